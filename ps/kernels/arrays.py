"""What a kernel demands of an array, checked where Python calls it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ps.kernels.vectors import WIDTH
from ps.types import WireDtype

Array = npt.NDArray[Any]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
_BFLOAT = np.dtype(np.int16)


def require(name: str, array: Array, dtype: np.dtype[Any], size: int, *, writeable: bool = False) -> None:
    """Refuse what the compiled code would misread.

    Raises:
        ValueError: another dtype or length, not contiguous, not aligned, or readonly where it is written.
    """
    if array.dtype != dtype:
        raise ValueError(f"{name}: dtype is {array.dtype}, must be {dtype}")
    if array.shape != (size,):
        raise ValueError(f"{name}: shape is {array.shape}, must be ({size},)")
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned):
        raise ValueError(f"{name}: must be contiguous and aligned; copy it first")
    if writeable and not flags.writeable:
        raise ValueError(f"{name}: is written, but the array is readonly")


def readonly(array: Array) -> Array:
    """Return a readonly view: numba compiles a kernel once more for each mixture of readonly and not."""
    view = array.view()
    view.flags.writeable = False
    return view


def padded(array: Array) -> Array:
    """Return the array if it is whole vectors, as every chunk is; else a copy that ends with zeros."""
    missing = -array.size % WIDTH
    return np.concatenate([array, np.zeros(missing, array.dtype)]) if missing else array


def wire_view(array: Array, dtype: WireDtype) -> Array:
    """Return the view whose element type tells the wire format to the kernels (see `formats`)."""
    return array.view(_BFLOAT) if dtype is WireDtype.BF16 else array
