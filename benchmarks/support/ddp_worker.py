"""PyTorch DDP over gloo with fused AdamW, its gradients there already: exchange and update alone."""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

#: Steps before the ones that count.
WARM_UP_STEPS = 2


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("master", help="HOST:PORT of rank 0")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compress", action="store_true", help="with the FP16 compression hook")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{arguments.master}", rank=arguments.rank, world_size=arguments.world_size
    )
    model = DistributedDataParallel(Given(arguments.parameters), gradient_as_bucket_view=True)
    if arguments.compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        model.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(arguments.steps + WARM_UP_STEPS):
        dist.barrier()
        started = time.perf_counter()
        model().backward()
        optimizer.step()
        dist.barrier()
        times.append(time.perf_counter() - started)
        optimizer.zero_grad()
    if arguments.rank == 0:
        print(" ".join(f"{seconds:.6f}" for seconds in times[WARM_UP_STEPS:]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
