"""ps.storage.files and ps.storage.storage_proof."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ps.errors import StorageError
from ps.storage.files import (
    TEMPORARY_SUFFIX,
    AtomicFile,
    make_directory,
    remove_tree,
    sweep,
    write_all,
    write_atomic,
)
from ps.storage.storage_proof import check_nonce, remove_nonce, write_nonce
from tests.support.checkpoints import names_in


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.json"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(fd: int) -> None:
        events.append("fsync " + str(Path(f"/proc/self/fd/{fd}").readlink()).removeprefix(str(tmp_path)))
        fsync(fd)

    def log_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    write_atomic(tmp_path / "a", b"data")
    assert [event.split()[0] for event in events] == ["fsync", "rename", "fsync"]
    assert events[0].endswith(TEMPORARY_SUFFIX)
    assert events[2] == "fsync "
    # What does not outlive the host does not wait for its disk.
    events.clear()
    write_atomic(tmp_path / "a", b"news", durable=False)
    assert events == ["rename"]
    assert (tmp_path / "a").read_bytes() == b"news"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match=r"/a cannot be written: No space left on device"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    write_atomic(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_an_abandoned_file_is_recognized_and_swept(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "a")  # a killed writer: neither commit nor abort
    file.write(b"half")
    (leftover,) = names_in(tmp_path)
    (tmp_path / ".hidden").touch()
    (tmp_path / f"notes{TEMPORARY_SUFFIX}").touch()
    assert sweep(tmp_path) == [leftover]
    assert names_in(tmp_path) == [".hidden", f"notes{TEMPORARY_SUFFIX}"]
    assert sweep(tmp_path / "missing") == []
    file.abort()


def test_a_committed_file_cannot_be_written(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "a") as file:
        file.commit()
        with pytest.raises(ValueError, match="committed or aborted"):
            file.write(b"more")
    assert (tmp_path / "a").exists()


def test_write_all_to_a_closed_file_is_an_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a", os.O_RDONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            write_all(fd, b"data")
    finally:
        os.close(fd)


def test_remove_tree_never_follows_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "below" / "link").symlink_to(outside / "precious")
    (tmp_path / "top").symlink_to(outside)
    remove_tree(tree)
    remove_tree(tmp_path / "top")
    remove_tree(tmp_path / "never was")
    assert names_in(tmp_path) == ["outside"]
    assert (outside / "precious").read_text() == "x"


def test_remove_tree_says_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "tree").mkdir()
    monkeypatch.setattr(os, "rmdir", busy)
    with pytest.raises(StorageError, match=r"tree cannot be removed: Device or resource busy"):
        remove_tree(tmp_path / "tree")


def test_make_directory_under_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/below cannot be created: Not a directory"):
        make_directory(tmp_path / "file" / "below")


def test_one_storage_is_proved(tmp_path: Path) -> None:
    name, nonce = write_nonce(tmp_path / "checkpoints")
    check_nonce(tmp_path / "checkpoints", name, nonce)
    remove_nonce(tmp_path / "checkpoints", name)
    remove_nonce(tmp_path / "checkpoints", name)
    assert names_in(tmp_path / "checkpoints") == []


def test_another_folder_is_found_out(tmp_path: Path) -> None:
    name, nonce = write_nonce(tmp_path / "coordinator")
    (tmp_path / "shard").mkdir()
    for folder in (tmp_path / "shard", tmp_path / "missing"):
        with pytest.raises(StorageError, match=r"of this shard is not the coordinator's.*set checkpoint\.dir"):
            check_nonce(folder, name, nonce)


@pytest.mark.parametrize("content", [b"another", b"", b"\xff\xfe"])
def test_another_nonce_is_found_out(tmp_path: Path, content: bytes) -> None:
    name, nonce = write_nonce(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StorageError, match="holds another nonce"):
        check_nonce(tmp_path, name, nonce)


def test_a_nonce_name_leads_nowhere_else(tmp_path: Path) -> None:
    name, nonce = write_nonce(tmp_path / "other")
    with pytest.raises(StorageError, match="not the name of a nonce file"):
        check_nonce(tmp_path / "checkpoints", f"../other/{name}", nonce)


def test_a_read_only_folder_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, nonce = write_nonce(tmp_path)
    # As root every folder is writable, so the answer of the system is what is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="not writable for this shard"):
        check_nonce(tmp_path, name, nonce)


def test_a_killed_coordinators_nonce_is_swept(tmp_path: Path) -> None:
    name, _ = write_nonce(tmp_path)
    assert sweep(tmp_path) == [name]
