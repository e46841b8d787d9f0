"""The manifest: what a checkpoint is, as JSON, written last. A checkpoint exists when it does.

It names the SHA-256 of every file, and ends with its own: not one flipped bit of a checkpoint is taken for data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ps import failpoints
from ps.errors import CheckpointDamaged, CheckpointNotFound, CheckpointWriteFailed, StorageError
from ps.storage.files import reason, write_atomic
from ps.storage.shard_file import ShardFile
from ps.types import ParameterTable, TensorSpec

MANIFEST_NAME = "manifest.json"
#: Counts up when a manifest or its files change in a way that older readers would get wrong.
FORMAT = 2

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_END = b"\n}\n"
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')


@dataclass(frozen=True)
class ScalerState:
    """The dynamic loss scaler after the checkpoint's last decision."""

    scale: float
    hysteresis: int
    #: The step of the last overflow; negative: none yet.
    last_overflow: int


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint but the numbers in its files."""

    #: Decided steps: `applied` + `skipped`.
    version: int
    applied: int
    skipped: int
    run_id: str
    #: C as of the last decision.
    contributions: int
    scaler: ScalerState
    table: ParameterTable
    num_shards: int
    plan_digest: str
    #: The optimizer's moments, in the order of the digest.
    moments: tuple[str, ...]
    #: One per shard, in the order of the shards.
    files: tuple[ShardFile, ...]
    #: The resolved configuration.
    job: dict[str, Any]
    #: The last held-out loss, in nats per token.
    evaluation: float | None
    windlass_version: str
    #: UTC, ISO 8601.
    created: str
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Complete a checkpoint.

    Returns:
        The SHA-256 of the manifest, in hex.

    Raises:
        CheckpointWriteFailed: a file that it names is not in the folder, whole, or the manifest
            cannot be written; the checkpoint does not exist.
    """
    data = encode(manifest)
    path = folder / MANIFEST_NAME
    try:
        decode(data, path)
        for file in manifest.files:
            _check_size(folder, file)
        failpoints.hit("manifest.before", folder.name)
        write_atomic(path, data)
        failpoints.hit("manifest.after", folder.name)
    except (StorageError, OSError) as error:
        raise CheckpointWriteFailed(f"the checkpoint {folder} is not complete: {error}") from error
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read a checkpoint's manifest.

    Returns:
        The manifest, and its SHA-256 in hex.

    Raises:
        CheckpointNotFound: there is none, so there is no checkpoint.
        CheckpointDamaged: it is not a manifest, or one of a format that this version does not
            know; names the file and the reason.
        StorageError: it cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound(f"{folder} is not a complete checkpoint: it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
    return decode(data, path), hashlib.sha256(data).hexdigest()


def _check_size(folder: Path, file: ShardFile) -> None:
    path = folder / file.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is missing") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
    if size != file.size:
        raise CheckpointDamaged(f"{path} has {size} bytes instead of {file.size}")


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON.

    Raises:
        TypeError, ValueError: the job holds what JSON cannot.
    """
    loss = manifest.evaluation
    fields = {
        "format": manifest.format,
        "windlass": manifest.windlass_version,
        "created": manifest.created,
        "run_id": manifest.run_id,
        "version": manifest.version,
        "applied": manifest.applied,
        "skipped": manifest.skipped,
        "contributions": manifest.contributions,
        "scaler": {
            "scale": manifest.scaler.scale,
            "hysteresis": manifest.scaler.hysteresis,
            "last_overflow": manifest.scaler.last_overflow,
        },
        # JSON has no NaN; a run that diverged is checkpointed all the same.
        "evaluation": loss if loss is None or math.isfinite(loss) else str(loss),
        "num_shards": manifest.num_shards,
        "plan_digest": manifest.plan_digest,
        "moments": list(manifest.moments),
        "files": [{"name": f.name, "sha256": f.sha256, "size": f.size} for f in manifest.files],
        "table": [[t.name, list(t.shape), t.group] for t in manifest.table.tensors],
        "job": manifest.job,
    }
    return seal(json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n")


def seal(text: bytes) -> bytes:
    """Add the SHA-256 of a JSON object of several lines to it, as its last field."""
    return text.removesuffix(_END) + b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"' + _END


def decode(data: bytes, path: Path) -> Manifest:
    """Read a manifest's JSON.

    Args:
        path: where it is from, for messages and to compare with the folder's name.

    Raises:
        CheckpointDamaged: names `path` and the reason.
    """
    try:
        fields = _parse(data)
        _check_seal(data)
        return _decode(fields, path.parent.name)
    except _Wrong as error:
        raise CheckpointDamaged(f"{path}: {error}") from None


class _Wrong(Exception):
    """Why a text is not a manifest."""


Kind = TypeVar("Kind")


class _Fields:
    """Typed access to a JSON object."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"{where} is {_short(value)}, not an object")
        self._value = value

    def any(self, name: str) -> Any:
        if name not in self._value:
            raise _Wrong(f"{name!r} is missing")
        return self._value[name]

    def get(self, name: str, kind: type[Kind]) -> Kind:
        value = self.any(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise _Wrong(f"{name!r} is {_short(value)}, not of type {kind.__name__}")
        return value

    def count(self, name: str, least: int = 0) -> int:
        value = self.get(name, int)
        if value < least:
            raise _Wrong(f"{name!r} is {value}, less than {least}")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _parse(data: bytes) -> _Fields:
    try:
        fields = _Fields(json.loads(data), "the manifest")
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"not JSON ({error})") from None
    if (number := fields.get("format", int)) != FORMAT:
        raise _Wrong(f"format {number}; this version of Windlass reads format {FORMAT}: use the one that wrote it")
    return fields


def _check_seal(data: bytes) -> None:
    found = _SEAL.search(data)
    if found is None:
        raise _Wrong("'sha256' is missing at its end")
    sha256 = hashlib.sha256(data[: found.start()] + _END).hexdigest()
    if sha256 != found[1].decode():
        raise _Wrong(f"it has the SHA-256 {sha256} instead of {found[1].decode()}")


def _decode(fields: _Fields, folder: str) -> Manifest:
    scaler = _Fields(fields.get("scaler", dict), "'scaler'")
    manifest = Manifest(
        version=fields.count("version"),
        applied=fields.count("applied"),
        skipped=fields.count("skipped"),
        run_id=fields.get("run_id", str),
        contributions=fields.count("contributions", 1),
        scaler=ScalerState(scaler.get("scale", float), scaler.get("hysteresis", int), scaler.get("last_overflow", int)),
        table=_table(fields.get("table", list)),
        num_shards=fields.count("num_shards", 1),
        plan_digest=fields.get("plan_digest", str),
        moments=_names(fields.get("moments", list)),
        files=_files(fields.get("files", list)),
        job=fields.get("job", dict),
        evaluation=_evaluation(fields),
        windlass_version=fields.get("windlass", str),
        created=fields.get("created", str),
    )
    _check_consistent(manifest, folder)
    return manifest


def _check_consistent(manifest: Manifest, folder: str) -> None:
    if manifest.version != manifest.applied + manifest.skipped:
        raise _Wrong(f"'version' {manifest.version} is not 'applied' {manifest.applied} + 'skipped' {manifest.skipped}")
    if len(manifest.files) != manifest.num_shards:
        raise _Wrong(f"{len(manifest.files)} files for {manifest.num_shards} shards")
    name = re.fullmatch(r"step-(\d+)", folder)
    if name and int(name[1]) != manifest.version:
        raise _Wrong(f"'version' is {manifest.version}; the folder was renamed or the manifest copied")


def _evaluation(fields: _Fields) -> float | None:
    value = fields.any("evaluation")
    if value is None:
        return None
    if type(value) in (int, float) or value in ("nan", "inf", "-inf"):
        return float(value)
    raise _Wrong(f"'evaluation' is {_short(value)}, not a number")


def _names(values: list[Any]) -> tuple[str, ...]:
    for value in values:
        if type(value) is not str or not value or "/" in value:
            raise _Wrong(f"'moments' has {_short(value)}, not a name")
    if len(set(values)) != len(values):
        raise _Wrong("'moments' has a name twice")
    return tuple(values)


def _files(values: list[Any]) -> tuple[ShardFile, ...]:
    files = []
    for value in values:
        fields = _Fields(value, "an entry of 'files'")
        file = ShardFile(fields.get("name", str), fields.get("sha256", str), fields.count("size", 1))
        # A name with a slash or dots in front could lead out of the folder.
        if not _FILE_NAME.fullmatch(file.name) or not _SHA256.fullmatch(file.sha256):
            raise _Wrong(f"'files' has {_short(value)}, not a file of this folder with its SHA-256")
        files.append(file)
    return tuple(files)


def _table(rows: list[Any]) -> ParameterTable:
    tensors = []
    for row in rows:
        match row:
            case [str(name), [*shape], int(group)] if all(type(n) is int and n > 0 for n in shape):
                tensors.append(TensorSpec(name, tuple(shape), group))
            case _:
                raise _Wrong(f"'table' has {_short(row)}, not [name, shape, group]")
    return ParameterTable(tuple(tensors))
