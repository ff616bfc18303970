from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .replica import Replica, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """One replica for all tests of a file; use `replica`, which finds it as new."""
    with Replica(model, tmp_path_factory.mktemp("run")) as replica:
        yield replica


@pytest.fixture
def replica(shared: Replica) -> Iterator[Replica]:
    engine = shared.engine
    yield shared
    shared.call(engine.go)
    engine.refuse = engine.end = None
    engine.max_running, engine.chunk = 10_000, 1
    shared.wait_for(lambda: not engine.running)
    if engine.phase != "Serving":
        shared.call(lambda: engine.set_phase("Serving"))
        shared.wait_for(lambda: shared.front.service.unready is None)


@pytest.fixture
def fresh(model: Path, tmp_path: Path) -> Iterator[Replica]:
    """A replica that a test may break."""
    with Replica(model, tmp_path) as replica:
        yield replica
