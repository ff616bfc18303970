"""The machine a figure comes from, and its two ceilings, measured in the same run."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
from benchmarks.gpu.measure import events_seconds

_COPY = 4 << 30
_N = 8192


def describe() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _query("driver_version"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def clocks() -> dict[str, str | None]:
    """As nvidia-smi has them at this moment, with units; None where it is missing or does not know."""
    return {
        name: _query(name) for name in ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    }


def ceilings() -> dict[str, float | None]:
    """Bytes per second of a device-to-device copy, read and written both counted; operations per second of 8192^3
    matrix products of random numbers by PyTorch's libraries. None: this PyTorch has no such product.
    """
    device = torch.device("cuda")
    found: dict[str, float | None] = {"copy_bytes_per_second": _copy_rate(device)}
    a, b = (torch.randn(_N, _N, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16_flops"] = _rate(lambda: a @ b.T)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    found["float8_flops"] = _rate(lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16))
    ai, bi = (torch.randint(-127, 128, (_N, _N), device=device, dtype=torch.int8) for _ in range(2))
    found["int8_flops"] = _rate(lambda: torch._int_mm(ai, bi.T))
    return found


def _copy_rate(device: torch.device) -> float:
    source = torch.randint(0, 256, (_COPY,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPY / events_seconds(lambda: target.copy_(source), 20)


def _rate(product: Callable[[], object]) -> float | None:
    try:
        return 2 * _N**3 / events_seconds(product, 20)
    except (RuntimeError, NotImplementedError) as error:
        print(f"no ceiling: {error}")
        return None


def _query(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return asked.stdout.strip() or None if asked.returncode == 0 else None
