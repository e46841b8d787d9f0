"""What goes wrong outside of the program is said in one clear line, and no process is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.eventually import eventually

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(90)]

TIMEOUT_S = 60.0
MARK = "WINDLASS_TEST_MARK"
ERROR = "windlass: error: "
ROOT = Path(__file__).parents[2]
#: Mounts a small file system that only the command and its children see, and that goes with them.
MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Ended:
    """A command that has ended, with every process that it started."""

    code: int
    out: str
    err: str

    def error(self, code: int = 1) -> str:
        """The one line with which it failed."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith(ERROR)
        return lines[0].removeprefix(ERROR)


def left_behind(mark: str) -> list[psutil.Process]:
    """The processes that inherited a mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def windlass(*arguments: object, full: tuple[str, Path] | None = None) -> Ended:
    """Run the command line to its end.

    Args:
        full: a size and a folder: the folder is on a disk of this size.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "workers.cli.main", *map(str, arguments)]
    if full is not None:
        full[1].mkdir(parents=True, exist_ok=True)
        command = [*UNSHARE, "sh", "-c", MOUNT, "sh", full[0], str(full[1]), *command]
    environment = {**os.environ, MARK: mark, "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
        eventually(lambda: not left_behind(mark), 8.0, "every process to end")
    finally:
        for one in left_behind(mark):
            one.send_signal(signal.SIGKILL)
    return Ended(process.returncode, out, err)


UNSHARE = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]


def can_mount() -> bool:
    try:
        command = [*UNSHARE, "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here (unshare -m)")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a run of 4 steps with a checkpoint every 2."""
    place = tmp_path_factory.mktemp("bad")
    lines = [f"def f{i}(x): return x + {i}  # the quick brown fox" for i in range(2000)]
    (place / "text.txt").write_text("\n".join(lines))
    ended = windlass("train", *job(place, place / "run"))
    assert ended.code == 0, ended
    return place


def job(place: Path, run: Path) -> list[str]:
    return [
        f"run_dir={run}",
        f"data.paths={place / 'text.txt'}",
        f"data.cache_dir={place / 'cache'}",
        *["data.vocab_size=300", "data.sequence_length=32", "evaluation.max_sequences=8"],
        *["model.num_layers=1", "model.hidden_size=64", "model.num_heads=2"],
        *["batch.micro_batch_size=2", "training.steps=4", "checkpoint.every_steps=2", "schedule.warmup_steps=1"],
    ]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    return run


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def log(run: Path, name: str) -> str:
    return (run / "logs" / f"{name}.log").read_text()


# -- Ports --------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[str]:
    """An address at which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_coordinators_port_is_in_use(taken: str, tmp_path: Path) -> None:
    error = windlass("coordinator", f"run_dir={tmp_path / 'run'}", "--listen", taken).error()
    assert f"cannot listen on {taken}" in error
    assert "in use" in error


def test_a_shards_ports_are_in_use(taken: str) -> None:
    command = ["shard", "--coordinator", "127.0.0.1:1", "--index", "0"]
    error = windlass(*command, "--listen", taken).error()
    assert f"cannot listen on {taken}" in error
    error = windlass(*command, "--metrics-listen", taken).error()
    assert f"cannot serve metrics on {taken}" in error


# -- Files --------------------------------------------------------------------------------------


def test_files_that_are_missing(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert str(nothing) in windlass("train", f"{nothing}.yaml").error(2)
    assert str(nothing) in windlass("resume", nothing).error(2)
    run = tmp_path / "run"
    error = windlass("train", f"run_dir={run}", f"data.paths={nothing}.txt", f"data.cache_dir={tmp_path}").error()
    assert f"{nothing}.txt" in error
    # Once the text is there, the same command works: the folder holds no run.
    assert not (run / "config.json").exists()


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = windlass("train", f"run_dir={tmp_path / 'file' / 'run'}").error()
    assert str(tmp_path / "file") in error


# -- Checkpoints --------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard_files(run: Path, name: str) -> list[Path]:
    return sorted((run / "checkpoints" / name).glob("shard-*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run: Path) -> None:
    flip(shard_files(run, "step-00000004")[1])
    ended = windlass("resume", run, "training.steps=6")
    assert ended.code == 0, ended
    assert "Traceback" not in log(run, "coordinator-0") + log(run, "shard-1")
    assert "step-00000004 cannot be loaded by shard 1" in log(run, "coordinator-0")
    # Steps 2 and 3 were computed again, and every step has one line.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(6))
    assert checkpoints(run)[-1] == "step-00000006"


def test_a_damaged_manifest_is_named_and_the_one_before_is_used(run: Path) -> None:
    manifest = run / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    ended = windlass("resume", run, "training.steps=6")
    assert ended.code == 0, ended
    assert str(manifest) in log(run, "coordinator-0")
    assert checkpoints(run)[-1] == "step-00000006"


def test_with_every_checkpoint_damaged_nothing_is_started_anew(run: Path) -> None:
    names = checkpoints(run)
    assert len(names) == 3
    for name in names:
        flip(shard_files(run, name)[0])
    before = (run / "metrics.jsonl").read_bytes()
    error = windlass("resume", run, "training.steps=6").error()
    for name in names:
        assert name in error
    assert "restore one" in error
    assert (run / "metrics.jsonl").read_bytes() == before
    assert checkpoints(run) == names


def test_a_damaged_checkpoint_is_not_evaluated(run: Path) -> None:
    damaged = shard_files(run, "step-00000004")[0]
    flip(damaged)
    for command in ("evaluate", "sample", "digest"):
        assert str(damaged) in windlass(command, run).error()


# -- No space -----------------------------------------------------------------------------------


@needs_mount
def test_no_space_for_the_first_checkpoint(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = windlass("train", *job(place, run), full=("64k", run / "checkpoints"))
    error = ended.error()
    assert "the first checkpoint could not be written" in error
    assert "No space left on device" in error
    assert str(run / "checkpoints") in error


@needs_mount
def test_no_space_for_the_last_checkpoint(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    size = sum(path.stat().st_size for path in (place / "run/checkpoints/step-00000004").iterdir())
    error = windlass("train", *job(place, run), full=(str(size * 5 // 2), run / "checkpoints")).error()
    assert "the last checkpoint could not be written" in error
    assert "No space left on device" in error
    # All of it was computed.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(4))


@needs_mount
def test_no_space_for_the_journal(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    error = windlass("train", *job(place, run), "training.steps=200", full=("8k", run / "journal")).error()
    assert "journal" in error
    assert "No space left on device" in error


@needs_mount
def test_no_space_at_all(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    error = windlass("train", *job(place, run), full=("16k", run)).error()
    assert str(run) in error
