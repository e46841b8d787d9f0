"""Windows of tokens, for training and for the held-out part.

B: samples of a micro-batch, L: sequence length, N: windows, T: L + 1 (inputs and targets overlap by one).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.data.prepare import PreparedData
from workers.data.sampling import slot_indices

Tokens = npt.NDArray[np.int64]


def _windows(tokens: npt.NDArray[np.unsignedinteger], indices_N: Tokens, sequence_length: int) -> Tokens:
    offsets_T = np.arange(sequence_length + 1, dtype=np.int64)
    gathered_NT = tokens[indices_N[:, None] * sequence_length + offsets_T]
    return gathered_NT.astype(np.int64)


class TokenBatches:
    """The training part, cut into windows; a micro-batch is a pure function of (seed, step, slot).

    Concurrency: read-only, so safe to share between threads.
    """

    def __init__(
        self,
        prepared: PreparedData,
        sequence_length: int,
        micro_batch_size: int,
        seed: int,
        slots_per_step: int,
    ) -> None:
        self.num_windows = (prepared.train_tokens - 1) // sequence_length
        self._tokens = np.asarray(prepared.train())
        self._sequence_length = sequence_length
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._slots_per_step = slots_per_step

    def batch(self, step: int, slot: int) -> Tokens:
        """Return the tokens of one slot: int64 [B, L+1]."""
        indices_B = slot_indices(self._seed, step, slot, self._slots_per_step, self._micro_batch_size, self.num_windows)
        return _windows(self._tokens, indices_B, self._sequence_length)


class HeldOut:
    """At most `max_sequences` windows spread evenly over the held-out part, in `parts` contiguous ranges."""

    def __init__(self, prepared: PreparedData, sequence_length: int, max_sequences: int, parts: int) -> None:
        available = (prepared.validation_tokens - 1) // sequence_length
        self.num_windows = min(max_sequences, available)
        self.parts = parts
        numbers_N = np.arange(self.num_windows, dtype=np.int64)
        self._indices_N = numbers_N * available // max(1, self.num_windows)
        self._tokens = np.asarray(prepared.validation())
        self._token_bytes = prepared.token_bytes()
        self._sequence_length = sequence_length

    def part(self, p: int) -> Tokens:
        """Return the windows of part p, 0..parts-1: int64 [N_p, L+1]; some parts may be empty."""
        if not 0 <= p < self.parts:
            raise ValueError(f"part {p} must be in 0..{self.parts - 1}")
        start, stop = p * self.num_windows // self.parts, (p + 1) * self.num_windows // self.parts
        return _windows(self._tokens, self._indices_N[start:stop], self._sequence_length)

    def bytes_of(self, p: int) -> int:
        """Count the UTF-8 bytes that the predicted tokens of part p stand for; the special token has none."""
        return int(self._token_bytes[self.part(p)[:, 1:]].sum())
