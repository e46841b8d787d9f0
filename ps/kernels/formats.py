"""One element of the wire: how it becomes a float32 and back.

Kernels tell the formats apart by the element type of the array: uint16 holds the bits of an FP16,
int16 those of a BF16, float32 itself. So one source compiles to exactly one machine loop per format.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding
import llvmlite.ir
import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from ps.kernels.jit import inner


def has_half_conversion() -> bool:
    """Return whether the processor that numba compiles for converts FP16 by itself (F16C on x86)."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return True
    if machine not in ("x86_64", "amd64"):
        return False
    if numba.config.CPU_FEATURES is not None:
        return "+f16c" in numba.config.CPU_FEATURES.split(",")
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c", False))


@intrinsic  # type: ignore[untyped-decorator]
def _half_to_float(_context: Any, _bits: Any) -> Any:
    def emit(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        half = builder.bitcast(arguments[0], llvmlite.ir.HalfType())
        return builder.fpext(half, llvmlite.ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic  # type: ignore[untyped-decorator]
def _float_to_half(_context: Any, _value: Any) -> Any:
    def emit(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], llvmlite.ir.HalfType())
        return builder.bitcast(half, llvmlite.ir.IntType(16))

    return types.uint16(types.float32), emit


@inner
def half_to_float_portable(bits: Any) -> Any:
    """Return the float32 of an FP16's bits, without F16C; a NaN becomes quiet, as with F16C.

    The exponent and mantissa are moved into place and the bias is corrected by an exact multiplication,
    which also makes denormals normal.
    """
    magnitude = np.uint32(bits & np.uint16(0x7FFF))
    sign = np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)
    moved = np.uint32(magnitude << np.uint32(13))
    scaled = np.float32(np.uint32(moved).view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    infinite = np.uint32(0x7F800000) if magnitude >= np.uint32(0x7C00) else np.uint32(0)
    quiet = np.uint32(0x00400000) if magnitude > np.uint32(0x7C00) else np.uint32(0)
    return np.uint32(scaled | infinite | quiet | sign).view(np.float32)


@inner
def float_to_half_portable(value: Any) -> Any:
    """Return the bits of the nearest FP16, ties to even, without F16C; a NaN becomes quiet, as with F16C.

    Adding a power of two whose last bit is the last bit of the result lets the addition do the rounding.
    Source: M. Dukhan, "FP16", fp16_ieee_from_fp32_value.
    """
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000))
    # 2^112 sends what is too large to infinity.
    base = np.float32(np.float32(np.uint32(magnitude).view(np.float32) * np.float32(2.0**112)) * np.float32(2.0**-110))
    exponent = max(np.uint32(magnitude & np.uint32(0x7F800000)), np.uint32(0x38800000))
    rounded = np.float32(np.uint32(exponent + np.uint32(0x07800000)).view(np.float32) + base).view(np.uint32)
    finite = np.uint16(((rounded >> np.uint32(13)) & np.uint32(0x7C00)) + (rounded & np.uint32(0x0FFF)))
    nan = np.uint16(np.uint32(0x7E00) | ((bits >> np.uint32(13)) & np.uint32(0x03FF)))
    return np.uint16(sign | (nan if magnitude > np.uint32(0x7F800000) else finite))


@inner
def _bfloat_to_float(bits: Any) -> Any:
    return np.uint32(np.uint32(np.uint16(bits)) << np.uint32(16)).view(np.float32)


@inner
def _float_to_bfloat(value: Any) -> Any:
    # Integers, because the instruction for it (AVX512_BF16) flushes denormals.
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    nan = np.uint32((bits >> np.uint32(16)) | np.uint32(0x0040))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.int16(np.uint16(nan if is_nan else rounded))


#: Chosen when a kernel is compiled; numba's cache is keyed by the processor's features.
_HALF_TO_FLOAT = _half_to_float if has_half_conversion() else half_to_float_portable
_FLOAT_TO_HALF = _float_to_half if has_half_conversion() else float_to_half_portable


def widen(element: Any) -> Any:
    """Return an element of the wire as float32 (inside kernels only)."""
    raise NotImplementedError


def narrow(value: Any, wire: Any) -> Any:
    """Return a float32 as an element of the array `wire`, to nearest even (inside kernels only)."""
    raise NotImplementedError


@overload(widen, strict=False)  # type: ignore[untyped-decorator]
def _widen(element: Any) -> Any:
    if element == types.uint16:
        return lambda element: _HALF_TO_FLOAT(element)
    if element == types.int16:
        return lambda element: _bfloat_to_float(element)
    return lambda element: element


@overload(narrow, strict=False)  # type: ignore[untyped-decorator]
def _narrow(value: Any, wire: Any) -> Any:  # noqa: ARG001
    if wire.dtype == types.uint16:
        return lambda value, wire: _FLOAT_TO_HALF(value)  # noqa: ARG005
    if wire.dtype == types.int16:
        return lambda value, wire: _float_to_bfloat(value)  # noqa: ARG005
    return lambda value, wire: value  # noqa: ARG005
