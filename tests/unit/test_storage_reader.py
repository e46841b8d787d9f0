"""ps.storage.reader and ps.storage.digest: what is read is what was written, or an error."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ps.errors import CheckpointDamaged, CheckpointNotFound, MismatchError
from ps.sharding import make_plan
from ps.storage import CheckpointReader, read_manifest
from ps.storage.digest import digest, digest_arrays
from ps.types import ParameterTable
from tests.support.checkpoints import Arrays, make_arrays, make_table, write_checkpoint

TABLE = make_table([150_000, 100, 3, 120_000])
ARRAYS = make_arrays(TABLE, ["exp_avg"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, TABLE, 3, ARRAYS)


def open_reader(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder, read_manifest(folder)[0])


def test_a_range_across_chunks_and_files(folder: Path) -> None:
    with open_reader(folder) as reader:
        assert reader.arrays == ("weights", "exp_avg")
        for start, stop in [(0, reader.plan.size), (65_535, 65_537), (65_000, 200_000), (7, 7), (64, 65)]:
            for array in reader.arrays:
                out = np.empty(stop - start, np.float32)
                reader.read(array, start, out)
                assert out.tobytes() == ARRAYS[array][start:stop].tobytes()


def test_only_the_files_needed_are_touched(folder: Path) -> None:
    with open_reader(folder) as reader:
        chunk = reader.plan.chunks[1]
        (needed,) = reader.files_for([(chunk.start, chunk.stop)])
        assert needed == reader.manifest.files[chunk.shard]
        assert reader.files_for([(0, reader.plan.size)]) == reader.manifest.files
        assert reader.files_for([(5, 5), (0, 1)]) == reader.files_for([(0, 1)])
        assert reader.files_for([]) == ()
        for file in reader.manifest.files:
            if file != needed:
                (folder / file.name).unlink()
        reader.verify([needed])
        reader.read("weights", chunk.start, np.empty(chunk.size, np.float32))
        with pytest.raises(CheckpointDamaged, match="is missing"):
            reader.read("weights", 0, np.empty(1, np.float32))


def test_a_flipped_bit_is_found(folder: Path) -> None:
    path = folder / "shard-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    after = hashlib.sha256(data).hexdigest()
    with open_reader(folder) as reader:
        reader.verify(reader.manifest.files[:1])
        with pytest.raises(CheckpointDamaged, match=f"{path} has the SHA-256 {after} instead of {before}"):
            reader.verify()
    with pytest.raises(CheckpointDamaged):
        digest(folder)


def test_a_truncated_file_is_found(folder: Path) -> None:
    path = folder / "shard-00002-of-00003.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with (
        open_reader(folder) as reader,
        pytest.raises(CheckpointDamaged, match=f"{path} has {size - 1} bytes instead of {size}"),
    ):
        reader.verify()


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "shard-00000-of-00003.safetensors").unlink()
    with (
        open_reader(folder) as reader,
        pytest.raises(CheckpointDamaged, match=r"shard-00000-of-00003\.safetensors is missing"),
    ):
        reader.verify()


def test_a_whole_checkpoint_verifies(folder: Path) -> None:
    with open_reader(folder) as reader:
        reader.verify()
        reader.verify([])


def test_another_optimizers_state_is_named(folder: Path) -> None:
    with (
        open_reader(folder) as reader,
        pytest.raises(MismatchError, match="holds weights, exp_avg and no 'momentum'"),
    ):
        reader.read("momentum", 0, np.empty(1, np.float32))


def test_a_wrong_range_or_buffer_is_refused(folder: Path) -> None:
    with open_reader(folder) as reader:
        size = reader.plan.size
        for start, out in [
            (-1, np.empty(2, np.float32)),
            (size - 1, np.empty(2, np.float32)),
            (0, np.empty(2, np.float64)),
            (0, np.empty((2, 2), np.float32)),
            (0, np.empty(4, np.float32)[::2]),
        ]:
            with pytest.raises(ValueError, match=r"outside of the flat space|not a contiguous"):
                reader.read("weights", start, out)


def test_another_layout_is_refused(folder: Path) -> None:
    manifest, _ = read_manifest(folder)
    with pytest.raises(CheckpointDamaged, match=r"was written with the plan 0+.*use the version 0\.1\.0"):
        CheckpointReader(folder, dataclasses.replace(manifest, plan_digest="0" * 64))
    with pytest.raises(CheckpointDamaged, match="has no possible plan"):
        CheckpointReader(folder, dataclasses.replace(manifest, table=ParameterTable(())))
    with pytest.raises(CheckpointDamaged, match=r"names shard-00002.* as the file of shard 0"):
        CheckpointReader(folder, dataclasses.replace(manifest, files=manifest.files[::-1]))


def test_the_digest_is_what_its_docstring_says(folder: Path) -> None:
    expected = hashlib.sha256(struct.pack("<Q", 90))
    for tensor, offset in zip(TABLE.tensors, make_plan(TABLE, 1).offsets, strict=True):
        for array in ("weights", "exp_avg"):
            name = tensor.name.encode()
            expected.update(struct.pack("<I", len(name)) + name)
            expected.update(struct.pack("<I", len(array)) + array.encode())
            expected.update(struct.pack("<Q", tensor.size))
            expected.update(ARRAYS[array][offset : offset + tensor.size].tobytes())
    assert digest(folder) == expected.hexdigest()


def test_the_digest_sees_everything_but_the_padding() -> None:
    def of(arrays: Arrays, table: ParameterTable = TABLE, applied: int = 90) -> str:
        def read(array: str, start: int, out: np.ndarray) -> None:
            out[:] = arrays[array][start : start + out.size]

        return digest_arrays(table, ["exp_avg"], applied, read)

    base = of(ARRAYS)
    assert of(ARRAYS, applied=91) != base
    for array in ARRAYS:
        offsets = make_plan(TABLE, 1).offsets
        for index in (0, 149_999, offsets[2], offsets[3] + 119_999):
            changed = {name: flat.copy() for name, flat in ARRAYS.items()}
            changed[array].view(np.uint32)[index] ^= 1
            assert of(changed) != base
        changed = {name: flat.copy() for name, flat in ARRAYS.items()}
        changed[array][offsets[2] + 3] = 1.0
        assert of(changed) == base
    renamed = ParameterTable((dataclasses.replace(TABLE.tensors[0], name="other"), *TABLE.tensors[1:]))
    assert of(ARRAYS, renamed) != base


def test_a_tensor_longer_than_a_piece(tmp_path: Path) -> None:
    table = make_table([(1 << 20) + 5])
    arrays = make_arrays(table, [])
    a, b = (write_checkpoint(tmp_path / str(shards), table, shards, arrays) for shards in (1, 2))
    assert digest(a) == digest(b)


def test_no_checkpoint_no_digest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        digest(tmp_path)


def test_storage_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, ps.storage, ps.storage.digest\n"
        "assert not {'torch', 'grpc'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
