"""The whole product on a real cluster: installed by Helm, used as its users would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cluster.cluster import Cluster

# The cluster's own fixtures; these tests are all marked for it.
from tests.cluster.conftest import (  # noqa: F401
    cluster,
    namespace,
    node_cluster,
    own_cluster,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
)
from tests.e2e.product import Llama, Product


@pytest.fixture(scope="module")
def product(node_cluster: Cluster) -> Iterator[Product]:  # noqa: F811
    """The operator, installed as docs/install.md says."""
    made = Product(node_cluster)
    made.install()
    yield made
    made.uninstall()


@pytest.fixture
def llama(product: Product, namespace: str) -> Iterator[Llama]:  # noqa: F811
    """A deployment to be, in a namespace of its own; whatever the test broke is mended after it."""
    made = Llama(product, namespace)
    yield made
    product.cluster.mend()
    made.delete()
