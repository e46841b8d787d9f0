"""Whole runs in real processes: stop and resume, deaths, signals, other languages."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.launched import launched, processes_of, tiny_job, train, windlass

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

STEPS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    """The digest of a run that nothing happened to."""
    return train(folder, "undisturbed", f"training.steps={STEPS}", "checkpoint.every_steps=50").digest()


def test_a_run_that_stops_at_a_step_and_resumes_is_the_same_run(folder: Path, undisturbed: str) -> None:
    run = train(folder, "stopped", f"training.steps={STEPS}", "training.stop_at=100", "checkpoint.every_steps=50")
    assert run.steps() == 100
    assert "windlass resume" in run.output()
    # At another number of shards and workers: a checkpoint does not know them.
    overrides = ["cluster.shards=1", "cluster.workers=3"]
    with launched("resume", run.run_dir, [str(run.run_dir), *overrides]) as resumed:
        assert resumed.finish() == 0, resumed.output()
    assert [line["step"] for line in resumed.metrics() if line["kind"] == "step"] == list(range(STEPS))
    assert resumed.digest() == undisturbed


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize(("role", "rank"), [("worker", 1), ("shard", 0), ("coordinator", 0)])
def test_a_killed_role_changes_nothing(folder: Path, undisturbed: str, role: str, rank: int, transport: str) -> None:
    name = f"killed-{role}-{transport}"
    often = (f"training.steps={STEPS}", "checkpoint.every_steps=50")
    arguments = tiny_job(folder, name, *often, f"launch.transport={transport}")
    with launched("train", folder / name, arguments) as run:
        run.wait_for_step(60)
        run.kill(role, rank)
        assert run.finish() == 0, run.output()
    assert run.digest() == undisturbed
    assert [line["step"] for line in run.metrics() if line["kind"] == "step"] == list(range(STEPS))


def test_a_worker_killed_in_mid_step_loses_no_contribution(folder: Path, undisturbed: str) -> None:
    """One worker, killed while it computes: nobody is there to take over until it is started again."""
    arguments = tiny_job(folder, "alone", f"training.steps={STEPS}", "cluster.workers=1")
    with launched("train", folder / "alone", arguments) as run:
        run.wait_for_step(60)
        run.kill("worker", 0)
        assert run.finish() == 0, run.output()
    assert run.digest() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_says_how_to_go_on(folder: Path, undisturbed: str, number: int) -> None:
    name = f"signal-{number}"
    with launched("train", folder / name, tiny_job(folder, name, f"training.steps={STEPS}")) as run:
        run.wait_for_step(40)
        run.process.send_signal(number)
        assert run.finish() == 128 + number, run.output()
    assert processes_of(run.run_dir) == []
    assert f"windlass resume {run.run_dir}" in run.output()
    with launched("resume", run.run_dir, [str(run.run_dir)]) as resumed:
        assert resumed.finish() == 0, resumed.output()
    assert resumed.digest() == undisturbed


def test_roles_end_when_their_launcher_is_killed(folder: Path) -> None:
    arguments = tiny_job(folder, "orphans", "training.steps=100000")
    with launched("train", folder / "orphans", arguments) as run:
        run.wait_for_step(5)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait(10)
        eventually(lambda: not processes_of(run.run_dir), 5.0, "the roles' end")


def test_chinese_text_is_text_like_any_other(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = [
        "参数",
        "服务器",
        "梯度",
        "累积",
        "混合精度",
        "训练",
        "语言模型",
        "学习率",
        "分片",
        "权重",
        "数据",
        "优化器",
    ]
    lines = ["".join(draw.choice(words) for _ in range(draw.randint(4, 12))) + "。" for _ in range(4000)]
    (tmp_path / "zh.txt").write_text("\n".join(lines), encoding="utf-8")
    job = tiny_job(tmp_path, "zh", f"data.paths=['{tmp_path / 'zh.txt'}']", "training.steps=120", "optimizer.lr=5e-3")
    with launched("train", tmp_path / "zh", job) as run:
        assert run.finish() == 0, run.output()
    losses = [line["loss"] for line in run.metrics() if line["kind"] == "step"]
    assert losses[-1] < 0.7 * losses[0]
    sample = windlass("sample", str(run.run_dir), "--prompt", "梯度", "--tokens", "60")
    assert sample.returncode == 0, sample.stderr
    assert "梯度" in sample.stdout
    assert sum("\u4e00" <= character <= "\u9fff" for character in sample.stdout) > 10
    evaluated = windlass("evaluate", str(run.run_dir))
    assert evaluated.returncode == 0
    assert "bits per byte" in evaluated.stdout
