"""The fused update against torch.optim, against its own cutting, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ps.config import OptimizerConfig
from ps.kernels.convert import encode
from ps.kernels.update import RunTable, Update
from ps.sharding import Run
from ps.types import Decision, Fence, GroupScalars, WireDtype

LR = 3e-3
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1),
    "adam": OptimizerConfig(name="adam", weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
    "adam without decay": OptimizerConfig(name="adam", weight_decay=0),
    "sgd": OptimizerConfig(name="sgd", momentum=0, weight_decay=0.01),
    "momentum": OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.01),
    "dampening": OptimizerConfig(name="sgd", momentum=0.9, dampening=0.3, weight_decay=0),
    "nesterov": OptimizerConfig(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.01),
}


def make_decision(optimizer: OptimizerConfig, applied: int, decays: tuple[float, ...], **changes) -> Decision:
    beta1, beta2 = optimizer.betas if optimizer.name != "sgd" else (0.0, 0.0)
    fields = {
        "fence": Fence(1, 1),
        "step": applied - 1,
        "skip": False,
        "applied": applied,
        "skipped": 0,
        "loss": 0.0,
        "tokens": 0,
        "gradient_norm": 1.0,
        "loss_scale": 1024.0,
        "gradient_multiplier": 1 / 1024,
        "groups": tuple(GroupScalars(LR, decay) for decay in decays),
        "bias_correction1": 1 - beta1**applied,
        "bias_correction2": 1 - beta2**applied,
        "next_loss_scale": 1024.0,
        "next_hysteresis": 1,
        "next_last_overflow": -1,
        "snapshot": False,
    }
    return Decision(**{**fields, **changes})


class State:
    """A flat space with one run table per chunk, and the passes over it."""

    def __init__(self, optimizer, size, runs, dtype=WireDtype.FP16, cuts=(), seed=0):
        rng = np.random.default_rng(seed)
        self.update = Update(optimizer, dtype)
        self.weights, self.moments = np.zeros(size, np.float32), []
        for start, stop, _ in runs:
            self.weights[start:stop] = rng.standard_normal(stop - start, dtype=np.float32)
        self.moments = [np.zeros(size, np.float32) for _ in self.update.moment_names]
        self.published = np.full(size, 7, dtype.numpy)
        self.dtype, self.optimizer, self.runs = dtype, optimizer, runs
        self.borders = list(zip((0, *cuts), (*cuts, size), strict=True))

    def step(self, mean, decision, absent=()):
        total = 0
        for low, high in self.borders:
            inside = [
                (Run(max(a, low) - low, min(b, high) - low, index, group), index not in absent)
                for index, (a, b, group) in enumerate(self.runs)
                if a < high and b > low
            ]
            total += self.update.apply(
                mean[low:high],
                self.weights[low:high],
                [moment[low:high] for moment in self.moments],
                RunTable.build([run for run, _ in inside], high - low),
                np.array([present for _, present in inside], np.bool_),
                decision,
                self.published[low:high],
                low,
            )
        return total % 2**64

    def hash(self):
        parts = [self.update.state_hash(self.weights[a:b], [m[a:b] for m in self.moments], a) for a, b in self.borders]
        return sum(parts) % 2**64

    def bytes(self):
        return b"".join(a.tobytes() for a in (self.weights, *self.moments, self.published))


def in_torch(optimizer, weights, groups):
    parameters = [torch.nn.Parameter(torch.from_numpy(weights[a:b].copy())) for a, b, _ in groups]
    rows = [
        {"params": [p], "weight_decay": optimizer.weight_decay if group == 0 else 0.0}
        for p, (_, _, group) in zip(parameters, groups, strict=True)
    ]
    plain = {"lr": LR, "foreach": False}
    if optimizer.name == "sgd":
        extra = {key: getattr(optimizer, key) for key in ("momentum", "dampening", "nesterov")}
        return parameters, torch.optim.SGD(rows, **plain, **extra)
    cls = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
    return parameters, cls(rows, betas=optimizer.betas, eps=optimizer.eps, **plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_follow_torch(name):
    optimizer, runs = OPTIMIZERS[name], [(0, 1500, 0), (1536, 1637, 1), (1664, 2999, 0)]
    state = State(optimizer, 3008, runs)
    parameters, reference = in_torch(optimizer, state.weights, runs)
    rng = np.random.default_rng(1)
    for applied in range(1, 51):
        mean = (1024 * rng.standard_normal(3008)).astype(np.float32)
        state.step(mean, make_decision(optimizer, applied, (optimizer.weight_decay, 0.0)))
        for parameter, (a, b, _) in zip(parameters, runs, strict=True):
            parameter.grad = torch.from_numpy(mean[a:b] / 1024)
        reference.step()
        for parameter, (a, b, _) in zip(parameters, runs, strict=True):
            expected = parameter.detach().numpy()
            # Relative to the tensor: a weight near 0 is the difference of larger numbers.
            error = np.abs(state.weights[a:b] - expected).max() / np.abs(expected).max()
            assert error < 1e-6, f"step {applied}"
    for name, moment in zip(state.update.moment_names, state.moments, strict=True):
        expected = reference.state[parameters[0]][name].numpy()
        np.testing.assert_allclose(moment[:1500], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_adamw_is_this_float32_formula_bit_for_bit():
    optimizer = OPTIMIZERS["adamw"]
    state, f = State(optimizer, 4096, [(0, 4096, 0)]), np.float32
    weights, m, v = state.weights.copy(), np.zeros(4096, f), np.zeros(4096, f)
    rng = np.random.default_rng(2)
    for applied in range(1, 6):
        mean = rng.standard_normal(4096, dtype=np.float32)
        decision = make_decision(optimizer, applied, (0.1,))
        state.step(mean, decision)
        gradient = mean * f(1 / 1024)
        m = f(0.9) * m + f(1 - 0.9) * gradient
        v = f(0.95) * v + f(1 - 0.95) * (gradient * gradient)
        denominator = np.sqrt(v) * f(1 / np.sqrt(decision.bias_correction2)) + f(1e-8)
        weights = f(1 - LR * 0.1) * weights - f(LR / decision.bias_correction1) * m / denominator
    np.testing.assert_array_equal(state.weights.view(np.uint32), weights.view(np.uint32))
    np.testing.assert_array_equal(state.moments[0].view(np.uint32), m.view(np.uint32))
    np.testing.assert_array_equal(state.moments[1].view(np.uint32), v.view(np.uint32))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neither_the_cut_into_chunks_nor_into_runs_changes_a_bit(name):
    optimizer, size = OPTIMIZERS[name], 8 * 1024 + 64
    whole = State(optimizer, size, [(0, size, 0)])
    pieces = State(optimizer, size, [(0, size, 0)], cuts=(1024, 3072, 7168))
    runs = [(a, min(a + 192, size), 0) for a in range(0, size, 192)]
    small = State(optimizer, size, runs, cuts=(2048,))
    small.weights[:] = whole.weights
    rng = np.random.default_rng(3)
    for applied in range(1, 4):
        mean = rng.standard_normal(size, dtype=np.float32)
        decision = make_decision(optimizer, applied, (0.1,))
        hashes = {state.step(mean, decision) for state in (whole, pieces, small)}
        assert hashes == {whole.hash()}
    assert whole.bytes() == pieces.bytes() == small.bytes()


@pytest.mark.parametrize("dtype", WireDtype)
@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_absent_runs_and_padding_are_published_and_hashed_but_not_updated(name, dtype):
    optimizer = OPTIMIZERS[name]
    runs = [(0, 100, 0), (128, 1500, 1), (1536, 1537, 0), (1600, 4000, 1)]
    state = State(optimizer, 4096, runs, dtype)
    before, moments = state.weights.copy(), [moment.copy() for moment in state.moments]
    mean = np.full(4096, 512, np.float32)
    value = state.step(mean, make_decision(optimizer, 1, (0.1, 0.0)), absent={1, 2})
    touched = np.zeros(4096, bool)
    touched[0:100] = touched[1600:4000] = True
    assert (state.weights[touched] != before[touched]).all()
    assert state.weights[~touched].tobytes() == before[~touched].tobytes()
    for moment, old in zip(state.moments, moments, strict=True):
        assert (moment[touched] != 0).all()
        assert moment[~touched].tobytes() == old[~touched].tobytes()
    expected = np.empty(4096, dtype.numpy)
    encode(state.weights, 1, dtype, expected)
    assert state.published.tobytes() == expected.tobytes()
    assert value == state.hash()
    published = np.empty_like(state.published)
    state.update.publish(state.weights, published)
    assert published.tobytes() == expected.tobytes()


def test_a_run_without_elements_of_a_block_and_an_empty_table_work():
    optimizer = OPTIMIZERS["adamw"]
    for runs in ([], [(3000, 3001, 0)]):
        state = State(optimizer, 4096, runs)
        state.step(np.ones(4096, np.float32), make_decision(optimizer, 1, (0.1,)))
        assert np.count_nonzero(state.moments[0]) == len(runs)
        assert np.count_nonzero(state.published) == len(runs)


def test_the_first_applied_step_skips_dampening_and_no_other_does():
    optimizer = OPTIMIZERS["dampening"]
    state, mean = State(optimizer, 64, [(0, 64, 0)]), np.full(64, 1024, np.float32)
    state.step(mean, make_decision(optimizer, 1, (0.0,)))
    np.testing.assert_array_equal(state.moments[0], np.float32(1))
    state.step(mean, make_decision(optimizer, 2, (0.0,)))
    np.testing.assert_allclose(state.moments[0], 0.9 + 0.7)


def test_a_readonly_mean_needs_no_second_compilation():
    from ps.kernels import update as module

    state = State(OPTIMIZERS["adamw"], 64, [(0, 64, 0)])
    decision = make_decision(OPTIMIZERS["adamw"], 1, (0.1,))
    state.step(np.zeros(64, np.float32), decision)
    compiled = len(module._apply.signatures)
    state.step(np.frombuffer(bytes(256), np.float32), decision)
    assert len(module._apply.signatures) == compiled


def test_moment_names_are_those_of_torch():
    names = {name: Update(optimizer, WireDtype.FP16).moment_names for name, optimizer in OPTIMIZERS.items()}
    assert names["adamw"] == names["adam"] == ("exp_avg", "exp_avg_sq")
    assert names["momentum"] == names["nesterov"] == ("momentum_buffer",)
    assert names["sgd"] == ()


@pytest.mark.parametrize(
    "runs",
    [
        [Run(0, 65, 0, 0)],
        [Run(8, 8, 0, 0)],
        [Run(0, 10, 0, 0), Run(9, 12, 1, 0)],
        [Run(-1, 10, 0, 0)],
        [Run(0, 4, 0, -1)],
    ],
)
def test_impossible_runs_are_refused(runs):
    with pytest.raises(ValueError, match="in a chunk of 64 elements"):
        RunTable.build(runs, 64)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mean": np.zeros(64)}, "mean"),
        ({"weights": np.frombuffer(bytes(256), np.float32)}, "weights"),
        ({"moments": [np.zeros(64, np.float32)]}, "zip"),
        ({"moments": [np.zeros(64, np.float32), np.zeros(63, np.float32)]}, "exp_avg_sq"),
        ({"present": np.ones(2, np.bool_)}, "present"),
        ({"runs": RunTable.build([Run(0, 64, 0, 0)], 128)}, "128 elements"),
        ({"runs": RunTable.build([Run(0, 64, 0, 1)], 64)}, "2 groups"),
        ({"published": np.zeros(64, np.float32)}, "published"),
        ({"base": 64}, "base=64"),
    ],
)
def test_apply_refuses_what_it_would_misread_and_touches_nothing(changes, names):
    optimizer = OPTIMIZERS["adamw"]
    arguments = {
        "mean": np.ones(64, np.float32),
        "weights": np.zeros(64, np.float32),
        "moments": [np.zeros(64, np.float32) for _ in range(2)],
        "runs": RunTable.build([Run(0, 64, 0, 0)], 64),
        "present": np.ones(1, np.bool_),
        "decision": make_decision(optimizer, 1, (0.1,)),
        "published": np.zeros(64, np.uint16),
        "base": 0,
    }
    arguments.update(changes)
    with pytest.raises(ValueError, match=names):
        Update(optimizer, WireDtype.FP16).apply(**arguments)
    assert not arguments["weights"].any()
