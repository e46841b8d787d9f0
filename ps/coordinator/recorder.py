"""What the coordinator writes for people: metrics.jsonl, cluster.json, targets.json.

Nothing is decided by these files, so a disk that fails must not end a run because of them: what could not be written to
metrics.jsonl is kept, and tried again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ps import failpoints
from ps.coordinator.members import MemberState
from ps.errors import StorageError
from ps.storage.files import append_all, reason, write_atomic

log = logging.getLogger(__name__)

#: A line per step and evaluation, in the run folder.
METRICS_NAME = "metrics.jsonl"
#: The file is read from its end, so much at a time.
_BLOCK_BYTES = 64 << 10
#: Between two attempts to write what could not be written.
RETRY_S = 1.0


_Line = tuple[dict[str, Any], bytes]
_Wanted = Callable[[dict[str, Any]], bool]


class Recorder:
    """The files of a run folder that follow the run. Not thread-safe."""

    def __init__(self, run_dir: Path, run: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._run = run
        self._metrics = run_dir / METRICS_NAME
        #: Lines that are not in the file yet.
        self._lines: list[_Line] = []
        #: What has to hold of the lines that stay in the file.
        self._wanted: list[_Wanted] = []
        #: The file may have lines that do not belong there: half a line too, that a killed coordinator has left.
        self._is_unclean = True
        self._failed_at: float | None = None
        self._write()

    @property
    def behind(self) -> int:
        """How many changes the file lacks; 0: it is as it should be."""
        return len(self._lines) + int(self._is_unclean)

    def record(self, line: dict[str, Any]) -> None:
        """Append one line, at once or as soon as that can be."""
        self._lines.append((line, json.dumps(line, allow_nan=False).encode() + b"\n"))
        self.catch_up()

    def rewind(self, version: int) -> None:
        """Drop what is about to be computed again: steps from `version` on, evaluations after it."""
        self._retain(lambda line: _belongs(line, version))

    def keep(self, steps: Container[int], evaluations: Container[int]) -> None:
        """Drop lines of steps and evaluations that are not among these: a killed coordinator's last words."""
        self._retain(
            lambda line: line["version"] in evaluations if line["kind"] == "evaluation" else line["step"] in steps
        )

    def catch_up(self) -> None:
        """Write what could not be written, now and then."""
        if self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_S:
            self._write()

    def close(self) -> None:
        """Try for the last time to write what is missing."""
        self._write()
        if self.behind:
            log.error("%s lacks %d lines: they are lost", self._metrics, len(self._lines))

    def _retain(self, wanted: _Wanted) -> None:
        self._lines = [(line, data) for line, data in self._lines if wanted(line)]
        self._wanted.append(wanted)
        self._is_unclean = True
        self.catch_up()

    def _write(self) -> None:
        """Bring the file up to date; a failure is said once, until it is over."""
        try:
            if self._is_unclean:
                self._clean()
            while self._lines:
                self._append(*self._lines[0])
        except StorageError as error:
            self._fail(error.message)
        except OSError as error:
            self._fail(f"{self._metrics} cannot be written: {reason(error)}")
        else:
            if self._failed_at is not None:
                log.info("%s is written again, and lacks nothing", self._metrics)
            self._failed_at = None

    def _fail(self, why: str) -> None:
        if self._failed_at is None:
            log.error("%s; training goes on, and it is tried again", why)
        self._failed_at = time.monotonic()

    def _append(self, line: dict[str, Any], data: bytes) -> None:
        failpoints.hit("record.before", line["kind"])
        # Of a line that failed a part may be there.
        self._is_unclean = True
        with self._metrics.open("ab") as file:
            # It must not wait for room: the whole run would.
            append_all(file.fileno(), data, file.tell(), timeout_s=0.0)
        self._is_unclean = False
        del self._lines[0]
        failpoints.hit("record.after", line["kind"])

    def _clean(self) -> None:
        """Cut what does not belong there: it is always the last that was written."""
        if self._metrics.exists():
            with self._metrics.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                for start, line in _lines_backwards(file, end):
                    if self._may_stay(line):
                        break
                    end = start
                file.truncate(end)
        self._wanted.clear()
        self._is_unclean = False

    def _may_stay(self, text: bytes) -> bool:
        """Whether it is a whole line that can be read, and wanted."""
        try:
            line = json.loads(text)
        except ValueError:
            return False
        return text.endswith(b"\n") and all(wanted(line) for wanted in self._wanted)

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
        # Of those who are there nobody outlives the host: its disk need not be waited for, which may take seconds.
        for name, content in (("cluster.json", entries), ("targets.json", targets)):
            write_atomic(self._run_dir / name, (json.dumps(content, indent=1) + "\n").encode(), durable=False)


def _lines_backwards(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line, from the last one on."""
    rest = b""
    while end > 0:
        size = min(end, _BLOCK_BYTES)
        end -= size
        file.seek(end)
        first, *lines = (file.read(size) + rest).splitlines(keepends=True)
        start = end + len(first) + sum(map(len, lines))
        for line in reversed(lines):
            start -= len(line)
            yield start, line
        # It may have begun before.
        rest = first
    if rest:
        yield 0, rest


def _belongs(line: dict[str, Any], version: int) -> bool:
    if line.get("kind") == "evaluation":
        return bool(line["version"] <= version)
    return bool(line["step"] < version)
