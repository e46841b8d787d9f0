"""What the view shows of a constructed status, at several widths and heights; nothing here needs a terminal."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from rich.cells import cell_len
from rich.console import Console

from protos.ps.v1 import common_pb2
from protos.ps.v1 import coordinator_pb2 as pb
from workers.launch.live import with_started
from workers.launch.metrics import Progress
from workers.launch.snapshot import MemberSnapshot, Snapshot, Spent, WaitSnapshot, from_message, starting
from workers.launch.view import choose_members, plain_line, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "status.md"

MESSAGE = pb.StatusResponse(
    run="0123abcd",
    run_dir="runs/a",
    fence=common_pb2.Fence(term=1, epoch=2),
    phase="running",
    version=812,
    applied=810,
    skipped=2,
    steps=5000,
    contributions=2,
    slots=8,
    loss=3.21456,
    evaluation_loss=3.5,
    evaluation_version=800,
    learning_rate=1.2e-3,
    gradient_norm=0.834,
    loss_scale=65536,
    tokens_per_s=12345.6,
    left_s=754,
    step_s=1.234,
    compute_s=0.912,
    push_s=0.04,
    pull_s=0.1,
    wait_s=0.08,
    checkpoint=800,
    checkpoint_age_s=12,
    up_s=3723,
    coordinator=common_pb2.Member(role="coordinator", pid=11, host="node-1", address="node-1:7000"),
    waits=[pb.Wait(role="worker", rank=1, what="contribution 1", since_s=6.25, last_seen_s=4.4)],
    waiting_for="step 812: waiting for worker 1 (contribution 1) since 6.2 s, last seen 4.4 s ago",
    members=[
        pb.MemberStatus(
            member=common_pb2.Member(role="shard", rank=0, pid=12, host="node-1", metrics_address="node-1:9100"),
            live=True,
            state="live",
            since_s=3700,
            last_seen_s=0.4,
            doing="step 812: reducing 3/6",
        ),
        pb.MemberStatus(
            member=common_pb2.Member(role="worker", rank=0, pid=13, host="node-1", metrics_address="node-1:9101"),
            live=True,
            state="live",
            since_s=3690,
            last_seen_s=0.2,
            doing="step 812: pushed, waiting for the decision",
            transport="shm",
            last=pb.Contributed(step=811, contribution=0, compute_s=0.912, push_s=0.0412, pull_s=0.1, wait_s=0.09),
        ),
        pb.MemberStatus(
            member=common_pb2.Member(role="worker", rank=1, pid=14, host="node-2"),
            state="lost",
            since_s=4.2,
            last_seen_s=4.4,
            restarts=2,
        ),
    ],
)


@pytest.fixture
def snapshot() -> Snapshot:
    return from_message(MESSAGE)


def draw(snapshot: Snapshot, width: int, height: int | None = None) -> list[str]:
    """The lines that are shown, without colour."""
    console = Console(record=True, width=width, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    with console.file:
        console.print(render(snapshot, width, height))
        return console.export_text().splitlines()


def test_a_wide_terminal_shows_everything(snapshot: Snapshot) -> None:
    lines = draw(snapshot, 160)
    text = "\n".join(lines)
    for words in (
        "running  runs/a",
        "812/5,000  12:34 left",
        "loss 3.2146  held-out 3.5000 at 800  lr 1.20e-03  gradient norm 0.834  loss scale 65,536  skipped 2",
        "tokens/s 12,346",
        "step 1.23 s  compute 912 ms  push 40 ms  pull 100 ms (80 ms waiting)  C 2  G 8  checkpoint 800, 0:12 ago",
        "waiting for worker 1 (contribution 1) since 6.2 s, last seen 4.4 s ago",
    ):
        assert words in text, words
    (worker,) = [line for line in lines if line.startswith("worker-0")]
    for words in (
        "live 1:01:30",
        "0.2 s",
        "912 ms",
        "41.2 ms",
        "100 ms",
        "shm",
        "node-1:13",
        "node-1:9101",
        "pushed, w",
    ):
        assert words in worker, words
    (lost,) = [line for line in lines if line.startswith("worker-1")]
    assert lost.split()[:6] == ["worker-1", "lost", "0:04", "4.4", "s", "2"]


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40, 20])
def test_no_line_is_wider_than_the_terminal(snapshot: Snapshot, width: int) -> None:
    lines = draw(snapshot, width)
    assert max(map(cell_len, lines)) <= width
    # Narrow or not: who is there, and that one of them is lost.
    text = "\n".join(lines)
    assert "worker-1" in text
    if width >= 40:
        assert "lost 0:04" in text
        assert "3.2146" in text


def test_columns_go_in_the_order_of_need(snapshot: Snapshot) -> None:
    heads = [
        next(line.split() for line in draw(snapshot, width) if "state" in line) for width in (140, 105, 80, 45, 30)
    ]
    assert heads == [
        ["state", "seen", "compute", "push", "pull", "waiting", "restarts", "via", "process", "metrics", "doing"],
        ["state", "seen", "compute", "push", "pull", "waiting", "restarts", "doing"],
        ["state", "seen", "restarts", "doing"],
        ["state", "seen"],
        ["state"],
    ]
    well = replace(snapshot, members=snapshot.members[:3])
    assert "restarts" not in "\n".join(draw(well, 160))


def test_a_low_terminal_keeps_who_is_in_trouble(snapshot: Snapshot) -> None:
    many = [MemberSnapshot("worker", rank, "live", 1.0, 0.1) for rank in range(50)]
    many[30] = replace(many[30], state="lost")
    crowd = replace(snapshot, members=tuple(many), waits=(WaitSnapshot("worker", 40, "contribution 7", 9.0, 0.1),))
    lines = draw(crowd, 100, height=20)
    assert len(lines) <= 19
    text = "\n".join(lines)
    for words in ("worker-0 ", "worker-30", "worker-40"):
        assert words in text, words
    shown, hidden = choose_members(crowd, 5)
    assert [member.rank for member in shown] == [0, 1, 30, 40]
    assert hidden == 46
    assert "and 4" in text
    # All that are in trouble, however many.
    lost = replace(crowd, members=tuple(replace(member, state="lost") for member in many))
    assert len(choose_members(lost, 5)[0]) == 50


def test_short_waits_are_not_shown(snapshot: Snapshot) -> None:
    wait = WaitSnapshot("worker", 0, "contribution 0", 0.4, 0.1)
    assert not any(line.startswith("waiting for") for line in draw(replace(snapshot, waits=(wait,)), 60))
    waits = tuple(WaitSnapshot("shard", shard, "to come", 5.0 + shard, None) for shard in range(5))
    text = "\n".join(draw(replace(snapshot, waits=waits), 120))
    assert "waiting for shard 4 (to come) since 9.0 s, never seen" in text
    assert "shard 2 (to come) since 7.0 s, never seen, and for 2 more" in text
    assert "shard 1 (to come)" not in text


def test_what_a_member_does_is_shown_without_the_step(snapshot: Snapshot) -> None:
    """Also of a step before: heartbeats come later than answers."""
    said = (MemberSnapshot("shard", 0, "live", 1.0, 0.1, "step 811: waiting for contributions 0, 1"),)
    (line,) = [line for line in draw(replace(snapshot, members=said), 120) if line.startswith("shard-0")]
    assert line.rstrip().endswith("  waiting for contributions 0, 1")


def test_who_only_starts_is_named_last(snapshot: Snapshot) -> None:
    waits = (
        WaitSnapshot("worker", 0, "to load its data and model", 5.0, 5.0),
        WaitSnapshot("shard", 0, "to start", 9.0, 0.1),
    )
    lines = [line for line in draw(replace(snapshot, waits=waits), 120) if line.startswith("waiting for")]
    assert [line.split(" (")[0] for line in lines] == ["waiting for worker 0", "waiting for shard 0"]


def test_before_the_coordinator_answers_the_processes_are_shown() -> None:
    started = {("coordinator", 0): (7, 1.0, 0), ("worker", 1): (9, 2.0, 3)}
    snapshot = with_started(starting(Progress(100, version=20, loss=4.5), "runs/a"), started, 5.0)
    lines = draw(snapshot, 100)
    assert "20/100" in "\n".join(lines)
    assert lines[-2].split() == ["coordinator-0", "starting", "0:04", "7"]
    assert lines[-1].split() == ["worker-1", "starting", "0:03", "3", "9"]


def test_a_process_that_the_coordinator_has_not_met_takes_the_place_of_its_former_life(snapshot: Snapshot) -> None:
    started = {("worker", 0): (13, 1.0, 0), ("worker", 1): (99, 4.0, 1)}
    merged = {member.name: member for member in with_started(snapshot, started, 5.0).members}
    assert len(merged) == 4
    assert (merged["worker-0"].state, merged["worker-0"].restarts) == ("live", 0)
    assert (merged["worker-1"].state, merged["worker-1"].pid, merged["worker-1"].restarts) == ("starting", 99, 1)


def test_a_silent_coordinator_is_what_is_waited_for(snapshot: Snapshot) -> None:
    text = "\n".join(draw(snapshot.silent(3.25), 100))
    assert text.startswith("unreachable")
    assert "waiting for the coordinator (to answer) since 3.2 s" in text


def test_what_is_not_known_is_left_out() -> None:
    snapshot = from_message(pb.StatusResponse(phase="gathering", steps=10, loss=float("nan"), checkpoint=-1))
    assert (snapshot.loss, snapshot.tokens_per_s, snapshot.checkpoint_version) == (None, None, None)
    text = "\n".join(draw(snapshot, 80))
    for word in ("nan", "None", "tokens/s", "checkpoint", "left"):
        assert word not in text


def test_a_standby_that_may_take_over_is_told_from_one_that_is_filled() -> None:
    message = pb.StatusResponse(phase="running")
    for rank, in_sync in enumerate((False, True)):
        who = common_pb2.Member(role="standby", rank=rank)
        message.members.append(pb.MemberStatus(member=who, state="live", since_s=60, in_sync=in_sync))
    shown = draw(from_message(message), 120)
    assert ["in sync" in line for line in shown if "standby" in line] == [False, True]
    members = from_message(message).as_json()["members"]
    assert [(member["role"], member["in_sync"]) for member in members] == [
        ("coordinator", None),
        ("standby", False),
        ("standby", True),
    ]


def test_plain_line(snapshot: Snapshot) -> None:
    line = plain_line(snapshot)
    assert line.startswith("running: step 812/5000  loss 3.2146")
    assert line.endswith(MESSAGE.waiting_for)
    assert "\n" not in line


# -- JSON ---------------------------------------------------------------------------------------


def test_json_is_plain_and_has_null_for_what_is_not_known(snapshot: Snapshot) -> None:
    found = json.loads(json.dumps(replace(snapshot, gradient_norm=float("inf")).as_json(), allow_nan=False))
    assert found["running"] is True
    assert found["gradient_norm"] is None
    assert (found["version"], found["micro_batches"], found["seconds_left"]) == (812, 8, 754.0)
    assert found["members"][0]["role"] == "coordinator"
    assert found["members"][1]["last_contribution"] is None
    assert found["members"][2]["last_contribution"] == {
        "step": 811,
        "contribution": 0,
        "compute_s": 0.912,
        "push_s": 0.0412,
        "pull_s": 0.1,
        "wait_s": 0.09,
    }
    assert found["waits"] == [
        {"role": "worker", "rank": 1, "what": "contribution 1", "since_s": 6.25, "last_seen_s": 4.4}
    ]


@pytest.mark.parametrize("cls", [Snapshot, MemberSnapshot, WaitSnapshot, Spent])
def test_every_key_is_described(cls: Any) -> None:
    described = DOCUMENT.read_text()
    for field in fields(cls):
        assert f"`{field.name}`" in described, field.name


def test_only_known_kinds_of_values() -> None:
    """Numbers, texts, nulls, lists and objects: nothing that another language could not read."""
    for cls in (Snapshot, MemberSnapshot, WaitSnapshot, Spent):
        for hint in get_type_hints(cls).values():
            kinds = {kind for kind in (get_args(hint) or (hint,)) if kind not in (type(None), Ellipsis)}
            assert all(kind in (str, int, float, bool) or is_dataclass(kind) for kind in kinds)
