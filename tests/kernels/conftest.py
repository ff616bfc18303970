"""Each test of a kernel runs twice: in Triton's interpreter, and, with `pytest -m gpu`, on a device."""

from __future__ import annotations

import pytest
import torch
from tests.kernels import mode


def pytest_configure(config: pytest.Config) -> None:
    mode.choose(config)


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors lie."""
    if request.param == "interpreter":
        if not mode.interpreted():
            pytest.skip("pytest -m gpu runs kernels compiled, in this process")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if mode.interpreted():
        pytest.skip("kernels run in the interpreter in this process; on the device: pytest -m gpu")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)
