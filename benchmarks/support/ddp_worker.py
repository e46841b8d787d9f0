"""PyTorch DDP over gloo with fused AdamW, its gradients there already: exchange and update alone."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _Give(torch.autograd.Function):
    """A loss whose gradient is a tensor that exists: backward computes nothing."""

    @staticmethod
    def forward(ctx, parameter, gradient):  # type: ignore[no-untyped-def]
        ctx.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return ctx.gradient, None


class Given(nn.Module):
    def __init__(self, parameters: int) -> None:
        super().__init__()
        sizes = [1 << 20] * (parameters >> 20) + ([parameters % (1 << 20)] if parameters % (1 << 20) else [])
        self.tensors = nn.ParameterList(torch.full((size,), 0.02) for size in sizes)
        self.gradients = [torch.randn(size) * 1e-3 for size in sizes]

    def forward(self) -> torch.Tensor:
        pairs = zip(self.tensors, self.gradients, strict=True)
        return torch.stack([_Give.apply(parameter, gradient) for parameter, gradient in pairs]).sum()


def main(rank: int, parameters: int, steps: int, compress: bool, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(Given(parameters), gradient_as_bucket_view=True)
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        model.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(steps + 2):
        dist.barrier()
        started = time.perf_counter()
        model().backward()
        optimizer.step()
        dist.barrier()
        times.append(time.perf_counter() - started)
        optimizer.zero_grad()
    if rank == 0:
        print(" ".join(f"{seconds:.6f}" for seconds in times[2:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fp16", int(sys.argv[5]))
