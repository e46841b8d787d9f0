"""What forward and backward take beyond weights and gradients, in a plain PyTorch process.

    python -m benchmarks.support.activations DEVICE DTYPE TIMES JOB_ARGUMENTS

prints bytes: the peak on the device above what the model and its gradients take.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.support import device_memory
from workers.config import load_job
from workers.models.gpt import GPT


def activations(
    job: Sequence[str], env: Mapping[str, str], times: int, device: str = "cpu", dtype: str = "float32"
) -> float:
    """Bytes; the median of 3 processes.

    Args:
        env: the environment of the processes: the malloc settings count.
        times: micro-batches, as many as a worker has done: the heap's holes grow for a while.
    """
    command = [sys.executable, "-m", __spec__.name, device, dtype, str(times), json.dumps(list(job))]
    runs = [subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True) for _ in range(3)]
    return statistics.median(int(run.stdout) for run in runs)


def main(device_name: str, dtype: str, times: int, job_arguments: list[str]) -> None:
    torch.set_num_threads(1)
    job = load_job(None, job_arguments)
    length, vocab_size = job.data.sequence_length, job.data.vocab_size
    device = torch.device(device_name)
    model = GPT(job.model, vocab_size, length).to(device, getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(1.0)
    tokens = torch.randint(0, vocab_size, (job.batch.micro_batch_size, length + 1), device=device)
    # The code of every operation is in memory before the counting starts.
    small = job.model.model_copy(update={"num_layers": 1, "hidden_size": 64, "num_heads": 1})
    GPT(small, vocab_size, 64).to(device, getattr(torch, dtype)).loss(tokens[:, :65]).backward()
    # What the C library keeps for later would hide the same amount of activations.
    ctypes.CDLL(None).malloc_trim(0)
    before = device_memory.now(device)
    device_memory.reset_peak(device)
    for _ in range(times):
        model.loss(tokens).backward()
    print(device_memory.peak(device) - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
