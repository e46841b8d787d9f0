"""The committed figures of short benchmarks, and what counts as having lost one. Pure but for reading and writing.

Figures are ratios, each against a peer in the same run. They carry over between machines of one kind, not between
kinds: what one processor's caches forgive costs another a third. So there is a set of figures for each kind of
hardware that was measured, and on any other the bounds of the benchmarks stand in for it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

#: A figure may fall to this part of its committed one.
TOLERANCE = 0.8

#: What a benchmark found: its checks, as in its JSON.
Checks = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A ratio that is to be kept."""

    value: float
    #: Larger is better: the bound of its check is one from below.
    rises: bool

    def kept(self, measured: float) -> float:
        """Return which part of it is still reached; above 1 it is surpassed."""
        return measured / self.value if self.rises else self.value / measured


def rises(check: Mapping[str, Any]) -> bool:
    """Tell whether a check's bound is one from below: that is how it came out as it did."""
    return bool(check["ok"]) == (check["value"] > check["bound"])


def bounds_of(checks: Checks) -> dict[str, Figure]:
    """The figures of hardware that was never measured."""
    return {check["name"]: Figure(check["bound"], rises(check)) for check in checks}


def median_of(runs: list[Checks]) -> dict[str, Figure]:
    """The figures of several runs of one benchmark.

    Raises:
        KeyError: a run lacks a check that another one has.
    """
    found = [{check["name"]: Figure(check["value"], rises(check)) for check in checks} for checks in runs]
    return {
        name: replace(figure, value=round(statistics.median(run[name].value for run in found), 3))
        for name, figure in found[0].items()
    }


@dataclass(frozen=True)
class Outcome:
    """How one figure compares."""

    name: str
    figure: Figure
    #: None: it is not measured any more.
    measured: float | None

    @property
    def kept(self) -> float:
        return 0.0 if self.measured is None else self.figure.kept(self.measured)

    @property
    def ok(self) -> bool:
        return self.kept >= TOLERANCE


def compare(figures: Mapping[str, Figure], runs: list[Checks]) -> list[Outcome]:
    """Hold the better of one or more runs against the figures: what slows one of them down is not the code."""

    def outcomes(checks: Checks) -> Iterator[Outcome]:
        values = {check["name"]: check["value"] for check in checks}
        for name, figure in figures.items():
            yield Outcome(name, figure, values.get(name))

    return [max(each, key=lambda outcome: outcome.kept) for each in zip(*map(outcomes, runs), strict=True)]


@dataclass(frozen=True)
class Measured:
    """A benchmark's figures by name of the check, when they were measured, and with which versions."""

    date: str
    versions: dict[str, str]
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Baseline:
    """What was measured on one kind of hardware, by benchmark."""

    cpu: str
    cores: int
    benchmarks: dict[str, Measured]

    def is_of(self, hardware: Mapping[str, Any]) -> bool:
        return (self.cpu, self.cores) == (hardware["cpu"], hardware["cores"])


def read(path: Path) -> list[Baseline]:
    def measured(entry: dict[str, Any]) -> Measured:
        figures = {name: Figure(**figure) for name, figure in entry["figures"].items()}
        return Measured(**entry | {"figures": figures})

    def built(entry: dict[str, Any]) -> Baseline:
        return Baseline(**entry | {"benchmarks": {name: measured(one) for name, one in entry["benchmarks"].items()}})

    return [built(entry) for entry in json.loads(path.read_text())] if path.exists() else []


def write(path: Path, baselines: list[Baseline]) -> None:
    path.write_text(json.dumps([asdict(baseline) for baseline in baselines], indent=1) + "\n")
