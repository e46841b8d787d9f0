"""Vectors of 16 elements, for loops that the compiler would not vectorize, or not as well.

Inside a kernel a vector is a value: `load` makes one, operators work on all of its elements (a scalar of the
element type stands for a vector of it), `store` and `stream` write it. The processor's registers may be
narrower: LLVM then uses several. Results are those of the same operations on each element.

`stream` writes past the caches: memory that nobody reads soon is then not read before it is written, which is a
third of the traffic of a plain write of a whole array. It is for whole lines of 64 bytes: `streams` tells where.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from ps.kernels.jit import inner

#: Elements of a vector: 64 bytes of float32.
WIDTH = 16
#: How far ahead `prefetch` asks for memory. Processors do it by themselves, but stop at the borders of pages and
#: lose track of many arrays.
AHEAD_BYTES = 2048
_LINE_BYTES = 64

_ELEMENTS = {
    types.boolean: ir.IntType(1),
    types.int16: ir.IntType(16),
    types.uint16: ir.IntType(16),
    types.uint32: ir.IntType(32),
    types.uint64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}
_INT32 = ir.IntType(32)


class Vector(types.Type):  # type: ignore[misc]
    """The type of a vector inside kernels."""

    def __init__(self, dtype: Any, width: int = WIDTH) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(f"vector({dtype} x {width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Any) -> None:
        super().__init__(manager, vector, _llvm(vector))


def _llvm(vector: Any) -> Any:
    return ir.VectorType(_ELEMENTS[vector.dtype], vector.width)


def _address(builder: Any, start: Any, index: Any, target: Any) -> Any:
    return builder.bitcast(builder.gep(start, [index]), target.as_pointer())


def _bytes(dtype: Any) -> int:
    return int(dtype.bitwidth) // 8


# -- Memory ----------------------------------------------------------------------------------------
# An array appears here as the address of its first element, and the caller knows that what it reads exists.


@intrinsic  # type: ignore[untyped-decorator]
def start_of(_context: Any, array: Any) -> Any:
    """Return the address of an array's first element.

    References to arrays are counted, in loops at every use; addresses are not. The arguments of a kernel live as
    long as it runs.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), emit


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, start: Any, _index: Any) -> Any:
    """Return the 16 elements from an index on."""
    vector = Vector(start.dtype)

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(_address(builder, arguments[0], arguments[1], _llvm(vector)), align=_bytes(start.dtype))

    return vector(start, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(_context: Any, start: Any, _index: Any, vector: Any) -> Any:
    """Write the 16 elements from an index on."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = _address(builder, arguments[0], arguments[1], _llvm(vector))
        builder.store(arguments[2], address, align=_bytes(start.dtype))
        return context.get_dummy_value()

    return types.void(start, types.intp, vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def _stream(_context: Any, start: Any, _index: Any, vector: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = _address(builder, arguments[0], arguments[1], _llvm(vector))
        instruction = builder.store(arguments[2], address, align=_LINE_BYTES)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    return types.void(start, types.intp, vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def streams(_context: Any, start: Any) -> Any:
    """Return whether an array starts where a line of memory does."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = builder.ptrtoint(arguments[0], ir.IntType(64))
        rest = builder.and_(address, ir.Constant(address.type, _LINE_BYTES - 1))
        return builder.icmp_unsigned("==", rest, ir.Constant(address.type, 0))

    return types.boolean(start), emit


@inner
def stream(start: Any, index: Any, vector: Any, past_the_caches: Any) -> None:
    """Write 16 float32 from an index on that is a multiple of 16; `settle` at the end.

    Args:
        past_the_caches: `streams(start)`, asked once before the loop.
    """
    if past_the_caches:
        _stream(start, index, vector)
    else:
        store(start, index, vector)


@intrinsic  # type: ignore[untyped-decorator]
def settle(_context: Any) -> Any:
    """Order what was streamed before everything that this thread writes later, such as a flag."""

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_context: Any, start: Any, _index: Any) -> Any:
    """Ask for what lies `AHEAD_BYTES` behind an index; nothing happens where there is no memory."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8)
        there = builder.gep(_address(builder, arguments[0], arguments[1], byte), [ir.Constant(_INT32, AHEAD_BYTES)])
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reading, keep, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(function, [there, reading, keep, data])
        return context.get_dummy_value()

    return types.void(start, types.intp), emit


# -- Values ----------------------------------------------------------------------------------------


def _repeat(builder: Any, scalar: Any, width: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, width), [0] * width))


@intrinsic  # type: ignore[untyped-decorator]
def repeat(_context: Any, scalar: Any) -> Any:
    """Return 16 times a scalar."""
    vector = Vector(scalar)
    return vector(scalar), lambda _context, builder, _signature, arguments: _repeat(builder, arguments[0], WIDTH)


@intrinsic  # type: ignore[untyped-decorator]
def positions(_context: Any) -> Any:
    """Return 0, 1, ..., 15 as uint32."""
    vector = Vector(types.uint32)
    return vector(), lambda *_: ir.Constant(_llvm(vector), list(range(WIDTH)))


def _install(function: Any, real: str, integer: str, *arguments: str) -> None:
    """Make an operator work on two vectors, or a vector and a scalar of its element type."""
    result_of: Callable[[Any], Any] = (lambda vector: Vector(types.boolean, vector.width)) if arguments else _same

    @intrinsic  # type: ignore[untyped-decorator]
    def apply(_context: Any, left: Any, right: Any) -> Any:
        vector = left if isinstance(left, Vector) else right
        taken = [kind if isinstance(kind, Vector) else vector.dtype for kind in (left, right)]
        name = real if isinstance(vector.dtype, types.Float) else integer

        def emit(_context: Any, builder: Any, signature: Any, values: Any) -> Any:
            both = [
                value if isinstance(kind, Vector) else _repeat(builder, value, vector.width)
                for kind, value in zip(signature.args, values, strict=True)
            ]
            return getattr(builder, name)(*arguments, *both)

        return result_of(vector)(*taken), emit

    @overload(function, strict=False)  # type: ignore[untyped-decorator]
    def choose(left: Any, right: Any) -> Any:
        if isinstance(left, Vector) or isinstance(right, Vector):
            return lambda left, right: apply(left, right)
        return None


def _same(vector: Any) -> Any:
    return vector


_install(operator.add, "fadd", "add")
_install(operator.sub, "fsub", "sub")
_install(operator.mul, "fmul", "mul")
_install(operator.truediv, "fdiv", "udiv")
_install(operator.and_, "", "and_")
_install(operator.or_, "", "or_")
_install(operator.xor, "", "xor")
_install(operator.lshift, "", "shl")
_install(operator.rshift, "", "lshr")
_install(operator.lt, "fcmp_ordered", "icmp_unsigned", "<")
_install(operator.gt, "fcmp_ordered", "icmp_unsigned", ">")
_install(operator.ge, "fcmp_ordered", "icmp_unsigned", ">=")


@intrinsic  # type: ignore[untyped-decorator]
def where(_context: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Return the elements of `yes` where the condition holds, else those of `no`."""
    return yes(condition, yes, no), lambda _context, builder, _signature, values: builder.select(*values)


@intrinsic  # type: ignore[untyped-decorator]
def _sqrt(_context: Any, vector: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(values[0].type, [values[0].type])
        name = f"llvm.sqrt.v{vector.width}f{vector.dtype.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

    return vector(vector), emit


@overload(np.sqrt, strict=False)  # type: ignore[untyped-decorator]
def _choose_sqrt(value: Any) -> Any:
    return (lambda value: _sqrt(value)) if isinstance(value, Vector) else None


@intrinsic  # type: ignore[untyped-decorator]
def total(_context: Any, vector: Any) -> Any:
    """Return the sum of the elements, modulo their range: for integers, whose order does not matter."""

    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_ELEMENTS[vector.dtype], [values[0].type])
        name = f"llvm.vector.reduce.add.v{vector.width}i{vector.dtype.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

    return vector.dtype(vector), emit


@intrinsic  # type: ignore[untyped-decorator]
def astype(_context: Any, vector: Any, dtype: Any) -> Any:
    """Convert each element: floats to floats, unsigned integers to unsigned integers."""
    result = Vector(dtype.dtype, vector.width)
    grows = result.dtype.bitwidth > vector.dtype.bitwidth
    names = ("fpext", "fptrunc") if isinstance(vector.dtype, types.Float) else ("zext", "trunc")

    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return getattr(builder, names[0] if grows else names[1])(values[0], _llvm(result))

    return result(vector, dtype), emit


@intrinsic  # type: ignore[untyped-decorator]
def reinterpret(_context: Any, vector: Any, dtype: Any) -> Any:
    """Return the same bits as elements of another type; there may be fewer."""
    result = Vector(dtype.dtype, vector.width * vector.dtype.bitwidth // dtype.dtype.bitwidth)
    return result(vector, dtype), lambda _context, builder, _signature, values: builder.bitcast(
        values[0], _llvm(result)
    )
