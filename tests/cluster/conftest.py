"""The cluster as a fixture: one for each module, a namespace per test, and the traces of a failed test kept.

Only with --cluster: its programs must have been built (python tools/cluster/build.py), which takes minutes. With
KUBECONFIG set, tests run on that cluster, and those that need one of our own are skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from tests.cluster import machine
from tests.cluster.cluster import Cluster, keep_logs, start_cluster
from tests.cluster.existing import ExistingCluster
from tests.cluster.processes import wait_until
from tests.cluster.traces import traces_of

FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --cluster its tests are left out. With it they come last: while it runs, nothing else is measured."""
    on_cluster = [item for item in items if item.get_closest_marker("cluster")]
    items[:] = [item for item in items if not item.get_closest_marker("cluster")]
    if config.getoption("--cluster"):
        items += on_cluster
    elif on_cluster:
        config.hook.pytest_deselected(items=on_cluster)


def unavailable(reason: str) -> NoReturn:
    """Skip the test; in CI, where nobody reads skips, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run the cluster's tests: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster | ExistingCluster]:
    """An API server: of two real nodes with eight counted GPUs each; of a control plane alone, where nobody is root or
    this is not Linux; or the one that KUBECONFIG names.
    """
    if kubeconfig := os.environ.get("KUBECONFIG"):
        if lack := machine.not_built("kubectl"):
            unavailable(lack)
        existing = ExistingCluster(Path(kubeconfig))
        yield existing
        existing.close()
        return
    if lack := machine.why_no_control_plane():
        unavailable(lack)
    own = start_cluster(0 if machine.why_no_nodes() else 2)
    yield own
    own.close()


@pytest.fixture(scope="module")
def own_cluster(cluster: Cluster | ExistingCluster) -> Cluster:
    """The cluster, for tests that change what only the owner of a cluster may, or do it harm."""
    if not isinstance(cluster, Cluster):
        unavailable("KUBECONFIG names a cluster that is not ours to harm")
    return cluster


@pytest.fixture(scope="module")
def node_cluster(own_cluster: Cluster) -> Cluster:
    """The cluster, for tests that need real nodes."""
    if not own_cluster.nodes:
        unavailable(machine.why_no_nodes() or "the cluster was started without nodes")
    return own_cluster


@pytest.fixture
def unharmed(own_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, for a test that breaks it: whatever the test did, each program runs and each node is Ready after."""
    yield own_cluster
    own_cluster.mend()


@pytest.fixture
def namespace(cluster: Cluster | ExistingCluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, gone with all its pods before the next test begins."""
    word = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:40].strip("-")
    name = f"{word}-{hashlib.sha256(f'{request.node.nodeid}{time.time_ns()}'.encode()).hexdigest()[:6]}"
    cluster.api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_until(lambda: cluster.api.exists(account), f"service account of {name}")
    yield name
    if request.node.stash.get(FAILED, False):
        traces = traces_of(cluster.api, name)
        request.node.add_report_section("teardown", "events and logs", "\n".join(traces.values()))
        if isinstance(cluster, Cluster):
            print("kept in", keep_logs(cluster.layout, word, traces))
    cluster.api.delete(f"/api/v1/namespaces/{name}")
    wait_until(lambda: not cluster.api.get(f"/api/v1/namespaces/{name}/pods")["items"], f"end of pods in {name}", 60.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report
