"""How this process runs Triton kernels: interpreted on the CPU, or compiled on a device.

Triton decides at import whether its kernels, and the functions of its own language, are interpreted, by the variable
TRITON_INTERPRET. So the choice is made once per process, here, before anything of Triton is imported: `pytest -m gpu`
compiles, every other run interprets. The variable is set for the time of the imports only, so that no process started
by a test inherits it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys

import pytest

VARIABLE = "TRITON_INTERPRET"


def selects_gpu(markers: str) -> bool:
    """Whether a `-m` expression asks for the tests that need a device."""
    return re.search(r"(?<!not )\bgpu\b", markers) is not None


def choose(config: pytest.Config) -> None:
    """Import the kernels in this process's mode. Raises UsageError where Triton has been imported in another."""
    if not selects_gpu(config.getoption("markexpr")):
        _import_interpreted()


def interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return bool(importlib.import_module("arriero_kernels.numerics").INTERPRET.value)


def _import_interpreted() -> None:
    if "arriero_kernels.numerics" in sys.modules and interpreted():
        return
    early = sorted(name for name in sys.modules if name in ("triton", "arriero_kernels.numerics"))
    if early:
        raise pytest.UsageError(
            f"{' and '.join(early)} was imported before the kernels' tests could ask for the interpreter: let what "
            f"imports it come later, or set {VARIABLE}=1"
        )
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        package = importlib.import_module("arriero_kernels")
        for module in pkgutil.iter_modules(package.__path__, "arriero_kernels."):
            importlib.import_module(module.name)
        importlib.import_module("tests.kernels.conversions")
        importlib.import_module("triton.experimental.gluon")  # else imported at the first launch, which is too late
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
