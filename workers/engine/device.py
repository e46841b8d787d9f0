"""All calls that depend on the device: which one, what it computes in, how chunks move to and from it.

Chunks move between the flat buffers on the device and host memory in the wire dtype. On the CPU
they are converted in one pass by the kernels, straight from or into the flat buffer; on an
accelerator they are converted there and copied through pinned buffers.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from ps import pages
from ps.config import PrecisionConfig
from ps.errors import ConfigError
from ps.kernels.convert import decode, encode
from ps.kernels.digest import hash_payload
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
    # It would also have every new tensor filled, which an operation that writes all of its result does not need.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
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


def flat_buffer(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make zeros [size] on the device; on the CPU in huge pages."""
    if device.type == "cpu":
        return torch.frombuffer(pages.zeros(size * dtype.itemsize), dtype=dtype, count=size)
    return torch.zeros(size, dtype=dtype, device=device)


#: A point in the work of a device; None where work is done as soon as it is asked for.
Mark = torch.cuda.Event | None


class Mover(Protocol):
    """Moves chunks between a flat buffer on the device and the wire. `read` and `write` are any thread's."""

    def mark(self) -> Mark:
        """Everything that has been asked of the device until now."""

    def use(self) -> None:
        """What is computed from now on reads what was written until now."""

    def write(self, payload: Array, target: torch.Tensor) -> None:
        """Convert wire elements into `target` (1-D, on the device), which nothing asked for until now reads late."""

    def read(self, source: torch.Tensor, divisor: int, room: Array, ready: Mark) -> bytes:
        """Write `source` / divisor, rounded once, as it is at `ready`, into `room` in the wire dtype; hash `room`."""


def mover(device: torch.device, wire: WireDtype, chunk_elements: int) -> Mover:
    """The mover for a device; `chunk_elements` is the size of the largest chunk."""
    if device.type == "cpu":
        return HostMover(wire)
    if device.type == "cuda":
        return CudaMover(device, wire, chunk_elements)
    return PlainMover(wire)


class HostMover:
    """The flat buffers are host memory: no copy, one conversion."""

    def __init__(self, wire: WireDtype) -> None:
        self._wire = wire

    def mark(self) -> Mark:
        return None

    def use(self) -> None:
        pass

    def write(self, payload: Array, target: torch.Tensor) -> None:
        if target.dtype is torch.float32:
            decode(payload, self._wire, target.numpy())
        else:
            target.copy_(_tensor(payload, self._wire))

    def read(self, source: torch.Tensor, divisor: int, room: Array, ready: Mark) -> bytes:
        del ready
        if source.dtype is torch.float32:
            return encode(source.numpy(), divisor, self._wire, room)
        _tensor(room, self._wire).copy_(source if divisor == 1 else source.float() / divisor)
        return hash_payload(room)


class PlainMover:
    """Copies that are waited for, on accelerators without streams of their own here."""

    def __init__(self, wire: WireDtype) -> None:
        self._wire = wire

    def mark(self) -> Mark:
        return None

    def use(self) -> None:
        pass

    def write(self, payload: Array, target: torch.Tensor) -> None:
        target.copy_(_tensor(payload, self._wire))

    def read(self, source: torch.Tensor, divisor: int, room: Array, ready: Mark) -> bytes:
        del ready
        converted = source if divisor == 1 else source.float() / divisor
        _tensor(room, self._wire).copy_(converted.to(_TORCH[self._wire]))
        return hash_payload(room)


class CudaMover:
    """Conversions on the device, copies through pinned buffers, on one stream each way beside the computation's.

    The computation is never waited for by the host: what it has finished is known by events, and what it
    needs it waits for itself, on the device.
    """

    def __init__(self, device: torch.device, wire: WireDtype, chunk_elements: int) -> None:
        self._device = device
        self._wire = wire
        self._compute = torch.cuda.current_stream(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._writes = _Staging(chunk_elements, _TORCH[wire])
        self._reads = _Staging(chunk_elements, _TORCH[wire])
        #: Before it the computation may read the weights that are about to be overwritten.
        self._last: Mark = None

    def mark(self) -> Mark:
        self._last = self._compute.record_event()
        return self._last

    def use(self) -> None:
        self._compute.wait_stream(self._down)

    def write(self, payload: Array, target: torch.Tensor) -> None:
        with self._writes.take(payload.size) as (staging, event):
            staging.copy_(_tensor(payload, self._wire))
            # The host says who may write, and runs ahead of the device.
            if self._last is not None:
                self._down.wait_event(self._last)
            with torch.cuda.stream(self._down):
                target.copy_(staging, non_blocking=True)
            event.record(self._down)

    def read(self, source: torch.Tensor, divisor: int, room: Array, ready: Mark) -> bytes:
        with self._reads.take(source.numel()) as (staging, event):
            if ready is not None:
                self._up.wait_event(ready)
            with torch.cuda.stream(self._up):
                converted = source if divisor == 1 else source.float() / divisor
                staging.copy_(converted.to(_TORCH[self._wire]), non_blocking=True)
            event.record(self._up)
            event.synchronize()
            _tensor(room, self._wire).copy_(staging)
        return hash_payload(room)


class _Staging:
    """Two pinned buffers; one is taken once the device has done with it."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for _ in range(2):
            self._free.put((torch.empty(elements, dtype=dtype, pin_memory=True), torch.cuda.Event()))

    @contextmanager
    def take(self, elements: int) -> Iterator[tuple[torch.Tensor, torch.cuda.Event]]:
        """Yield a buffer, and the event by which whoever took it tells when the device has done with it."""
        buffer, event = self._free.get()
        try:
            event.synchronize()
            yield buffer[:elements], event
        finally:
            self._free.put((buffer, event))


def fetch(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a small tensor to the host; what is returned waits for it."""
    if values.device.type != "cuda":
        return values.cpu
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.current_stream(values.device).record_event()

    def wait() -> torch.Tensor:
        event.synchronize()
        return host

    return wait


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
