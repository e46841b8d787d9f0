"""Paths that nobody may read, also where tests run as root, whom no mode keeps out."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


def make_unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, *, looked_at: bool = False) -> None:
    """Have the operating system refuse a path, as it does for what is in a folder without the right to search it.

    Args:
        monkeypatch: undoes it.
        path: as the code under test spells it, or absolute.
        looked_at: it is only not to be opened, as a file of somebody else's is.
    """
    refused = path.absolute()
    # What pathlib opens with, and what it looks with.
    calls = [(os, "open"), (io, "open"), (os, "scandir"), *([] if looked_at else [(os, "stat")])]

    def guard(real: Any) -> Any:
        def call(what: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(what, str | os.PathLike) and Path(what).absolute() == refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(what))
            return real(what, *arguments, **named)

        return call

    for module, name in calls:
        monkeypatch.setattr(module, name, guard(getattr(module, name)))
