"""What several commands have in common."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ps.errors import StartupError
from workers.cli.completion import complete_job, complete_override, complete_run


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"
    XLA = "xla"


Job = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[job.yaml] [key=value ...]",
        help="A job file, and what to change in it, such as optimizer.lr=1e-3.",
        autocompletion=complete_job,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="What to change, such as training.steps=1000.",
        autocompletion=complete_override,
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", autocompletion=complete_run)]
RunOrCheckpoint = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in one.", autocompletion=complete_run),
]

TokenizerFile = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json. Default: the one in the run folder."),
]

Certificates = Annotated[
    Path | None,
    typer.Option(
        envvar="WINDLASS_CERTIFICATES",
        metavar="DIR",
        help="A certificate's folder, or one of `windlass certs init`. Default: no TLS.",
    ),
]


def require_worker_extra(who: str) -> None:
    """Say how to install what only workers need, before anything fails on its absence.

    Raises:
        StartupError: it is not installed.
    """
    missing = [name for name in ("torch", "tokenizers") if find_spec(name) is None]
    if missing:
        raise StartupError(f"{who} needs {' and '.join(missing)}: pip install 'windlass[worker]'")
