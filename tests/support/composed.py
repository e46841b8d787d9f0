"""The compose files: as mappings for checks without Docker, and as a cluster for checks with it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.eventually import eventually

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"


class _Loader(yaml.SafeLoader):
    """Reads Compose's own tags: what an overlay removes is None, what it replaces is the new value."""


def _tagged(loader: yaml.SafeLoader, _tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return None


_Loader.add_multi_constructor("!", _tagged)


def read(name: str) -> dict[str, Any]:
    """A compose file, with its anchors filled in and its variables as they are written."""
    loaded: dict[str, Any] = yaml.load((COMPOSE / name).read_text(), _Loader)
    return loaded


class Project:
    """A project of containers under a name of its own.

    Args:
        name: of the project.
        files: names of files in compose/.
        environment: what the files' variables are set to.
    """

    def __init__(self, name: str, files: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = ["docker", "compose", "--project-name", name]
        for file in files:
            self._command += ["--file", str(COMPOSE / file)]
        self._environment = {**os.environ, **environment}

    def __call__(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run `docker compose ...` and return what it prints."""
        return run([*self._command, *arguments], timeout_s, self._environment)

    def container(self, service: str, index: int = 1) -> dict[str, Any]:
        """What the engine knows of a container."""
        found: list[dict[str, Any]] = json.loads(run(["docker", "inspect", f"{self.name}-{service}-{index}"]))
        return found[0]

    def kill(self, service: str, index: int = 1) -> None:
        """SIGKILL a container's main process from outside, behind the engine's back."""
        os.kill(self.container(service, index)["State"]["Pid"], signal.SIGKILL)

    def left(self) -> str:
        """Containers, volumes and networks that the engine still has of this project."""
        label = ["--filter", f"label=com.docker.compose.project={self.name}", "--quiet"]
        kinds = (["ps", "--all"], ["volume", "ls"], ["network", "ls"])
        return "".join(run(["docker", *kind, *label]) for kind in kinds)

    def said(self, service: str, words: str, index: int = 1) -> bool:
        """Whether a container has written these words, in this life or one before."""
        found = subprocess.run(
            ["docker", "logs", f"{self.name}-{service}-{index}"], capture_output=True, text=True, check=False
        )
        return words in found.stdout + found.stderr

    def records(self, run_dir: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run, from the volume itself: the roles may be gone."""
        volume = run(["docker", "volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.name}_runs"]).strip()
        try:
            text = (Path(volume) / run_dir / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_step(self, run_dir: str, step: int, timeout_s: float) -> None:
        def reached() -> bool:
            return sum(record["kind"] == "step" for record in self.records(run_dir)) > step

        eventually(reached, timeout_s, f"step {step} of {self.name}")


@contextmanager
def project(files: Sequence[str], environment: Mapping[str, str]) -> Iterator[Project]:
    """A project that is taken down at the end, with everything that belongs to it."""
    made = Project(f"windlass-test-{random.SystemRandom().getrandbits(32):08x}", files, environment)
    try:
        yield made
    finally:
        made("--profile", "*", "down", "--volumes", "--timeout", "5", "--remove-orphans")


def run(command: Sequence[str], timeout_s: float = 60.0, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run(
        list(command), capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-4000:]}"
    return done.stdout
