"""What numba lacks, written as LLVM IR: typed pointers from addresses, atomics, calls by address.

Nothing here runs at import: an intrinsic is a recipe that numba follows when it compiles a kernel that uses it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending
from numba import types as numba_types

# numba's annotations know neither that an intrinsic is called without its typing context nor its own constructors.
intrinsic: Any = extending.intrinsic
types: Any = numba_types

_i16, _i32, _i64, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _pointer_of(numba_type: Any, ir_type: ir.Type) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], ir_type.as_pointer())

        return types.CPointer(numba_type)(types.int64), codegen

    return pointer


f32_at = _pointer_of(types.float32, _f32)
u16_at = _pointer_of(types.uint16, _i16)
i32_at = _pointer_of(types.int32, _i32)
i64_at = _pointer_of(types.int64, _i64)
f64_at = _pointer_of(types.float64, ir.DoubleType())


@intrinsic
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """2 ** exponent for a whole float32 of -126 to 127. numba would widen the bits to int64, at half the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _i32), _i32(127))
        return builder.bitcast(builder.shl(biased, _i32(23)), _f32)

    return types.float32(types.float32), codegen


@intrinsic
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """float32 -> its int32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _i32)

    return types.int32(types.float32), codegen


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _i64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _i64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _read_modify_write(operation: str) -> Any:
    @intrinsic
    def rmw(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, builder.inttoptr(args[0], _i64.as_pointer()), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return rmw


exchange = _read_modify_write("xchg")
fetch_add = _read_modify_write("add")


@intrinsic
def call_kernel(typingctx: Any, kernel: Any, arguments: Any, thread: Any, threads: Any) -> Any:
    """Call the compiled kernel at an address: void(int64 arguments, int64 thread, int64 threads)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [_i64, _i64, _i64])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def call_tile(
    typingctx: Any,
    table: Any,
    rows: Any,
    x: Any,
    x_row: Any,
    x_k: Any,
    w: Any,
    w_k: Any,
    out: Any,
    out_row: Any,
    k: Any,
    accumulate: Any,
) -> Any:
    """Call the tile of `rows` rows from a table of `tiles.tile_tables`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        entry = builder.add(args[0], builder.mul(args[1], _i64(8)))
        address = builder.load(builder.inttoptr(entry, _i64.as_pointer()))
        function_type = ir.FunctionType(ir.VoidType(), [_i64] * 9)
        builder.call(builder.inttoptr(address, function_type.as_pointer()), args[2:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


def _libc(name: str, parameters: int) -> Any:
    """A C function of integers and pointers, all passed as int64, returning int."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(_i32, [_i64] * parameters)
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        builder.call(function, args)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * parameters)
    if parameters == 0:

        @intrinsic
        def call0(typingctx: Any) -> Any:
            return signature, codegen

        return call0

    @intrinsic
    def call1(typingctx: Any, a: Any) -> Any:
        return signature, codegen

    return call1


sem_wait = _libc("sem_wait", 1)
sem_post = _libc("sem_post", 1)
sched_yield = _libc("sched_yield", 0)
