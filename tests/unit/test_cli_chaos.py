"""`windlass chaos`: whom it refuses before it does anything, what it warns of, how it judges, and how it is ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.status import StatusClient
from ps.errors import AccessDenied, HandshakeFailed, WaitTimeout
from ps.storage.journal import Journal
from tests.support.checkpoints import make_arrays, make_table, write_checkpoint
from tests.support.eventually import eventually
from tests.support.fake_run import FakeRun, make_config
from workers.cli.main import main
from workers.launch.alive import Process
from workers.launch.chaos import Struck, await_end
from workers.launch.faults import Kind, Plan
from workers.launch.folder import RunFolder
from workers.launch.jobs import resolve

TABLE = make_table([131_072, 300])
STEPS = 6


def ended(path: Path, saved: int = STEPS, seed: int = 0) -> RunFolder:
    """A run of six steps that is over, whose last checkpoint is of this version."""
    folder = RunFolder(path)
    folder.write_job(resolve(None, [f"run_dir={path}", f"training.steps={STEPS}"]))
    write_checkpoint(path / "checkpoints", TABLE, 2, make_arrays(TABLE, [], seed=seed), saved)
    made = FakeRun(make_config(path))
    made.everybody()
    made.run()
    with Journal.open(folder.journal) as journal:
        journal.begin_term()
        for record in [{"type": "run", "run": "run", "contributions": 2}, *made.records]:
            journal.append(record)
    return folder


def judged(capsys: pytest.CaptureFixture[str], folder: RunFolder, *arguments: str) -> tuple[int, str]:
    code = main(["chaos", str(folder.path), "--faults", "2", "--every", "0.1", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run were under way when chaos is called, and over after that."""
    monkeypatch.setattr("workers.cli.chaos._refuse_idle", lambda _: None)


@pytest.fixture
def two_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run had been under way, and two faults had been carried out."""
    monkeypatch.setattr("workers.cli.chaos._refuse_idle", lambda _: None)
    fault = Struck(Plan(Kind.KILL, 0.0, 0.0, 0.0, 0.0), Process("shard", 0, 12), at=0.0)
    monkeypatch.setattr("workers.cli.chaos.strike_all", lambda *_, **__: iter([fault, fault]))


def refused(capsys: pytest.CaptureFixture[str], folder: RunFolder, *arguments: str) -> str:
    """The one line that it says instead of doing anything."""
    code = main(["chaos", str(folder.path), *arguments])
    shown = capsys.readouterr()
    assert (code, shown.out, shown.err.count("\n")) == (2, "", 1)
    return shown.err


NOBODY = "windlass: error: nothing that `windlass train` has started runs here: "


def test_where_nothing_runs_it_says_so_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete = ended(tmp_path / "complete")
    assert f"{NOBODY}{complete.path} is complete: 6 of 6 steps; to go on: " in refused(capsys, complete)
    stopped = ended(tmp_path / "stopped", saved=4)
    saved = "is not running: step 0 of 6, one checkpoint, step-00000004; to go on: "
    assert f"{NOBODY}{stopped.path} {saved}" in refused(capsys, stopped)
    fresh = RunFolder(tmp_path / "fresh")
    fresh.write_job(resolve(None, [f"run_dir={fresh.path}"]))
    assert f"{NOBODY}{fresh.path} is not running: step 0 of 400, no checkpoint" in refused(capsys, fresh)


@pytest.mark.parametrize("error", [None, AccessDenied("no"), HandshakeFailed("no")])
def test_roles_that_were_started_by_hand_are_not_struck(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def ask(_self: StatusClient, _timeout_s: float) -> pb.StatusResponse:
        if error is not None:
            raise error
        return pb.StatusResponse(phase="running", coordinator=Member(role="coordinator", pid=2))

    monkeypatch.setattr(StatusClient, "ask", ask)
    folder = ended(tmp_path / "run")
    folder.cluster.write_text(json.dumps([{"role": "coordinator", "rank": 0, "pid": 2, "address": "a:1"}]))
    expected = f"the coordinator of {folder.path} answers, but was started by hand, or on another host\n"
    assert refused(capsys, folder) == NOBODY + expected


@pytest.mark.usefixtures("under_way")
def test_what_cannot_be_compared_with_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, missing = ended(tmp_path / "run"), tmp_path / "missing"
    (tmp_path / "link").symlink_to(folder.path)
    assert f"{missing} holds no run" in refused(capsys, folder, "--same-as", str(missing))
    for own in (folder.path, tmp_path / "link", folder.path / "checkpoints" / "step-00000006"):
        assert f"--same-as {own} is the run that is struck; " in refused(capsys, folder, "--same-as", str(own))
    for override in ("seed=7", "model.num_layers=1"):
        other = RunFolder(tmp_path / override)
        other.write_job(resolve(None, [f"run_dir={other.path}", override]))
        key, value = override.split("=")
        expected = f"--same-as {other.path}: {key} is {value} there, and "
        assert expected in refused(capsys, folder, "--same-as", str(other.path))


@pytest.mark.usefixtures("two_faults")
def test_what_may_be_equal_all_the_same_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same job elsewhere, with other processes and other files; 704 is what auto comes to."""
    folder, calm = ended(tmp_path / "run"), ended(tmp_path / "calm")
    harmless = ["cluster.workers=1", "cluster.standbys=1", "training.steps=9", "model.intermediate_size=704"]
    calm.write_job(resolve(None, [f"run_dir={calm.path}", "batch.contributions_per_step=2", *harmless]))
    arguments = ["chaos", str(folder.path), "--faults", "2", "--same-as", str(calm.path)]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    calm.write_job(resolve(None, [f"run_dir={calm.path}", "batch.contributions_per_step=2", f"data.paths={tmp_path}"]))
    assert main(arguments) == 0
    assert re.fullmatch(
        r"windlass: warning: --same-as \S+: data\.paths is .* the results may differ for that\n",
        capsys.readouterr().err,
    )


@pytest.mark.usefixtures("two_faults")
def test_a_checkpoint_is_compared_with_whichever_version_wrote_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the tests have a job without a run folder, which is none of today's."""
    folder, calm = ended(tmp_path / "run"), ended(tmp_path / "calm").path / "checkpoints" / "step-00000006"
    code, out = judged(capsys, folder, "--same-as", str(calm))
    assert (code, "the same as without faults" in out) == (0, True)


@pytest.mark.usefixtures("two_faults")
def test_another_run_may_still_be_on_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, late = ended(tmp_path / "run"), RunFolder(tmp_path / "late")
    late.write_job(resolve(None, [f"run_dir={late.path}"]))
    assert main(["chaos", str(folder.path), "--faults", "2", "--same-as", str(late.path)]) == 1
    shown = capsys.readouterr()
    assert f"warning: --same-as {late.path} has no checkpoint yet; it needs one when " in shown.err
    assert f"WRONG: there is nothing to compare with: {late.path} has no complete checkpoint yet" in shown.out


@pytest.mark.usefixtures("two_faults")
def test_it_warns_of_a_limit_that_its_faults_exceed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ended(tmp_path / "run")
    often = ["chaos", str(folder.path), "--faults", "1000", "--every", "0.5", "--kinds", "kill,cut"]
    main(often)
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"windlass: warning: coordinator 0 may be killed \d\d times within 60 s, and more than "
        r"launch\.restart_limit=10 ends the run: .*\n",
        said,
    )
    main(["chaos", str(folder.path)])
    main([*often[:-1], "stop,cut"])
    folder.write_job(resolve(None, [f"run_dir={folder.path}", f"training.steps={STEPS}", "launch.restart_limit=1000"]))
    main(often)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("under_way")
def test_a_run_that_was_over_has_come_through_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = judged(capsys, ended(tmp_path / "run"))
    assert code == 1
    assert "WRONG: the run was over after 0 of 2 faults" in out
    assert out.count("WRONG") == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_it_holds_stopped_goes_on_when_it_is_ended(tmp_path: Path, signum: signal.Signals) -> None:
    folder = ended(tmp_path / "run")
    words = ["-m", "workers.cli.main", "coordinator", str(folder.config)]
    victim = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    member = {"role": "coordinator", "rank": 0, "pid": victim.pid, "host": socket.gethostname(), "address": "a:1"}
    folder.cluster.write_text(json.dumps([member]))
    lock = folder.try_lock()
    assert lock is not None
    # The first stop that seed 1 draws lasts for minutes.
    chaos = ["chaos", str(folder.path), "--kinds=stop", "--every=0.1", "--longest-stop=1000", "--seed=1"]
    struck = subprocess.Popen(
        [sys.executable, "-m", "workers.cli.main", *chaos],
        stdout=subprocess.PIPE,
        text=True,
        # Under nohup it would be ignored, here as well.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        eventually(lambda: state(victim.pid) == "T", 30.0, "the process to be stopped")
        struck.send_signal(signum)
        said = struck.communicate(timeout=30)[0]
        assert state(victim.pid) != "T"
    finally:
        os.close(lock)
        struck.kill()
        victim.kill()
        victim.communicate()
        struck.wait()
    assert struck.returncode == 128 + signum
    lines = said.splitlines()
    assert re.fullmatch(rf" +\d+\.\d s +1  stop coordinator 0 \(pid {victim.pid}\) for \d{{2,}}\.\d s", lines[0])
    assert lines[1:] == [f"{signum.name}: ended after 0 of 50 faults; nobody is left stopped"]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.usefixtures("two_faults")
def test_a_run_that_came_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm, other = ended(tmp_path / "calm"), ended(tmp_path / "other", seed=1)
    code, out = judged(capsys, ended(tmp_path / "run"), "--same-as", str(calm.path))
    assert code == 0
    assert "kill shard: 2" in out
    assert "every contribution of 6 steps was counted once by every shard" in out
    assert "the same as without faults" in out
    code, out = judged(capsys, RunFolder(tmp_path / "run"), "--same-as", str(other.path))
    assert code == 1
    assert "WRONG: without faults the digest is " in out


@pytest.mark.usefixtures("two_faults")
def test_a_run_that_did_not_reach_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ended(tmp_path / "run", saved=4)
    code, out = judged(capsys, folder)
    assert code == 1
    assert f"WRONG: the run ended at step 4 of 6: the logs in {folder.logs} say why" in out


def test_a_run_that_records_nothing_is_given_up(tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    lock = folder.try_lock()
    assert lock is not None
    try:
        with pytest.raises(WaitTimeout, match="has recorded no step for 0 s, and is not over"):
            await_end(folder, hangs_s=0.0)
    finally:
        os.close(lock)
    await_end(folder, hangs_s=0.0)
