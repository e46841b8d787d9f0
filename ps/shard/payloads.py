"""What a worker's payload has to be: whatever it says of itself is held against the chunk that it is for."""

from __future__ import annotations

from ps.errors import WrongDtype, WrongHash, WrongLength
from ps.sharding import Chunk
from ps.types import WireDtype
from ps.wire.messages import Initialize, Push


def check_gradient(header: Push, chunk: Chunk, dtype: WireDtype, payload: memoryview, payload_hash: bytes) -> None:
    """Refuse a gradient of another dtype or size, or one that was damaged.

    Args:
        dtype: of the run.
        payload_hash: of the payload as it arrived.

    Raises:
        WrongDtype, WrongLength, WrongHash: what it is instead.
    """
    if header.dtype != dtype:
        raise WrongDtype(f"dtype {header.dtype[:20]!r} where the run's wire dtype is {dtype}")
    if len(payload) != chunk.size * dtype.itemsize:
        raise WrongLength(f"chunk {chunk.index}: {len(payload)} bytes of gradient, not {chunk.size * dtype.itemsize}")
    if len(header.present) != chunk.presence_bytes:
        raise WrongLength(
            f"chunk {chunk.index}: a presence map of {len(header.present)} bytes, not {chunk.presence_bytes}"
        )
    if int.from_bytes(header.present, "little") >> len(chunk.runs):
        raise WrongLength(f"chunk {chunk.index}: the presence map has bits beyond its {len(chunk.runs)} runs")
    if payload_hash != header.hash:
        raise WrongHash(f"chunk {chunk.index} of contribution {header.contribution} was damaged on its way")


def check_initial(header: Initialize, chunk: Chunk, payload: memoryview, payload_hash: bytes) -> None:
    """Refuse FP32 initial values of another size, or ones that were damaged.

    Raises:
        WrongLength, WrongHash: what they are instead.
    """
    if len(payload) != 4 * chunk.size:
        raise WrongLength(f"initial values of chunk {chunk.index}: {len(payload)} bytes, not {4 * chunk.size}")
    if payload_hash != header.hash:
        raise WrongHash(f"initial values of chunk {chunk.index} were damaged on their way")
