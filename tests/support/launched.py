"""Real runs through the command line: a tiny job in processes of its own, all gone at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.support.eventually import eventually

#: Starting all roles takes seconds of torch import on two cores.
START_S = 90.0


def write_corpus(path: Path) -> None:
    """A small text of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 8))) for _ in range(300)]
    path.write_text("\n".join(" ".join(draw.choice(words) for _ in range(12)) for _ in range(3000)))


def tiny_job(folder: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of `windlass train` for a GPT of 126,016 parameters; the text is shared by the folder's runs."""
    text = folder / "text.txt"
    if not text.exists():
        write_corpus(text)
    return [
        f"run_dir={folder / name}",
        f"data.paths=['{text}']",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_size=300",
        "data.sequence_length=32",
        "model.num_layers=2",
        "model.hidden_size=64",
        "evaluation.every_steps=0",
        "evaluation.max_sequences=8",
        "batch.micro_batches_per_step=4",
        "batch.contributions_per_step=2",
        *overrides,
    ]


def windlass(
    *arguments: str, timeout_s: float = 120.0, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "workers.cli.main", *arguments]
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd, env=variables
    )


class LaunchedRun:
    """A `windlass train` or `resume` that is under way."""

    def __init__(self, process: subprocess.Popen[str], run_dir: Path) -> None:
        self.process = process
        self.run_dir = run_dir

    def steps(self) -> int:
        """Steps that metrics.jsonl has a line of."""
        return len([line for line in self.metrics() if line["kind"] == "step"])

    def metrics(self) -> list[dict[str, Any]]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def members(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads((self.run_dir / "cluster.json").read_text())
        except (OSError, ValueError):
            return []
        return found

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"the run ended early:\n{self.output()}"
            return self.steps() >= step

        eventually(reached, START_S, f"step {step} of {self.run_dir.name}")

    def kill(self, role: str, rank: int) -> None:
        """SIGKILL one role, by its pid."""

        def pid() -> int | None:
            found = [m["pid"] for m in self.members() if (m["role"], m["rank"]) == (role, rank)]
            return found[0] if found else None

        eventually(lambda: pid() is not None, START_S, f"{role} {rank} in cluster.json")
        os.kill(pid() or 0, signal.SIGKILL)

    def finish(self, timeout_s: float = 120.0) -> int:
        return self.process.wait(timeout_s)

    def output(self) -> str:
        return (self.run_dir.parent / f"{self.run_dir.name}.out").read_text()

    def digest(self) -> str:
        found = windlass("digest", str(self.run_dir))
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()


@contextmanager
def launched(command: str, run_dir: Path, arguments: Sequence[str]) -> Iterator[LaunchedRun]:
    """Start a run; whatever is left of it at the end is killed, by pid, and fails the test."""
    output = run_dir.parent / f"{run_dir.name}.out"
    with output.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.cli.main", command, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield LaunchedRun(process, run_dir)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.poll() is None:
            process.kill()
            process.wait(30)
        psutil.wait_procs(children, timeout=10)
        left = processes_of(run_dir)
        for survivor in left:
            survivor.kill()
        assert not left, f"left behind: {left}"


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Processes that belong to a run: those whose log is in its folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if any(Path(file.path).is_relative_to(run_dir / "logs") for file in process.open_files()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def train(folder: Path, name: str, *overrides: str) -> LaunchedRun:
    """Train a tiny job to its end."""
    with launched("train", folder / name, tiny_job(folder, name, *overrides)) as run:
        assert run.finish() == 0, run.output()
    return run
