"""What a shard writes down, and what its standby hears: the records that lead from one state to the next.

In their order they are the run, as this shard sees it: `Base` says where it begins, `Reduced` what a chunk's
gradient of a step is, `Decided` what was done with it. Whoever holds the state of the base and carries them
out (`ps.shard.replay`) holds the state of the end. Pure: no files, no sockets.

A record is a map, and `Reduced` has a payload beside it: m, float32 [chunk.size].
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from ps.errors import JournalDamaged
from ps.types import ContributionReport, Decision
from ps.wire.proto import from_record, to_record


@dataclass(frozen=True)
class Base:
    """The state that the records after it begin with."""

    run: str
    #: The epoch of the last rollback: a state of before it is not the run's any more.
    lineage: int
    shard: int
    plan: str
    version: int
    state_hash: int


@dataclass(frozen=True)
class Reduced:
    """A chunk's gradient of a step is whole; m is the payload."""

    step: int
    chunk: int
    #: That of the gradients in it.
    loss_scale: float
    #: Which runs of the chunk had a gradient, as bits; least significant first.
    present: bytes
    #: Sum of squares of m, one per segment.
    square_sums: tuple[float, ...]
    #: What is in m, and the hash of each payload, in order of contribution.
    contributions: tuple[ContributionReport, ...]
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class Reopened:
    """What was reduced of a step counts no more: its gradients carry another loss scale from now on."""

    step: int
    loss_scale: float


@dataclass(frozen=True)
class Decided:
    """A step's decision, before it is carried out."""

    decision: Decision
    #: 64-bit hash of the state before it: shows whether whoever follows still has the same bits. 0: it is not said.
    state_hash: int = 0


Record = Base | Reduced | Reopened | Decided

_KINDS: dict[str, type[Record]] = {"base": Base, "reduced": Reduced, "reopened": Reopened, "decided": Decided}
_NAMES = {cls: name for name, cls in _KINDS.items()}


def kind_of(record: Record) -> str:
    """Its name in a file."""
    return _NAMES[type(record)]


def pack(record: Record) -> bytes:
    """Encode a record; m goes beside it."""
    return bytes(msgpack.packb({"kind": kind_of(record), **to_record(record)}))


def unpack(data: bytes) -> Record:
    """Read what `pack` made.

    Raises:
        JournalDamaged: it is something else, or of another version of Windlass.
    """
    try:
        fields = msgpack.unpackb(data)
        return from_record(_KINDS[fields.pop("kind")], fields)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise JournalDamaged(f"{len(data)} bytes are not a record of this version of Windlass: {error!r}") from None
