"""Memory that is the system's again as soon as it is let go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ps import pages

SIZE = 64 << 20


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@linux
def test_pages_cost_nothing_until_they_are_touched() -> None:
    before = resident()
    memory = pages.zeros(SIZE)
    array = np.frombuffer(memory, np.float32)
    assert resident() - before < SIZE // 4
    array[:] = 1.0
    assert resident() - before > SIZE * 3 // 4


@linux
def test_an_array_of_pages_is_gone_with_its_last_view() -> None:
    before = resident()
    array = pages.float32_zeros(SIZE // 4)
    array[:] = 1.0
    view = array[:16]
    del array
    assert float(view[3]) == 1.0
    del view
    assert resident() - before < SIZE // 4
