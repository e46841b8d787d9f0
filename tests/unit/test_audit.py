"""What an audit finds in a journal, and what it says when something is not as it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ps.coordinator.accounts import accounts
from ps.coordinator.audit import Audit, audit
from ps.storage.journal import Journal
from ps.storage.journal_files import read
from ps.types import ContributionReport, Fence, Prepared
from tests.support.fake_run import FakeRun, make_config
from tests.support.untrained import make_run
from workers.cli.main import main

Records = list[dict[str, Any]]


def records_of(run: FakeRun, term: int = 1) -> Records:
    """As the journal gives them back."""
    head: Records = [{"type": "run", "run": "run", "contributions": 2}, {"type": "term", "term": term}]
    return [msgpack.unpackb(msgpack.packb(record)) for record in [*head, *run.records]]


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    made = FakeRun(make_config(tmp_path))
    made.everybody()
    return made


def test_an_undisturbed_run_is_in_order(run: FakeRun) -> None:
    run.run()
    found = audit(records_of(run))
    assert found.problems == []
    assert (found.run, found.contributions, found.shards) == ("run", 2, 2)
    assert list(found.steps) == list(range(6))
    assert all(step.computed_by() == {0: [0], 1: [0]} for step in found.steps.values())
    assert found.by_worker() == {0: 12}
    assert found.steps[0].hashes == [1001, 1001]
    assert [event.what.split(" (")[0] for event in found.events] == [
        "coordinator started: term 1",
        "shard 0 is there",
        "shard 1 is there",
        "worker 0 is there",
        "worker 1 is there",
        "epoch 1: 2 shards are made to serve",
    ]


def test_it_tells_who_came_and_went(run: FakeRun) -> None:
    run.run_to(2)
    run.kill_worker(1)
    run.step(0.5)
    run.run_to(3)
    run.join_worker(1)
    run.step()
    run.run()
    found = audit(records_of(run))
    assert found.problems == []
    told = [(event.step, event.what.split(" (")[0]) for event in found.events]
    assert (2, "worker 1 broke its connection") in told
    assert told.index((2, "worker 1 broke its connection")) < told.index((3, "worker 1 is there"))


def test_who_comes_back_to_a_new_coordinator_comes_back_where_the_run_was(run: FakeRun) -> None:
    """It does not know yet which step is open."""
    run.run_to(4)
    records = [
        *records_of(run),
        {"type": "term", "term": 2},
        {"type": "live", "role": "worker", "rank": 1, "life": 7, "step": 0},
    ]
    event = audit(records).events[-1]
    assert (event.step, event.what.split(" (")[0]) == (4, "worker 1 is there")


def test_a_rollback_is_told_and_what_is_made_again_must_be_the_same(run: FakeRun) -> None:
    run.run_to(5)
    run.join_shard(1)
    run.run()
    found = audit(records_of(run))
    assert found.problems == []
    assert found.repeated == 2
    assert "rollback to version 3" in [event.what for event in found.events]
    again = [record for record in records_of(run) if record["type"] == "decision" and record["step"] == 4]
    assert len(again) == 2
    altered = records_of(run)
    [record for record in altered if record["type"] == "decision" and record["step"] == 4][1]["loss"] = 7.0
    assert audit(altered).problems == ["step 4: was decided otherwise before a rollback"]
    altered = records_of(run)
    [record for record in altered if record["type"] == "applied" and record["step"] == 3][1]["hashes"][1] = 77
    assert audit(altered).problems == ["step 3: shard 1 has another state than before a rollback"]


def test_a_new_coordinator_goes_on_in_the_same_journal(run: FakeRun) -> None:
    run.run_to(3)
    later = run.restart()
    later.records.insert(len(run.records), {"type": "term", "term": 2})
    later.everybody()
    later.run()
    found = audit(records_of(later))
    assert found.problems == []
    assert list(found.steps) == list(range(6))


def decided(records: Records, step: int) -> dict[str, Any]:
    (found,) = [record for record in records if record["type"] == "decision" and record["step"] == step]
    return found


def counts_twice(records: Records) -> None:
    decided(records, 2)["counted"][0][1].append([1, 0, 1])


def lacks_one(records: Records) -> None:
    decided(records, 2)["counted"][0][1].pop()


def knows_another(records: Records) -> None:
    decided(records, 2)["counted"][0][1].append([9, 0, 1])


def lacks_a_shard(records: Records) -> None:
    decided(records, 2)["counted"][0][0].remove(1)


def is_decided_twice(records: Records) -> None:
    records.insert(records.index(decided(records, 3)), decided(records, 2))


def is_missing(records: Records) -> None:
    records.remove(decided(records, 2))


def has_an_old_fence(records: Records) -> None:
    decided(records, 2)["fence"]["epoch"] = 0


def has_an_epoch_again(records: Records) -> None:
    (epoch,) = [record for record in records if record["type"] == "epoch"]
    records.insert(records.index(decided(records, 2)), epoch)


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (counts_twice, "step 2: shards [0, 1] counted contribution 1 2 times"),
        (lacks_one, "step 2: shards [0, 1] counted contribution 1 0 times"),
        (knows_another, "step 2: shards [0, 1] counted contribution 9 1 times"),
        (lacks_a_shard, "step 2: shards [0] reported, where there are 2"),
        (is_decided_twice, "step 2: was decided where step 3 was open"),
        (is_missing, "step 3: was decided where step 2 was open"),
        (has_an_old_fence, "step 2: was decided under (term 1, epoch 0), where (term 1, epoch 1) is valid"),
        (has_an_epoch_again, "step 2: the fence (term 1, epoch 1) came after (term 1, epoch 1)"),
    ],
)
def test_what_must_not_be_is_named(run: FakeRun, alter: Callable[[Records], None], problem: str) -> None:
    run.run()
    records = records_of(run)
    alter(records)
    found: Audit = audit(records)
    assert problem in found.problems


def test_a_decision_that_a_shard_gave_back_is_not_accounted_for(run: FakeRun) -> None:
    run.run()
    records = records_of(run)
    del decided(records, 2)["counted"]
    found = audit(records)
    assert found.problems == []
    assert found.unaccounted == [2]
    assert found.steps[2].computed_by() == {}


def test_a_journal_that_lost_power_goes_on_with_the_last_that_a_shard_gives_back(run: FakeRun) -> None:
    """What was not on disk yet is not wrong, and said to be missing."""
    run.run()
    records = records_of(run)
    given_back = {key: value for key, value in decided(records, 4).items() if key != "counted"}
    lost = records[: records.index(decided(records, 2))]
    found = audit([*lost, {"type": "term", "term": 2}, given_back])
    assert found.problems == []
    assert (found.unaccounted, found.accounted) == ([2, 3, 4], 2)
    # A coordinator that goes on has lost nothing in between.
    assert audit([*lost, given_back]).problems == ["step 4: was decided where step 2 was open"]


def test_or_with_a_checkpoint_that_is_newer(run: FakeRun) -> None:
    run.run()
    records = records_of(run)
    lost, rollback = records[: records.index(decided(records, 2))], {"type": "rollback", "version": 4, "epoch": 2}
    epoch = {"type": "epoch", "term": 2, "epoch": 2, "shards": [1, 2]}
    found = audit([*lost, {"type": "term", "term": 2}, epoch, rollback])
    assert found.problems == []
    assert found.unaccounted == [2, 3]
    assert audit([*lost, rollback]).problems == ["step 4: a rollback to version 4, which is not decided"]


def test_a_journal_in_the_place_of_a_damaged_one_begins_at_a_checkpoint(run: FakeRun) -> None:
    run.run()
    records = records_of(run)
    beginning = records[: records.index(decided(records, 0))]
    (rollback,) = [record for record in beginning if record["type"] == "rollback"]
    rollback["version"] = 4
    found = audit([*beginning, *records[records.index(decided(records, 4)) :]])
    assert found.problems == []
    assert found.unaccounted == [0, 1, 2, 3]
    assert list(found.steps) == [4, 5]


def test_a_step_that_is_made_again_is_accounted_for(run: FakeRun) -> None:
    run.run_to(5)
    run.join_shard(1)
    run.run()
    records = records_of(run)
    del next(record for record in records if record["type"] == "decision" and record["step"] == 4)["counted"]
    found = audit(records)
    assert (found.problems, found.unaccounted, found.accounted) == ([], [], 6)


def prepared(shard: int, *by: int) -> Prepared:
    reports = tuple(ContributionReport(c, 1.0, 10, rank, 100 + rank) for c, rank in enumerate(by))
    return Prepared(Fence(1, 1), 3, shard, (1.0,), reports)


def test_shards_that_say_the_same_are_written_down_once() -> None:
    reports = [prepared(2, 0, 1), prepared(0, 0, 1), prepared(1, 0, 2)]
    assert accounts(reports) == [[[0, 2], [[0, 0, 100], [1, 1, 101]]], [[1], [[0, 0, 100], [1, 2, 102]]]]


# -- The command ------------------------------------------------------------------------------------


def written(tmp_path: Path, records: Records) -> Path:
    """A run folder with this journal, whose coordinator is still there."""
    tmp_path.mkdir()
    folder = make_run(tmp_path, "some text " * 2000).path
    with Journal.open(folder / "journal") as journal:
        journal.begin_term()
        for record in records:
            if record["type"] != "term":
                journal.append({**record, "at": 1_700_000_000.0})
        assert read(folder / "journal") == [{"type": "term", "term": 1}, *journal_records(records)]
    return folder


def journal_records(records: Records) -> Records:
    return [{**record, "at": 1_700_000_000.0} for record in records if record["type"] != "term"]


def test_the_command_says_so(run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.run()
    folder = written(tmp_path / "run", records_of(run))
    assert main(["audit", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "run run: 6 steps decided, 0 of them skipped, with 2 contributions each, by 2 shards" in out
    assert "every contribution of 6 steps was counted once by every shard" in out
    assert "worker 0 computed 12 contributions" in out
    assert "worker 1 is there" in out
    assert main(["audit", str(folder), "--steps"]) == 0
    out = capsys.readouterr().out
    assert "step      5  (term 1, epoch 1)  committed  workers 0:0 1:0  states 00000000000003ee 00000000000003ee" in out


def test_the_command_fails_where_something_is_wrong(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run()
    records = records_of(run)
    counts_twice(records)
    assert main(["audit", str(written(tmp_path / "run", records))]) == 1
    out = capsys.readouterr().out
    assert "WRONG: step 2: shards [0, 1] counted contribution 1 2 times" in out
    assert "was counted once" not in out


def test_a_run_without_a_journal_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "some text " * 2000).path
    assert main(["audit", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"{folder} has no journal yet" in said
    assert f"windlass resume {folder}" in said


def test_steps_that_the_journal_lost_are_named(
    run: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run()
    records = records_of(run)
    for step in (2, 3):
        del decided(records, step)["counted"]
    assert main(["audit", str(written(tmp_path / "run", records))]) == 0
    out = capsys.readouterr().out
    assert "every contribution of 4 steps was counted once by every shard" in out
    assert "not known who computed step 2, 3: the journal does not have it any more" in out


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
