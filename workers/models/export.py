"""A checkpoint as a Hugging Face folder: whole, or not there."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ps.config import validate
from ps.errors import ConfigError, DataError, PsError, StorageError
from ps.storage import CheckpointReader, read_manifest
from ps.storage.files import TEMPORARY_SUFFIX, fsync_directory, make_directory, reason, remove_tree, write_atomic
from ps.types import WireDtype
from workers.config import JobConfig
from workers.data import kept
from workers.data.bpe import END_OF_TEXT
from workers.models import hugging_face
from workers.models.safetensors_file import MAX_FILE_BYTES, write_model

#: Hugging Face's name of each dtype.
DTYPES = {"float32": WireDtype.FP32, "float16": WireDtype.FP16, "bfloat16": WireDtype.BF16}
#: What an exported folder holds; --force replaces nothing else.
_OURS = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    #: Decided steps.
    version: int
    num_parameters: int
    num_bytes: int


def export(
    path: Path,
    checkpoint: Path,
    out: Path,
    dtype: str,
    tokenizer: Path | None = None,
    force: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write a checkpoint's FP32 master weights, each rounded once to `dtype`, for `transformers` to load.

    Args:
        path: the run folder, or the checkpoint itself.
        checkpoint: the checkpoint.
        out: the folder to make. It appears by one rename; what a killed export leaves beside it ends in
            ".windlass-tmp".
        dtype: one of `DTYPES`.
        tokenizer: a tokenizer.json to use instead of the run folder's.
        force: an export that is there already may be replaced.

    Raises:
        ConfigError: `out` holds something.
        CheckpointDamaged, StorageError: the checkpoint cannot be used, or `out` not be written.
        MismatchError: Hugging Face knows no such model.
        DataError: there is no tokenizer, and no text to train it on again.
    """
    _check_out(out, force)
    manifest, _ = read_manifest(checkpoint)
    job = validate(JobConfig, manifest.job)
    vocabulary = kept.find(path, checkpoint, manifest, tokenizer)
    hugging_face.check_model(job, manifest.table, vocabulary.size)
    tokenizer_bytes, end = _read_tokenizer(vocabulary.tokenizer_path)
    texts: dict[str, dict[str, Any]] = {
        "config.json": hugging_face.model_config(job, vocabulary.size, end, dtype),
        "generation_config.json": hugging_face.generation_config(end),
        "tokenizer_config.json": hugging_face.tokenizer_config(job.data.sequence_length),
    }
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    make_directory(temporary)
    try:
        write_atomic(temporary / "tokenizer.json", tokenizer_bytes)
        for name, content in texts.items():
            write_atomic(temporary / name, (json.dumps(content, indent=2) + "\n").encode())
        with CheckpointReader(checkpoint, manifest) as reader:
            reader.verify()
            files = write_model(temporary, reader, DTYPES[dtype], max_file_bytes)
        num_bytes = sum(file.stat().st_size for file in files)
        _check_out(out, force)
        _put_in_place(temporary, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {reason(error)}") from error
    finally:
        remove_tree(temporary)
    return Exported(out, manifest.version, manifest.table.num_parameters, num_bytes)


def _check_out(out: Path, force: bool) -> None:
    try:
        names = sorted(entry.name for entry in out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be used: {reason(error)}") from None
    foreign = next((name for name in names if not _OURS.fullmatch(name)), None)
    if foreign is not None:
        raise ConfigError(f"--out={out} holds other things than an export, such as {foreign}; choose another folder")
    if names and not force:
        raise ConfigError(f"--out={out} holds an export already; replace it with --force, or choose another folder")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename; a folder cannot be renamed onto one that holds something, so that one makes room first."""
    former = temporary.with_name(temporary.name.replace(TEMPORARY_SUFFIX, f"-former{TEMPORARY_SUFFIX}"))
    if out.exists():
        out.rename(former)
    try:
        temporary.rename(out)
    except OSError:
        if former.exists():
            former.rename(out)
        raise
    fsync_directory(out.parent)
    remove_tree(former)


def _read_tokenizer(path: Path) -> tuple[bytes, int]:
    """Return the file, and the number of its special token."""
    try:
        content = path.read_bytes()
        return content, int(json.loads(content)["model"]["vocab"][END_OF_TEXT])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PsError(f"{path} is not a tokenizer of Windlass: {error!r}") from None
