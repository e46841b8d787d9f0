"""Prove at the start that the checkpoint folder is one storage for the coordinator and all shards.

The coordinator writes a file with a nonce and sends both to the shards; who cannot read the nonce
has another folder under the same name, and its part of every checkpoint would be lost.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from ps.errors import StorageError
from ps.storage.files import TEMPORARY_SUFFIX, make_directory, reason, write_atomic

_WAY_OUT = "set checkpoint.dir to a folder that the coordinator and all shards share (NFS, a common volume)"


def write_nonce(checkpoint_dir: Path) -> tuple[str, str]:
    """Put a nonce into the checkpoint folder, which is created when missing.

    Returns:
        The name of the file and the nonce. A killed coordinator's file is removed by `sweep`.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_directory(checkpoint_dir)
    name, nonce = f".nonce-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}", secrets.token_hex(16)
    write_atomic(checkpoint_dir / name, nonce.encode())
    return name, nonce


def check_nonce(checkpoint_dir: Path, name: str, nonce: str) -> None:
    """Check, in a shard, that its checkpoint folder is the coordinator's, and writable.

    Raises:
        StorageError: it is not; the shard must not start.
    """
    if Path(name).name != name or not name.endswith(TEMPORARY_SUFFIX):
        raise StorageError(f"{name!r} is not the name of a nonce file")
    path = checkpoint_dir / name
    try:
        found = path.read_text(encoding="ascii")
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(
            f"the checkpoint folder {checkpoint_dir} of this shard is not the coordinator's: the file "
            f"{name} that the coordinator wrote there is missing; {_WAY_OUT}"
        ) from None
    except UnicodeDecodeError:
        found = ""
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}") from error
    if not secrets.compare_digest(found.encode(), nonce.encode()):
        raise StorageError(
            f"the checkpoint folder {checkpoint_dir} of this shard is not the coordinator's: {name} holds "
            f"another nonce; {_WAY_OUT}"
        )
    if not os.access(checkpoint_dir, os.W_OK | os.X_OK):
        raise StorageError(f"the checkpoint folder {checkpoint_dir} is not writable for this shard")


def remove_nonce(checkpoint_dir: Path, name: str) -> None:
    """Remove the nonce file. Idempotent; one that stays is harmless."""
    with contextlib.suppress(OSError):
        (checkpoint_dir / name).unlink(missing_ok=True)
