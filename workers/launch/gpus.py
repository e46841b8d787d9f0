"""Which GPU a worker takes when several workers start on one host: a free one, by a lock that dies with it.

The folder of locks is shared by the workers, also by those in containers of their own: a file lock is the
kernel's, whatever the container. Knows nothing of CUDA, which reads its choice once, when it is loaded.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ps.errors import StartupError
from ps.storage.files import reason

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The names of the GPUs that this process may use: as $CUDA_VISIBLE_DEVICES says, else all that are there."""
    chosen = environment.get(VISIBLE)
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    found = [re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*")]
    # The driver numbers its files as it likes; CUDA counts from 0.
    return [str(index) for index in range(len([match for match in found if match]))]


def claim(gpus: Sequence[str], folder: Path) -> str:
    """Take a GPU that no other process has taken; it is given back when this process is gone, however it ends.

    Args:
        gpus: what there is to choose from, the same for all who choose.
        folder: the locks; the same for all who choose.

    Raises:
        StartupError: all are taken, there is none, or the folder cannot be written.
    """
    if not gpus:
        raise StartupError(f"there is no GPU to claim in {folder}: /dev has no nvidia0; start without --gpu-locks")
    for gpu in gpus:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / f"gpu-{gpu.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StartupError(f"the folder of GPU locks {folder} cannot be written: {reason(error)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return gpu
    raise StartupError(
        f"all {len(gpus)} GPUs are claimed by other workers (locks in {folder}); start at most {len(gpus)} on this host"
    )
