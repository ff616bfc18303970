"""Launch parameters worth trying: what each module in `cases` declares as CANDIDATES, by the tables' keys.

A candidate replaces, of the row that the table has now, the parameters that it names.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Mapping, Sequence

from arriero_kernels.tuning import Parameters

Candidates = Mapping[str, Sequence[Parameters]]


def product(**choices: Sequence[int]) -> list[Parameters]:
    """Every combination of the parameters' values."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def all_candidates() -> dict[str, dict[str, list[Parameters]]]:
    """Of every module in `cases` that declares any: operation -> table's key -> candidates."""
    from benchmarks.gpu import cases

    found = {}
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda m: m.name):
        declared: Candidates = getattr(importlib.import_module(f"{cases.__name__}.{module.name}"), "CANDIDATES", {})
        if declared:
            found[module.name] = {key: list(tried) for key, tried in declared.items()}
    return found
