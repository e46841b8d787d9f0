"""The metrics that several roles have; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from ps.types import Role

STEP = Gauge("windlass_step", "Decided steps, as this process knows it")
RECEIVED_BYTES = Counter("windlass_received_bytes", "Bytes received on tensor streams, by the other end", ["peer"])
SENT_BYTES = Counter("windlass_sent_bytes", "Bytes sent on tensor streams, by the other end", ["peer"])

#: Ranks come in messages; whatever they say, a metric has no more series than a run has members.
MAX_PEERS = 4096


class LinkBytes:
    """Bytes to and from one peer: its series are looked up once, not for each frame."""

    def __init__(self, role: Role, rank: int) -> None:
        name = peer(role, rank)
        self.received = RECEIVED_BYTES.labels(name)
        self.sent = SENT_BYTES.labels(name)


def peer(role: Role, rank: int) -> str:
    """How metrics call a member: shard-0, worker-3."""
    return f"{role}-{rank}" if 0 <= rank < MAX_PEERS else f"{role}-other"
