"""Following a run through its metrics.jsonl: a tail that survives a rewrite, and what its lines add up to."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Speed is measured over this many steps.
SPEED_WINDOW = 20

Record = Mapping[str, Any]


class Tail:
    """Reads what was appended to a file of JSON lines since the last time.

    A rollback rewrites the file without the lines that were taken back. That is seen by the last
    line that was read: if it is not where it was, all is read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last_line = b""

    def poll(self) -> tuple[bool, list[Record]]:
        """Read on.

        Returns:
            Whether the file was rewritten (then the records are all of its records), and the new records.
        """
        try:
            with self._path.open("rb") as file:
                start = self._offset - len(self._last_line)
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return False, []
        rewritten = not data.startswith(self._last_line)
        if rewritten:
            start, self._last_line = 0, b""
            data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        fresh = lines[1:] if self._last_line and not rewritten else lines
        self._offset = start + len(whole)
        self._last_line = lines[-1] if lines else b""
        return rewritten, [record for record in map(_parse, fresh) if record is not None]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def last_evaluation(path: Path) -> Record | None:
    """The last evaluation that a run has recorded."""
    _, records = Tail(path).poll()
    return next((record for record in reversed(records) if record.get("kind") == "evaluation"), None)


@dataclass
class Progress:
    """Where a run is: a fold over its records."""

    #: Where the run, or this part of it, ends.
    steps: int
    #: Decided steps.
    version: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    learning_rate: float | None = None
    #: (seconds, tokens) of the last steps.
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))

    def feed(self, record: Record) -> None:
        """Take the next record."""
        if record.get("kind") == "step":
            self.version = int(record["step"]) + 1
            self.loss = record.get("loss")
            self.learning_rate = record.get("learning_rate")
            self.recent.append((float(record.get("step_seconds") or 0), int(record.get("tokens") or 0)))
        elif record.get("kind") == "evaluation":
            self.held_out_loss = record.get("loss")

    def restart(self, records: Iterable[Record]) -> None:
        """Forget everything and take these records: all that there are."""
        self.version = 0
        self.loss = self.held_out_loss = self.learning_rate = None
        self.recent.clear()
        for record in records:
            self.feed(record)

    @property
    def tokens_per_s(self) -> float | None:
        seconds = sum(step_s for step_s, _ in self.recent)
        return sum(tokens for _, tokens in self.recent) / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        seconds = sum(step_s for step_s, _ in self.recent)
        left = max(0, self.steps - self.version)
        return left * seconds / len(self.recent) if seconds > 0 else None

    def __str__(self) -> str:
        parts = [f"step {self.version}/{self.steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.held_out_loss is not None:
            parts.append(f"held-out {self.held_out_loss:.4f}")
        if self.learning_rate is not None:
            parts.append(f"lr {self.learning_rate:.2e}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return "  ".join(parts)


def evaluation_line(record: Record) -> str:
    """An evaluation for people."""
    # What is not finite was recorded as null.
    loss, perplexity, bits = (
        math.nan if record[key] is None else record[key] for key in ("loss", "perplexity", "bits_per_byte")
    )
    return (
        f"loss {loss:.4f} nats per token, perplexity {perplexity:.2f}, {bits:.4f} bits per byte "
        f"({record['tokens']:,} tokens, {record['bytes']:,} bytes)"
    )


def clock(seconds: float) -> str:
    """A duration for people: 0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
