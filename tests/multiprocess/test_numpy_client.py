"""`windlass.Client` against real processes: the numbers of plain numpy, whoever computes and whoever dies."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import windlass
from tests.support.cluster import Finished
from windlass.testing import LocalCluster

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
STEPS, SLOTS, CONTRIBUTIONS = 12, 7, 3
LR, BETAS, EPS, DECAY, CLIP = 0.05, (0.9, 0.95), 1e-8, 0.1, 1.0
#: 133,120 elements: three segments, so two shards.
INPUTS, OUTPUTS = 64, 2048
JOB = (
    f"training.steps={STEPS}",
    f"batch.micro_batches_per_step={SLOTS}",
    f"batch.contributions_per_step={CONTRIBUTIONS}",
    f"optimizer.lr={LR}",
    f"optimizer.weight_decay={DECAY}",
    f"optimizer.clip_norm={CLIP}",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "membership.lease_s=60",
)

Tensors = dict[str, np.ndarray]
truth = np.random.default_rng(0).standard_normal((INPUTS, OUTPUTS), np.float32)


def initial() -> Tensors:
    return {"weight": np.zeros((INPUTS, OUTPUTS), np.float32), "bias": np.ones(OUTPUTS, np.float32)}


def compute(weights: Tensors, step: int, slots: range) -> tuple[Tensors, float]:
    """The sum over the slots of the gradient of the mean squared error, and of the error."""
    gradients, loss_sum = {name: np.zeros_like(value) for name, value in weights.items()}, 0.0
    for slot in slots:
        x = np.random.default_rng((step, slot)).standard_normal((8, INPUTS), np.float32)
        error = x @ weights["weight"] + weights["bias"] - x @ truth
        loss_sum += float(np.mean(error**2))
        gradients["weight"] += 2 * x.T @ error / error.size
        gradients["bias"] += 2 * error.sum(axis=0) / error.size
    return gradients, loss_sum


def alone() -> tuple[Tensors, list[float]]:
    """Plain numpy: AdamW with clipping, in float64; the weight decays and the bias does not."""
    weights = {name: value.astype(np.float64) for name, value in initial().items()}
    first, second = ({name: np.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    losses = []
    for step in range(STEPS):
        gradients, loss_sum = compute({n: v.astype(np.float32) for n, v in weights.items()}, step, range(SLOTS))
        losses.append(loss_sum / SLOTS)
        mean = {name: gradient / SLOTS for name, gradient in gradients.items()}
        norm = np.sqrt(sum(float(np.sum(gradient.astype(np.float64) ** 2)) for gradient in mean.values()))
        for name, weight in weights.items():
            gradient = mean[name] * min(1.0, CLIP / (norm + 1e-6))
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            if name == "weight":
                weight *= 1 - LR * DECAY
            corrected = np.sqrt(second[name] / (1 - BETAS[1] ** (step + 1))) + EPS
            weight -= LR * first[name] / (1 - BETAS[0] ** (step + 1)) / corrected
    return weights, losses


def work(
    address: str,
    on_work: Callable[[windlass.Work], object] = lambda _: None,
    on_connect: Callable[[windlass.Client], object] = lambda _: None,
) -> tuple[str, Tensors, int]:
    """Be a client until the end; returns why it ended, the last weights, and how much it pushed."""
    pushed = 0
    with windlass.Client.connect(address, initial()) as client:
        on_connect(client)
        for piece in client:
            on_work(piece)
            pushed += client.push(piece, *compute(dict(piece.weights), piece.step, piece.slots))
        last = {name: value.copy() for name, value in client.pull(timeout_s=10.0).items()}
        return client.reason, last, pushed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensors, list[float]]:
    """Digest, weights and losses of one client and two shards."""
    run_dir = tmp_path_factory.mktemp("client") / "undisturbed"
    with LocalCluster(*JOB, "precision.wire=fp32", shards=2, run_dir=run_dir) as cluster:
        reason, last, pushed = work(cluster.address)
        cluster.wait(60.0)
    assert reason == f"finished: {STEPS} steps"
    assert pushed == STEPS * CONTRIBUTIONS
    finished = Finished(cluster.job)
    for name, value in finished.tensors().items():
        np.testing.assert_array_equal(last[name], value)
    return finished.digest(), last, finished.column("loss")


def test_the_numbers_are_those_of_plain_numpy(undisturbed: tuple[str, Tensors, list[float]]) -> None:
    _, last, losses = undisturbed
    expected, expected_losses = alone()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[-1] < 0.95 * losses[0]
    for name, value in expected.items():
        # Where a gradient is nearly zero, Adam divides one rounding error by another.
        np.testing.assert_allclose(last[name], value, atol=2e-4)
        assert np.mean(np.abs(last[name] - value)) < 1e-6


def test_a_half_precision_wire_carries_a_loss_scale_that_nobody_sees(tmp_path: Path) -> None:
    with LocalCluster(*JOB, "precision.wire=fp16", run_dir=tmp_path / "run") as cluster:
        scales: set[float] = set()
        _, last, _ = work(cluster.address, lambda piece: scales.add(piece.loss_scale))
    assert scales == {65536.0}
    assert not any(Finished(cluster.job).column("skipped"))
    expected, _ = alone()
    # Adam's first steps are signs: where a gradient rounds across zero, they differ by the learning rate.
    assert np.mean(np.abs(last["weight"] - expected["weight"])) < 5e-3


def test_two_clients_make_the_same_bits(undisturbed: tuple[str, Tensors, list[float]], tmp_path: Path) -> None:
    with LocalCluster(*JOB, "precision.wire=fp32", shards=2, run_dir=tmp_path / "run") as cluster:
        # The first one's first piece waits until the second one has weights: from then on both are dealt work.
        together = threading.Event()
        shares: list[int] = []

        def first() -> None:
            shares.append(work(cluster.address, lambda _: together.wait(60.0))[2])

        def second() -> None:
            def look(client: windlass.Client) -> None:
                np.testing.assert_array_equal(client.pull(0)["bias"], initial()["bias"])
                together.set()

            shares.append(work(cluster.address, lambda _: None, look)[2])

        clients = [threading.Thread(target=first), threading.Thread(target=second)]
        clients[0].start()
        clients[1].start()
        for client in clients:
            client.join(120.0)
        cluster.wait(60.0)
    assert len(shares) == 2
    assert min(shares) > 0
    assert Finished(cluster.job).digest() == undisturbed[0]


def test_the_loop_goes_on_after_kill_9(undisturbed: tuple[str, Tensors, list[float]], tmp_path: Path) -> None:
    overrides = ["precision.wire=fp32", "checkpoint.every_steps=2"]
    with LocalCluster(*JOB, *overrides, shards=2, run_dir=tmp_path / "run") as cluster:
        victims = {4: ("shard", 1), 7: ("coordinator", 0)}
        steps = []

        def kill(piece: windlass.Work) -> None:
            steps.append(piece.step)
            if piece.step in victims:
                cluster.kill(*victims.pop(piece.step))

        reason, last, _ = work(cluster.address, kill)
        cluster.wait(60.0)
    assert reason == f"finished: {STEPS} steps"
    assert not victims
    # The shard's death took the cluster back to its newest checkpoint.
    assert steps.count(4) > CONTRIBUTIONS or steps != sorted(steps)
    assert Finished(cluster.job).digest() == undisturbed[0]
    for name, value in undisturbed[1].items():
        np.testing.assert_array_equal(last[name], value)


def test_other_parameters_than_the_run_has_are_refused(tmp_path: Path) -> None:
    with LocalCluster("training.steps=5", run_dir=tmp_path / "run") as cluster:
        with windlass.Client.connect(cluster.address, {"w": np.zeros(3, np.float32)}) as client:
            assert client.wait(60.0) is not None
            with (
                windlass.Client.connect(cluster.address, {"w": np.zeros(4, np.float32)}) as other,
                pytest.raises(windlass.PsError, match="has other parameters than this run"),
            ):
                other.wait(60.0)
        with pytest.raises(windlass.ConfigError, match="at least one"):
            windlass.Client.connect(cluster.address, {})


def test_the_text_of_the_readme_runs(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Push and pull from anything\n")[1].split("\n## ")[0]
    program, shell, output = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    assert program == (ROOT / "examples" / "numpy_linear.py").read_text()
    command = shlex.split(shell.split("&")[0])
    assert command[:2] == ["windlass", "coordinator"]
    overrides = [word for word in command if "=" in word and not word.startswith(("run_dir=", "cluster.shards="))]
    (tmp_path / "worker.py").write_text(program)
    with LocalCluster(*overrides, run_dir=tmp_path / "run") as cluster:
        ran = subprocess.run(
            [sys.executable, str(tmp_path / "worker.py"), cluster.address],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == output
