"""Job files, overrides, what a resumed run may change, role environments and last words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ps.errors import CheckpointNotFound, ConfigError, StorageError
from ps.storage.journal import Journal
from ps.types import Role
from workers.config import JobConfig
from workers.launch import jobs
from workers.launch.environment import MALLOC_TUNABLES, role_environment
from workers.launch.folder import RunFolder, find_checkpoint
from workers.launch.processes import RoleCommands, errors_in, last_words
from workers.launch.supervisor import COORDINATOR, Member

RUN = Path("runs/a")


def job(*overrides: str) -> JobConfig:
    return jobs.resolve(None, ["run_dir=runs/a", *overrides])


def test_a_job_file_is_told_from_overrides(tmp_path: Path) -> None:
    assert jobs.split_arguments(()) == (None, [])
    assert jobs.split_arguments(["job.yaml", "seed=2"]) == (Path("job.yaml"), ["seed=2"])
    assert jobs.split_arguments(["seed=2"]) == (None, ["seed=2"])
    file = tmp_path / "lr=1" / "config.json"
    file.parent.mkdir()
    file.write_text("{}")
    assert jobs.split_arguments([str(file)]) == (file, [])


def test_resolving_fixes_the_number_of_contributions() -> None:
    assert job("cluster.workers=3").batch.contributions_per_step == 3
    assert job("cluster.workers=9", "batch.micro_batches_per_step=4").batch.contributions_per_step == 4
    assert jobs.resume(job("cluster.workers=3"), RUN, ["cluster.workers=2"]).contributions == 3


def test_resuming_forgets_where_to_stop_and_stays_where_the_folder_is() -> None:
    previous = job("training.stop_at=100", "optimizer.lr=0.01")
    resumed = jobs.resume(previous, Path("elsewhere/a"), ["training.steps=900", "worker.device=cpu"])
    assert resumed.training.stop_at is None
    assert resumed.training.steps == 900
    assert resumed.optimizer.lr == 0.01
    assert resumed.run_dir == Path("elsewhere/a")
    assert jobs.resume(previous, RUN, ["training.stop_at=200"]).training.stop_at == 200


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=5",
        "seed=2",
        "optimizer.lr=0.5",
        "batch.micro_batch_size=3",
        "batch.contributions_per_step=1",
        "precision.wire=fp32",
        "data.vocab_size=300",
        "schedule.warmup_steps=1",
    ],
)
def test_resuming_refuses_to_make_another_run(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}=.*would make another run") as caught:
        jobs.resume(job(), RUN, [override])
    assert "\n" not in str(caught.value)


def test_resuming_refuses_another_folder() -> None:
    with pytest.raises(ConfigError, match="run_dir"):
        jobs.resume(job(), RUN, ["run_dir=runs/b"])


def test_the_run_folder_gives_back_the_job(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    assert not folder.holds_run()
    with pytest.raises(ConfigError, match="holds no run"):
        folder.read_job()
    made = job('data.paths=["x.txt"]', "optimizer.lr=3e-4")
    folder.write_job(made)
    assert folder.read_job() == made
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]
    # What the roles are given is the same job again.
    assert jobs.resolve(folder.config, []) == made


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run"):
        RunFolder(tmp_path / "file" / "run").write_job(job())


def test_members_survives_whatever_is_in_the_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.members() == []
    for text, members in (("", []), ("{}", []), ('[1, {"pid": 3}]', [{"pid": 3}])):
        folder.cluster.write_text(text)
        assert folder.members() == members


def test_a_locked_folder_is_locked_until_the_descriptor_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lock = folder.try_lock()
    assert lock is not None
    assert folder.try_lock() is None
    assert folder.holder().isdigit()
    os.close(lock)
    again = folder.try_lock()
    assert again is not None
    os.close(again)


def test_a_journal_is_held_while_a_coordinator_has_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.journal_is_held()
    with Journal.open(folder.journal):
        assert folder.journal_is_held()
    assert not folder.journal_is_held()


def test_find_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        find_checkpoint(tmp_path)
    RunFolder(tmp_path).write_job(job())
    with pytest.raises(CheckpointNotFound, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    for version in (2, 10, 12):
        folder = tmp_path / "checkpoints" / f"step-{version:08d}"
        folder.mkdir(parents=True)
        if version != 12:
            (folder / "manifest.json").write_text("{}")
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(newest) == newest


def test_roles_start_as_the_commands_that_people_use() -> None:
    commands = RoleCommands(job("telemetry.metrics=false"), RUN / "config.json")
    tail = [commands(member, "host:5")[4:] for member in (Member(Role.SHARD, 1), Member(Role.WORKER, 0))]
    assert tail == [
        ["shard", "--coordinator", "host:5", "--index", "1", "--listen", "127.0.0.1:0"],
        ["worker", "--coordinator", "host:5", "--rank", "0", "--listen", "127.0.0.1:0"],
    ]
    first = ["coordinator", "runs/a/config.json", "--listen", "127.0.0.1:0"]
    assert commands(COORDINATOR, None)[4:] == first
    # A restarted one is where the others look for it.
    assert commands(COORDINATOR, "127.0.0.1:5")[-1] == "127.0.0.1:5"
    with pytest.raises(ValueError, match="before"):
        commands(Member(Role.SHARD, 0), None)


def test_role_environment_keeps_what_the_user_has_set() -> None:
    made = role_environment({"OMP_NUM_THREADS": "3", "PATH": "/bin"}, Role.SHARD, glibc=True)
    assert made["GLIBC_TUNABLES"] == MALLOC_TUNABLES
    assert (made["OMP_NUM_THREADS"], made["NUMBA_NUM_THREADS"], made["PATH"]) == ("3", "1", "/bin")
    assert role_environment({"GLIBC_TUNABLES": "x"}, Role.WORKER, glibc=True)["GLIBC_TUNABLES"] == "x"
    plain = role_environment({}, Role.WORKER, glibc=False)
    assert "GLIBC_TUNABLES" not in plain
    assert "OMP_NUM_THREADS" not in plain
    assert plain["GRPC_VERBOSITY"] == "NONE"


def record(level: str, message: str, **more: str) -> str:
    return json.dumps({"level": level, "message": message, **more})


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", (None, "")),
        (record("info", "hello"), (None, "hello")),
        (record("info", "a") + "\nwindlass: error: no port\n" + record("info", "b"), ("no port", "no port")),
        (record("error", "bad") + "\n" + record("info", "b"), (None, "bad")),
        (record("error", "bad", exception="Traceback\n  x\nOSError: 5"), (None, "bad: OSError: 5")),
        (record("info", "a") + "\nTraceback:\n  File x\nValueError: 3\n\n", (None, "ValueError: 3")),
        ('[1]\n"text"\n{"level": 1}', (None, '{"level": 1}')),
    ],
)
def test_last_words(log: str, words: tuple[str | None, str]) -> None:
    assert last_words(log) == words


def test_errors_are_told_from_the_other_lines_of_a_log() -> None:
    lines = [record("info", "a"), record("error", "b"), "c", "windlass: error: d", "", record("warning", "e")]
    assert errors_in([*lines, record("error", "f", exception="Traceback\n  x\nOSError: 5")]) == ["b", "f: OSError: 5"]
