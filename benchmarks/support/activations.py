"""What forward and backward take beyond weights and gradients, in a plain PyTorch process on the CPU.

    python -m benchmarks.support.activations JOB_ARGUMENTS VOCAB_SIZE TIMES

prints bytes: the peak of the resident memory above what the model and its gradients take.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

from workers.config import load_job
from workers.models.gpt import GPT


def resident(key: str) -> int:
    """VmRSS now, or VmHWM at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(job_arguments: list[str], vocab_size: int, times: int) -> None:
    torch.set_num_threads(1)
    job = load_job(None, job_arguments)
    length = job.data.sequence_length
    model = GPT(job.model, vocab_size, length)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(1.0)
    tokens = torch.randint(0, vocab_size, (job.batch.micro_batch_size, length + 1))
    # The code of every operation is in memory before the counting starts.
    small = job.model.model_copy(update={"num_layers": 1, "hidden_size": 64, "num_heads": 1})
    GPT(small, vocab_size, 64).loss(tokens[:, :65]).backward()
    # What the C library keeps for later would hide the same amount of activations.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS:")
    # As often as a worker does it: the heap's holes grow for a while.
    for _ in range(times):
        model.loss(tokens).backward()
    print(resident("VmHWM:") - before)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
