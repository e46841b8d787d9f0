"""Fixtures for clusters inside one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import cluster
from workers.config import JobConfig

MakeJob = Callable[..., JobConfig]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text to train on; its tokens are cached beside it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    cluster.write_text(path)
    return path


@pytest.fixture
def make_job(text: Path, tmp_path: Path) -> MakeJob:
    """Make the small job: `make_job(name, *overrides)`; names are run folders."""

    def make(name: str, *overrides: str) -> JobConfig:
        return cluster.make_job(tmp_path / name, text, overrides)

    return make
