"""What was compared once is not rendered again, until either side changes."""

from __future__ import annotations

import copy

import pytest
from tests.operator.fake_cluster import SETTINGS, FakeCluster

from arriero_operator import workers
from arriero_operator.desired import desired
from arriero_operator.writes import Apply, Write

NAME = "llama-70b"


def serving() -> FakeCluster:
    """A deployment at rest, with the versions that an API server gives objects."""
    made = FakeCluster()
    made.add_nodes(4)
    made.create(NAME)
    made.converge(NAME)
    for number, seen in enumerate(made.objects.values()):
        seen["metadata"]["resourceVersion"] = str(number)
    return made


def writes(made: FakeCluster) -> tuple[Write, ...]:
    return desired(made.observe(NAME), SETTINGS).writes


def test_an_unchanged_object_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = serving()
    assert writes(made) == ()
    rendered: list[int] = []
    monkeypatch.setattr(workers, "_template", lambda *_, **__: rendered.append(1) or {})
    assert writes(made) == ()
    assert not rendered


def test_a_changed_object_is_compared_anew() -> None:
    made = serving()
    assert writes(made) == ()
    seen = copy.deepcopy(made.objects["StatefulSet", f"{NAME}-0"])
    seen["spec"]["revisionHistoryLimit"] = 7
    seen["metadata"]["resourceVersion"] = "1000"
    made.objects["StatefulSet", f"{NAME}-0"] = seen
    (write,) = writes(made)
    assert isinstance(write, Apply)
    assert write.object["metadata"]["name"] == f"{NAME}-0"
    assert writes(made) == (write,), "it stays due until it is done"


def test_a_changed_spec_is_compared_anew() -> None:
    made = serving()
    assert writes(made) == ()
    made.edit(NAME, router={"replicas": 3})
    assert [w.object["kind"] for w in writes(made) if isinstance(w, Apply)] == ["Deployment"]
    made.edit(NAME, router={"replicas": 1})
    assert not [w for w in writes(made) if isinstance(w, Apply)]


def test_another_object_of_the_same_name_is_compared_anew() -> None:
    made = serving()
    assert writes(made) == ()
    seen = copy.deepcopy(made.objects["Service", f"{NAME}-leaders"])
    seen["metadata"]["uid"] = "another"
    seen["spec"]["selector"] = {}
    made.objects["Service", f"{NAME}-leaders"] = seen
    assert [w.object["metadata"]["name"] for w in writes(made) if isinstance(w, Apply)] == [f"{NAME}-leaders"]
