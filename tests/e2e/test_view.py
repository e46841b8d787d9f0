"""What a user sees of a run: on a terminal, and with `windlass status`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.launched import LaunchedRun, launched, processes_of, tiny_job, train, windlass
from tests.support.terminal import on_terminal

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

STEPS = 100_000


def test_train_on_a_terminal_draws_the_cluster_in_place(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "workers.cli.main", "train", *tiny_job(tmp_path, "run", f"training.steps={STEPS}")]
    with on_terminal(command, columns=120, rows=30) as terminal:
        shown = "\n".join
        terminal.until(lambda screen: "worker-1" in shown(screen), 90.0, "members")
        terminal.until(lambda screen: "tokens/s" in shown(screen), 90.0, "speed")
        terminal.until(lambda screen: re.search(r"worker-1 +live.* ms .* ms .* ms", shown(screen)), 30.0, "seconds")
        for words in ("running", f"/{STEPS:,}", "loss ", "gradient norm ", "loss scale 65,536", "compute ", "left"):
            assert words in shown(terminal.emulator.screen), words
        # A line that the launcher says appears above, once, and the view stays where it was.
        worker = json.loads((run_dir / "cluster.json").read_text())[-1]
        os.kill(worker["pid"], signal.SIGKILL)
        terminal.until(lambda screen: "starting it again" in shown(screen), 30.0, "the launcher's line")
        terminal.until(lambda screen: re.search(r"worker-1 +live .* 1  ", shown(screen)), 60.0, "the restart")
        assert shown(terminal.emulator.lines).count("coordinator-0") == 1
        assert shown(terminal.emulator.lines).count("starting it again") == 1
        # Narrower and lower than the view: it fits again, and is there once.
        terminal.resize(60, 14)
        terminal.until(lambda screen: shown(screen).count("coordinator-0") == 1, 30.0, "the view after the resize")
        version = re.compile(r"([\d,]+)/100,000")

        def at(screen: list[str]) -> int:
            found = version.search(shown(screen))
            return int(found[1].replace(",", "")) if found else 0

        before = at(terminal.emulator.screen)
        terminal.until(lambda screen: at(screen) > before, 30.0, "progress")
        terminal.until(lambda screen: "worker-1" in shown(screen), 5.0, "a whole view")
        assert len(terminal.emulator.screen) <= 14
        assert shown(terminal.emulator.screen).count("running") == 1
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish(60.0) == 130
    # Long lines are wrapped.
    everything = "".join(terminal.emulator.lines)
    assert "stopping: waiting for the last checkpoint" in everything
    assert f"go on with: windlass resume {run_dir}" in everything
    # What was drawn is taken away; the last numbers stay.
    assert "coordinator-0" not in shown(terminal.emulator.screen)
    assert re.search(rf"step \d+/{STEPS}  loss", everything)
    assert processes_of(run_dir) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedRun]:
    folder = tmp_path_factory.mktemp("status")
    # No step begins before both workers are there.
    job = tiny_job(folder, "run", f"training.steps={STEPS}", "membership.min_workers=2")
    with launched("train", folder / "run", job) as under_way:
        under_way.wait_for_step(25)
        yield under_way
        under_way.process.send_signal(signal.SIGTERM)
        under_way.finish()


def test_status_of_a_run_folder_and_of_an_address(run: LaunchedRun) -> None:
    shown = windlass("status", str(run.run_dir))
    assert shown.stderr == ""
    assert shown.returncode == 0
    for words in ("running", f"/{STEPS:,}", "coordinator-0", "shard-1", "worker-1", "tokens/s", "checkpoint 0"):
        assert words in shown.stdout, words
    members = run.members()
    for arguments, environment in (
        ([members[0]["address"]], {}),
        ([], {"WINDLASS_COORDINATOR": members[0]["address"]}),
        ([str(run.run_dir)], {}),
    ):
        answer = windlass("status", "--json", *arguments, environment=environment)
        found = json.loads(answer.stdout)
        assert found["running"] is True
        assert found["phase"] == "running"
        assert found["version"] >= 25
        assert found["step_s"] > 0
        assert found["seconds_left"] > 0
        assert [m["pid"] for m in found["members"]] == [m["pid"] for m in members]
        assert {m["state"] for m in found["members"]} == {"live"}
        spent = found["members"][-1]["last_contribution"]
        assert spent["compute_s"] > 0
        # The second contribution of a step waits for nothing.
        assert 0 <= spent["wait_s"] <= spent["pull_s"]
        assert 0 <= found["wait_s"] <= found["pull_s"] <= 10
        assert found["members"][-1]["metrics_address"] == members[-1]["metrics_address"]
        assert [m["transport"] for m in found["members"]] == ["", "", "", "shm", "shm"]


def test_status_says_what_workers_wait_for_in_a_step(run: LaunchedRun) -> None:
    def waited() -> bool:
        found = json.loads(windlass("status", "--json", str(run.run_dir)).stdout)
        return min(found["wait_s"], found["members"][-1]["last_contribution"]["wait_s"]) > 0

    eventually(waited, 60.0, "a step in which the last worker waits")


def test_the_newest_run_is_the_default(run: LaunchedRun, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(run.run_dir)
    found = windlass("status", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["run_dir"] == str(run.run_dir)


def test_watch_draws_on_a_terminal_and_prints_lines_into_a_pipe(run: LaunchedRun) -> None:
    command = [sys.executable, "-m", "workers.cli.main", "status", str(run.run_dir), "--watch", "--every", "0.2"]
    with on_terminal(command, columns=70, rows=24) as terminal:
        terminal.until(lambda screen: "worker-1" in "".join(screen), 30.0, "members")
        before = "".join(terminal.emulator.screen)
        terminal.until(lambda screen: "worker-1" in "".join(screen) and "".join(screen) != before, 30.0, "news")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.finish(30.0) == 130
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        versions = [json.loads(process.stdout.readline())["version"] for _ in range(3)]
        assert versions == sorted(versions)
    finally:
        process.kill()
        process.communicate()


def test_status_of_what_does_not_run_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    run = train(tmp_path, "done", "training.steps=3")
    shown = windlass("status", str(run.run_dir))
    assert (shown.returncode, shown.stderr) == (1, "")
    assert shown.stdout == (
        f"{run.run_dir} is complete: 3 of 3 steps; to go on: windlass resume {run.run_dir} training.steps=6\n"
    )
    answer = windlass("status", str(run.run_dir), "--json")
    found = json.loads(answer.stdout)
    assert answer.returncode == 1
    assert (found["running"], found["version"], found["checkpoints"][-1]) == (False, 3, "step-00000003")
    watched = windlass("status", str(run.run_dir), "--watch")
    assert watched.returncode == 1
    assert watched.stdout == shown.stdout
