"""One evaluation of the held-out data: parts that any worker may compute."""

from __future__ import annotations

import math
from typing import Any

from ps.coordinator.dealing import Dealing


class Evaluation:
    """The evaluation of one version. The result does not depend on who computed which part."""

    def __init__(self, version: int, parts: int) -> None:
        self.version = version
        self.dealing = Dealing(parts)
        self._results: dict[int, tuple[float, int, int]] = {}

    def add(self, part: int, loss_sum: float, tokens: int, num_bytes: int) -> None:
        """Take one part's result; the first one stands."""
        if 0 <= part < self.dealing.count:
            self._results.setdefault(part, (loss_sum, tokens, num_bytes))
            self.dealing.finish(part)

    def result(self) -> dict[str, Any]:
        """Loss in nats per token, perplexity, and bits per byte of the held-out text."""
        loss_sum = math.fsum(loss for loss, _, _ in self._results.values())
        tokens = sum(count for _, count, _ in self._results.values())
        num_bytes = sum(count for _, _, count in self._results.values())
        loss = loss_sum / tokens if tokens else math.nan
        return {
            "version": self.version,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": loss_sum / math.log(2) / num_bytes if num_bytes else math.nan,
            "tokens": tokens,
            "bytes": num_bytes,
        }
