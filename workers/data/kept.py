"""What a run folder keeps of its text: enough to write, and to be exported, when text and cache are gone.

tokenizer.json   the tokenizer
data.json        what else must be known of the text, and where its tokens are in the cache
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from ps.config import validate
from ps.errors import ConfigError, DataError, MismatchError, PsError, StorageError
from ps.storage.files import write_atomic
from ps.storage.manifest import MANIFEST_NAME, Manifest
from workers.config import JobConfig
from workers.data.bpe import END_OF_TEXT
from workers.data.prepare import PreparedData, hash_file, open_prepared, prepare
from workers.launch.folder import RunFolder

TOKENIZER_NAME = "tokenizer.json"
FACTS_NAME = "data.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What data.json holds."""

    #: Over tokens and tokenizer, as the workers of the run agree on it.
    digest: str
    #: The name of the entry in `data.cache_dir`.
    cache_entry: str
    vocab_size: int
    #: The first token of the held-out text: what an empty prompt is continued from.
    first_token: int
    tokenizer_digest: str


@dataclass(frozen=True)
class Vocabulary:
    """A run's tokenizer, and what is known of the text that it comes from."""

    tokenizer_path: Path
    size: int
    first_token: int
    #: None: the tokenizer was named by hand, and nothing is known of the text.
    facts: Facts | None


def keep(run_dir: Path, data: PreparedData) -> None:
    """Copy into the run folder what is needed of the text.

    Nothing happens when it is there already. The files are the same whoever writes them.

    Raises:
        StorageError: the folder cannot be written, or the cache not read.
    """
    facts = _facts_of(data)
    if _read_facts(run_dir) == facts and (run_dir / TOKENIZER_NAME).is_file():
        return
    try:
        tokenizer = data.tokenizer_path.read_bytes()
    except OSError as error:
        raise StorageError(f"{data.tokenizer_path} cannot be read: {error.strerror}") from None
    # The facts hold the tokenizer's digest: they come last, and what is half written is none.
    write_atomic(run_dir / TOKENIZER_NAME, tokenizer)
    write_atomic(run_dir / FACTS_NAME, (json.dumps(asdict(facts), indent=1) + "\n").encode())


def keep_where_the_run_is(job: JobConfig, data: PreparedData) -> None:
    """`keep`, if this host has the run folder; that it cannot be written is logged and no reason to stop."""
    folder = RunFolder(job.run_dir)
    try:
        if folder.holds_run() and folder.read_job() == job:
            keep(folder.path, data)
    except (PsError, OSError) as error:
        log.warning("the tokenizer is not kept in the run folder %s: %s", folder.path, error)


def find(path: Path, checkpoint: Path, manifest: Manifest, tokenizer: Path | None = None) -> Vocabulary:
    """Find the tokenizer of a checkpoint: in its run folder, else by preparing the text again.

    Args:
        path: the run folder, or the checkpoint itself.
        checkpoint: the checkpoint's folder.
        manifest: what the checkpoint holds.
        tokenizer: a tokenizer.json to use instead.

    Raises:
        ConfigError: `tokenizer` is none.
        DataError: there is no tokenizer, and no text to train it on again.
    """
    if tokenizer is not None:
        return _from_file(tokenizer)
    job = validate(JobConfig, manifest.job)
    is_checkpoint = (path / MANIFEST_NAME).is_file()
    folders = [checkpoint.absolute().parent.parent, job.run_dir] if is_checkpoint else [path]
    for folder in folders:
        facts = _read_facts(folder) if RunFolder(folder).holds_run() else None
        if facts is not None and _is_sound(folder / TOKENIZER_NAME, facts):
            return Vocabulary(folder / TOKENIZER_NAME, facts.vocab_size, facts.first_token, facts)
    try:
        data = prepare(job.data)
    except PsError as error:
        raise DataError(
            f"{folders[0]} holds no {TOKENIZER_NAME}, and it cannot be made again from the text: {error.message}; "
            f"`sample` and `export` take a copy with --tokenizer FILE"
        ) from None
    facts = _facts_of(data)
    return Vocabulary(data.tokenizer_path, facts.vocab_size, facts.first_token, facts)


def open_text(job: JobConfig, vocabulary: Vocabulary) -> PreparedData:
    """Open the tokens of a run: those in the cache, else the text is tokenized again.

    Raises:
        DataError: both are gone.
        MismatchError: the text is another one by now.
    """
    facts = vocabulary.facts
    if facts is not None:
        cached = open_prepared(job.data.cache_dir / facts.cache_entry)
        if cached is not None and cached.digest == facts.digest:
            return cached
    try:
        data = prepare(job.data)
    except PsError as error:
        raise DataError(
            f"the held-out text of this run is gone: it is neither in data.cache_dir={job.data.cache_dir} "
            f"nor can it be prepared again ({error.message})"
        ) from None
    if facts is not None and data.digest != facts.digest:
        raise MismatchError(
            f"the text of this run has changed: its digest is {data.digest[:12]} where the run has "
            f"{facts.digest[:12]}; bring back the text, or data.cache_dir={job.data.cache_dir}"
        )
    return data


def _facts_of(data: PreparedData) -> Facts:
    return Facts(
        data.digest, data.folder.name, data.vocab_size, int(data.validation()[0]), hash_file(data.tokenizer_path)
    )


def _read_facts(run_dir: Path) -> Facts | None:
    try:
        return Facts(**json.loads((run_dir / FACTS_NAME).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be used: %s", run_dir / FACTS_NAME, error)
        return None


def _is_sound(tokenizer: Path, facts: Facts) -> bool:
    try:
        sound = hash_file(tokenizer) == facts.tokenizer_digest
    except OSError:
        sound = False
    if not sound:
        log.warning("%s is missing, or is not the run's: it is made again from the text", tokenizer)
    return sound


def _from_file(path: Path) -> Vocabulary:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises a bare Exception for whatever it cannot read.
    except Exception as error:  # noqa: BLE001
        raise ConfigError(f"--tokenizer={path}: not a tokenizer.json: {error}") from None
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ConfigError(f"--tokenizer={path}: it has no {END_OF_TEXT}, so it is not a tokenizer of Windlass")
    return Vocabulary(path, tokenizer.get_vocab_size(), end, None)
