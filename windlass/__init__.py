"""The public face of Windlass. Everything is imported when it is first used: no torch before it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ps.client.api import Client, Work
    from ps.errors import (
        CheckpointDamaged,
        CheckpointNotFound,
        ConfigError,
        DataError,
        GradientError,
        MismatchError,
        PeerUnavailable,
        PsError,
        Refusal,
        StartupError,
        StorageError,
        WaitTimeout,
    )
    from workers.config import JobConfig, load_job

    __version__: str

__all__ = [
    "CheckpointDamaged",
    "CheckpointNotFound",
    "Client",
    "ConfigError",
    "DataError",
    "GradientError",
    "JobConfig",
    "MismatchError",
    "PeerUnavailable",
    "PsError",
    "Refusal",
    "StartupError",
    "StorageError",
    "WaitTimeout",
    "Work",
    "__version__",
    "load_job",
]

_FROM_WORKERS = {"JobConfig": "workers.config", "load_job": "workers.config"}
_FROM_CLIENT = {"Client": "ps.client.api", "Work": "ps.client.api"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("windlass")
    elif name in __all__:
        value = getattr(import_module((_FROM_WORKERS | _FROM_CLIENT).get(name, "ps.errors")), name)
    else:
        raise AttributeError(f"module 'windlass' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
