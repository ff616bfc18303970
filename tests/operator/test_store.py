"""What is kept of what the API shows."""

from __future__ import annotations

from typing import Any

from arriero_operator import names
from arriero_operator.observe import Pod
from arriero_operator.runtime.store import Store
from arriero_operator.scheduling import demands


def pod(name: str, version: int, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "space",
            "uid": name,
            "resourceVersion": str(version),
            "labels": labels,
            "annotations": {names.GROUP_SIZE: "1"},
            "managedFields": [{"manager": "x"}],
        },
        "spec": {
            "containers": [
                {"name": "worker", "env": [{"name": "A"}], "resources": {"requests": {"cpu": "2"}}},
                {"name": "sidecar", "resources": {"limits": {"nvidia.com/gpu": "1"}}},
            ],
            "initContainers": [{"name": "download", "args": ["x"], "resources": {"requests": {"cpu": "5"}}}],
            "schedulingGates": [{"name": names.GATE}],
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}},
            "volumes": [{"name": "tmp"}],
        },
        "status": {"phase": "Pending", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }


def test_of_our_pods_all_is_kept_that_decisions_are_made_of() -> None:
    store = Store(lambda *_: None)
    whole = pod("llama-0-0", 5, **{names.DEPLOYMENT: "llama", names.GROUP: "llama-0"})
    store.put(whole)
    kept, fresh = store.pod(("space", "llama-0-0")), Pod.of(whole)
    assert kept is not None
    for field in Pod.__dataclass_fields__:
        assert field == "raw" or getattr(kept, field) == getattr(fresh, field), field
    assert demands(kept) == demands(fresh)
    assert (kept.annotations, kept.labels, kept.phase) == (fresh.annotations, fresh.labels, fresh.phase)
    assert kept.raw["status"] == whole["status"]
    assert "env" not in str(kept.raw)
    assert "managedFields" not in kept.raw["metadata"]


def test_of_others_pods_only_their_room_is_kept() -> None:
    store = Store(lambda *_: None)
    store.put({"kind": "Node", "metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "8"}}})
    other = pod("other", 6)
    del other["spec"]["schedulingGates"]
    store.put({**other, "spec": {**other["spec"], "nodeName": "n"}})
    assert store.nodes[0].free["cpu"] == 3, "its largest init container asks for most"
    seen = store.get("Pod", ("space", "other"))
    assert seen is not None
    assert "annotations" not in seen["metadata"]


def test_what_is_older_or_gone_does_not_come_back() -> None:
    store = Store(lambda *_: None)
    store.put(pod("a", 5, **{names.DEPLOYMENT: "llama"}))
    store.put(pod("a", 4, **{names.DEPLOYMENT: "other"}))
    seen = store.get("Pod", ("space", "a"))
    assert seen is not None
    assert seen["metadata"]["labels"] == {names.DEPLOYMENT: "llama"}
    store.remove("Pod", ("space", "a"), 7)
    store.put(pod("a", 6, **{names.DEPLOYMENT: "llama"}))
    assert store.get("Pod", ("space", "a")) is None
