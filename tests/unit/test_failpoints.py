"""Failpoints: what the variable may say, what then happens, and that each of them is somewhere in the code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ps import failpoints
from ps.errors import ConfigError
from ps.failpoints import NAMES, POINTS, Failpoints, roles_of

ROOT = Path(__file__).parents[2]


def armed(text: str, member: str = "shard-1") -> Failpoints:
    points = Failpoints(text)
    points.enter(member)
    return points


def failures(points: Failpoints, name: str, hits: int, detail: str = "") -> list[int]:
    """Which of so many hits failed."""
    failed = []
    for number in range(1, hits + 1):
        try:
            points.hit(name, detail)
        except OSError:
            failed.append(number)
    return failed


def test_off_it_is_a_function_that_does_nothing() -> None:
    assert failpoints.hit is failpoints._off
    assert failpoints.enter is failpoints._off_for


def test_every_point_has_both_sides_in_the_code_and_no_other_is_there() -> None:
    sources = [path.read_text() for top in ("ps", "workers") for path in (ROOT / top).rglob("*.py")]
    found = Counter(name for source in sources for name in re.findall(r'failpoints\.hit\(\s*"([^"]+)"', source))
    assert set(found) == NAMES


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("apply.before:error", [1, 2, 3, 4]),
        ("apply.before:error@3", [3]),
        ("apply.before:error@3+", [3, 4]),
        ("apply.before:error@1, apply.before:error@4", [1, 4]),
        ("apply.after:error", []),
    ],
)
def test_it_happens_at_the_hits_that_were_named(text: str, failed: list[int]) -> None:
    assert failures(armed(text), "apply.before", 4) == failed


@pytest.mark.parametrize(
    ("who", "member", "is_meant"),
    [
        ("", "shard-1", True),
        ("shard/", "shard-1", True),
        ("shard-1/", "shard-1", True),
        ("shard-0/", "shard-1", False),
        ("shard-1/", "shard-11", False),
        ("coordinator/", "shard-1", False),
        ("worker/", "worker", True),
        ("", "", False),
    ],
)
def test_it_happens_in_the_roles_that_are_meant(who: str, member: str, is_meant: bool) -> None:
    assert failures(armed(f"{who}fsync.before:error@1", member), "fsync.before", 2) == [1] * is_meant


def test_nothing_happens_before_a_process_has_said_who_it_is() -> None:
    points = Failpoints("apply.before:kill")
    points.hit("apply.before")


def test_what_a_point_is_about_can_be_named() -> None:
    points = armed("rename.before~*/shard-*:error=ENOSPC@1")
    assert failures(points, "rename.before", 1, "step-00000003/manifest.json") == []
    with pytest.raises(OSError, match="No space left on device"):
        points.hit("rename.before", "step-00000003/shard-00000-of-00001.safetensors")


def test_a_delay_delays() -> None:
    began = time.monotonic()
    armed("apply.before:delay=0.05").hit("apply.before")
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apply:kill", "no point is called 'apply'; there are acknowledge.after, acknowledge.before, "),
        ("apply.before", "is not .WHO/.NAME"),
        ("apply.before:crash", "is not .WHO/.NAME"),
        ("apply.before:kill@0", "is not .WHO/.NAME"),
        ("apply.before:error=EWHAT", "EWHAT is not the name of an errno"),
        ("apply.before:delay=soon", "soon is not a number of seconds from 0 to 86400"),
        ("apply.before:delay=inf", "inf is not a number of seconds"),
        ("apply.before:delay=nan", "nan is not a number of seconds"),
        ("apply.before:kill=1e9", "1e9 is not a number of seconds"),
        ("shards-1/apply.before:kill", "no role 'shards'; there are coordinator, shard, standby, worker"),
        ("coordinator/push.before:kill", "a coordinator never comes to push.before; worker does"),
        ("worker/decision.before:kill", "a worker never comes to decision.before; coordinator, shard, standby does"),
        ("coordinator-0/record.before:kill", "the coordinator has no number; write coordinator/record.before"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        armed(text)


def test_a_role_refuses_to_start_with_what_it_does_not_understand() -> None:
    command = [sys.executable, "-m", "workers.cli.main", "shard", "--coordinator", "127.0.0.1:1", "--index", "0"]
    variables = {**os.environ, failpoints.VARIABLE: "no.such:kill"}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "windlass: error: WINDLASS_FAILPOINT: no point is called 'no.such'" in ended.stderr


def test_a_process_is_killed_where_it_was_told(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ps import failpoints; from ps.storage import write_atomic\n"
        "failpoints.enter('shard-0')\n"
        "for text in (b'first', b'second'): write_atomic(Path(sys.argv[1]), text)\n"
    )
    file = tmp_path / "file"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env={**os.environ, failpoints.VARIABLE: "rename.before~*/file:kill@2"},
        check=False,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"first"


def test_every_point_says_who_has_it() -> None:
    assert all(roles_of(point) for point in POINTS)
    assert roles_of("decision") == ["coordinator", "shard", "standby"]
    assert roles_of("fsync") == ["coordinator", "shard", "standby", "worker"]
    assert roles_of("mirror") == ["shard"]


def test_the_table_for_people_has_every_point() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (`[a-z.`, ]+`) \| ([a-z, ]+): ", text, re.MULTILINE)
    listed = {point: roles.split(", ") for points, roles in rows for point in re.findall("`([a-z.]+)`", points)}
    assert set(listed) == set(POINTS)
    assert all(POINTS[point].startswith(f"{', '.join(roles)}: ") for point, roles in listed.items())
