"""A checkpoint of any number of shards restores into any other, bit for bit; harm of any kind shows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import CheckpointDamaged
from ps.sharding import make_plan
from ps.storage import CheckpointReader, read_manifest, verify
from ps.storage.digest import digest
from ps.types import ParameterTable
from tests.support.checkpoints import flip, make_arrays, make_table, write_checkpoint

# At least four segments, so that four shards have something each.
tables = st.lists(st.integers(1, 90_000), max_size=6).map(lambda sizes: make_table([220_000, *sizes]))


@settings(max_examples=15, deadline=None)
@given(tables, st.integers(0, 2**32), st.sampled_from([(), ("momentum",), ("exp_avg", "exp_avg_sq")]))
def test_any_number_of_shards(table: ParameterTable, seed: int, moments: tuple[str, ...]) -> None:
    arrays = make_arrays(table, moments, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), table, 3, arrays)
        with CheckpointReader(folder, read_manifest(folder)[0]) as reader:
            for num_shards in (1, 2, 4):
                plan = make_plan(table, num_shards)
                restored = {name: np.full(plan.size, np.nan, np.float32) for name in reader.arrays}
                for shard in range(num_shards):
                    for chunk in plan.chunks_of(shard):
                        for array, flat in restored.items():
                            reader.read(array, chunk.start, flat[chunk.start : chunk.stop])
                for array, flat in restored.items():
                    assert flat.tobytes() == arrays[array].tobytes()
        single = write_checkpoint(Path(name) / "single", table, 1, arrays)
        assert digest(single) == digest(folder)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_range(data: st.DataObject) -> None:
    table = make_table([220_000, 70_001, 5])
    arrays = make_arrays(table, ("exp_avg",))
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), table, 3, arrays)
        with CheckpointReader(folder, read_manifest(folder)[0]) as reader:
            for _ in range(10):
                start = data.draw(st.integers(0, reader.plan.size))
                stop = data.draw(st.integers(start, reader.plan.size))
                out = np.empty(stop - start, np.float32)
                reader.read("exp_avg", start, out)
                assert out.tobytes() == arrays["exp_avg"][start:stop].tobytes()
                needed = {file.name for file in reader.files_for([(start, stop)])}
                owners = {chunk.shard for chunk in reader.plan.chunks if chunk.start < stop and chunk.stop > start}
                assert needed == ({reader.manifest.files[s].name for s in owners} if start < stop else set())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_found_and_named(data: st.DataObject) -> None:
    table = make_table([131_072, 300])
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), table, 2, make_arrays(table, []))
        file = data.draw(st.sampled_from(sorted(folder.iterdir())))
        byte = data.draw(st.integers(0, file.stat().st_size - 1))
        bit = data.draw(st.integers(-1, 7))
        if bit < 0:
            os.truncate(file, byte)
        else:
            flip(file, byte, bit)
        with pytest.raises(CheckpointDamaged, match=file.name):
            verify(folder)
