"""Faults at random over all roles of a running job, with mutual TLS: the result is that of a run without faults."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.launched import launched, tiny_job, train, windlass

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

FAULTS = 30
#: Of all faults.
FAULTS_S = 300.0


def test_faults_change_nothing(tmp_path: Path) -> None:
    """The job has no end: it is saved where it is when all faults have been carried out."""
    made = windlass("certs", "init", str(tmp_path / "keys"))
    assert made.returncode == 0, made.stderr
    common = [
        "training.steps=1000000",
        f"security.certificates={tmp_path / 'keys'}",
        "checkpoint.every_steps=250",
        "launch.restart_limit=1000",
        "membership.lease_s=2",
    ]
    job = tiny_job(tmp_path, "chaos", *common, "cluster.standbys=1", "durability=journal")
    with launched("train", tmp_path / "chaos", job) as run:
        run.wait_for_step(10)
        with chaos(str(run.run_dir), "--seed", "1", "--faults", str(FAULTS), "--every", "1") as told:
            said = until_it_waits(told)
            run.process.send_signal(signal.SIGTERM)
            assert run.finish() == 128 + signal.SIGTERM, run.output()
            said += told.communicate(timeout=60)[0]
    steps = [line["step"] for line in run.metrics() if line["kind"] == "step"]
    assert steps == list(range(len(steps)))
    assert len(re.findall(r"^ *[\d.]+ s +\d+ +(?:kill|stop|cut)", said, re.MULTILINE)) == FAULTS
    assert f"every contribution of {len(steps)} steps was counted once by every shard" in said
    # It was ended before its last step, and nothing else is wrong.
    assert told.returncode == 1
    assert [line for line in said.splitlines() if line.startswith("WRONG")] == [
        f"WRONG: the run ended at step {len(steps)} of 1000000: the logs in {run.run_dir / 'logs'} say why"
    ]
    undisturbed = train(tmp_path, "undisturbed", *common, f"training.stop_at={len(steps)}")
    assert run.digest() == undisturbed.digest()


def chaos(*arguments: str) -> subprocess.Popen[str]:
    command: Sequence[str] = [sys.executable, "-m", "workers.cli.main", "chaos", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_it_waits(told: subprocess.Popen[str]) -> str:
    """What a chaos says until it has carried out all faults, and waits for the end of the run."""
    assert told.stdout is not None
    said = ""
    giving_up = threading.Timer(FAULTS_S, told.kill)
    giving_up.start()
    try:
        for line in told.stdout:
            said += line
            if line.startswith("waiting for the end"):
                return said
    finally:
        giving_up.cancel()
    raise AssertionError(f"it ended, or was given up after {FAULTS_S:.0f} s:\n{said}")
