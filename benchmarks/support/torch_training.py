"""The project's GPT as a user of PyTorch would train it: a few steps whenever it is asked for them.

    python -m benchmarks.support.torch_training MODE DEVICE RANK WORLD_SIZE PORT JOB_ARGUMENTS

A line of standard input is a number of steps; it is answered by a line of JSON: the seconds of each, and the peak of
the bytes on the device.
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

from benchmarks.support import device_memory
from workers.config import JobConfig, load_job
from workers.models.gpt import GPT

Batch = Callable[[], torch.Tensor]
Step = Callable[[], None]


class Loss(nn.Module):
    """DDP's hooks are on what `forward` calls."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.gpt.loss(tokens)


def alone(job: JobConfig, model: nn.Module, batch: Batch, slots: int) -> Step:
    """Forward and backward only: what computing takes. In half precision on a GPU, as Windlass does it there."""
    del job
    if next(model.parameters()).is_cuda:
        model.half()

    def step() -> None:
        for _ in range(slots):
            (model(batch()) / slots).backward()
        model.zero_grad()

    return step


def ddp(job: JobConfig, model: nn.Module, batch: Batch, slots: int) -> Step:
    """Gradients averaged in FP32."""
    return _distributed(job, DistributedDataParallel(model, gradient_as_bucket_view=True), batch, slots)


def ddp_fp16(job: JobConfig, model: nn.Module, batch: Batch, slots: int) -> Step:
    """Gradients averaged in FP16, as DDP's own hook does it."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return _distributed(job, wrapped, batch, slots)


def amp(job: JobConfig, model: nn.Module, batch: Batch, slots: int) -> Step:
    """Automatic mixed precision, on one device: FP32 weights, computing in FP16, a loss scale."""
    device = next(model.parameters()).device.type
    optimizer, scaler = _optimizer(job, model), torch.amp.GradScaler(device)

    def step() -> None:
        for _ in range(slots):
            with torch.autocast(device, torch.float16):
                loss = model(batch()) / slots
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


MODES = {mode.__name__: mode for mode in (alone, ddp, ddp_fp16, amp)}


def _distributed(job: JobConfig, model: DistributedDataParallel, batch: Batch, slots: int) -> Step:
    optimizer = _optimizer(job, model)

    def step() -> None:
        for slot in range(slots):
            with nullcontext() if slot == slots - 1 else model.no_sync():
                (model(batch()) / slots).backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(job: JobConfig, model: nn.Module) -> torch.optim.Optimizer:
    chosen = job.optimizer
    return torch.optim.AdamW(
        model.parameters(),
        lr=chosen.lr,
        betas=chosen.betas,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        fused=True,
    )


def main(mode: str, device_name: str, rank: int, world_size: int, port: int, job_arguments: list[str]) -> None:
    job = load_job(None, job_arguments)
    device = torch.device(device_name)
    torch.set_num_threads(job.worker.threads)
    torch.manual_seed(rank)
    gpt = GPT(job.model, job.data.vocab_size, job.data.sequence_length)
    gpt.initialize(job.seed)
    shape = (job.batch.micro_batch_size, job.data.sequence_length + 1)

    def batch() -> torch.Tensor:
        return torch.randint(0, job.data.vocab_size, shape, device=device)

    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    step = MODES[mode](job, Loss(gpt).to(device), batch, job.batch.micro_batches_per_step // world_size)
    for line in sys.stdin:
        device_memory.reset_peak(device)
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(round(time.perf_counter() - began, 6))
        print(json.dumps({"seconds": seconds, "peak_bytes": device_memory.peak(device)}), flush=True)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), json.loads(sys.argv[6]))
