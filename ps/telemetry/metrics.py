"""The metrics that several roles have; each is described in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

STEP = Gauge("windlass_step", "Decided steps, as this process knows it")
RECEIVED_BYTES = Counter("windlass_received_bytes", "Bytes received on tensor streams")
SENT_BYTES = Counter("windlass_sent_bytes", "Bytes sent on tensor streams")
