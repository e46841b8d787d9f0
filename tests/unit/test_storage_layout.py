"""ps.storage.layout: which checkpoints exist, and which are removed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from ps.errors import CheckpointWriteFailed, StorageError
from ps.storage import layout
from ps.storage.layout import checkpoint_folder, checkpoints, newest, prepare, retain, version_of
from tests.support.checkpoints import flip, make_arrays, make_table, names_in, write_checkpoint

TABLE = make_table([100])
ARRAYS = make_arrays(TABLE, [])


def make(folder: Path, versions: Sequence[int], incomplete: Sequence[int] = ()) -> None:
    for version in versions:
        write_checkpoint(folder, TABLE, 1, ARRAYS, version)
    for version in incomplete:
        (write_checkpoint(folder, TABLE, 1, ARRAYS, version) / "manifest.json").unlink()


def versions_in(folder: Path) -> list[int | None]:
    return [version_of(path) for path in sorted(folder.iterdir())]


def test_names() -> None:
    assert checkpoint_folder(Path("c"), 100) == Path("c/step-00000100")
    assert version_of(Path("c/step-00000100")) == 100
    assert version_of(checkpoint_folder(Path("c"), 10**9)) == 10**9
    assert version_of(Path("c/step-100")) is None
    assert version_of(Path("c/step-00000100.old")) is None


def test_only_complete_ones_exist_and_the_newest_is_last(tmp_path: Path) -> None:
    make(tmp_path, [20, 10, 10**9], incomplete=[30])
    (tmp_path / "step-00000040").symlink_to(tmp_path / "step-00000010")
    (tmp_path / "step-00000050").touch()
    (tmp_path / "notes").mkdir()
    assert [version_of(folder) for folder in checkpoints(tmp_path)] == [10, 20, 10**9]
    assert newest(tmp_path) == tmp_path / "step-1000000000"


def test_no_folder_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "missing") == []
    assert newest(tmp_path / "missing") is None
    assert retain(tmp_path / "missing", 1) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file cannot be read: Not a directory"):
        checkpoints(tmp_path / "file")


def test_an_older_one_that_is_still_being_written_stays(tmp_path: Path) -> None:
    make(tmp_path, [10, 40], incomplete=[20, 30])
    assert [version_of(folder) for folder in retain(tmp_path, 1, 40, writing=[30, 40])] == [10, 20]
    assert versions_in(tmp_path) == [30, 40]


def test_the_newest_are_kept_and_old_attempts_removed(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30, 40], incomplete=[5, 35, 50])
    (tmp_path / "notes").touch()
    removed = retain(tmp_path, 2)
    assert [version_of(folder) for folder in removed] == [5, 10, 20, 35]
    assert versions_in(tmp_path) == [None, 30, 40, 50]
    assert retain(tmp_path, 2) == []


def test_without_a_complete_one_nothing_is_removed(tmp_path: Path) -> None:
    make(tmp_path, [], incomplete=[10, 20])
    assert retain(tmp_path, 1) == []
    assert versions_in(tmp_path) == [10, 20]


@pytest.mark.parametrize("harm", ["cut", "missing", "manifest", "bit", "manifest bit"])
def test_the_last_good_one_is_never_removed(tmp_path: Path, harm: str) -> None:
    make(tmp_path, [10, 20, 30, 40])
    for version in (30, 40):
        folder = checkpoint_folder(tmp_path, version)
        file = folder / "shard-00000-of-00001.safetensors"
        if harm == "cut":
            os.truncate(file, 100)
        elif harm == "missing":
            file.unlink()
        elif harm == "bit":
            flip(file, -1)
        elif harm == "manifest bit":
            flip(folder / "manifest.json", 500)
        else:
            (folder / "manifest.json").write_text("{")
    damaged: list[Path] = []
    assert [version_of(folder) for folder in retain(tmp_path, 2, on_damaged=damaged.append)] == [10]
    assert versions_in(tmp_path) == [20, 30, 40]
    assert [version_of(folder) for folder in damaged] == [40, 30]


def test_keeping_none_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        retain(tmp_path, 0)


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed halfway through a removal, what is left is no checkpoint."""
    make(tmp_path, [10, 20])

    class Killed(Exception):
        pass

    def kill(path: Path) -> None:
        assert names_in(path) == ["shard-00000-of-00001.safetensors"]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(layout, "remove_tree", kill)
        with pytest.raises(Killed):
            retain(tmp_path, 1)
    assert checkpoints(tmp_path) == [tmp_path / "step-00000020"]
    assert retain(tmp_path, 1) == [tmp_path / "step-00000010"]


def test_what_cannot_be_removed_is_logged_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, [10, 20, 30])
    remove_tree = layout.remove_tree

    def stubborn(path: Path) -> None:
        if path.name == "step-00000010":
            raise StorageError(f"{path} cannot be removed: Device or resource busy")
        remove_tree(path)

    monkeypatch.setattr(layout, "remove_tree", stubborn)
    with caplog.at_level(logging.WARNING):
        assert retain(tmp_path, 1) == [tmp_path / "step-00000020"]
    assert "step-00000010 cannot be removed: Device or resource busy" in caplog.text


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", [10, 20])
    (tmp_path / "precious").write_text("x")
    (tmp_path / "checkpoints" / "step-00000010" / "link").symlink_to(tmp_path)
    retain(tmp_path / "checkpoints", 1)
    assert (tmp_path / "precious").read_text() == "x"


def test_prepare_makes_an_empty_folder(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", [10, 20])
    assert prepare(tmp_path / "checkpoints", 20) == tmp_path / "checkpoints" / "step-00000020"
    assert names_in(tmp_path / "checkpoints" / "step-00000020") == []
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000010"
    assert names_in(prepare(tmp_path / "new" / "checkpoints", 0)) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointWriteFailed, match="file/step-00000000 cannot be removed: Not a directory"):
        prepare(tmp_path / "file", 0)
