"""The headers of the tensor stream: one frozen dataclass per kind of frame, checked when read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ps.errors import BY_CODE, MalformedFrame, Refusal
from ps.types import Fence

_INT_MAX = 2**63 - 1
#: Tokens of one contribution, at most: the sum over 8192 of them still fits the messages to the coordinator.
MAX_TOKENS = 2**48
#: Published chunks that one frame tells of, at most: each takes less than 32 of a header's 65,536 bytes.
MAX_PLACES = 1024


@dataclass(frozen=True)
class Header:
    kind: ClassVar[str]

    def pack(self) -> dict[str, Any]:
        """The map that goes on the wire."""
        return {"kind": self.kind, **vars(self)}


@dataclass(frozen=True)
class Fenced(Header):
    """What a worker sends: who, of which run, believing in which fence."""

    run: str
    term: int
    epoch: int
    rank: int
    incarnation: int

    @property
    def fence(self) -> Fence:
        return Fence(self.term, self.epoch)


@dataclass(frozen=True)
class Hello(Fenced):
    """First frame of a stream."""

    kind = "hello"
    plan: str
    #: The name of a segment of shared memory for gradients, and its bytes; empty: only frames.
    shared: str = ""
    shared_bytes: int = 0
    #: Which greeting of this worker it is: places belong to one.
    greeting: int = 0


@dataclass(frozen=True)
class Attach(Fenced):
    """The worker has attached the segment in which the shard publishes."""

    kind = "attach"
    #: Of that segment, 16 bytes.
    nonce: bytes


@dataclass(frozen=True)
class Push(Fenced):
    """One chunk of a contribution. Its key is (step, contribution, chunk); the rest is fence or check."""

    kind = "push"
    step: int
    contribution: int
    chunk: int
    #: K_c, the micro-batches in the contribution.
    slots: int
    loss_scale: float
    dtype: str
    #: `ps.kernels.digest.hash_payload` of the payload, 8 bytes.
    hash: bytes
    #: One bit per run of the chunk, least significant first: it had a gradient.
    present: bytes
    loss_sum: float
    tokens: int


@dataclass(frozen=True)
class PushPlaced(Fenced):
    """Chunks of a contribution that are in the worker's segment of shared memory; otherwise as `Push`."""

    kind = "push_placed"
    step: int
    contribution: int
    slots: int
    loss_scale: float
    dtype: str
    loss_sum: float
    tokens: int
    #: The greeting to which the places belong.
    greeting: int
    #: (chunk, place, hash, presence map); a place is in bytes from the start of the segment.
    chunks: list[list[Any]]

    def pushes(self) -> Iterator[tuple[Push, int]]:
        """What each chunk would be as a frame, and its place."""
        common = {name: getattr(self, name) for name in _PUSH_COMMON}
        for chunk, place, digest, present in self.chunks:
            yield Push(**common, chunk=chunk, hash=digest, present=present), place


@dataclass(frozen=True)
class Initialize(Fenced):
    """The FP32 initial values of one chunk. Its key is (init, chunk)."""

    kind = "initialize"
    chunk: int
    hash: bytes


@dataclass(frozen=True)
class Pull(Fenced):
    """Asks for the shard's chunks at a version; waits until it is there."""

    kind = "pull"
    version: int
    #: Committed steps in the weights that the worker holds; -1: it holds none.
    applied: int


@dataclass(frozen=True)
class Welcome(Header):
    """The answer to Hello: what the shard holds of the open step."""

    kind = "welcome"
    shard: int
    incarnation: int
    term: int
    epoch: int
    #: The open step, which is the version of the published weights.
    step: int
    applied: int
    #: Held chunks of each contribution: (contribution, bitmap over the shard's chunks).
    held: list[list[Any]]
    #: The nonce of the worker's segment, and the name and bytes of the one in which the shard publishes;
    #: empty: only frames.
    nonce: bytes = b""
    shared: str = ""
    shared_bytes: int = 0
    #: The greeting that this answers; 0: it offered no memory.
    greeting: int = 0


@dataclass(frozen=True)
class Ack(Header):
    """A contribution is held with all of the shard's chunks, or (contribution -1) the initial values of a chunk are."""

    kind = "ack"
    step: int
    contribution: int
    #: -1 for a contribution.
    chunk: int


@dataclass(frozen=True)
class Weights(Header):
    """One published chunk."""

    kind = "weights"
    #: Committed steps in these weights: the same for every chunk of one version.
    applied: int
    chunk: int
    dtype: str


@dataclass(frozen=True)
class Placed(Header):
    """Published chunks that are in the shard's segment of shared memory; otherwise as `Weights`."""

    kind = "placed"
    applied: int
    dtype: str
    #: (chunk, place, slot, sequence); a place is in bytes from the start of the segment, and what was read there was
    #: not torn if the segment's sequence number in that slot is still the one that is told here.
    chunks: list[list[Any]]


@dataclass(frozen=True)
class Unchanged(Header):
    """The answer to a pull of what the worker holds already (after a skipped step)."""

    kind = "unchanged"
    version: int
    applied: int


@dataclass(frozen=True)
class Refused(Header):
    """A frame was refused; nothing changed. -1 where a number does not apply."""

    kind = "refused"
    code: str
    message: str
    step: int
    contribution: int
    chunk: int

    def error(self) -> Refusal:
        """The error that the shard raised, rebuilt."""
        cls = BY_CODE.get(self.code)
        return cls(self.message) if cls is not None and issubclass(cls, Refusal) else Refusal(self.message)


@dataclass(frozen=True)
class State(Header):
    """One array of one chunk in FP32, as the Snapshot call sends it, and a shard to its standby."""

    kind = "state"
    version: int
    chunk: int
    #: "weights", or an array of the optimizer.
    array: str
    #: Committed steps in it.
    applied: int


@dataclass(frozen=True)
class Mirror(Header):
    """First frame of a shard's stream to its standby. What comes after it belongs to this fence."""

    kind = "mirror"
    run: str
    plan: str
    term: int
    epoch: int
    #: Whose process calls, and which one is meant to be called.
    shard: int
    incarnation: int
    standby: int

    @property
    def fence(self) -> Fence:
        return Fence(self.term, self.epoch)


@dataclass(frozen=True)
class Mirrored(Header):
    """The answer to Mirror: what the standby holds."""

    kind = "mirrored"
    #: Decided steps, as far as it has heard.
    step: int
    #: One bit per chunk of the shard, least significant first: its state is held, as of this step.
    filled: bytes
    #: The same for what is reduced of the open step.
    reduced: bytes


@dataclass(frozen=True)
class Noted(Header):
    """What a shard with a journal writes down: a record (`ps.shard.records`), whose payload is this frame's."""

    kind = "noted"
    record: bytes


@dataclass(frozen=True)
class Covered(Header):
    """A standby's word that it holds the state of every chunk and all that is reduced of a step: it could take over."""

    kind = "covered"
    step: int


_TO_STANDBY: dict[str, type[Header]] = {cls.kind: cls for cls in (Mirror, State, Noted)}
_FROM_STANDBY: dict[str, type[Header]] = {cls.kind: cls for cls in (Mirrored, Covered, Refused)}
_TO_SHARD: dict[str, type[Header]] = {cls.kind: cls for cls in (Hello, Attach, Push, PushPlaced, Initialize, Pull)}
_TO_WORKER: dict[str, type[Header]] = {cls.kind: cls for cls in (Welcome, Ack, Weights, Placed, Unchanged, Refused)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= _INT_MAX


def _is_hash(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == 8


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


#: By field, where its type says too little.
_FIELD_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hash": (_is_hash, "8 bytes"),
    "incarnation": (lambda v: _is_int(v) and v >= 0, "an integer from 0 to 2^63-1"),
    "tokens": (lambda v: _is_int(v) and 0 <= v <= MAX_TOKENS, "an integer from 0 to 2^48"),
}
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, "an integer from -1 to 2^63-1"),
    "float": (lambda v: isinstance(v, float), "a float"),
    "str": (_is_text, "text of at most 4096 characters"),
    "bytes": (lambda v: isinstance(v, bytes), "bytes"),
    "bool": (lambda v: isinstance(v, bool), "a boolean"),
    "list[list[Any]]": (lambda v: isinstance(v, list) and all(isinstance(row, list) for row in v), "a list of lists"),
}

#: The columns of `chunks`.
_ROWS: dict[type[Header], tuple[Callable[[Any], bool], ...]] = {
    PushPlaced: (_is_int, _is_int, _is_hash, _CHECKS["bytes"][0]),
    Placed: (_is_int, _is_int, _is_int, _is_int),
}
#: By kind: name, check and what is wanted of each field.
_LAYOUTS = {
    cls: [(field.name, *(_FIELD_CHECKS.get(field.name) or _CHECKS[str(field.type)])) for field in fields(cls)]
    for kinds in (_TO_SHARD, _TO_WORKER, _TO_STANDBY, _FROM_STANDBY)
    for cls in kinds.values()
}
_PUSH_COMMON = [field.name for field in fields(Push) if field.name not in ("chunk", "hash", "present")]


def _parse(kinds: dict[str, type[Header]], header: dict[str, Any]) -> Header:
    kind = header.get("kind")
    cls = kinds.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise MalformedFrame(f"frames of kind {str(kind)[:40]!r} are not known here; known: {', '.join(kinds)}")
    values = {}
    for name, check, wanted in _LAYOUTS[cls]:
        if name not in header:
            raise MalformedFrame(f"{kind}: the header field {name!r} is missing")
        value = header[name]
        if not check(value):
            raise MalformedFrame(f"{kind}: the header field {name}={str(value)[:40]!r} is not {wanted}")
        values[name] = value
    for row in values["chunks"] if cls in _ROWS else ():
        if len(row) != len(_ROWS[cls]) or not all(check(cell) for check, cell in zip(_ROWS[cls], row, strict=True)):
            raise MalformedFrame(f"{kind}: {str(row)[:60]} does not say where a chunk is")
    return cls(**values)


def parse_to_shard(header: dict[str, Any]) -> Hello | Attach | Push | PushPlaced | Initialize | Pull:
    """Read a header that a worker sent.

    Raises:
        MalformedFrame: an unknown kind, or a field that is missing or of a wrong type.
    """
    parsed = _parse(_TO_SHARD, header)
    if isinstance(parsed, Push | PushPlaced) and not (parsed.loss_scale > 0 and math.isfinite(parsed.loss_scale)):
        raise MalformedFrame(f"{parsed.kind}: the header field loss_scale={parsed.loss_scale} is not a positive number")
    return parsed  # type: ignore[return-value]


def parse_to_worker(header: dict[str, Any]) -> Welcome | Ack | Weights | Placed | Unchanged | Refused:
    """Read a header that a shard sent.

    Raises:
        MalformedFrame: an unknown kind, or a field that is missing or of a wrong type.
    """
    return _parse(_TO_WORKER, header)  # type: ignore[return-value]


def parse_to_standby(header: dict[str, Any]) -> Mirror | State | Noted:
    """Read a header that a shard sent to its standby.

    Raises:
        MalformedFrame: an unknown kind, or a field that is missing or of a wrong type.
    """
    return _parse(_TO_STANDBY, header)  # type: ignore[return-value]


def parse_from_standby(header: dict[str, Any]) -> Mirrored | Covered | Refused:
    """Read a header that a standby sent to its shard.

    Raises:
        MalformedFrame: an unknown kind, or a field that is missing or of a wrong type.
    """
    return _parse(_FROM_STANDBY, header)  # type: ignore[return-value]
