"""The byte-level BPE: trained on a spread of the text, encoding in batches. Bytes in, bytes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from workers.data.split import pieces

END_OF_TEXT = "<|endoftext|>"
#: Merges are learnt from at most about this much text, spread evenly: more costs time and changes little.
TRAINING_BYTES = 4_000_000
_BATCH_BYTES = 1 << 22


def train(documents: Iterable[bytes], total_bytes: int, vocab_size: int) -> Any:
    """Train a tokenizer of at most `vocab_size` entries, the special token included.

    The result depends on nothing but the arguments; the number of threads does not matter.

    Args:
        documents: The training part.
        total_bytes: About how much text that is: decides how much of it is looked at.
        vocab_size: At least 257.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_spread(documents, total_bytes), trainer)
    # A document that happens to contain the special token's name is text like any other.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _spread(documents: Iterable[bytes], total_bytes: int) -> Iterator[str]:
    """Take pieces while what was taken lags behind the wanted part of what was seen."""
    fraction = min(1.0, TRAINING_BYTES / max(1, total_bytes))
    seen = taken = 0
    for document in documents:
        for piece in pieces(document):
            seen += len(piece)
            if taken < seen * fraction:
                taken += len(piece)
                yield piece.decode("utf-8")


class Encoder:
    """Appends documents to a file of tokens, each followed by the special token."""

    def __init__(self, tokenizer: Any, file: BinaryIO, dtype: str) -> None:
        self.num_tokens = 0
        self.num_bytes = 0
        self.num_documents = 0
        self._tokenizer = tokenizer
        self._file = file
        self._dtype = dtype
        self._end = tokenizer.token_to_id(END_OF_TEXT)
        self._batch: list[str] = []
        #: For each piece of the batch: whether its document ends with it.
        self._ends: list[bool] = []
        self._batch_bytes = 0

    def add(self, document: bytes) -> None:
        """Add a document; an empty one is ignored."""
        if not document:
            return
        self.num_documents += 1
        self.num_bytes += len(document)
        remaining = len(document)
        for piece in pieces(document):
            remaining -= len(piece)
            self._batch.append(piece.decode("utf-8"))
            self._ends.append(remaining == 0)
            self._batch_bytes += len(piece)
            if self._batch_bytes >= _BATCH_BYTES:
                self.flush()

    def flush(self) -> None:
        """Encode and write what was added."""
        tokens: list[int] = []
        for encoding, is_end in zip(self._tokenizer.encode_batch_fast(self._batch), self._ends, strict=True):
            tokens.extend(encoding.ids)
            if is_end:
                tokens.append(self._end)
        self._file.write(np.array(tokens, dtype=self._dtype).tobytes())
        self.num_tokens += len(tokens)
        self._batch, self._ends, self._batch_bytes = [], [], 0


def token_bytes(tokenizer_path: Path) -> npt.NDArray[np.int64]:
    """Return the number of bytes of each token: int64 [vocab_size]; 0 for the special one.

    In a byte-level vocabulary every character of a token's name stands for one byte.
    """
    vocabulary: dict[str, int] = json.loads(tokenizer_path.read_text("utf-8"))["model"]["vocab"]
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for name, token in vocabulary.items():
        if name != END_OF_TEXT:
            lengths[token] = len(name)
    return lengths
