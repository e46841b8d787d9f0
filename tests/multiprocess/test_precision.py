"""Half precision in forward and backward, on a CPU: slow there, and the same path as on a GPU."""

from __future__ import annotations

import pytest

from tests.multiprocess.conftest import MakeJob
from tests.support.cluster import train

pytestmark = pytest.mark.multiprocess

STEPS = "training.steps=30"


def losses(make_job: MakeJob, name: str, *overrides: str) -> list[float]:
    return train(make_job(name, STEPS, "optimizer.lr=3e-3", *overrides)).column("loss")


@pytest.mark.parametrize("accumulate", ["fp32", "fp16"])
def test_fp16_forward_and_backward_follow_fp32(make_job: MakeJob, accumulate: str) -> None:
    expected = losses(make_job, "fp32")
    found = losses(make_job, "fp16", "precision.compute=fp16", f"precision.accumulate={accumulate}")
    assert found != expected, "FP16 arithmetic must show"
    assert found == pytest.approx(expected, rel=0.02)
    assert expected[-1] < 0.9 * expected[0]


def test_bf16_forward_and_backward_follow_fp32(make_job: MakeJob) -> None:
    expected = losses(make_job, "fp32")
    found = losses(make_job, "bf16", "precision.compute=bf16", "precision.wire=bf16")
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03)
