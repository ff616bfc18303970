"""The cuda backend in Triton's interpreter, on the CPU; with `pytest -m gpu`, on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.kernels import mode
from tests.kernels.conftest import device  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    mode.choose(config)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
