"""What every operation of the room has: a test, a case to compile and to measure, launch parameters, and a contract."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from benchmarks.gpu.case import all_cases
from tests.kernels import mode  # noqa: F401  the kernels are imported as it chose

import arriero_kernels

SHARED = {"attention", "checks", "gemm", "int4", "gumbel", "numerics", "ordering", "quantization", "tuning"}
OPS = sorted({module.name for module in pkgutil.iter_modules(arriero_kernels.__path__)} - SHARED)


def launchers(op: str) -> list[tuple[str, Callable[..., object]]]:
    module = import_module(f"arriero_kernels.{op}")
    return [
        (name, value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


@pytest.mark.parametrize("op", OPS)
def test_an_operation_is_tested_and_measured(op: str) -> None:
    assert (Path(__file__).parent / f"test_{op}.py").is_file()
    cases = [case for case in all_cases() if case.op == op]
    assert any(case.timed for case in cases)


@pytest.mark.parametrize("op", OPS)
def test_a_launcher_states_its_contract(op: str) -> None:
    found = launchers(op)
    assert found
    for name, function in found:
        documented = inspect.getdoc(function)
        assert documented, name
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"
            assert parameter.name in documented or "arguments" in documented or parameter.name in _COMMON, (
                f"{name} does not say what {parameter.name} is"
            )


_COMMON = {"tuning"}


def test_a_case_belongs_to_an_operation() -> None:
    assert {case.op for case in all_cases()} <= set(OPS)
