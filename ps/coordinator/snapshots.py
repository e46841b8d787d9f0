"""Checkpoints on their way and complete ones, as the coordinator knows them. Pure."""

from __future__ import annotations

import logging

from ps.coordinator.actions import WriteManifest
from ps.coordinator.decision import TrainingState
from ps.coordinator.recovery import Candidate
from ps.types import Fence

log = logging.getLogger(__name__)

File = tuple[str, str, int]


class Snapshots:
    """Which versions are being written, are complete, or failed."""

    def __init__(self, candidates: list[Candidate], rejected: list[str]) -> None:
        self.candidates = list(candidates)
        #: Names of checkpoints that turned out to be damaged.
        self.rejected = list(rejected)
        self._pending: dict[int, TrainingState] = {}
        #: Under which fence each of these was begun: its folder was empty then.
        self._begun: dict[int, Fence] = {}
        self._files: dict[int, dict[int, File]] = {}
        self._failures: dict[int, str] = {}

    def begin(self, state: TrainingState, fence: Fence) -> None:
        """A checkpoint of this state has been asked for: its folder is emptied, whatever was there."""
        self.candidates = [c for c in self.candidates if c.state.version != state.version]
        self._pending[state.version] = state
        self._begun[state.version] = fence
        self._files[state.version] = {}
        self._failures.pop(state.version, None)

    def written(
        self, fence: Fence, shard: int, version: int, file: File, error: str, num_shards: int
    ) -> WriteManifest | None:
        """One shard's file is there; with the last one the manifest can be written.

        Args:
            fence: under which the shard was asked for it. What was asked for before the folder was emptied is gone.
        """
        state = self._pending.get(version)
        if state is None or fence < self._begun[version]:
            return None
        if error:
            self.completed(version, None, f"shard {shard}: {error}")
            return None
        files = self._files[version]
        files[shard] = file
        if len(files) < num_shards:
            return None
        return WriteManifest(state, tuple(files[index] for index in range(num_shards)))

    def completed(self, version: int, candidate: Candidate | None, error: str) -> None:
        """The manifest is there, or the checkpoint failed."""
        self._pending.pop(version, None)
        self._files.pop(version, None)
        if candidate is None:
            log.error("there is no checkpoint of version %d: %s", version, error)
            self._failures[version] = error
        else:
            self.candidates = [c for c in self.candidates if c.state.version != version] + [candidate]

    def lose(self, shard: int, version: int) -> None:
        """A shard started anew, and holds at most this version: its part of an older one will never come."""
        for pending in [pending for pending in self._pending if pending < version]:
            if shard not in self._files[pending]:
                self.completed(pending, None, f"shard {shard} died before its part was written")

    def reject(self, candidate: Candidate) -> None:
        """A checkpoint turned out to be damaged."""
        self.candidates = [c for c in self.candidates if c != candidate]
        self.rejected.append(candidate.name)

    def forget_pending(self) -> None:
        """A rollback: what was being written belongs to a past that is computed again."""
        self._pending.clear()
        self._files.clear()

    def exists(self, version: int) -> bool:
        return any(candidate.state.version == version for candidate in self.candidates)

    @property
    def newest(self) -> int:
        """The version of the newest complete checkpoint; -1: there is none."""
        return max((candidate.state.version for candidate in self.candidates), default=-1)

    def has_first(self) -> bool:
        """Whether there is anything to go back to; nothing is decided before that."""
        return bool(self.candidates)

    def is_pending(self, version: int) -> bool:
        return version in self._pending

    def pending(self) -> list[int]:
        return sorted(self._pending)

    def unwritten(self, version: int, num_shards: int) -> list[int]:
        """The shards whose file of a pending checkpoint is not there yet."""
        return [shard for shard in range(num_shards) if shard not in self._files.get(version, {})]

    def failure(self, version: int) -> str:
        return self._failures.get(version, "")
