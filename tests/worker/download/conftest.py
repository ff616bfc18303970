"""No process outlives the test that started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .program import end_all


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    end_all()
