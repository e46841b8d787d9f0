"""All calls that depend on the device: which one, what it computes in, how chunks move to and from it.

Chunks move between the flat buffers on the device and host memory in the wire dtype. On the CPU
they are converted in one pass by the kernels, straight from or into the flat buffer; on an
accelerator they are converted there and copied through pinned buffers.
"""

from __future__ import annotations

from mmap import mmap
from typing import Protocol

import numpy as np
import torch

from ps import pages
from ps.config import PrecisionConfig
from ps.errors import ConfigError
from ps.kernels.convert import decode, encode
from ps.types import WireDtype

_TORCH = {WireDtype.FP16: torch.float16, WireDtype.BF16: torch.bfloat16, WireDtype.FP32: torch.float32}
_COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Array = np.ndarray


def choose(wanted: str) -> torch.device:
    """Find the device.

    Raises:
        ConfigError: it is asked for by name and is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("worker.device=cuda: torch sees no CUDA device here; use cpu, or a CUDA build of torch")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("worker.device=mps: torch sees no Metal device here; use cpu")
    if wanted == "xla":
        try:
            import torch_xla.core.xla_model as xla  # type: ignore[import-not-found]
        except ImportError:
            raise ConfigError("worker.device=xla: torch_xla is not installed; install it, or use cpu") from None
        device: torch.device = xla.xla_device()
        return device
    return torch.device(wanted)


def compute_dtype(precision: PrecisionConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward: the wire's on CUDA (FP16 by default), FP32 elsewhere, unless the job says.

    The wire's, because FP16 gradients need the loss scale, which only an FP16 wire carries.

    Raises:
        ConfigError: gradients are to add up in FP16, and there are none in it.
    """
    if precision.compute != "auto":
        return _COMPUTE[precision.compute]
    dtype = _TORCH[precision.wire] if device.type == "cuda" else torch.float32
    if precision.accumulate == "fp16" and dtype is not torch.float16:
        raise ConfigError(
            f"precision.accumulate=fp16 needs gradients in FP16, and precision.compute=auto is FP32 on {device.type}; "
            "set precision.compute=fp16 or precision.accumulate=fp32"
        )
    return dtype


def prepare(device: torch.device, threads: int) -> None:
    """Make results repeatable: a fixed number of threads, deterministic kernels where there are any."""
    torch.set_num_threads(threads)
    # The same as use_deterministic_algorithms(True, warn_only=True), which imports 70 MB of compiler.
    torch.set_deterministic_debug_mode("warn")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False


def seed(value: int) -> None:
    """Set the state of every generator that a forward may draw from."""
    torch.manual_seed(value)


def upload(tokens: Array, device: torch.device) -> torch.Tensor:
    """Copy a batch of token numbers to the device."""
    host = torch.from_numpy(tokens)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class Arena:
    """A flat buffer on the device; on the CPU in pages that can be given back between two uses."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pages: mmap | None = None
        if device.type == "cpu":
            self._pages = pages.zeros(size * dtype.itemsize)
            self.tensor = torch.frombuffer(self._pages, dtype=dtype, count=size)
        else:
            self.tensor = torch.zeros(size, dtype=dtype, device=device)
        self._is_zero = True

    def discard(self) -> None:
        """The contents are not needed any more."""
        self._is_zero = self._pages is not None and pages.discard(self._pages)

    def use(self) -> None:
        """Begin anew, with zeros."""
        if not self._is_zero:
            self.tensor.zero_()
        self._is_zero = False


class Mover(Protocol):
    """Moves chunks between a flat buffer on the device and the wire."""

    def write(self, payload: Array, target: torch.Tensor) -> None:
        """Convert wire elements into `target` (1-D, on the device)."""

    def read(self, source: torch.Tensor, divisor: int, room: Array) -> None:
        """Write `source` / divisor, rounded once, into `room` in the wire dtype."""


def mover(device: torch.device, wire: WireDtype, chunk_elements: int) -> Mover:
    """The mover for a device; `chunk_elements` is the size of the largest chunk."""
    return HostMover(wire) if device.type == "cpu" else AcceleratorMover(device, wire, chunk_elements)


class HostMover:
    """The flat buffers are host memory: no copy, one conversion."""

    def __init__(self, wire: WireDtype) -> None:
        self._wire = wire

    def write(self, payload: Array, target: torch.Tensor) -> None:
        if target.dtype is torch.float32:
            decode(payload, self._wire, target.numpy())
        else:
            target.copy_(_tensor(payload, self._wire))

    def read(self, source: torch.Tensor, divisor: int, room: Array) -> None:
        if source.dtype is torch.float32:
            encode(source.numpy(), divisor, self._wire, room)
        else:
            _tensor(room, self._wire).copy_(source if divisor == 1 else source.float() / divisor)


class AcceleratorMover:
    """Conversions on the device, copies through two pinned buffers on a stream of their own."""

    def __init__(self, device: torch.device, wire: WireDtype, chunk_elements: int) -> None:
        self._device = device
        self._wire = wire
        pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._staging = [torch.empty(chunk_elements, dtype=_TORCH[wire], pin_memory=pinned) for _ in range(2)]
        self._busy: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def write(self, payload: Array, target: torch.Tensor) -> None:
        self._turn ^= 1
        event = self._busy[self._turn]
        if event is not None:
            event.synchronize()
        staging = self._staging[self._turn][: target.numel()]
        staging.copy_(_tensor(payload, self._wire))
        if self._stream is None:
            target.copy_(staging)
            return
        # The model reads the weights on the current stream: it waits for the copy there, not the host.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(staging, non_blocking=True)
        self._busy[self._turn] = self._stream.record_event()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def read(self, source: torch.Tensor, divisor: int, room: Array) -> None:
        converted = source if divisor == 1 else source.float() / divisor
        staging = self._staging[0][: source.numel()]
        if self._busy[0] is not None:
            self._busy[0].synchronize()
        staging.copy_(converted.to(_TORCH[self._wire]))
        _tensor(room, self._wire).copy_(staging)


def _tensor(array: Array, wire: WireDtype) -> torch.Tensor:
    """View wire elements as a tensor; a received payload is only ever read."""
    if not array.flags.writeable:
        array = _writable_view(array)
    return torch.from_numpy(array.view(np.int16 if wire.itemsize == 2 else np.float32)).view(_TORCH[wire])


def _writable_view(array: Array) -> Array:
    """torch warns about read-only arrays; this one is not written to."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("Holder", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)
