"""What numba lacks: typed pointers from addresses, atomics, and a register-tiled matrix product, written as LLVM IR.

Nothing here runs at import: an intrinsic is a recipe that numba follows when it compiles a kernel that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba import types as numba_types
from numba.core import cgutils

# numba's annotations know neither that an intrinsic is called without its typing context nor its own constructors.
intrinsic: Any = extending.intrinsic
types: Any = numba_types
alloca_once: Any = cgutils.alloca_once

LANES = 8
"""float32 values of one vector register of the tile (AVX2; wider machines take two at a time)."""
PANEL = 2 * LANES
"""Columns of a packed weight panel."""
MAX_ROWS = 6
"""Rows of the largest tile: 6 * 2 accumulators, 2 weights and 1 input fill 15 of AVX2's 16 registers."""

_i8, _i16, _i32, _i64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_f32 = ir.FloatType()
_vector = ir.VectorType(_f32, LANES)
_int_vector = ir.VectorType(_i32, LANES)
_short_vector = ir.VectorType(_i16, LANES)


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


def _fmuladd(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = f"llvm.fmuladd.v{LANES}f32"
    function_type = ir.FunctionType(_vector, [_vector] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, [a, b, c])


def _splat(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_vector, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(one, ir.Constant(_vector, ir.Undefined), ir.Constant(_int_vector, [0] * LANES))


def _load(builder: Any, address: Any, ir_type: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, ir_type.as_pointer()), align=1 if ir_type is _vector else None)


def _load_float32(builder: Any, address: Any) -> list[Any]:
    """One row of a panel: 16 float32 in order."""
    return [_load(builder, builder.add(address, _i64(4 * LANES * i)), _vector) for i in range(2)]


def _load_bfloat16(builder: Any, address: Any) -> list[Any]:
    """One row of a panel: 16 bfloat16 in order."""
    rows = []
    for i in range(2):
        pointer = builder.inttoptr(builder.add(address, _i64(2 * LANES * i)), _short_vector.as_pointer())
        wide = builder.zext(builder.load(pointer, align=1), _int_vector)
        rows.append(builder.bitcast(builder.shl(wide, ir.Constant(_int_vector, [16] * LANES)), _vector))
    return rows


def _load_paired(builder: Any, address: Any) -> list[Any]:
    """One row of a panel: 8 words, the bfloat16 of column j in the low half of word j, of column j + 8 in the high."""
    words = builder.load(builder.inttoptr(address, _int_vector.as_pointer()), align=1)
    low = builder.shl(words, ir.Constant(_int_vector, [16] * LANES))
    high = builder.and_(words, ir.Constant(_int_vector, [0xFFFF0000] * LANES))
    return [builder.bitcast(low, _vector), builder.bitcast(high, _vector)]


def _tile(rows: int, panels: int, load: Callable[[Any, Any], list[Any]]) -> Any:
    """out[rows, panels * 16] (+)= x[rows, K] @ w[K, panels * 16], accumulators in registers throughout.

    Every output is one chain of multiply-adds in order of k, begun at zero and added to `out` at its end, whatever the
    tile: a token's result does not depend on how many others are in the batch, and long sums err as blocked ones do.
    """

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        x_k: Any,
        w: Any,
        w_k: Any,
        w_panel: Any,
        out: Any,
        out_row: Any,
        k: Any,
        accumulate: Any,
    ) -> Any:
        """Addresses and strides in bytes; `out` is float32 with unit stride; `accumulate` 0 or 1."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_row, x_k, w, w_k, w_panel, out, out_row, k, accumulate = args
            outs = [builder.add(out, builder.mul(out_row, _i64(r))) for r in range(rows)]
            cells = [(r, c) for r in range(rows) for c in range(2 * panels)]
            addresses = [builder.add(outs[r], _i64(4 * LANES * c)) for r, c in cells]
            sums = [alloca_once(builder, _vector) for _ in cells]
            for slot in sums:
                builder.store(ir.Constant(_vector, [0.0] * LANES), slot)
            x_rows = [builder.mul(x_row, _i64(r)) for r in range(rows)]
            w_panels = [builder.mul(w_panel, _i64(p)) for p in range(panels)]

            def step(x_address: Any, w_address: Any) -> None:
                weights = [v for p in w_panels for v in load(builder, builder.add(w_address, p))]
                for r in range(rows):
                    value = _splat(builder, _load(builder, builder.add(x_address, x_rows[r]), _f32))
                    for c in range(2 * panels):
                        slot = sums[r * 2 * panels + c]
                        builder.store(_fmuladd(builder, value, weights[c], builder.load(slot)), slot)

            x_at, w_at = alloca_once(builder, _i64), alloca_once(builder, _i64)
            builder.store(x, x_at)
            builder.store(w, w_at)

            def loop(trips: Any, unroll: int) -> None:
                left = alloca_once(builder, _i64)
                builder.store(trips, left)
                head = builder.append_basic_block("tile.head")
                body = builder.append_basic_block("tile.body")
                done = builder.append_basic_block("tile.done")
                builder.branch(head)
                builder.position_at_end(head)
                builder.cbranch(builder.icmp_signed(">", builder.load(left), _i64(0)), body, done)
                builder.position_at_end(body)
                for _ in range(unroll):
                    x_now, w_now = builder.load(x_at), builder.load(w_at)
                    step(x_now, w_now)
                    builder.store(builder.add(x_now, x_k), x_at)
                    builder.store(builder.add(w_now, w_k), w_at)
                builder.store(builder.sub(builder.load(left), _i64(1)), left)
                builder.branch(head)
                builder.position_at_end(done)

            loop(builder.lshr(k, _i64(2)), 4)
            loop(builder.and_(k, _i64(3)), 1)
            with builder.if_then(builder.icmp_signed("!=", accumulate, _i64(0))):
                for slot, address in zip(sums, addresses, strict=True):
                    builder.store(builder.fadd(_load(builder, address, _vector), builder.load(slot)), slot)
            for slot, address in zip(sums, addresses, strict=True):
                builder.store(builder.load(slot), builder.inttoptr(address, _vector.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


FLOAT32, BFLOAT16, PAIRED = 0, 1, 2
_LOADS = (_load_float32, _load_bfloat16, _load_paired)


def _tile_function(rows: int, kind: int) -> Any:
    """The tile over one panel as a function of its own: inlined side by side, tiles take each other's registers."""
    tile = _tile(rows, 1, _LOADS[kind])

    @numba.njit
    def run(x, x_row, x_k, w, w_k, out, out_row, k, accumulate):  # type: ignore[no-untyped-def]
        tile(x, x_row, x_k, w, w_k, 0, out, out_row, k, accumulate)

    return run


def _tiles(kind: int) -> Any:
    """A function that runs the tile of `rows` rows, 1 to MAX_ROWS, over one panel."""
    t1, t2, t3, t4, t5, t6 = (_tile_function(rows, kind) for rows in range(1, MAX_ROWS + 1))

    @numba.njit
    def tiles(  # type: ignore[no-untyped-def]
        rows, x, x_row, x_k, w, w_k, out, out_row, k, accumulate
    ):
        if rows == 1:
            t1(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)
        elif rows == 2:
            t2(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)
        elif rows == 3:
            t3(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)
        elif rows == 4:
            t4(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)
        elif rows == 5:
            t5(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)
        else:
            t6(x, x_row, x_k, w, w_k, out, out_row, k, accumulate)

    return tiles


tiles_float32, tiles_bfloat16, tiles_paired = (_tiles(kind) for kind in (FLOAT32, BFLOAT16, PAIRED))
