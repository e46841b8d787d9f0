"""Text -> tokenizer and memory-mapped tokens, cached by content and prepared once.

cache_dir/<key>.lock          held (flock) by the process that prepares; freed by the kernel when it dies
cache_dir/<key>.tmp/          being written; whoever holds the lock may remove it
cache_dir/<key>/              complete: it appears by one rename
    tokenizer.json train.bin validation.bin data.json
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ps.errors import DataError, StartupError
from workers.config import DataConfig
from workers.data import bpe, source
from workers.data.split import DocumentKey, Split, choose

#: A change of anything that decides which tokens a text becomes gets a new number.
FORMAT_VERSION = 1
_SIDECAR = "data.json"
_TOKENIZER = "tokenizer.json"
_TRAIN = "train.bin"
_VALIDATION = "validation.bin"

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Tokenized text in a folder of the cache. Read-only, so safe to share."""

    folder: Path
    vocab_size: int
    #: "uint16" or "uint32".
    dtype: str
    #: Over the tokens and the tokenizer: workers of one run must agree on it.
    digest: str
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    tokenizer_path: Path

    def train(self) -> np.memmap[Any, Any]:
        """Map the tokens of the training part."""
        return np.memmap(self.folder / _TRAIN, dtype=self.dtype, mode="r")

    def validation(self) -> np.memmap[Any, Any]:
        """Map the tokens of the held-out part."""
        return np.memmap(self.folder / _VALIDATION, dtype=self.dtype, mode="r")

    def tokenizer(self) -> Any:
        """Load the `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_path))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each token stands for: int64 [vocab_size]."""
        return bpe.token_bytes(self.tokenizer_path)


@dataclass(frozen=True)
class Sidecar:
    """What data.json says of the files beside it."""

    format_version: int
    dtype: str
    vocab_size: int
    tokenizer_digest: str
    train_digest: str
    validation_digest: str
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    validation_bytes: int
    train_documents: int
    validation_documents: int
    source_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 over tokens and tokenizer."""
        return _hash_json([self.dtype, self.tokenizer_digest, self.train_digest, self.validation_digest])

    def save(self, path: Path) -> None:
        content = asdict(self)
        path.write_text(json.dumps(content | {"sidecar_digest": _hash_json(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Sidecar:
        """Raises ValueError when the file is not what was saved."""
        content = json.loads(path.read_bytes())
        digest = content.pop("sidecar_digest", None)
        if digest != _hash_json(content):
            raise ValueError(f"{path.name} does not have its digest")
        return cls(**content)


def prepare(config: DataConfig, on_progress: Progress | None = None) -> PreparedData:
    """Tokenize the text of a job, or find that it was done.

    Args:
        config: Which text, which vocabulary, where the cache is.
        on_progress: Told, in a line each, what is being done; nothing when the cache has it all.

    Raises:
        DataError: the text cannot be used; names the file and the offset, or what is too small.
        StartupError: the cache folder cannot be written.

    Concurrency: any number of processes may call it at once; one prepares, the others wait for it.
    """
    files = source.collect(config.paths)
    source_digest = _source_digest(files)
    key = _hash_json([FORMAT_VERSION, source_digest, config.vocab_size, config.validation_fraction])[:32]
    folder = config.cache_dir / key
    progress = on_progress or (lambda _: None)
    prepared = _load(folder)
    if prepared is None:
        try:
            config.cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(config.cache_dir / f"{key}.lock", progress):
                prepared = _load(folder) or _build(folder, files, source_digest, config, progress)
        except OSError as error:
            raise StartupError(
                f"data.cache_dir={config.cache_dir} cannot be written: {error.strerror}; choose another"
            ) from error
    _check_size(prepared, config)
    return prepared


def open_prepared(folder: Path) -> PreparedData | None:
    """Open an entry of the cache, without its text; None when it is not there or damaged."""
    return _load(folder)


def _source_digest(files: Sequence[Path]) -> str:
    """Hash the contents and kinds of the files, not their places: the same text has one cache entry."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.suffix.encode() + b"\0" + hashlib.sha256(source.read(file)).digest())
    return total.hexdigest()


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the same text")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(folder: Path) -> PreparedData | None:
    """Open a complete cache entry; None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        sidecar = Sidecar.load(folder / _SIDECAR)
        for name, digest in (
            (_TOKENIZER, sidecar.tokenizer_digest),
            (_TRAIN, sidecar.train_digest),
            (_VALIDATION, sidecar.validation_digest),
        ):
            if hash_file(folder / name) != digest:
                raise ValueError(f"{name} does not have its digest")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("the tokenized text in %s is damaged and will be made again: %s", folder, error)
        return None
    return PreparedData(
        folder=folder,
        vocab_size=sidecar.vocab_size,
        dtype=sidecar.dtype,
        digest=sidecar.digest,
        train_tokens=sidecar.train_tokens,
        validation_tokens=sidecar.validation_tokens,
        validation_bytes=sidecar.validation_bytes,
        tokenizer_path=folder / _TOKENIZER,
    )


def _build(
    folder: Path, files: Sequence[Path], source_digest: str, config: DataConfig, progress: Progress
) -> PreparedData:
    temporary = folder.with_name(folder.name + ".tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    temporary.mkdir()
    try:
        _write(temporary, files, source_digest, config, progress)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(folder)
    prepared = _load(folder)
    if prepared is None:
        raise StartupError(f"{folder} was written and cannot be read back; is the disk sound?")
    return prepared


def _write(folder: Path, files: Sequence[Path], source_digest: str, config: DataConfig, progress: Progress) -> None:
    keys = [DocumentKey.of(document) for document in source.documents(files)]
    total_bytes = sum(key.num_bytes for key in keys)
    split = choose(keys, config.validation_fraction)
    progress(f"training a tokenizer of {config.vocab_size} entries on {len(keys)} documents, {total_bytes:,} bytes")
    tokenizer = bpe.train(
        (split.divide(index, document)[0] for index, document in enumerate(source.documents(files))),
        total_bytes,
        config.vocab_size,
    )
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size < config.vocab_size:
        logger.warning("the text gives only %d of %d vocabulary entries", vocab_size, config.vocab_size)
    tokenizer.save(str(folder / _TOKENIZER))
    progress("encoding the text")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts = _encode(folder, files, split, tokenizer, dtype)
    Sidecar(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        tokenizer_digest=hash_file(folder / _TOKENIZER),
        train_digest=hash_file(folder / _TRAIN),
        validation_digest=hash_file(folder / _VALIDATION),
        source_digest=source_digest,
        **counts,
    ).save(folder / _SIDECAR)


def _encode(folder: Path, files: Sequence[Path], split: Split, tokenizer: Any, dtype: str) -> dict[str, int]:
    with (folder / _TRAIN).open("wb") as train_file, (folder / _VALIDATION).open("wb") as validation_file:
        train = bpe.Encoder(tokenizer, train_file, dtype)
        validation = bpe.Encoder(tokenizer, validation_file, dtype)
        for index, document in enumerate(source.documents(files)):
            train_part, validation_part = split.divide(index, document)
            train.add(train_part)
            validation.add(validation_part)
        train.flush()
        validation.flush()
        for file in (train_file, validation_file):
            file.flush()
            os.fsync(file.fileno())
    counts: dict[str, int] = {}
    for name, encoder in (("train", train), ("validation", validation)):
        counts[f"{name}_tokens"] = encoder.num_tokens
        counts[f"{name}_bytes"] = encoder.num_bytes
        counts[f"{name}_documents"] = encoder.num_documents
    return counts


def _check_size(prepared: PreparedData, config: DataConfig) -> None:
    """Both parts must hold a window of sequence_length inputs and their targets."""
    needed = config.sequence_length + 1
    if prepared.train_tokens < needed:
        raise DataError(
            f"the training part has {prepared.train_tokens} tokens, and data.sequence_length="
            f"{config.sequence_length} needs {needed}; give more text or a smaller data.sequence_length"
        )
    if prepared.validation_tokens < needed:
        raise DataError(
            f"the held-out part has {prepared.validation_tokens} tokens, and data.sequence_length="
            f"{config.sequence_length} needs {needed}; give more text, a larger data.validation_fraction="
            f"{config.validation_fraction} or a smaller data.sequence_length"
        )


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """XXH3-128: fast enough to check everything at every start."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
