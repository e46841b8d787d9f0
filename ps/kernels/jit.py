"""How every kernel is compiled, and where the compiled code is kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def cache_directory() -> Path:
    """Return the folder that keeps compiled kernels: the first one that can be written.

    $NUMBA_CACHE_DIR; $XDG_CACHE_HOME or ~/.cache, then windlass/numba; a folder of this user's own in
    the temporary directory. When none can be written the last one is returned, and kernels are compiled
    in every process.

    Concurrency: processes may share it; numba replaces files atomically.
    """
    places = _places()
    return next((place for place in places if _is_writable(place)), places[-1])


def _places() -> list[Path]:
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/nonexistent") / ".cache"
    private = Path(tempfile.gettempdir()) / f"windlass-{os.getuid()}" / "numba"
    return [*([Path(chosen)] if chosen else []), Path(home) / "windlass" / "numba", private]


def _is_writable(place: Path) -> bool:
    """Compiled code is executed: a folder that somebody else owns is as bad as one that cannot be written."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        return not place.is_relative_to(tempfile.gettempdir()) or _owned(place)
    except OSError:
        return False


def _owned(place: Path) -> bool:
    return all(folder.stat().st_uid == os.getuid() for folder in (place, place.parent))


def _sources_digest() -> str:
    """numba looks only at the file that defines a kernel; what a kernel inlines may be in another one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _prepare_cache() -> Path | None:
    """Point numba to this version's folder; None when nothing can be kept."""
    place = cache_directory() / f"windlass-{_sources_digest()}"
    if not _is_writable(place):
        return None
    numba.config.CACHE_DIR = str(place)
    return place


#: Where this process keeps compiled kernels; None: nowhere.
CACHE = _prepare_cache()


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile what Python calls, on the first call or from the cache.

    IEEE arithmetic to the letter (no fast-math, no contraction), without the interpreter lock.
    """
    return _compiled(function, cache=CACHE is not None)


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """Compile what only kernels call: it becomes a part of theirs, and is not kept by itself.

    Always inlined: a call would pass its vectors through memory.
    """
    return _compiled(function, forceinline=True)


def _compiled(function: Callable[P, R], **options: bool) -> Callable[P, R]:
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=False, **options)(function)
    return cast(Callable[P, R], compiled)
