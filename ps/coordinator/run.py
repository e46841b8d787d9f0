"""The facts of one life (term) of the coordinator that all of its decisions share."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from ps.config import RunConfig
from ps.coordinator.actions import Action, End, TellDecision
from ps.coordinator.decision import TrainingState
from ps.coordinator.history import History
from ps.coordinator.members import Members
from ps.coordinator.recovery import Candidate
from ps.coordinator.since import Since
from ps.coordinator.snapshots import Snapshots
from ps.types import Decision, Fence


class Phase(Enum):
    GATHERING = "gathering"
    INSPECTING = "inspecting"
    LOADING = "loading"
    OPENING = "opening"
    INITIALIZING = "initializing"
    RUNNING = "running"
    ENDED = "ended"


class Run:
    """Where the run is, who is there, and what has been asked of the surroundings."""

    def __init__(
        self, config: RunConfig, history: History, candidates: list[Candidate], rejected: list[str], term: int
    ) -> None:
        self.config = config
        self.history = history
        self.members = Members(
            config.membership.lease_s,
            config.membership.reconnect_grace_s,
            config.cluster.shards,
            has_standbys=config.cluster.standbys > 0,
            expected=dict(history.primaries),
        )
        self.snapshots = Snapshots(candidates, rejected)
        self.phase = Phase.GATHERING
        self.state = TrainingState.start(config)
        self.fence = Fence(term, history.epoch)
        self.last_decision: Decision | None = None
        #: Why the run was asked to stop.
        self.stop_reason: str | None = None
        #: Why the shards must be made to serve anew; empty: they need not.
        self.recovery_reason = ""
        self.since = Since()
        #: For how long this coordinator was away in all: time that its clock does not know, but that people do.
        self.away_s = 0.0
        self._actions: list[Action] = []

    @property
    def shards(self) -> range:
        """The indices of all shards."""
        return range(self.config.cluster.shards)

    def ask(self, action: Action) -> None:
        """Have something done, after what was asked for before."""
        self._actions.append(action)

    def drain(self) -> list[Action]:
        """Take the actions that have come up, in order."""
        actions, self._actions = self._actions, []
        return actions

    def tell_decision(self, shard: int, decision: Decision, *, standby: bool = False) -> None:
        """Tell a shard, or its standby, a decision under the present fence, whenever it was made."""
        self.ask(TellDecision(shard, replace(decision, fence=self.fence), standby))

    def recover(self, why: str) -> None:
        """Have the cluster made to serve anew under another fence, also when the run is to stop."""
        self.recovery_reason = why

    def end(self, ok: bool, reason: str) -> None:
        """End the run."""
        self.phase = Phase.ENDED
        self.ask(End(ok, reason))
