"""What is measured: one launch of an operation, its PyTorch twin, and what the launch must at least move and compute.

The same cases are compiled ahead of time for the table of docs/kernels.md, where no GPU is: on torch's "meta" device,
whose tensors have shapes and no values. So `make` draws through `randn` and friends, and reads nothing back.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from arriero_kernels.tuning import Tuning

Outputs = torch.Tensor | Sequence[torch.Tensor]
Unit = Literal["bfloat16", "float8", "int8"]


@dataclass(frozen=True, slots=True)
class Work:
    """One set of inputs. What is changed in place exists twice, once for `call` and once for `twin`."""

    call: Callable[[], Outputs]
    """Our launch."""
    twin: Callable[[], Outputs] | None
    """What a user of PyTorch would write, with the same outputs (codes and scales as well); None where it has no such
    operation."""
    bytes: int
    """The least that has to be moved: each input read once, each output written once."""
    flops: int = 0
    """Multiplications and additions on the matrix units."""
    unit: Unit = "bfloat16"
    """The matrix units' precision."""


@dataclass(frozen=True, slots=True)
class Case:
    op: str
    """The operation's file in arriero_kernels."""
    name: str
    """What distinguishes it: sizes, dtypes, variant."""
    make: Callable[[torch.device, Tuning | None], Work]
    """Draws one set of inputs on a device. The tuning is handed to the launch; None: the device's."""
    timed: bool = True
    """False: compiled only, to gate a configuration that would tell nothing more about speed."""

    @property
    def label(self) -> str:
        return f"{self.op}: {self.name}"


def all_cases() -> list[Case]:
    """Of every module in `cases`, by their names. Labels are unique."""
    from benchmarks.gpu import cases

    found: list[Case] = []
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda m: m.name):
        found += importlib.import_module(f"{cases.__name__}.{module.name}").CASES
    labels = [case.label for case in found]
    assert len(set(labels)) == len(labels), f"labels are not unique: {labels}"
    return found


def bytes_of(*tensors: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


_PLAIN = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}


def plain(dtype: torch.dtype) -> str:
    """A dtype's short name, for labels."""
    return _PLAIN[dtype]
