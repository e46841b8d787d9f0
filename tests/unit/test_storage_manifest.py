"""ps.storage.manifest: the manifest comes last, says everything, and is read with suspicion."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from ps.errors import CheckpointDamaged, CheckpointNotFound, CheckpointWriteFailed, StorageError
from ps.sharding import make_plan
from ps.storage import Manifest, checkpoints, read_manifest, verify, write_manifest
from ps.storage.manifest import decode, encode
from ps.types import ParameterTable, TensorSpec
from tests.support.checkpoints import make_arrays, make_manifest, make_table, names_in, sealed, write_shard_file

TABLE = make_table([150_000, 3])


def written(folder: Path, version: int = 100) -> Manifest:
    """A folder with its shard files, and the manifest that is not in it yet."""
    plan = make_plan(TABLE, 2)
    files = [write_shard_file(folder, plan, shard, make_arrays(TABLE, ["exp_avg"])) for shard in range(2)]
    return make_manifest(plan, files, version, ["exp_avg"])


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000100"
    manifest = written(folder)
    with pytest.raises(CheckpointNotFound):
        verify(folder)
    sha256 = write_manifest(folder, manifest)
    assert read_manifest(folder) == (manifest, sha256)
    assert sha256 == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert verify(folder) == manifest


def test_every_number_survives_exactly(tmp_path: Path) -> None:
    table = ParameterTable((TensorSpec("scalar", (), 0), TensorSpec('wte.weight é/"', (3, 70_000), 1)))
    plan = make_plan(table, 1)
    file = write_shard_file(tmp_path, plan, 0, make_arrays(table, []))
    base = make_manifest(plan, [file], 7, [])
    for loss in (None, 0.1 + 0.2, 5e-324, math.inf, -math.inf, 3.0):
        manifest = dataclasses.replace(base, evaluation=loss)
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path)[0] == manifest
    write_manifest(tmp_path, dataclasses.replace(base, evaluation=math.nan))
    evaluation = read_manifest(tmp_path)[0].evaluation
    assert evaluation is not None
    assert math.isnan(evaluation)


def test_it_is_not_written_before_all_files_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000100"
    manifest = written(folder)
    path = folder / manifest.files[1].name
    path.rename(folder / "elsewhere")
    with pytest.raises(CheckpointWriteFailed, match=r"not complete: .*shard-00001.* is missing"):
        write_manifest(folder, manifest)
    path.write_bytes(b"short")
    with pytest.raises(CheckpointWriteFailed, match=r"shard-00001.* has 5 bytes instead of"):
        write_manifest(folder, manifest)
    assert checkpoints(tmp_path) == []


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000100"
    manifest = dataclasses.replace(written(folder), skipped=3)
    with pytest.raises(CheckpointWriteFailed, match="'version' 100 is not 'applied' 90"):
        write_manifest(folder, manifest)
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_no_space_left_means_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    folder = tmp_path / "step-00000100"
    manifest = written(folder)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointWriteFailed, match=r"manifest\.json cannot be written: No space left"):
            write_manifest(folder, manifest)
    assert checkpoints(tmp_path) == []
    assert len(names_in(folder)) == 2


def test_no_manifest_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointNotFound, match=r"is not a complete checkpoint: it has no manifest\.json"):
            read_manifest(folder)


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read: Permission denied") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, CheckpointDamaged)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", 1, "format 1; this version of Windlass reads format 2"),
        ("format", "1", "'format' is '1', not of type int"),
        ("version", True, "'version' is True, not of type int"),
        ("version", -1, "'version' is -1, less than 0"),
        ("version", 101, r"'version' 101 is not 'applied' 90 \+ 'skipped' 10"),
        ("contributions", 0, "'contributions' is 0, less than 1"),
        ("num_shards", 3, "2 files for 3 shards"),
        ("scaler", [], r"'scaler' is \[\], not of type dict"),
        ("scaler", {"scale": 1.0}, "'hysteresis' is missing"),
        ("evaluation", "low", "'evaluation' is 'low', not a number"),
        ("moments", ["a", "a"], "a name twice"),
        ("moments", ["../a"], "not a name"),
        ("files", [{"name": "../x", "sha256": "0" * 64, "size": 1}] * 2, "not a file of this folder"),
        ("files", [{"name": ".x", "sha256": "0" * 64, "size": 1}] * 2, "not a file of this folder"),
        ("files", [{"name": "x", "sha256": "0", "size": 1}] * 2, "not a file of this folder"),
        ("files", ["x", "y"], "an entry of 'files' is 'x', not an object"),
        ("table", [["a", [0], 0]], "not .name, shape, group."),
        ("table", [["a", [3]]], "not .name, shape, group."),
        ("job", None, "'job' is None, not of type dict"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    fields = json.loads(encode(written(tmp_path)))
    fields[key] = value
    path = tmp_path / "manifest.json"
    path.write_bytes(sealed(fields))
    with pytest.raises(CheckpointDamaged, match=rf"{path}: .*{reason}"):
        read_manifest(tmp_path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    fields = json.loads(encode(written(tmp_path)))
    for key in fields:
        rest = {name: value for name, value in fields.items() if name != key}
        with pytest.raises(CheckpointDamaged, match=f"manifest.json: {key!r} is missing"):
            decode(sealed(rest) if key != "sha256" else json.dumps(rest).encode(), tmp_path / "manifest.json")


def test_a_cut_manifest_is_damaged(tmp_path: Path) -> None:
    data = encode(written(tmp_path))
    for cut in (0, 1, len(data) // 2, len(data) - 2):
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json: not JSON"):
            decode(data[:cut], tmp_path / "manifest.json")
    for text in (b"[]", b"\xff\xfe", b"3"):
        with pytest.raises(CheckpointDamaged):
            decode(text, tmp_path / "manifest.json")


def test_a_renamed_folder_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000100"
    write_manifest(folder, written(folder))
    folder.rename(tmp_path / "best")
    assert read_manifest(tmp_path / "best")[0].version == 100
    (tmp_path / "best").rename(tmp_path / "step-00000200")
    with pytest.raises(CheckpointDamaged, match="'version' is 100; the folder was renamed"):
        read_manifest(tmp_path / "step-00000200")
