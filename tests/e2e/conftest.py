"""The whole product on a real cluster: installed by Helm, used as its users would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster.cluster import Cluster, keep_logs

# The cluster's own fixtures; these tests are all marked for it.
from tests.cluster.conftest import (  # noqa: F401
    FAILED,
    cluster,
    namespace,
    node_cluster,
    own_cluster,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
)
from tests.cluster.traces import traces_of
from tests.e2e.product import Llama, Product


@pytest.fixture(scope="module")
def product(node_cluster: Cluster) -> Iterator[Product]:  # noqa: F811
    """The operator, installed as docs/install.md says."""
    made = Product(node_cluster)
    made.install()
    yield made
    made.uninstall()


@pytest.fixture
def llama(product: Product, namespace: str, request: pytest.FixtureRequest) -> Iterator[Llama]:  # noqa: F811
    """A deployment to be, in a namespace of its own; whatever the test broke is mended after it."""
    made = Llama(product, namespace)
    yield made
    if request.node.stash.get(FAILED, False):  # what is deleted below cannot be asked any more
        traces = {**traces_of(product.cluster.api, namespace), "operator.txt": product.operator_log()}
        print("kept in", keep_logs(product.cluster.layout, request.node.name[5:45], traces))
    product.cluster.mend()
    made.delete()
