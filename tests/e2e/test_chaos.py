"""Faults at random over all roles of a running job, with mutual TLS: the result is that of a run without faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.launched import launched, tiny_job, train, windlass

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

FAULTS = 30
STEPS = 2500


def test_faults_change_nothing(tmp_path: Path) -> None:
    made = windlass("certs", "init", str(tmp_path / "keys"))
    assert made.returncode == 0, made.stderr
    common = [
        f"training.steps={STEPS}",
        f"security.certificates={tmp_path / 'keys'}",
        "checkpoint.every_steps=250",
        "launch.restart_limit=1000",
        "membership.lease_s=2",
    ]
    undisturbed = train(tmp_path, "undisturbed", *common)
    job = tiny_job(tmp_path, "chaos", *common, "cluster.standbys=1", "durability=journal")
    with launched("train", tmp_path / "chaos", job) as run:
        run.wait_for_step(10)
        told = windlass(
            "chaos",
            str(run.run_dir),
            *("--seed", "1", "--faults", str(FAULTS), "--every", "1.5", "--same-as", str(undisturbed.run_dir)),
            timeout_s=500.0,
        )
        assert told.returncode == 0, told.stdout + told.stderr + run.output()
        assert run.finish() == 0, run.output()
    assert len(re.findall(r"^ *[\d.]+ s +\d+ +(?:kill|stop|cut)", told.stdout, re.MULTILINE)) == FAULTS
    assert "the same as without faults" in told.stdout
    assert run.digest() == undisturbed.digest()
    assert [line["step"] for line in run.metrics() if line["kind"] == "step"] == list(range(STEPS))
