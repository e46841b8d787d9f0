"""Which part of the text is held out: a pure function of the documents, whatever their order on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ps.errors import DataError

#: Documents are encoded in pieces of about this many bytes, so that one large file keeps all cores busy.
PIECE_BYTES = 1 << 16
#: So much text is at least two characters, and can be cut between them.
_MIN_CUT_BYTES = 8


@dataclass(frozen=True)
class DocumentKey:
    """What the split needs to know of a document."""

    digest: bytes
    num_bytes: int

    @classmethod
    def of(cls, document: bytes) -> DocumentKey:
        return cls(hashlib.blake2b(document, digest_size=16).digest(), len(document))


@dataclass(frozen=True)
class Split:
    """Which documents are held out whole, and which one is cut."""

    held_out: frozenset[int]
    #: The document whose tail is held out, when whole documents do not add up to the fraction.
    cut_document: int | None = None
    tail_bytes: int = 0

    def divide(self, index: int, document: bytes) -> tuple[bytes, bytes]:
        """Return the (training, held-out) parts of a document; one of them is usually empty."""
        if index in self.held_out:
            return b"", document
        if index == self.cut_document:
            cut = line_boundary(document, len(document) - self.tail_bytes)
            return document[:cut], document[cut:]
        return document, b""


def choose(keys: Sequence[DocumentKey], fraction: float) -> Split:
    """Hold out about `fraction` of the bytes: whole documents in the order of their digests.

    Where whole documents do not come near the fraction (one big file), the tail of the largest
    training document is held out too, from a line's beginning.

    Raises:
        DataError: there is too little text for two parts.
    """
    total = sum(key.num_bytes for key in keys)
    target = max(1, round(total * fraction))
    held_out: set[int] = set()
    chosen = 0
    for index in sorted(range(len(keys)), key=lambda index: (keys[index].digest, index)):
        if chosen + keys[index].num_bytes <= target:
            held_out.add(index)
            chosen += keys[index].num_bytes
        if chosen >= 0.95 * target:
            break
    if 0.5 * target <= chosen < total:
        return Split(frozenset(held_out))
    largest = max(range(len(keys)), key=lambda index: keys[index].num_bytes, default=None)
    if largest is None or keys[largest].num_bytes < _MIN_CUT_BYTES:
        raise DataError(f"{total} bytes of text are too few to hold a part out; give more in data.paths")
    return Split(frozenset(held_out), largest, max(1, target - chosen))


def pieces(document: bytes) -> Iterator[bytes]:
    """Cut a document at line boundaries into pieces of about PIECE_BYTES, to be encoded side by side."""
    start = 0
    while len(document) - start > 2 * PIECE_BYTES:
        stop = line_boundary(document, start + PIECE_BYTES, start)
        yield document[start:stop]
        start = stop
    yield document[start:]


def line_boundary(document: bytes, near: int, after: int = 0) -> int:
    """Return the last line's beginning in (after, near], or near it the beginning of a character.

    The result is inside the document: strictly between `after` and its end.
    """
    near = min(max(near, after + 1), len(document) - 1)
    newline = document.rfind(b"\n", after, near)
    if newline > after:
        return newline + 1
    while near > after + 1 and document[near] & 0xC0 == 0x80:
        near -= 1
    while near < len(document) - 1 and document[near] & 0xC0 == 0x80:
        near += 1
    return near
