"""The held-out loss. N: windows, L: sequence length, B: batch, V: vocabulary, T: L + 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from workers.models.gpt import GPT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no graph inside; the mode that it found afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate_windows(model: GPT, windows: npt.NDArray[np.int64], batch_size: int) -> tuple[float, int]:
    """Add up the loss over windows.

    Args:
        model: On any device; its mode is restored.
        windows: int64 [N, L+1]; N may be 0.
        batch_size: Windows in one forward.

    Returns:
        The loss in nats summed over the predicted tokens, in float64, and their number.
    """
    device = next(model.parameters()).device
    loss_sum = 0.0
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            tokens_BT = torch.from_numpy(windows[start : start + batch_size]).to(device)
            logits_BLV = model(tokens_BT[:, :-1])
            losses = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
            loss_sum += float(losses.cpu().double().sum())
    return loss_sum, windows.shape[0] * (windows.shape[1] - 1)
