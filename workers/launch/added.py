"""What one start of a run has added to it, told by the files from what was there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ps.errors import StorageError
from ps.storage.layout import checkpoints
from ps.storage.manifest import MANIFEST_NAME

#: (modified, inode) of a checkpoint's manifest: a checkpoint that is written again has another one.
Stamp = tuple[int, int]


@dataclass(frozen=True)
class Added:
    """What has come about since a launcher took the run folder."""

    #: The checkpoint that was written last. None: none was.
    checkpoint: Path | None = None
    #: Whether a step was made.
    trained: bool = False
    #: How far the run is, in steps; it may have been there before.
    version: int = 0

    @property
    def nothing(self) -> bool:
        return self.checkpoint is None and not self.trained


def stamps(checkpoint_dir: Path) -> dict[Path, Stamp]:
    """The complete checkpoints, as they are now; none where the folder cannot be read."""
    found = {}
    try:
        for folder in checkpoints(checkpoint_dir):
            status = (folder / MANIFEST_NAME).stat()
            found[folder] = (status.st_mtime_ns, status.st_ino)
    except (StorageError, OSError):
        # Who has to use it says what is wrong with it.
        return {}
    return found


def last_written(checkpoint_dir: Path, before: Mapping[Path, Stamp]) -> Path | None:
    """The checkpoint that was written last since `before`; not the newest version, for a run may have gone back."""
    written = {folder: stamp for folder, stamp in stamps(checkpoint_dir).items() if before.get(folder) != stamp}
    return max(written, key=lambda folder: (written[folder], folder), default=None)
