"""The register tile under every product: out[rows, 16] (+)= x[rows, K] @ w[K, 16] in float32, for 1 to 6 rows.

Written as LLVM IR, because neither numba nor torch can say "these twelve sums stay in registers", and compiled when a
process starts (half a second) for the CPU it runs on. Every output is one chain of multiply-adds in order of k, begun
at zero and added to `out` at its end, whatever the tile: a token's result does not depend on how many others are in
the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir

LANES = 8
"""float32 values of one vector (AVX2's register; narrower machines take several for one)."""
PANEL = 2 * LANES
"""Columns of a tile, and of a packed weight panel."""
MAX_ROWS = 6
"""Rows of the largest tile: 6 * 2 sums, 2 weights and 1 input fill 15 of AVX2's 16 registers."""

FLOAT32, BFLOAT16, PAIRED = 0, 1, 2
"""How a row of 16 weights lies in memory: in order, or (PAIRED) as 8 words, the bfloat16 of column j in the low half of
word j, that of column j + 8 in the high half, so that one load and two operations make two vectors."""

_AHEAD = 3072
"""Bytes between the weights in use and those asked for: a quarter more bandwidth from one core than the hardware's own
prefetching gives. It runs on into the next panel, which follows in memory."""

_i16, _i32, _i64, _f32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_vector = ir.VectorType(_f32, LANES)
_ints = ir.VectorType(_i32, LANES)
_shorts = ir.VectorType(_i16, LANES)


@cache
def tile_tables() -> tuple[int, int, int]:
    """Addresses of three tables, by kind of weights; entry `rows` of a table is the address of the tile of that size.

    A tile is void(x, x_row, x_k, w, w_k, out, out_row, k, accumulate), all int64: addresses, strides in bytes, counts;
    `out` has unit stride, `accumulate` is 0 or 1.
    """
    module = ir.Module("tiles")
    for kind in (FLOAT32, BFLOAT16, PAIRED):
        for rows in range(1, MAX_ROWS + 1):
            _define(module, kind, rows)
    engine = _compile(module)
    table = np.zeros((3, MAX_ROWS + 1), dtype=np.int64)
    for kind in (FLOAT32, BFLOAT16, PAIRED):
        for rows in range(1, MAX_ROWS + 1):
            table[kind, rows] = engine.get_function_address(_name(kind, rows))
    _keep.append((engine, table))
    return table[0].ctypes.data, table[1].ctypes.data, table[2].ctypes.data


_keep: list[Any] = []  # code and tables live as long as the process


def _name(kind: int, rows: int) -> str:
    return f"tile_{kind}_{rows}"


def _compile(module: ir.Module) -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


def _define(module: ir.Module, kind: int, rows: int) -> None:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * 9), _name(kind, rows))
    x, x_row, x_k, w, w_k, out, out_row, k, accumulate = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    sums = [builder.alloca(_vector) for _ in range(2 * rows)]
    x_at, w_at, left = builder.alloca(_i64), builder.alloca(_i64), builder.alloca(_i64)
    for slot in sums:
        builder.store(ir.Constant(_vector, [0.0] * LANES), slot)
    builder.store(x, x_at)
    builder.store(w, w_at)
    builder.store(k, left)
    x_rows = [builder.mul(x_row, _i64(r)) for r in range(rows)]
    head, body, done = (function.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    builder.cbranch(builder.icmp_signed(">", builder.load(left), _i64(0)), body, done)

    # Not unrolled: LLVM would load the next steps' weights early and run out of registers, at a third of the speed.
    builder.position_at_end(body)
    x_now, w_now = builder.load(x_at), builder.load(w_at)
    _prefetch(builder, builder.add(w_now, _i64(_AHEAD)))
    weights = _LOADS[kind](builder, w_now)
    for r in range(rows):
        value = _splat(builder, _load(builder, builder.add(x_now, x_rows[r]), _f32))
        for c in range(2):
            slot = sums[2 * r + c]
            builder.store(_multiply_add(builder, value, weights[c], builder.load(slot)), slot)
    builder.store(builder.add(x_now, x_k), x_at)
    builder.store(builder.add(w_now, w_k), w_at)
    builder.store(builder.sub(builder.load(left), _i64(1)), left)
    builder.branch(head)

    builder.position_at_end(done)
    outs = [
        builder.add(builder.add(out, builder.mul(out_row, _i64(r))), _i64(4 * LANES * c))
        for r in range(rows)
        for c in range(2)
    ]
    with builder.if_then(builder.icmp_signed("!=", accumulate, _i64(0))):
        for slot, address in zip(sums, outs, strict=True):
            builder.store(builder.fadd(_load(builder, address, _vector), builder.load(slot)), slot)
    for slot, address in zip(sums, outs, strict=True):
        builder.store(builder.load(slot), builder.inttoptr(address, _vector.as_pointer()), align=4)
    builder.ret_void()


def _prefetch(builder: Any, address: Any) -> None:
    """Into all cache levels, for reading. Any address will do, mapped or not."""
    name = "llvm.prefetch.p0"
    module = builder.module
    pointer = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [pointer] + [_i32] * 3)
    function = module.globals.get(name) or ir.Function(module, function_type, name)
    builder.call(function, [builder.inttoptr(address, pointer), _i32(0), _i32(3), _i32(1)])


def _load(builder: Any, address: Any, kind: ir.Type, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _splat(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_vector, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(one, ir.Constant(_vector, ir.Undefined), ir.Constant(_ints, [0] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Fused where the machine can, which every x86-64 with AVX2 and every arm64 does."""
    name = f"llvm.fmuladd.v{LANES}f32"
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(_vector, [_vector] * 3), name)
    return builder.call(function, [a, b, c])


def _row_float32(builder: Any, address: Any) -> list[Any]:
    return [_load(builder, builder.add(address, _i64(4 * LANES * c)), _vector) for c in range(2)]


def _row_bfloat16(builder: Any, address: Any) -> list[Any]:
    row = []
    for c in range(2):
        wide = builder.zext(_load(builder, builder.add(address, _i64(2 * LANES * c)), _shorts, 2), _ints)
        row.append(builder.bitcast(builder.shl(wide, ir.Constant(_ints, [16] * LANES)), _vector))
    return row


def _row_paired(builder: Any, address: Any) -> list[Any]:
    words = _load(builder, address, _ints)
    low = builder.shl(words, ir.Constant(_ints, [16] * LANES))
    high = builder.and_(words, ir.Constant(_ints, [0xFFFF0000] * LANES))
    return [builder.bitcast(low, _vector), builder.bitcast(high, _vector)]


_LOADS: tuple[Callable[[Any, Any], list[Any]], ...] = (_row_float32, _row_bfloat16, _row_paired)
