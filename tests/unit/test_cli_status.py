"""What `windlass status` says when there is nobody to ask."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.client.status import StatusClient
from ps.errors import PeerUnavailable
from tests.support.checkpoints import make_arrays, make_table, write_checkpoint
from tests.support.unreadable import make_unreadable
from workers.cli import report, train
from workers.cli.main import main
from workers.launch import jobs, watch
from workers.launch.added import Added
from workers.launch.folder import RunFolder
from workers.launch.supervisor import End


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """runs/a, with a job of 400 steps of which one was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WINDLASS_COORDINATOR", raising=False)
    found = RunFolder(Path("runs/a"))
    found.write_job(jobs.resolve(None, ["run_dir=runs/a"]))
    found.metrics.write_text('{"kind": "step", "step": 0, "loss": 3.0}\n')
    return found


def refused() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_folder_that_cannot_be_read_is_one_line(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unreadable(monkeypatch, folder.config)
    for arguments in ([], ["--json"], ["--watch"]):
        assert main(["status", "runs/a", *arguments]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == (
            "",
            "windlass: error: runs/a/config.json cannot be read: Permission denied\n",
        )


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step-00000400/manifest.json"])
def test_checkpoints_that_cannot_be_read_are_not_none(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    finish(folder)
    make_unreadable(monkeypatch, folder.path / what)
    assert main(["status", "runs/a"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert re.search(rf"is not running: step 400 of 400, .*{what} cannot be read: Permission denied; ", shown.err)
    assert main(["status", "runs/a", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checkpoints"] is None


@pytest.mark.usefixtures("folder")
def test_a_run_that_never_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 1
    assert capsys.readouterr().err == (
        "windlass: error: runs/a is not running: step 1 of 400, no checkpoint; to go on: windlass resume runs/a\n"
    )
    assert main(["status", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.pop("error").startswith("runs/a is not running")
    assert found == {"running": False, "run_dir": "runs/a", "version": 1, "steps": 400, "checkpoints": []}


def test_a_run_whose_coordinator_is_gone(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.cluster.write_text(json.dumps([{"role": "coordinator", "rank": 0, "pid": 1, "address": refused()}]))
    assert main(["status", "runs/a"]) == 1
    assert "runs/a is not running: step 1 of 400" in capsys.readouterr().err


def test_a_run_that_is_being_started(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lock = folder.try_lock()
    assert lock is not None
    try:
        assert main(["status", "runs/a"]) == 1
        assert "its coordinator is being started, or has just ended: step 1 of 400" in capsys.readouterr().err
    finally:
        os.close(lock)
    # Looking took nothing.
    again = folder.try_lock()
    assert again is not None
    os.close(again)


def test_a_coordinator_that_does_not_answer_is_not_one_that_is_gone(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process with the command line of this run's coordinator.
    words = ["-m", "workers.cli.main", "coordinator", str(folder.config)]
    stopped = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    # Longer than a channel takes by default for an attempt to connect.
    monkeypatch.setattr("workers.cli.status.ANSWER_S", 1.0)
    lock = folder.try_lock()
    assert lock is not None
    try:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            address = f"127.0.0.1:{deaf.getsockname()[1]}"
            host = socket.gethostname()
            member = {"role": "coordinator", "rank": 0, "pid": stopped.pid, "host": host, "address": address}
            folder.cluster.write_text(json.dumps([member]))
            asked_at = time.monotonic()
            assert main(["status", "runs/a"]) == 1
            waited_s = time.monotonic() - asked_at
    finally:
        os.close(lock)
        stopped.kill()
        stopped.communicate()
    said = re.search(
        rf"its coordinator \(process {stopped.pid}\) has not answered for ([\d.]+) s", capsys.readouterr().err
    )
    assert said is not None
    assert 1.0 <= float(said[1]) <= round(waited_s, 1)


def test_another_runs_coordinator_at_the_same_port_is_not_taken_for_it(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = pb.StatusResponse(phase="running", coordinator=Member(role="coordinator", pid=2))
    monkeypatch.setattr(StatusClient, "ask", lambda _self, _timeout_s: answer)
    for pid, code in ((2, 0), (1, 1)):
        folder.cluster.write_text(json.dumps([{"role": "coordinator", "rank": 0, "pid": pid, "address": "a:1"}]))
        assert main(["status", "runs/a"]) == code
    assert "runs/a is not running" in capsys.readouterr().err


def finish(folder: RunFolder) -> None:
    """The folder's run has made its 400 steps, and its last checkpoint is complete."""
    lines = [
        {"kind": "step", "step": 399, "loss": 2.0},
        {"kind": "evaluation", "version": 400, "loss": 6.03714, "perplexity": 9.0, "bits_per_byte": 2.0}
        | {"tokens": 10, "bytes": 20},
    ]
    folder.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    table = make_table([10])
    write_checkpoint(folder.path / "checkpoints", table, 1, make_arrays(table, ()), 400)


COMPLETE = "runs/a is complete: 400 of 400 steps; to go on: windlass resume runs/a training.steps=800\n"


def test_of_a_complete_run_it_says_what_resume_says(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    finish(folder)
    assert main(["resume", "runs/a"]) == 0
    assert capsys.readouterr().out == COMPLETE
    assert main(["status", "runs/a"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (COMPLETE, "")
    assert main(["status", "runs/a", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == COMPLETE.strip()


@pytest.mark.parametrize("by_folder", [True, False])
def test_watching_a_run_to_its_end_ends_with_one_line(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by_folder: bool
) -> None:
    last = pb.StatusResponse(
        phase="running", version=400, steps=400, loss=2.0, evaluation_loss=6.5, coordinator=Member(pid=2)
    )
    answers = iter([last, last])

    def ask(_self: StatusClient, _timeout_s: float) -> pb.StatusResponse:
        answer = next(answers, None)
        if answer is not None:
            return answer
        if not folder.path.joinpath("checkpoints").exists():
            finish(folder)
        raise PeerUnavailable("gone")

    monkeypatch.setattr(StatusClient, "ask", ask)
    monkeypatch.setattr(watch, "SILENT_S", 0.3)
    folder.cluster.write_text(json.dumps([{"role": "coordinator", "rank": 0, "pid": 2, "address": "a:1"}]))
    assert main(["status", "runs/a" if by_folder else "a:1", "--watch", "--every", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"finished: 400 of 400 steps, held-out {'6.0371' if by_folder else '6.5000'}"
    assert {line.split(":")[0] for line in lines[:-1]} <= {"running"}


def test_watching_a_run_that_is_stopped_ends_with_how_far_it_came(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = pb.StatusResponse(phase="ended", version=1, steps=400, evaluation_loss=math.nan)
    monkeypatch.setattr(StatusClient, "ask", lambda _self, _timeout_s: answer)
    folder.cluster.write_text(json.dumps([{"role": "coordinator", "rank": 0, "address": "a:1"}]))
    assert main(["status", "runs/a", "--watch", "--every", "0.1"]) == 0
    assert capsys.readouterr().out == "ended: 1 of 400 steps\n"


STOPPED, FAILED = End(130, None, finished=False), End(1, "coordinator-0: no space", finished=False)
LAST = Path("runs/a/checkpoints/step-00000400")


@pytest.mark.parametrize(
    ("end", "added", "words"),
    [
        (STOPPED, Added(LAST, True, 400), "saved step-00000400; go on with: windlass resume runs/a\n"),
        # Of a start that was stopped before it had saved, or made, anything.
        (STOPPED, Added(None, True, 401), "the newest checkpoint is step-00000400, 1 step back; go on with: "),
        (STOPPED, Added(None, False, 400), "the newest checkpoint is step-00000400; go on with: windlass resume"),
        # It went back from that one, which may be damaged.
        (STOPPED, Added(None, False, 399), "go on with: windlass resume runs/a\n"),
        (STOPPED, Added(LAST, True, 422), "the newest checkpoint is step-00000400, 22 steps back; go on with: "),
        (FAILED, Added(LAST, True, 422), "the newest checkpoint is step-00000400, 22 steps back; go on with: "),
        # metrics.jsonl may lack the last steps of a run that failed.
        (FAILED, Added(LAST, True, 400), "the newest checkpoint is step-00000400; go on with: windlass resume"),
        (FAILED, Added(None, False, 400), ""),
    ],
)
def test_a_run_that_was_stopped_names_what_it_has_saved_itself(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], end: End, added: Added, words: str
) -> None:
    finish(folder)
    report.print_unfinished(folder, folder.read_job(), end, added)
    out = capsys.readouterr().out
    assert out.startswith(words)
    assert bool(out) == bool(words)


def test_a_run_that_was_stopped_before_its_first_checkpoint(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    report.print_unfinished(folder, folder.read_job(), STOPPED, Added())
    assert capsys.readouterr().out == "go on with: windlass resume runs/a\n"
    (folder.path / "checkpoints").write_text("")
    report.print_unfinished(folder, folder.read_job(), STOPPED, Added(None, True, 3))
    assert capsys.readouterr().out == "go on with: windlass resume runs/a\n"


@pytest.mark.parametrize(("override", "done"), [("training.steps=400", True), ("training.steps=800", False)])
@pytest.mark.usefixtures("folder")
def test_a_signal_after_the_last_step_was_too_late_to_stop_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, done: bool
) -> None:
    class Interrupted:
        def __init__(self, _job: object, folder: RunFolder, *_: object) -> None:
            self._folder = folder

        def run(self, fresh: bool) -> End:
            assert not fresh
            finish(self._folder)
            return STOPPED

        def added(self) -> Added:
            return Added(LAST, True, 400)

    monkeypatch.setattr(train, "Launcher", Interrupted)
    monkeypatch.setattr(report, "_print_sample", lambda *_: None)
    code = main(["resume", "runs/a", override])
    out = capsys.readouterr().out
    if done:
        assert code == 0
        assert "done: 400 of 400 steps" in out
        assert "saved" not in out
    else:
        assert code == 130
        assert out == "saved step-00000400; go on with: windlass resume runs/a\n"


def test_a_run_is_at_its_end_where_the_job_says(folder: RunFolder) -> None:
    assert not report.is_at_end(folder.read_job(), None)
    assert not report.is_at_end(folder.read_job(), LAST)
    finish(folder)
    for overrides, ended in (
        ([], True),
        (["training.steps=401"], False),
        (["training.steps=800", "training.stop_at=400"], True),
    ):
        assert report.is_at_end(jobs.resolve(None, ["run_dir=runs/a", *overrides]), LAST) == ended


def test_a_ctrl_c_while_a_sample_is_written_skips_it(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.engine import restore

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restore, "load_model", interrupted)
    finish(folder)
    report.print_result(folder, folder.read_job(), 1.0)
    out = capsys.readouterr().out
    assert "no sample: interrupted" in out
    assert "go on       windlass resume runs/a training.steps=800" in out


def test_an_address_where_nobody_listens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    address = refused()
    monkeypatch.setenv("WINDLASS_COORDINATOR", address)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == (
        f"windlass: error: nothing answers at {address}; is a coordinator running there?\n"
    )


def test_without_any_run_it_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WINDLASS_COORDINATOR", raising=False)
    assert main(["status"]) == 2
    assert "there is no run in runs/: name a run folder, or a coordinator" in capsys.readouterr().err
