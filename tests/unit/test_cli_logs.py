"""What a record says, for machines and for people."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from ps.telemetry import logs

log = logging.getLogger("windlass.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    logs.bind(role=None, rank=None, shard=None, step=None)


def test_json_lines_say_who_and_where() -> None:
    out = io.StringIO()
    logs.configure("shard", 3, "info", out)
    log.info("chunk %d", 5)
    logs.bind(step=812)
    log.debug("not at this level")
    try:
        raise OSError("broken")
    except OSError:
        log.exception("failed")
    log.info("elsewhere", extra={"step": 7})
    first, second, third = (json.loads(line) for line in out.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "windlass.test",
        "role": "shard",
        "rank": 3,
        "shard": 3,
        "step": None,
        "message": "chunk 5",
    }
    assert second["step"] == 812
    assert second["exception"].endswith("OSError: broken")
    assert third["step"] == 7


def test_lines_for_people() -> None:
    out = Terminal()
    logs.configure("worker", None, "debug", out)
    log.info("hello")
    logs.bind(rank=2, step=9)
    log.warning("late")
    first, second = out.getvalue().splitlines()
    assert first[8:] == " worker: hello"
    assert second[8:] == " worker-2 step 9: warning: late"


def test_configuring_again_replaces() -> None:
    before, after = io.StringIO(), io.StringIO()
    logs.configure("worker", 0, "info", before)
    logs.configure("worker", 1, "info", after)
    log.info("once")
    assert before.getvalue() == ""
    assert json.loads(after.getvalue())["rank"] == 1
