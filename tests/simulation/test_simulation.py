"""Seeds of whole runs, and that a seed is one run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ps.types import Role
from tests.simulation import faults
from tests.simulation.faults import Fault
from tests.simulation.report import Summary, describe
from tests.simulation.seeds import outcomes
from tests.simulation.simulation import KINDS, simulate

#: Seeds of one test; the normal suite runs a few, `make simulate` as many as it is told.
BLOCK = 40
BLOCKS = 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_goes_wrong_where_nothing_goes_wrong(kind: str) -> None:
    outcome = simulate(0, kind=kind, calm=True)
    assert outcome.wrong == []
    assert outcome.faults == []


@pytest.mark.parametrize("standbys", [0, 1])
def test_a_coordinator_that_was_stopped_past_every_lease_throws_nobody_out(standbys: int) -> None:
    for seed in range(5):
        stopped = Fault(600 + 20 * seed, "stop", faults.stop(7.0, Role.COORDINATOR))
        outcome = simulate(seed, calm=True, only=[stopped], standbys=standbys, trace=True)
        assert outcome.faults == ["SIGSTOP coordinator-0 for 7.000 s"]
        assert outcome.wrong == []
        assert outcome.simulated_s > 7.0
        lost = [line for line in outcome.trace if "has been silent for too long" in line or "broke its conn" in line]
        assert (lost, outcome.takeovers) == ([], 0)


@pytest.mark.parametrize(("block", "standbys"), [(0, 0), *((block, 1) for block in range(BLOCKS))])
def test_every_run_ends_as_the_sequential_model_does(block: int, standbys: int) -> None:
    summary = Summary()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        outcome = simulate(seed, standbys=standbys)
        summary.add(outcome)
        assert not outcome.wrong, describe(simulate(seed, standbys=standbys, trace=True))
    summary.check()


def test_a_seed_is_one_run_whatever_the_process() -> None:
    """Also with another order of hashing, and when it is traced."""
    seeds = (7, 11, 18)
    script = f"from tests.simulation.simulation import simulate\nprint(*(simulate(s).fingerprint for s in {seeds}))"
    found = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.add(tuple(map(int, run.stdout.split())))
    found.add(tuple(simulate(seed, trace=True).fingerprint for seed in seeds))
    assert len(found) == 1


def test_seeds_are_the_same_on_several_processes() -> None:
    alone, shared = ({o.seed: o.fingerprint for o in outcomes(range(4), False, jobs)} for jobs in (1, 2))
    assert alone == shared


def test_other_seeds_are_other_runs() -> None:
    assert simulate(1).fingerprint != simulate(2).fingerprint
