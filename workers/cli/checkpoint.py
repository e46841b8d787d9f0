"""`windlass checkpoint list`, `verify` and `digest`: which checkpoints a run has, and whether they are good."""

from __future__ import annotations

from pathlib import Path

import typer

from ps.errors import CheckpointDamaged, CheckpointNotFound, StorageError
from ps.storage.layout import checkpoints, is_complete
from ps.storage.manifest import Manifest, read_manifest
from ps.storage.reader import verify as verify_checkpoint
from workers.cli import inspect
from workers.cli.arguments import RunOrCheckpoint
from workers.launch.folder import RunFolder

app = typer.Typer(help="List and check checkpoints.")
app.command()(inspect.digest)

_MIB = 1 << 20


@app.callback(invoke_without_command=True)
def _checkpoint(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_all(run: RunOrCheckpoint) -> int:
    """List the complete checkpoints, the oldest first; reads their manifests only."""
    found = _find(run)
    print(f"{'checkpoint':<16} {'committed':>10} {'skipped':>8} {'shards':>7} {'MiB':>9}  {'held-out':<9} written")
    for folder in found:
        try:
            print(_line(folder, read_manifest(folder)[0]))
        except StorageError as error:
            print(f"{folder.name:<16} {_wrong(error)}")
    return 0


@app.command()
def verify(run: RunOrCheckpoint) -> int:
    """Read every checkpoint whole and compare sizes and SHA-256.

    Exit code 1: one is damaged or cannot be read, and is named.
    """
    harmed = 0
    for folder in _find(run):
        try:
            manifest = verify_checkpoint(folder)
            print(f"{folder.name}: good, {len(manifest.files)} files, {_size(manifest):.1f} MiB", flush=True)
        except StorageError as error:
            if _is_gone(folder):
                # A run that is under way removes its oldest while this reads; the manifest goes first.
                print(f"{folder.name}: removed meanwhile", flush=True)
                continue
            harmed += 1
            print(f"{folder.name}: {_wrong(error)}", flush=True)
    return 1 if harmed else 0


def _is_gone(folder: Path) -> bool:
    try:
        return not is_complete(folder)
    except StorageError:
        return False


def _wrong(error: StorageError) -> str:
    """What is wrong with a checkpoint; one that nobody may read is not damaged for that."""
    return f"damaged: {error.message}" if isinstance(error, CheckpointDamaged) else error.message


def _find(path: Path) -> list[Path]:
    """The complete checkpoints of a run, or the one that is named.

    Raises:
        ConfigError: it is neither.
        CheckpointNotFound: the run has none yet.
        StorageError: a folder cannot be read.
    """
    if is_complete(path):
        return [path]
    directory = RunFolder(path).read_job().model_copy(update={"run_dir": path}).checkpoint_dir
    found = checkpoints(directory)
    if not found:
        raise CheckpointNotFound(f"{path} has no complete checkpoint yet (looked in {directory})")
    return found


def _line(folder: Path, manifest: Manifest) -> str:
    loss = "-" if manifest.evaluation is None else f"{manifest.evaluation:.4f}"
    return (
        f"{folder.name:<16} {manifest.applied:>10} {manifest.skipped:>8} {manifest.num_shards:>7} "
        f"{_size(manifest):>9.1f}  {loss:<9} {manifest.created}"
    )


def _size(manifest: Manifest) -> float:
    """MiB of a checkpoint's files."""
    return sum(file.size for file in manifest.files) / _MIB
