"""`windlass checkpoint list`, `verify` and `digest` on checkpoints that nobody trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ps.storage.digest import digest
from ps.storage.manifest import Manifest
from tests.support.checkpoints import flip, make_arrays, make_table, write_checkpoint
from tests.support.unreadable import make_unreadable
from workers.cli import checkpoint
from workers.cli.main import main
from workers.launch.folder import RunFolder
from workers.launch.jobs import resolve

TABLE = make_table([131_072, 300])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    path = tmp_path / "run"
    RunFolder(path).write_job(resolve(None, [f"run_dir={path}"]))
    for version in (10, 20, 30):
        write_checkpoint(path / "checkpoints", TABLE, 2, make_arrays(TABLE, [], seed=version), version)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    code = main(["checkpoint", *arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_a_list_says_what_there_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints" / "step-00000020" / "manifest.json", 300)
    code, lines, err = call(capsys, "list", str(run))
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines] == ["checkpoint", "step-00000010", "step-00000020", "step-00000030"]
    assert lines[1].split() == ["step-00000010", "9", "1", "2", "0.5", "1.2500", "2026-01-02T03:04:05+00:00"]
    assert "damaged: " in lines[2]
    assert "step-00000020/manifest.json: " in lines[2]


def test_good_ones_are_good(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = call(capsys, "verify", str(run))
    assert (code, err) == (0, "")
    assert lines == [f"step-000000{version}: good, 2 files, 0.5 MiB" for version in (10, 20, 30)]


@pytest.mark.parametrize("gone", ["manifest.json", "shard-00001-of-00002.safetensors"])
def test_one_that_the_run_removes_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Before its manifest is read, or after it."""
    oldest, real = run / "checkpoints" / "step-00000010", checkpoint.verify_checkpoint

    def verify(folder: Path) -> Manifest:
        if folder != oldest:
            return real(folder)
        (folder / gone).unlink()
        try:
            return real(folder)
        finally:
            shutil.rmtree(folder)

    monkeypatch.setattr(checkpoint, "verify_checkpoint", verify)
    code, lines, _ = call(capsys, "verify", str(run))
    assert code == 0
    assert [line.split(",")[0] for line in lines] == [
        "step-00000010: removed meanwhile",
        "step-00000020: good",
        "step-00000030: good",
    ]


def test_a_damaged_one_is_named_and_is_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "step-00000020" / "shard-00001-of-00002.safetensors"
    flip(file, 100_000)
    code, lines, _ = call(capsys, "verify", str(run))
    assert code == 1
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["good", "damaged", "good"]
    assert f"{file} has the SHA-256 " in lines[1]
    code, lines, _ = call(capsys, "verify", str(run / "checkpoints" / "step-00000030"))
    assert (code, len(lines)) == (0, 1)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001-of-00002.safetensors"])
def test_one_that_nobody_may_read_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = run / "checkpoints" / "step-00000020" / name
    make_unreadable(monkeypatch, file, looked_at=True)
    code, lines, _ = call(capsys, "verify", str(run))
    assert code == 1
    assert lines[1] == f"step-00000020: {file} cannot be read: Permission denied"
    assert [line.split(", ")[0] for line in lines[::2]] == ["step-00000010: good", "step-00000030: good"]
    code, lines, _ = call(capsys, "list", str(run))
    assert (code, "damaged" in lines[2], "cannot be read" in lines[2]) == (0, False, name == "manifest.json")


@pytest.mark.parametrize("command", ["list", "verify", "digest"])
def test_a_folder_that_cannot_be_read_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file = run / "checkpoints" / "step-00000020" / "manifest.json"
    make_unreadable(monkeypatch, file)
    code, lines, err = call(capsys, command, str(run))
    assert (code, lines, err) == (1, [], f"windlass: error: {file} cannot be read: Permission denied\n")


def test_the_digest_is_that_of_the_newest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = call(capsys, "digest", str(run))
    assert (code, lines) == (0, [digest(run / "checkpoints" / "step-00000030")])


def test_where_there_is_none_it_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    for command in ("list", "verify", "digest"):
        code, lines, err = call(capsys, command, str(run))
        assert (code, lines, "has no complete checkpoint yet" in err) == (1, [], True)
        code, lines, err = call(capsys, command, str(tmp_path))
        assert (code, lines, "holds no run" in err) == (2, [], True)


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = call(capsys)
    assert code == 0
    assert {"list", "verify", "digest"} <= {line.split()[0] for line in lines if line.strip()}
