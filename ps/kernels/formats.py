"""Elements of the wire: how a vector of them becomes float32 and back.

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
from ps.kernels.vectors import Vector, astype, reinterpret, where


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
def _half_to_float(_context: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = builder.bitcast(arguments[0], llvmlite.ir.VectorType(llvmlite.ir.HalfType(), bits.width))
        return builder.fpext(halves, context.get_value_type(signature.return_type))

    return Vector(types.float32)(bits), emit


@intrinsic  # type: ignore[untyped-decorator]
def _float_to_half(_context: Any, values: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = builder.fptrunc(arguments[0], llvmlite.ir.VectorType(llvmlite.ir.HalfType(), values.width))
        return builder.bitcast(halves, context.get_value_type(signature.return_type))

    return Vector(types.uint16)(values), emit


_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)


@inner
def half_to_float_portable(halves: Any) -> Any:
    """Return the float32 of FP16 bits, without F16C; a NaN becomes quiet, as with F16C.

    The exponent and mantissa are moved into place and the bias is corrected by an exact multiplication,
    which also makes denormals normal.
    """
    bits = astype(halves, np.uint32)
    magnitude = bits & np.uint32(0x7FFF)
    scaled = reinterpret(reinterpret(magnitude << np.uint32(13), np.float32) * np.float32(2.0**112), np.uint32)
    scaled = where(magnitude >= np.uint32(0x7C00), scaled | _INFINITY, scaled)
    scaled = where(magnitude > np.uint32(0x7C00), scaled | np.uint32(0x00400000), scaled)
    return reinterpret(scaled | ((bits << np.uint32(16)) & _SIGN), np.float32)


@inner
def float_to_half_portable(values: Any) -> Any:
    """Return the bits of the nearest FP16, ties to even, without F16C; a NaN becomes quiet, as with F16C.

    Adding a power of two whose last bit is the last bit of the result lets the addition do the rounding.
    Source: M. Dukhan, "FP16", fp16_ieee_from_fp32_value.
    """
    bits = reinterpret(values, np.uint32)
    magnitude = bits & _MAGNITUDE
    # 2^112 sends what is too large to infinity.
    base = reinterpret(magnitude, np.float32) * np.float32(2.0**112) * np.float32(2.0**-110)
    exponent = magnitude & _INFINITY
    least = np.uint32(0x38800000)
    exponent = where(exponent > least, exponent, (exponent & np.uint32(0)) | least)
    rounded = reinterpret(reinterpret(exponent + np.uint32(0x07800000), np.float32) + base, np.uint32)
    finite = ((rounded >> np.uint32(13)) & np.uint32(0x7C00)) + (rounded & np.uint32(0x0FFF))
    nan = ((bits >> np.uint32(13)) & np.uint32(0x03FF)) | np.uint32(0x7E00)
    result = where(magnitude > _INFINITY, nan, finite)
    return astype(result | ((bits >> np.uint32(16)) & np.uint32(0x8000)), np.uint16)


@inner
def _bfloat_to_float(bfloats: Any) -> Any:
    return reinterpret(astype(reinterpret(bfloats, np.uint16), np.uint32) << np.uint32(16), np.float32)


@inner
def _float_to_bfloat(values: Any) -> Any:
    # Integers, because the instruction for it (AVX512_BF16) flushes denormals.
    bits = reinterpret(values, np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return reinterpret(astype(where((bits & _MAGNITUDE) > _INFINITY, nan, rounded), np.uint16), np.int16)


#: Chosen when a kernel is compiled; numba's cache is keyed by the processor's features.
_HALF_TO_FLOAT = _half_to_float if has_half_conversion() else half_to_float_portable
_FLOAT_TO_HALF = _float_to_half if has_half_conversion() else float_to_half_portable


def widen(elements: Any) -> Any:
    """Return a vector of the wire's elements as float32 (inside kernels only)."""
    raise NotImplementedError


def narrow(values: Any, wire: Any) -> Any:
    """Return a vector of float32 as elements of the array `wire`, to nearest even (inside kernels only)."""
    raise NotImplementedError


@overload(widen, strict=False)  # type: ignore[untyped-decorator]
def _widen(elements: Any) -> Any:
    if elements.dtype == types.uint16:
        return lambda elements: _HALF_TO_FLOAT(elements)
    if elements.dtype == types.int16:
        return lambda elements: _bfloat_to_float(elements)
    return lambda elements: elements


@overload(narrow, strict=False)  # type: ignore[untyped-decorator]
def _narrow(values: Any, wire: Any) -> Any:  # noqa: ARG001
    if wire.dtype == types.uint16:
        return lambda values, wire: _FLOAT_TO_HALF(values)  # noqa: ARG005
    if wire.dtype == types.int16:
        return lambda values, wire: _float_to_bfloat(values)  # noqa: ARG005
    return lambda values, wire: values  # noqa: ARG005
