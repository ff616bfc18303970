from __future__ import annotations

from collections.abc import Iterator

import pytest

from .running import Loop


@pytest.fixture(scope="package")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()
