"""What every room's tests share: the size of random campaigns, and the seed they print."""

from __future__ import annotations

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("arriero")
    group.addoption("--campaign", type=int, default=1, metavar="N", help="multiply random campaigns by N (default: 1)")
    group.addoption("--cluster", action="store_true", help="also run the tests that need a Kubernetes cluster")
    group.addoption("--campaign-seed", type=int, default=None, metavar="S", help="repeat campaigns of this seed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: needs a Kubernetes cluster; runs with --cluster")
    if config.getoption("--campaign") < 1:
        raise pytest.UsageError("--campaign: expected a whole number from 1 on")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--campaign-seed")
    return f"campaign: x{config.getoption('--campaign')}, seed {'of each test' if seed is None else seed}"


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest) -> int:
    """By how much a random campaign is enlarged: 1, or --campaign N."""
    value: int = request.config.getoption("--campaign")
    return value


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed: the same at each run, or --campaign-seed S. Printed, so it stands in a failure's report."""
    given: int | None = request.config.getoption("--campaign-seed")
    value = random.Random(request.node.nodeid).randrange(2**32) if given is None else given
    print(f"seed {value}: repeat with --campaign-seed {value}")
    return value
