"""Launch parameters, chosen beforehand for each kind of device: nothing is tuned while serving.

`tables/*.json`, one per kind of device:

    {"device": "NVIDIA H200",           # how its name begins
     "multiprocessors": 132,
     "ops": {"rms_norm": {"measured": null, "rows": [{"up_to": 2048, "num_warps": 4}, {"up_to": null, ...}]}}}

`measured` says in which run the rows were found to be the fastest, or null: compiled and checked for spills and shared
memory, never timed. The first row whose `up_to` is at least the size the operation asks with is taken; null is the
rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

DEFAULT = "h100"
"""The table of devices that have none of their own, and of the interpreter."""

Parameters = Mapping[str, int]
"""What a launcher hands to its kernel: num_warps, num_stages, and the kernel's own block sizes."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The parameters of every operation on one device."""

    device: str
    multiprocessors: int
    ops: Mapping[str, Sequence[tuple[int | None, Parameters]]]

    @classmethod
    def load(cls, table: str) -> Tuning:
        """A table by its file's name without the ending. Raises ValueError for one that is missing or malformed."""
        if table not in tables():
            raise ValueError(f"there is no tuning table {table!r}, only {', '.join(tables())}")
        content = json.loads((files(__package__) / "tables" / f"{table}.json").read_text())
        ops = {name: _rows(table, name, op["rows"]) for name, op in content["ops"].items()}
        return cls(content["device"], content["multiprocessors"], ops)

    @classmethod
    def of(cls, device: torch.device) -> Tuning:
        """The table for a device, with its own number of multiprocessors; DEFAULT's for one without a table."""
        if device.type != "cuda":
            return _loaded(DEFAULT)
        return _of_cuda(torch.cuda.current_device() if device.index is None else device.index)

    def choose(self, op: str, size: int) -> Parameters:
        """The parameters of an operation at a size; which size, the operation's file says.

        Multiplications and additions are fused, said explicitly as Triton's default depends on its version.
        """
        for up_to, parameters in self.ops[op]:
            if up_to is None or size <= up_to:
                return {**parameters, "enable_fp_fusion": True}
        raise AssertionError(f"the last row of {op} in the table of {self.device} is open")

    def using(self, op: str, **parameters: int) -> Tuning:
        """This table with one operation's parameters fixed at every size: how tuning tries them."""
        return replace(self, ops={**self.ops, op: [(None, parameters)]})


@cache
def tables() -> tuple[str, ...]:
    """The names of the tables that are shipped."""
    found = (files(__package__) / "tables").iterdir()
    return tuple(sorted(entry.name.removesuffix(".json") for entry in found if entry.name.endswith(".json")))


@cache
def _loaded(table: str) -> Tuning:
    return Tuning.load(table)


@cache
def _of_cuda(index: int) -> Tuning:
    properties = torch.cuda.get_device_properties(index)
    named = [loaded for loaded in map(_loaded, tables()) if properties.name.startswith(loaded.device)]
    return replace(named[0] if named else _loaded(DEFAULT), multiprocessors=properties.multi_processor_count)


def _rows(table: str, op: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int | None, Parameters]]:
    bounds = [row["up_to"] for row in rows]
    if not bounds or bounds[-1] is not None or None in bounds[:-1] or bounds[:-1] != sorted(set(bounds[:-1])):
        raise ValueError(f"tuning table {table}, {op}: up_to must rise, and be null in the last row, found {bounds}")
    return [(row["up_to"], {name: int(value) for name, value in row.items() if name != "up_to"}) for row in rows]
