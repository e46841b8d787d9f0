"""A model's weights as safetensors, streamed out of a checkpoint a piece at a time.

Source: https://huggingface.co/docs/safetensors, "Format"; https://huggingface.co/docs/transformers,
"Sharded checkpoints".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ps.errors import ConfigError
from ps.kernels.convert import encode
from ps.storage import WEIGHTS, CheckpointReader
from ps.storage.files import AtomicFile, write_atomic
from ps.types import TensorSpec, WireDtype

#: As large as files of a model commonly are.
MAX_FILE_BYTES = 5_000_000_000
_PIECE_ELEMENTS = 4 << 20
#: Anything larger is infinite in float16.
FP16_MAX = 65504.0
_NAMES = {WireDtype.FP32: "F32", WireDtype.FP16: "F16", WireDtype.BF16: "BF16"}


def write_model(
    folder: Path, reader: CheckpointReader, dtype: WireDtype, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write the weights of a checkpoint, rounded once to `dtype`: one file, or several with an index.

    Args:
        folder: where to.
        reader: the checkpoint.
        dtype: of the files.
        max_file_bytes: more than this is cut into several files, between tensors.

    Raises:
        OSError: the folder cannot be written.
        PsError: the checkpoint cannot be read.
    """
    tensors = reader.plan.table.tensors
    parts = _cut(tensors, dtype, max_file_bytes)
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    offsets = dict(zip(tensors, reader.plan.offsets, strict=True))
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, offsets, reader, dtype)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors) * dtype.itemsize},
            "weight_map": {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part},
        }
        write_atomic(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return [folder / name for name in names]


def _cut(tensors: Sequence[TensorSpec], dtype: WireDtype, max_file_bytes: int) -> list[list[TensorSpec]]:
    parts: list[list[TensorSpec]] = [[]]
    room = max_file_bytes
    for tensor in tensors:
        size = tensor.size * dtype.itemsize
        if size > room and parts[-1]:
            parts.append([])
            room = max_file_bytes
        parts[-1].append(tensor)
        room -= size
    return parts


def _write_file(
    path: Path,
    tensors: Sequence[TensorSpec],
    offsets: dict[TensorSpec, int],
    reader: CheckpointReader,
    dtype: WireDtype,
) -> None:
    with AtomicFile(path) as file:
        file.write(_header(tensors, dtype))
        for tensor in tensors:
            for start in range(0, tensor.size, _PIECE_ELEMENTS):
                values = np.empty(min(_PIECE_ELEMENTS, tensor.size - start), np.dtype("<f4"))
                reader.read(WEIGHTS, offsets[tensor] + start, values)
                rounded = np.empty(values.size, dtype.numpy)
                encode(values, 1, dtype, rounded)
                if dtype is WireDtype.FP16 and np.abs(values).max(initial=0.0) > FP16_MAX:
                    raise ConfigError(
                        f"{tensor.name} has values beyond {FP16_MAX:g}, the largest of float16; "
                        "export with --dtype bfloat16 or float32"
                    )
                file.write(rounded.data.cast("B"))
        file.commit()


def _header(tensors: Sequence[TensorSpec], dtype: WireDtype) -> bytes:
    # "format" tells transformers which library's layout the tensors have.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.size * dtype.itemsize
        entries[tensor.name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
