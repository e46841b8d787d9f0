"""ps.storage.shard_file: streaming, readable by safetensors, and harmless when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from ps.errors import CheckpointDamaged, CheckpointWriteFailed, StorageError
from ps.storage import ShardFileWriter, checkpoints, shard_file_name, verify
from ps.storage.files import sweep
from ps.storage.shard_file import ShardFileReader, chunk_name
from tests.support.checkpoints import make_arrays, make_table, names_in, write_checkpoint

NAMES = [("weights/000000000000000", 5), ("exp_avg/000000000000000", 5), ("weights/000000000065536", 3)]


def open_writer(folder: Path) -> ShardFileWriter:
    return ShardFileWriter(folder, 0, 2, NAMES, {"run": "r", "step": "100"})


def values(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length, np.float32)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    with open_writer(tmp_path / "step-00000100") as writer:
        for seed, (name, length) in enumerate(NAMES):
            writer.write(name, values(length, seed))
        file = writer.commit()
    path = tmp_path / "step-00000100" / "shard-00000-of-00002.safetensors"
    assert names_in(path.parent) == [file.name] == [path.name]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.size == path.stat().st_size
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert header_bytes % 8 == 0
    loaded = load_file(path)
    assert sorted(loaded) == sorted(name for name, _ in NAMES)
    for seed, (name, length) in enumerate(NAMES):
        np.testing.assert_array_equal(loaded[name], values(length, seed))
    with safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {"run": "r", "step": "100"}


def test_nothing_has_the_name_before_commit(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.write(*_first())
    (leftover,) = names_in(tmp_path)
    assert leftover != writer.path.name
    assert sweep(tmp_path) == [leftover], "a killed writer's file is recognized"
    writer.abort()


def test_abort_removes_the_temporary_file(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(*_first())
    assert names_in(tmp_path) == []
    writer.abort()
    with pytest.raises(CheckpointWriteFailed, match="given up"):
        writer.write(NAMES[1][0], values(5, 1))


def test_only_what_was_declared_is_written(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for name, wrong in [
            (NAMES[1][0], values(5, 0)),
            (NAMES[0][0], values(4, 0)),
            (NAMES[0][0], values(5, 0).astype(np.float64)),
        ]:
            with pytest.raises(ValueError, match=r"weights/000000000000000: float32\[5\] was declared"):
                writer.write(name, wrong)
        with pytest.raises(ValueError, match="not written"):
            writer.commit()
        for name, length in NAMES:
            writer.write(name, values(length, 0))
        with pytest.raises(ValueError, match="all 3 declared"):
            writer.write(*_first())
    with pytest.raises(ValueError, match="declared twice"):
        ShardFileWriter(tmp_path, 0, 1, [("a/0", 1), ("a/0", 1)], {})


def test_a_strided_array_is_written_in_order(tmp_path: Path) -> None:
    strided = values(10, 0)[::2]
    with ShardFileWriter(tmp_path, 0, 1, [("weights/0", 5)], {}) as writer:
        writer.write("weights/0", strided)
        writer.commit()
    np.testing.assert_array_equal(load_file(writer.path)["weights/0"], strided)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_no_space_left_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    table = make_table([200_000])
    previous = write_checkpoint(tmp_path, table, 2, make_arrays(table, []), version=50)
    before = {path.name: path.read_bytes() for path in previous.iterdir()}

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(
            CheckpointWriteFailed, match=r"shard-0000.-of-00002\.safetensors cannot be written: No space left"
        ):
            write_checkpoint(tmp_path, table, 2, make_arrays(table, []), version=100)
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
    assert checkpoints(tmp_path) == [previous]
    assert [path.name for path in (tmp_path / "step-00000100").glob(".*")] == [], "no space is held"


def test_a_disk_that_fills_up_midway(tmp_path: Path) -> None:
    """A real short write, from a limit of the kernel's."""
    table = make_table([200_000])
    previous = write_checkpoint(tmp_path, table, 1, make_arrays(table, []), version=50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_001, limits[1]))
    try:
        with pytest.raises(CheckpointWriteFailed, match="File too large"):
            write_checkpoint(tmp_path, table, 1, make_arrays(table, []), version=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path / "step-00000100") == []
    assert checkpoints(tmp_path) == [previous]
    assert verify(previous).version == 50


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteFailed, match=r"missing/step-1/shard-.*: No such file or directory"):
        open_writer(tmp_path / "missing" / "step-1")


def test_parts_of_an_array_are_read(tmp_path: Path) -> None:
    path = _written(tmp_path)
    reader = ShardFileReader(path)
    out = np.empty(2, np.float32)
    reader.read(NAMES[2][0], 1, out)
    np.testing.assert_array_equal(out, values(3, 2)[1:])
    with pytest.raises(CheckpointDamaged, match="has 3 elements, not the 4 of the plan"):
        reader.read(NAMES[2][0], 2, out)
    with pytest.raises(CheckpointDamaged, match="holds no exp_avg_sq/000000000000000"):
        reader.read(chunk_name("exp_avg_sq", 0), 0, out)
    reader.close()
    reader.close()


def test_every_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    path = _written(tmp_path)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointDamaged, match=path.name):
            ShardFileReader(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = _written(tmp_path)
    reader = ShardFileReader(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointDamaged, match="it was cut"):
        reader.read(NAMES[2][0], 0, np.empty(3, np.float32))
    reader.close()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [4]},
        ["F32"],
    ],
)
def test_another_header_is_refused(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"weights/0": entry}).encode()
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointDamaged, match="file"):
        ShardFileReader(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # As root every file is readable, so the answer of the system is what is replaced.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"safetensors cannot be read: Permission denied") as caught:
        ShardFileReader(path)
    assert not isinstance(caught.value, CheckpointDamaged)


def test_file_names() -> None:
    assert shard_file_name(1, 12) == "shard-00001-of-00012.safetensors"
    assert chunk_name("exp_avg", 65536) == "exp_avg/000000000065536"


def _first() -> tuple[str, np.ndarray]:
    return NAMES[0][0], values(NAMES[0][1], 0)


def _written(folder: Path) -> Path:
    with open_writer(folder) as writer:
        for seed, (name, length) in enumerate(NAMES):
            writer.write(name, values(length, seed))
        writer.commit()
    return writer.path
