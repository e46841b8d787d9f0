"""Durable state: the commit journal and checkpoints. No sockets, no torch.

The digest of a state is in `ps.storage.digest`, which is a module here and not the function in it.
"""

from ps.storage.files import fsync_directory, make_directory, remove_tree, sweep, write_atomic
from ps.storage.journal import Journal
from ps.storage.layout import checkpoint_folder, checkpoints, newest, prepare, retain, version_of
from ps.storage.manifest import MANIFEST_NAME, Manifest, ScalerState, read_manifest, write_manifest
from ps.storage.reader import CheckpointReader, verify
from ps.storage.shard_file import WEIGHTS, ShardFile, ShardFileWriter, chunk_name, shard_file_name
from ps.storage.storage_proof import check_nonce, remove_nonce, write_nonce

__all__ = [
    "MANIFEST_NAME",
    "WEIGHTS",
    "CheckpointReader",
    "Journal",
    "Manifest",
    "ScalerState",
    "ShardFile",
    "ShardFileWriter",
    "check_nonce",
    "checkpoint_folder",
    "checkpoints",
    "chunk_name",
    "fsync_directory",
    "make_directory",
    "newest",
    "prepare",
    "read_manifest",
    "remove_nonce",
    "remove_tree",
    "retain",
    "shard_file_name",
    "sweep",
    "verify",
    "version_of",
    "write_atomic",
    "write_manifest",
    "write_nonce",
]
