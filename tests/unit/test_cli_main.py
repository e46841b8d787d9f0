"""The command line's messages and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ps.errors import ConfigError, StartupError
from ps.lifeline import Lifeline
from ps.telemetry import logs
from ps.wire.security import PLAIN
from workers.cli import roles
from workers.cli.main import main
from workers.launch import environment, jobs
from workers.launch.folder import RunFolder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("windlass 0.")
    for arguments in ((), ("--help",)):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        commands = ("train", "resume", "status", "plot", "evaluate", "sample", "digest", "export", "init", "validate")
        commands += ("audit",)
        for command in (*commands, "coordinator", "shard", "worker", "certs"):
            assert f"  {command} " in out


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_gone_is_no_finding(unbuffered: str) -> None:
    """Exit code 1 would say that something is wrong; a shell says 141 of whoever SIGPIPE ends.

    What is printed is written at once, or at the end.
    """
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli.main", "--version"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_output_that_does_not_fit_on_a_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "workers.cli.main", "--version"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False, env=environment)
    expected = b"windlass: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_certs_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "certs")
    assert (code, err) == (0, "")
    assert all(f"  {command} " in out for command in ("init", "issue", "show"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such.yaml"], ["no job file no-such.yaml"]),
        (["train", "optimizer.lrr=1"], ["optimizer.lrr", "optimizer.lr"]),
        (["train", "cluster.shards=0"], ["cluster.shards=0"]),
        (["train", "seed=1", "oops"], ["oops", "key=value"]),
        (["train", "--fast"], ["--fast"]),
        (["train", "--model.num_layers=2"], ["--model.num_layers", "write model.num_layers=2, without --"]),
        (["train", "--seed", "3"], ["write seed=3, without --"]),
        (["validate", "model.num_layers", "2"], ["model.num_layers is a key", "write model.num_layers=2,"]),
        (["train", "seed=1", "model.num_layers", "=", "2"], ["write model.num_layers=2,"]),
        (["train", "seed"], ["write seed=VALUE,"]),
        (["resume"], ["RUN"]),
        (["resume", "no/such/run"], ["no/such/run holds no run"]),
        (["resume", "pyproject.toml"], ["pyproject.toml is a file; resume takes a run folder"]),
        (["sample", "no/such/run", "--tokens", "many"], ["--tokens", "integer"]),
        (["sample", "no/such/run"], ["no/such/run holds no run"]),
        (["evaluate", "no/such/run"], ["no/such/run holds no run"]),
        (["digest", "no/such/run"], ["no/such/run holds no run"]),
        (["status", "no/such/run"], ["no/such/run is neither a run folder", "HOST:PORT"]),
        (["status", "a:0"], ["a:0 is neither"]),
        (["shard", "--index", "0"], ["--coordinator"]),
        (["shard", "--coordinator", "nowhere", "--index", "0"], ["--coordinator=nowhere", "HOST:PORT"]),
        (["shard", "--coordinator", "a:1", "--index", "0", "--listen", "a:99999"], ["--listen=a:99999"]),
        (["worker", "--coordinator", "a:1", "--device", "abacus"], ["--device", "abacus"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("windlass: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_train_refuses_a_folder_with_a_run_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RunFolder(tmp_path).write_job(jobs.resolve(None, [f"run_dir={tmp_path}"]))
    code, _, err = run(capsys, "train", f"run_dir={tmp_path}")
    assert code == 2
    assert f"windlass resume {tmp_path}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("override", ["data.paths=nothing.txt", "worker.device=xla"])
def test_a_start_that_cannot_work_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "train", override)
    assert code in (1, 2)
    assert out == ""
    assert err.startswith(f"windlass: error: {override.partition('=')[0]}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_folder_that_is_none_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for command in ("validate", "train"):
        code, out, err = run(capsys, command, "run_dir=run", "checkpoint.dir=file")
        assert (code, out) == (1, "")
        assert err == "windlass: error: the checkpoint folder file cannot be read: Not a directory\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Role commands without what they do to their process, and with a role that records its start."""
    monkeypatch.setattr(environment, "enter", lambda _role: None)
    monkeypatch.setattr(roles, "_end", lambda code: code)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    monkeypatch.setattr(Lifeline, "from_environment", classmethod(lambda _: None))
    started: list[object] = []

    class App:
        @staticmethod
        def run(*arguments: object) -> int:
            started.append(arguments)
            if isinstance(started[0], Exception):
                raise started[0]
            return 7

    for name in ("ps.coordinator", "ps.shard", "workers.engine"):
        monkeypatch.setitem(sys.modules, f"{name}.app", App)
        monkeypatch.setattr(sys.modules.get(name) or __import__(name, fromlist=["x"]), "app", App, raising=False)
    return started


def test_role_flags_come_from_the_command_line_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, role: list[object]
) -> None:
    assert main(["shard", "--coordinator", "a:1", "--index", "2", "--listen", "0.0.0.0:9"]) == 7
    monkeypatch.setenv("WINDLASS_COORDINATOR", "b:2")
    monkeypatch.setenv("WINDLASS_INDEX", "3")
    monkeypatch.setenv("WINDLASS_LISTEN", "b:3")
    monkeypatch.setenv("WINDLASS_METRICS_LISTEN", "b:4")
    monkeypatch.setenv("WINDLASS_ADVERTISE", "b")
    assert main(["shard"]) == 7
    assert main(["worker", "--device", "cpu"]) == 7
    assert role == [
        ("a:1", 2, "0.0.0.0:9", None, PLAIN, None),
        ("b:2", 3, "b:3", "b:4", PLAIN, "b"),
        ("b:2", None, "cpu", "b:3", "b:4", PLAIN, "b"),
    ]


def test_a_roles_error_is_one_line(capsys: pytest.CaptureFixture[str], role: list[object]) -> None:
    for error, exit_code in ((StartupError("the port\n8 is taken"), 1), (ConfigError("bad"), 2)):
        role[:] = [error]
        code, _, err = run(capsys, "worker", "--coordinator", "a:1")
        assert (code, err) == (exit_code, f"windlass: error: {error.message}\n")


def test_the_coordinator_settles_the_job(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, role: list[object]
) -> None:
    arguments = ["coordinator", f"run_dir={tmp_path / 'run'}", "cluster.workers=3", "--listen", "127.0.0.1:0"]
    assert main(arguments) == 7
    written = RunFolder(tmp_path / "run").read_job()
    assert written.batch.contributions_per_step == 3
    assert role[0][1:] == (written.model_dump_json(), "127.0.0.1:0", PLAIN, None, None, 0.0)  # type: ignore[index]
    # The same command again is the same run; another job is refused unless it is asked for.
    assert main(arguments) == 7
    code, _, err = run(capsys, *arguments, "training.steps=7")
    assert code == 2
    assert "training.steps is 400, not 7" in err
    assert main([*arguments, "training.steps=7", "--resume"]) == 7
    assert RunFolder(tmp_path / "run").read_job().training.steps == 7
    # Other workers leave C as it is; what makes another run is refused.
    assert main([*arguments, "cluster.workers=1", "--resume"]) == 7
    assert RunFolder(tmp_path / "run").read_job().contributions == 3
    code, _, err = run(capsys, *arguments, "seed=2", "--resume")
    assert code == 2
    assert "seed=2 would make another run" in err


def test_a_launcher_that_is_gone_ends_a_role_by_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: sent.append((pid, signum)))
    roles._launcher_gone()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_nothing_but_a_worker_imports_torch() -> None:
    modules = "windlass, workers.cli.main, workers.launch.launcher, ps.storage, ps.lifeline, ps.telemetry.logs"
    check = (
        f"import sys, {modules}\n"
        "import windlass\n"
        "windlass.PsError, windlass.JobConfig, windlass.load_job, windlass.__version__\n"
        # A client pushes and pulls: it needs the wire and the kernels, and still no torch.
        "light = set(windlass.__all__) - {'Client', 'Work'}\n"
        "assert light == {n for n in light if getattr(windlass, n) is not None}\n"
        "heavy = {'torch', 'tokenizers', 'numba', 'grpc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "windlass.Client, windlass.Work\n"
        "import windlass.testing\n"
        "assert not {'torch', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_face_knows_its_names() -> None:
    import windlass

    assert windlass.ConfigError is ConfigError
    assert "load_job" in dir(windlass)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = windlass.nonsense
