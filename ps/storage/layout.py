"""The checkpoint folder: one folder per checkpoint, which exists when its manifest does.

<checkpoint_dir>/step-00000100/shard-00000-of-00002.safetensors
                               shard-00001-of-00002.safetensors
                               manifest.json
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from ps import failpoints
from ps.errors import CheckpointWriteFailed, StorageError
from ps.storage.files import fsync_directory, make_directory, reason, remove_tree
from ps.storage.manifest import MANIFEST_NAME
from ps.storage.reader import verify

logger = logging.getLogger(__name__)

_FOLDER_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_folder(checkpoint_dir: Path, version: int) -> Path:
    """Where the checkpoint of a version is."""
    return checkpoint_dir / f"step-{version:08d}"


def version_of(folder: Path) -> int | None:
    """The version that a checkpoint folder's name says, or None when it is none."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def prepare(checkpoint_dir: Path, version: int) -> Path:
    """Make an empty folder for a checkpoint, before any shard writes into it.

    What a former attempt left is removed, its manifest first: a decision that is made again after a
    rollback writes its checkpoint again.

    Raises:
        CheckpointWriteFailed: names the folder and the reason.
    """
    folder = checkpoint_folder(checkpoint_dir, version)
    try:
        _remove(folder)
        make_directory(folder)
    except StorageError as error:
        raise CheckpointWriteFailed(str(error)) from error
    return folder


def checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Return the complete checkpoints, the newest last; none when the folder does not exist.

    Raises:
        StorageError: the folder cannot be read.
    """
    return [folder for folder in _folders(checkpoint_dir) if is_complete(folder)]


def newest(checkpoint_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, if any.

    Raises:
        StorageError: the folder cannot be read.
    """
    return next(reversed(checkpoints(checkpoint_dir)), None)


def retain(
    checkpoint_dir: Path,
    keep: int,
    newest: int | None = None,
    writing: Collection[int] = (),
    on_damaged: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoints, and incomplete older ones.

    Those of versions after `newest` neither count nor go: a rollback has passed them, perhaps because
    they are damaged, and they will be written again.

    Before anything is removed one of those that stay is read and found good. When none is, the newest
    good one is kept as well: the last good one is never removed. A folder that cannot be removed is
    logged and left.

    Args:
        writing: versions that are still being written; one that is newer than all that are complete need not be named.
        on_damaged: hears of each that is read and not good.

    Returns:
        The folders that were removed, the oldest first.

    Raises:
        StorageError: the folder cannot be read.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept")
    folders = [folder for folder in _folders(checkpoint_dir) if newest is None or _version(folder) <= newest]
    complete = [folder for folder in folders if is_complete(folder)]
    if not complete:
        return []
    kept = complete[-keep:]
    going = [folder for folder in folders[: folders.index(complete[-1])] if folder not in kept]
    if going and not any(_is_good(folder, on_damaged) for folder in reversed(kept)):
        good = next((folder for folder in reversed(complete[:-keep]) if _is_good(folder, on_damaged)), None)
        going = [folder for folder in going if folder != good]
    removed = []
    for folder in going:
        if _version(folder) in writing:
            continue
        try:
            _remove(folder)
            removed.append(folder)
        except StorageError as error:
            logger.warning("an old checkpoint stays: %s", error)
    return removed


def _remove(folder: Path) -> None:
    """Remove a checkpoint; from the first moment on it is none."""
    try:
        if folder.is_dir() and not folder.is_symlink():
            failpoints.hit("remove.before", folder.name)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            fsync_directory(folder)
            failpoints.hit("remove.after", folder.name)
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed: {reason(error)}") from error
    remove_tree(folder)


def _is_good(folder: Path, on_damaged: Callable[[Path], None]) -> bool:
    try:
        verify(folder)
    except StorageError as error:
        logger.error("the checkpoint %s is not good, an older one stays for it: %s", folder.name, error)
        on_damaged(folder)
        return False
    return True


def _version(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint.

    Raises:
        StorageError: it cannot be looked into.
    """
    manifest = folder / MANIFEST_NAME
    try:
        return manifest.is_file()
    except OSError as error:
        raise StorageError(f"{manifest} cannot be read: {reason(error)}") from error


def _folders(checkpoint_dir: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, by version; links are not ours."""
    found = []
    try:
        with os.scandir(checkpoint_dir) as entries:
            for entry in entries:
                version = version_of(Path(entry.path))
                if version is not None and entry.is_dir(follow_symlinks=False):
                    found.append((version, Path(entry.path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"the checkpoint folder {checkpoint_dir} cannot be read: {reason(error)}") from error
    return [folder for _, folder in sorted(found)]
