"""The table that a benchmark prints, and the JSON that it writes."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One bound, and what was measured."""

    name: str
    value: float
    bound: float
    ok: bool


class Report:
    """Rows of figures, checks and notes."""

    def __init__(self, name: str, columns: list[str]) -> None:
        self.name = name
        self.columns = columns
        self.rows: list[list[Any]] = []
        self.checks: list[Check] = []
        self.notes: dict[str, Any] = {}

    def row(self, *values: Any) -> None:
        self.rows.append(list(values))

    def check(self, check: Check) -> None:
        self.checks.append(check)

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value

    def finish(self, path: Path) -> None:
        """Print the table and write the JSON; ends with exit code 1 when a check failed."""
        self._print()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": _hardware(),
            "versions": _versions(),
            "columns": self.columns,
            "rows": self.rows,
            "notes": self.notes,
            "checks": [asdict(check) for check in self.checks],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {path}")
        sys.exit(0 if all(check.ok for check in self.checks) else 1)

    def _print(self) -> None:
        table = [self.columns, *[[_text(value) for value in row] for row in self.rows]]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        for row in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        for name, value in self.notes.items():
            print(f"{name}: {_text(value)}")
        for check in self.checks:
            verdict = "ok  " if check.ok else "MISS"
            print(f"{verdict} {check.name}: {_text(check.value)} (bound {_text(check.bound)})")


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _hardware() -> dict[str, Any]:
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("windlass", "torch", "grpcio", "numba", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
