"""The project's GPT as a user of PyTorch would train it: DDP over gloo, clipping, fused AdamW.

    python -m benchmarks.support.ddp_training RANK MODE PORT VOCAB_SIZE JOB_ARGUMENTS

MODE: `fp32`, `fp16` (the same with DDP's compression hook), or `alone`: forward and backward only, with
nobody to talk to and no update: what computing takes on this machine when another one computes beside it.
Each line of standard input is a number of steps; they are done, and answered by a line of their seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from workers.config import JobConfig, load_job
from workers.models.gpt import GPT

Step = Callable[[], None]


class Loss(nn.Module):
    """DDP's hooks are on what `forward` calls."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens)


def distributed(job: JobConfig, model: nn.Module, batch: Callable[[], torch.Tensor], *, compress: bool) -> Step:
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(None, fp16_compress_hook)
    chosen = job.optimizer
    optimizer = torch.optim.AdamW(
        ddp.parameters(), lr=chosen.lr, betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay, fused=True
    )
    slots = job.batch.micro_batches_per_step // 2

    def step() -> None:
        for slot in range(slots):
            with nullcontext() if slot == slots - 1 else ddp.no_sync():
                (ddp(batch()) / slots).backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), chosen.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def alone(job: JobConfig, model: nn.Module, batch: Callable[[], torch.Tensor]) -> Step:
    slots = job.batch.micro_batches_per_step // 2

    def step() -> None:
        for _ in range(slots):
            (model(batch()) / slots).backward()
        model.zero_grad()

    return step


def main(rank: int, mode: str, port: int, vocab_size: int, job_arguments: list[str]) -> None:
    job = load_job(None, job_arguments)
    torch.set_num_threads(job.worker.threads)
    torch.manual_seed(rank)
    gpt = GPT(job.model, vocab_size, job.data.sequence_length)
    gpt.initialize(job.seed)
    model = Loss(gpt)
    shape = (job.batch.micro_batch_size, job.data.sequence_length + 1)

    def batch() -> torch.Tensor:
        return torch.randint(0, vocab_size, shape)

    if mode == "alone":
        step = alone(job, model, batch)
    else:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        step = distributed(job, model, batch, compress=mode == "fp16")
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(round(time.perf_counter() - began, 6))
        print(json.dumps(seconds), flush=True)
    if mode != "alone":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
