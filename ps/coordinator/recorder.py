"""What the coordinator writes for people: metrics.jsonl, cluster.json, targets.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from ps.coordinator.members import MemberState
from ps.errors import StorageError
from ps.storage.files import append_all, reason, write_atomic

#: A line per step and evaluation, in the run folder.
METRICS_NAME = "metrics.jsonl"


class Recorder:
    """The files of a run folder that follow the run."""

    def __init__(self, run_dir: Path, run: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._run = run
        self._metrics = run_dir / METRICS_NAME
        self._drop_torn_line()

    def record(self, line: dict[str, Any]) -> None:
        """Append one line; on a full disk it waits a while for room.

        Raises:
            StorageError: names the file and the reason; nothing of the line is in it.
        """
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            with self._metrics.open("ab") as file:
                append_all(file.fileno(), data, file.tell())
        except OSError as error:
            raise StorageError(f"{self._metrics} cannot be written: {reason(error)}") from error

    def rewind(self, version: int) -> None:
        """Drop what is about to be computed again: steps from `version` on, evaluations after it."""
        self._retain(lambda line: _belongs(line, version))

    def keep(self, steps: Container[int], evaluations: Container[int]) -> None:
        """Drop lines of steps and evaluations that are not among these: a killed coordinator's last words."""
        self._retain(
            lambda line: line["version"] in evaluations if line["kind"] == "evaluation" else line["step"] in steps
        )

    def _retain(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = self._lines()
        kept = [line for line in lines if wanted(json.loads(line))]
        if kept != lines:
            write_atomic(self._metrics, "".join(line + "\n" for line in kept).encode())

    def members(self, members: Sequence[MemberState]) -> None:
        """Write who is there: for people and tools, and as targets for Prometheus."""
        entries = [
            {
                "role": str(member.role),
                "rank": member.rank,
                "pid": member.pid,
                "host": member.host,
                "address": member.address,
                "metrics_address": member.metrics_address,
            }
            for member in members
        ]
        targets = [
            {
                "targets": [member.metrics_address],
                "labels": {"role": str(member.role), "rank": str(member.rank), "run": self._run},
            }
            for member in members
            if member.metrics_address
        ]
        write_atomic(self._run_dir / "cluster.json", (json.dumps(entries, indent=1) + "\n").encode())
        write_atomic(self._run_dir / "targets.json", (json.dumps(targets, indent=1) + "\n").encode())

    def _lines(self) -> list[str]:
        if not self._metrics.exists():
            return []
        return self._metrics.read_text(encoding="utf-8").splitlines()

    def _drop_torn_line(self) -> None:
        """A killed coordinator may have left half a line."""
        if not self._metrics.exists():
            return
        data = self._metrics.read_bytes()
        if data and not data.endswith(b"\n"):
            write_atomic(self._metrics, data[: data.rfind(b"\n") + 1])


def _belongs(line: dict[str, Any], version: int) -> bool:
    if line.get("kind") == "evaluation":
        return bool(line["version"] <= version)
    return bool(line["step"] < version)
