"""A plan as plain rows of text, for people; whoever prints them chooses the looks."""

from __future__ import annotations

from arriero_plan.memory import GIB, MIB
from arriero_plan.plan import Plan

STAGE_COLUMNS = ("stage", "layers", "ranks", "weights", "KV", "workspace", "reserve", "total")


def size(count: int) -> str:
    """Bytes in the unit a person would use."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / MIB:.1f} MiB"


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """What holds for the whole replica, as (name, value)."""
    layout = plan.layout
    pods = "pod" if plan.pods_per_group == 1 else "pods"
    ranks = "rank" if plan.ranks_per_pod == 1 else "ranks"
    sequences = plan.kv_tokens / plan.max_context
    device = "" if plan.device_bytes is None else f", {size(plan.device_bytes)} each"
    blocks = f"{plan.kv_blocks:,} blocks of {plan.block_size}"
    return [
        ("model", f"{plan.model}, {_count(plan.parameters)} parameters"),
        ("layout", f"tensor {layout.tensor} x pipeline {layout.pipeline}"),
        ("devices", f"{plan.world} x {plan.accelerator}{device}"),
        ("pods per replica", f"{plan.pods_per_group} {pods} of {plan.ranks_per_pod} {ranks}"),
        ("types", f"weights {plan.weights}, KV {plan.kv_dtype}, computed in {plan.dtype}"),
        ("context", f"{plan.max_context:,} tokens"),
        ("KV cache", f"{plan.kv_tokens:,} tokens, {sequences:.1f} longest sequences ({blocks})"),
    ]


def stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row for each stage in the order of STAGE_COLUMNS; sizes are those of one device."""
    tensor = plan.layout.tensor
    rows: list[tuple[str, ...]] = []
    for number, stage in enumerate(plan.stages):
        first, last = stage.first_layer, stage.end_layer - 1
        ranks = f"{number * tensor}-{number * tensor + tensor - 1}" if tensor > 1 else str(number)
        rows.append(
            (
                str(number),
                f"{first}-{last} ({last - first + 1})",
                ranks,
                size(stage.weight_bytes),
                size(stage.kv_bytes),
                size(stage.workspace_bytes),
                size(stage.reserve_bytes),
                size(stage.total_bytes),
            )
        )
    return rows


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 10**8 else f"{parameters / 1e6:.2f} M"
