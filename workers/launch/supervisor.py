"""What the launcher does when: a state machine that takes what happened and returns actions.

    STARTING --coordinator reachable--> RUNNING --signal--> STOPPING --coordinator ended--> DRAINING
        |                                  |                   |                               |
        +------ a role cannot run ---------+---> TERMINATING <-+---- deadline -----------------+
                                                     | deadline, or a second signal
                                                     v
                                                  KILLING

It knows no process, clock or file, so that every order of deaths can be tried in a unit test.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from ps.types import Role

#: A role's deaths are counted over this.
LIMIT_WINDOW_S = 60.0
#: The first restart comes after this, the next ones after twice as long each, up to the last.
BACKOFF_S, LONGEST_BACKOFF_S = 0.05, 0.2
#: A role that ended by itself while the coordinator runs on is missed after this.
LEAVE_GRACE_S = 10.0
#: After the coordinator's end the others may take this to end by themselves; after SIGTERM the same.
DRAIN_S = 5.0


@dataclass(frozen=True)
class Member:
    """One place in the cluster; whichever process fills it."""

    role: Role
    rank: int

    def __str__(self) -> str:
        return f"{self.role.value}-{self.rank}"


COORDINATOR = Member(Role.COORDINATOR, 0)


@dataclass(frozen=True)
class Exit:
    """A member's process has ended."""

    member: Member
    #: As in subprocess: negative for a signal.
    code: int
    #: The one line with which it said why it ends; None if it did not.
    error: str | None = None
    #: The last line of its log that tells something, for people.
    last_line: str = ""
    #: Whether the coordinator had listed the process.
    registered: bool = False

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.member} was killed by {signal.Signals(-self.code).name}"
        return f"{self.member} ended with exit code {self.code}"


@dataclass(frozen=True)
class Start:
    """Start a process for the member; if one is left, kill it first."""

    member: Member


@dataclass(frozen=True)
class Signal:
    """Send a signal to the member's process."""

    member: Member
    signum: signal.Signals


@dataclass(frozen=True)
class Say:
    """Tell the user."""

    text: str


@dataclass(frozen=True)
class End:
    """Nothing is left to do."""

    exit_code: int
    #: Why it failed; None if it did not.
    error: str | None
    #: Whether the run came to its end, so that there is a result to report.
    finished: bool


Action = Start | Signal | Say | End


class Phase(Enum):
    STARTING = auto()
    RUNNING = auto()
    STOPPING = auto()
    DRAINING = auto()
    TERMINATING = auto()
    KILLING = auto()
    ENDED = auto()


class Supervisor:
    """Keeps a coordinator, shards and workers running until the coordinator has ended well.

    Args:
        shards: S.
        workers: W.
        restart_limit: deaths of one member within `LIMIT_WINDOW_S` that are put up with.
        start_timeout_s: seconds until the coordinator must be reachable.
        stop_timeout_s: seconds that the last checkpoint may take.
        standbys: second processes of each shard; which of the two is the shard is up to the coordinator.

    Concurrency: one thread. `now` is in seconds of any clock that never goes back.
    """

    def __init__(
        self,
        shards: int,
        workers: int,
        restart_limit: int,
        start_timeout_s: float,
        stop_timeout_s: float,
        *,
        standbys: int = 0,
    ) -> None:
        self.phase = Phase.STARTING
        self._others = [Member(Role.SHARD, index) for index in range(shards)]
        self._others += [Member(Role.STANDBY, index) for index in range(shards if standbys else 0)]
        self._others += [Member(Role.WORKER, rank) for rank in range(workers)]
        self._restart_limit = restart_limit
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._alive: set[Member] = set()
        #: Killed on purpose, to stay away.
        self._dismissed: set[Member] = set()
        self._due: dict[Member, float] = {}
        self._deaths: dict[Member, deque[float]] = {}
        self._lives: dict[Member, int] = {}
        self._deadline = float("inf")
        self._end = End(0, None, finished=True)

    def start(self, now: float) -> list[Action]:
        """Begin: the coordinator first, for the others need its address."""
        self._deadline = now + self._start_timeout_s
        return [self._start(COORDINATOR)]

    def reachable(self) -> list[Action]:
        """The coordinator's address is known: start the others. Does nothing the second time."""
        if self.phase is not Phase.STARTING:
            return []
        self._enter(Phase.RUNNING, float("inf"))
        return [self._start(member) for member in self._others]

    def interrupt(self, now: float, signum: signal.Signals) -> list[Action]:
        """The user wants it to stop: in good order the first time, at once the second time."""
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            self._end = End(128 + signum, None, finished=False)
            name = "Ctrl-C" if signum is signal.SIGINT else signum.name
            return self._stop(now, f"{name} again")
        if self.phase is Phase.ENDED:
            return []
        if self._end.error is None and not self._end.finished:
            self._end = End(128 + signum, None, finished=False)
        return [Say("killing what is left"), *self._kill()]

    def dismiss(self, member: Member) -> list[Action]:
        """Kill a member, and do not start it again before `recall`: somebody tests what happens without it."""
        self._dismissed.add(member)
        self._due.pop(member, None)
        return [Signal(member, signal.SIGKILL)]

    def recall(self, now: float, member: Member) -> list[Action]:
        """Start a dismissed member again, at the next tick."""
        if member in self._dismissed and self.phase in (Phase.STARTING, Phase.RUNNING):
            self._dismissed.remove(member)
            if member not in self._alive:
                self._due[member] = now
        return []

    def tick(self, now: float, exits: Iterable[Exit] = ()) -> list[Action]:
        """Take what has ended since the last call, and the time."""
        actions: list[Action] = []
        # The coordinator's end explains the others' ends.
        for gone in sorted(exits, key=lambda gone: gone.member != COORDINATOR):
            self._alive.discard(gone.member)
            actions += self._after(now, gone)
        for member in [member for member, due in self._due.items() if due <= now]:
            del self._due[member]
            actions.append(self._start(member))
        if now >= self._deadline:
            actions += self._overdue(now)
        if self.phase in (Phase.DRAINING, Phase.TERMINATING, Phase.KILLING) and not self._alive:
            self._enter(Phase.ENDED, float("inf"))
            actions.append(self._end)
        return actions

    def _after(self, now: float, gone: Exit) -> list[Action]:
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            return self._while_running(now, gone)
        if self.phase is Phase.STOPPING:
            return self._while_stopping(now, gone)
        return []

    def _while_running(self, now: float, gone: Exit) -> list[Action]:
        if gone.member in self._dismissed:
            return []
        if gone.member == COORDINATOR and gone.code == 0:
            self._enter(Phase.DRAINING, now + DRAIN_S)
            return []
        if gone.code == 0:
            # It was told that the run is over, or left as asked: a death only if the coordinator stays.
            self._due[gone.member] = now + LEAVE_GRACE_S
            return []
        if self._is_final(gone):
            return self._fail(now, f"{gone.member}: {gone.error or gone.last_line or gone}")
        return self._restart(now, gone)

    def _is_final(self, gone: Exit) -> bool:
        """Whether starting the member again would only end in the same way."""
        if gone.code != 1 or gone.error is None:
            return gone.code == 2
        first_life = self._lives[gone.member] == 1
        if gone.member == COORDINATOR:
            # Its errors are decisions; but a restarted one may find its port taken for a moment.
            return first_life or gone.registered
        return first_life and not gone.registered

    def _restart(self, now: float, gone: Exit) -> list[Action]:
        deaths = self._deaths.setdefault(gone.member, deque())
        deaths.append(now)
        while deaths[0] < now - LIMIT_WINDOW_S:
            deaths.popleft()
        why = gone.error or gone.last_line
        if len(deaths) > self._restart_limit:
            message = f"{gone}, for the {len(deaths)}. time within a minute; its last words: {why or 'none'}"
            if gone.member.role is Role.WORKER and COORDINATOR in self._alive:
                # What was trained is worth a checkpoint, and for that no worker is needed.
                self._end = End(1, message, finished=False)
                return [Say(message), *self._stop(now, "Ctrl-C")]
            return self._fail(now, message)
        self._due[gone.member] = now + min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (len(deaths) - 1))
        return [Say(f"{gone}; starting it again" + (f" (its last words: {why})" if gone.code > 0 and why else ""))]

    def _while_stopping(self, now: float, gone: Exit) -> list[Action]:
        if gone.member == COORDINATOR:
            if gone.code == 0:
                self._enter(Phase.DRAINING, now + DRAIN_S)
                return []
            why = f": {gone.error}" if gone.error else ""
            return [Say(f"{gone} before it had made a checkpoint{why}"), *self._terminate(now)]
        if gone.code != 0:
            return [Say(f"{gone} while the run was stopping; the last checkpoint may not come")]
        return []

    def _stop(self, now: float, kills: str) -> list[Action]:
        self._due.clear()
        if COORDINATOR not in self._alive:
            return [Say("the coordinator is not running: no new checkpoint is made"), *self._terminate(now)]
        self._enter(Phase.STOPPING, now + self._stop_timeout_s)
        waits = f"stopping: waiting for the last checkpoint, for up to {self._stop_timeout_s:g} s"
        return [Say(f"{waits}; {kills} kills at once"), Signal(COORDINATOR, signal.SIGTERM)]

    def _fail(self, now: float, message: str) -> list[Action]:
        self._end = End(1, message, finished=False)
        return self._terminate(now)

    def _terminate(self, now: float) -> list[Action]:
        self._enter(Phase.TERMINATING, now + DRAIN_S)
        return [Signal(member, signal.SIGTERM) for member in self._in_order()]

    def _kill(self) -> list[Action]:
        self._enter(Phase.KILLING, float("inf"))
        return [Signal(member, signal.SIGKILL) for member in self._in_order()]

    def _overdue(self, now: float) -> list[Action]:
        left = ", ".join(str(member) for member in self._in_order())
        if self.phase is Phase.STARTING:
            return self._fail(
                now,
                f"the coordinator could not be reached within {self._start_timeout_s:g} s "
                f"(membership.start_timeout_s); see its log",
            )
        if self.phase is Phase.STOPPING:
            given_up = f"no checkpoint within {self._stop_timeout_s:g} s (checkpoint.timeout_s)"
            return [Say(f"{given_up}; ending {left}"), *self._terminate(now)]
        if self.phase is Phase.DRAINING:
            return self._terminate(now)
        return [Say(f"still there {DRAIN_S:g} s after SIGTERM, killing: {left}"), *self._kill()]

    def _start(self, member: Member) -> Start:
        self._alive.add(member)
        self._lives[member] = self._lives.get(member, 0) + 1
        return Start(member)

    def _enter(self, phase: Phase, deadline: float) -> None:
        self.phase = phase
        self._deadline = deadline
        if phase not in (Phase.STARTING, Phase.RUNNING):
            self._due.clear()

    def _in_order(self) -> list[Member]:
        return sorted(self._alive, key=lambda member: (list(Role).index(member.role), member.rank))
