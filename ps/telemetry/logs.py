"""Logging of a role: the only place that configures it.

Every record has role, rank, shard and step. JSON lines when nobody watches, readable lines on a
terminal. What a process is and where it stands is one value per process: threads of a role work on
the same step.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, TextIO


@dataclass(frozen=True)
class Context:
    """What every record says about its process."""

    role: str | None = None
    rank: int | None = None
    shard: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        name = self.role or "windlass"
        if self.rank is not None:
            name += f"-{self.rank}"
        return name if self.step is None else f"{name} step {self.step}"


_context = Context()


def bind(**fields: Any) -> None:
    """Say from now on, in every record of this process, another rank, shard or step.

    Args:
        **fields: fields of `Context`.

    Concurrency: thread-safe; the last one stands.
    """
    global _context
    _context = replace(_context, **fields)


class AddContext(logging.Filter):
    """Gives each record the process's context, unless the call gave its own through `extra`."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = _context
        for name in ("role", "rank", "shard", "step"):
            if not hasattr(record, name):
                setattr(record, name, getattr(context, name))
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": getattr(record, "role", None),
            "rank": getattr(record, "rank", None),
            "shard": getattr(record, "shard", None),
            "step": getattr(record, "step", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, who, where, level if it matters, message."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        who = Context(*(getattr(record, name, None) for name in ("role", "rank", "shard", "step")))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{clock} {who}: {level}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(role: str, rank: int | None, level: str = "info", stream: TextIO | None = None) -> None:
    """Send the process's log to `stream`; a second call replaces the first.

    Args:
        role: what the process is.
        rank: its number; None while it has none. A shard's rank is its index.
        level: debug, info, warning or error.
        stream: standard error when absent.
    """
    stream = sys.stderr if stream is None else stream
    bind(role=role, rank=rank, shard=rank if role == "shard" else None, step=None)
    handler = logging.StreamHandler(stream)
    handler.addFilter(AddContext())
    handler.setFormatter(TextFormatter() if stream.isatty() else JsonFormatter())
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if any(isinstance(added, AddContext) for added in old.filters):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
