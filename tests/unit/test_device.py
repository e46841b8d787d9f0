"""Devices: which one, in what it computes, and how chunks move; the accelerator's way also without one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from ps.config import PrecisionConfig
from ps.errors import ConfigError
from ps.types import WireDtype
from tests.support.shards import in_threads
from workers.config import load_job
from workers.engine import device

SIZE = 70_000

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[cuda, pytest.mark.cuda])]


def wire_values(wire: WireDtype) -> np.ndarray:
    """Elements of the wire dtype, read-only as a received payload is."""
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(3)).to(device._TORCH[wire])
    bits = values.view(torch.int16).numpy().view(np.uint16) if wire.itemsize == 2 else values.numpy()
    bits.flags.writeable = False
    return bits


def movers(name: str, wire: WireDtype) -> list[device.Mover]:
    """The device's own, and the one that needs nothing of a device."""
    return [device.mover(torch.device(name), wire, SIZE), device.PlainMover(wire)]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("wire", list(WireDtype))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_arrive_as_they_were_published(name: str, wire: WireDtype, dtype: torch.dtype) -> None:
    payload = wire_values(wire)
    expected = torch.from_numpy(payload.copy().view(np.int16 if wire.itemsize == 2 else np.float32))
    expected = expected.view(device._TORCH[wire]).to(dtype)
    for mover in movers(name, wire):
        weights = torch.zeros(3, SIZE, dtype=dtype, device=name)
        for row in weights:
            mover.write(payload, row)
        mover.use()
        for row in weights.cpu():
            assert torch.equal(row, expected)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("wire", list(WireDtype))
@pytest.mark.parametrize("divisor", [1, 3, 4])
def test_gradients_are_divided_and_rounded_once(name: str, wire: WireDtype, divisor: int) -> None:
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(5)) * 300
    gradient[7], gradient[8] = 1e6, float("nan")
    expected = (gradient / divisor).to(device._TORCH[wire])
    for mover in movers(name, wire):
        room = np.zeros(SIZE, wire.numpy)
        mover.read(gradient.to(name), divisor, room, mover.mark())
        found = torch.from_numpy(room.view(np.int16 if wire.itemsize == 2 else np.float32)).view(device._TORCH[wire])
        assert torch.equal(found.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
        assert torch.isnan(found[8])


@pytest.mark.parametrize("name", DEVICES)
def test_chunks_move_in_several_threads_at_once(name: str) -> None:
    """One of each stream writes, and the pusher's reads."""
    mover = device.mover(torch.device(name), WireDtype.FP16, SIZE)
    payload, threads, times = wire_values(WireDtype.FP16), 4, 20
    weights = torch.zeros(threads, SIZE, device=name)
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(5)).to(name)
    rooms = [np.zeros(SIZE, np.uint16) for _ in range(times)]
    mark = mover.mark()

    def write(row: int) -> None:
        for _ in range(times):
            mover.write(payload, weights[row])

    def read() -> None:
        for room in rooms:
            mover.read(gradient, 3, room, mark)

    in_threads(*[partial(write, row) for row in range(threads)], read)
    mover.use()
    expected = torch.from_numpy(payload.copy().view(np.float16)).float()
    assert all(torch.equal(row, expected) for row in weights.cpu())
    halves = (gradient.cpu() / 3).half().numpy().view(np.uint16)
    assert all(np.array_equal(room, halves) for room in rooms)


@pytest.mark.cuda
@cuda
def test_the_computation_is_not_waited_for_and_is_not_overtaken() -> None:
    """Weights that the device still reads are not written over, and a gradient is read when it is there."""
    mover = device.mover(torch.device("cuda"), WireDtype.FP32, SIZE)
    weights = torch.full((SIZE,), 1.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    seen = weights * 2
    mark = mover.mark()
    mover.write(np.full(SIZE, 5, np.float32), weights)
    room = np.zeros(SIZE, np.float32)
    mover.read(seen, 1, room, mark)
    assert np.all(room == 2), "as it was when it was marked"
    mover.use()
    assert torch.all(weights * 1 == 5)


def test_a_device_that_is_not_there_is_an_error() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"worker\.device=cuda"):
            device.choose("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match=r"worker\.device=mps"):
            device.choose("mps")
    assert device.choose("cpu").type == "cpu"


def test_fp16_is_computed_where_there_is_hardware_for_it() -> None:
    precision = PrecisionConfig()
    assert device.compute_dtype(precision, torch.device("cpu")) is torch.float32
    assert device.compute_dtype(precision, torch.device("cuda")) is torch.float16
    assert device.compute_dtype(PrecisionConfig(wire=WireDtype.BF16), torch.device("cuda")) is torch.bfloat16
    assert device.compute_dtype(PrecisionConfig(compute="bf16"), torch.device("cpu")) is torch.bfloat16


def test_fp16_arithmetic_without_a_loss_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a loss scale"):
        load_job(None, ["precision.compute=fp16", "precision.wire=bf16"])
    load_job(None, ["precision.compute=fp16", "precision.wire=bf16", "precision.loss_scale.static=1024"])
    with pytest.raises(ConfigError, match=r"precision\.accumulate=fp16"):
        device.compute_dtype(PrecisionConfig(accumulate="fp16"), torch.device("cpu"))
