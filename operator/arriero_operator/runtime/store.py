"""What is seen of the cluster: every object that matters, by kind and by the deployment it belongs to.

Watches fill it, and so do the answers to our own writes, so a pass sees what the pass before it wrote. What is older
than what is known never replaces it, and what was deleted does not come back with a late answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from arriero_operator import names
from arriero_operator.observe import Node, Object, Pod, condition
from arriero_operator.runtime.rooms import Rooms

Key = tuple[str, str]
"""Namespace and name."""

Changed = Callable[[str, Object | None, Object | None], None]
"""Told of each change: kind, what it was, what it is; None: not there."""

_TOMBSTONES = 10_000


class Store:
    """Objects by kind and key."""

    def __init__(self, changed: Changed) -> None:
        self._changed = changed
        self._objects: dict[str, dict[Key, Object]] = {}
        self._pods: dict[Key, Pod] = {}
        self._members: dict[Key, set[tuple[str, Key]]] = {}
        self._gone: OrderedDict[tuple[str, Key], int] = OrderedDict()
        self._rooms = Rooms()
        self._gated: set[Key] = set()
        self._assumed: dict[Key, tuple[Object, Object]] = {}

    def get(self, kind: str, key: Key) -> Object | None:
        return self._objects.get(kind, {}).get(key)

    def all(self, kind: str) -> Iterable[Object]:
        return self._objects.get(kind, {}).values()

    def count(self, kind: str) -> int:
        return len(self._objects.get(kind, {}))

    def members(self, owner: Key) -> Iterator[Object]:
        """Whatever bears the deployment's label, pods excepted."""
        for kind, key in self._members.get(owner, ()):
            if kind != "Pod":
                yield self._objects[kind][key]

    def pods_of(self, owner: Key) -> list[Pod]:
        """The deployment's pods, by name."""
        return sorted(
            (self._pods[key] for kind, key in self._members.get(owner, ()) if kind == "Pod"), key=lambda pod: pod.name
        )

    def owners(self) -> Iterable[Key]:
        """Deployments that anything is labelled with."""
        return self._members.keys()

    def pod(self, key: Key) -> Pod | None:
        """A pod that belongs to a deployment."""
        return self._pods.get(key)

    def gated(self) -> list[Pod]:
        """All pods of every group that has a gated one."""
        groups = {
            (pod.namespace, pod.labels[names.DEPLOYMENT], pod.group) for pod in map(self._pods.get, self._gated) if pod
        }
        owners = {(namespace, deployment) for namespace, deployment, _ in groups}
        return [pod for owner in sorted(owners) for pod in self.pods_of(owner) if (*owner, pod.group) in groups]

    @property
    def waiting(self) -> bool:
        """Whether any pod waits for a place."""
        return bool(self._gated)

    def assume(self, key: Key, uid: str, body: Object) -> None:
        """Take a merge patch for done that is about to be written: a pod's pin is its room, from now on."""
        seen = self.get("Pod", key)
        if seen is None or seen["metadata"].get("uid") != uid:
            return
        self._assumed[key] = (seen, body)
        self._enter("Pod", key, seen, merged(seen, body))

    def settle(self, owner: Key) -> None:
        """The deployment's writes are over: what was assumed and did not come true is forgotten."""
        for key in [key for key in self._assumed if owner_of(self._assumed[key][0]) == owner]:
            seen, _ = self._assumed.pop(key)
            if (there := self.get("Pod", key)) is not None:
                self._enter("Pod", key, there, seen)

    def on_node(self, node: str) -> set[Key]:
        """Deployments with a pod on a node."""
        return {
            (pod.namespace, owner)
            for pod in self._pods.values()
            if pod.node == node and (owner := pod.labels.get(names.DEPLOYMENT))
        }

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes with what is free on them, by name."""
        return self._rooms.nodes

    def put(self, seen: Object) -> None:
        """An object as the API has just shown it."""
        kind, key = seen["kind"], key_of(seen)
        table = self._objects.setdefault(kind, {})
        old = table.get(key)
        version = version_of(seen)
        if old is not None and version and version <= version_of(old):
            return
        if version and version <= self._gone.get((kind, key), 0):
            return
        kept = _lean(seen)
        if kind == "Pod":
            kept = _ours(kept) if owner_of(kept) else _foreign(kept)
        if kind == "Pod" and key in self._assumed:
            body = self._assumed.pop(key)[1]
            if Pod.of(kept).gated and kept["metadata"].get("uid") == body["metadata"]["uid"]:
                # Another change got there first; ours is still on its way.
                self._assumed[key] = (kept, body)
                kept = merged(kept, body)
        self._enter(kind, key, old, kept)
        self._changed(kind, old, kept)

    def remove(self, kind: str, key: Key, version: int = 0, uid: str = "") -> None:
        """An object is not there any more. `uid`: only if it is that one."""
        old = self.get(kind, key)
        if version:
            self._gone[kind, key] = max(version, self._gone.get((kind, key), 0))
            self._gone.move_to_end((kind, key))
            while len(self._gone) > _TOMBSTONES:
                self._gone.popitem(last=False)
        if old is None or (uid and old["metadata"].get("uid") != uid) or (version and version_of(old) > version):
            return
        self._assumed.pop(key, None)
        self._leave(kind, key, old)
        self._changed(kind, old, None)

    def replace(self, kind: str, listed: Iterable[Object], version: int, namespace: str = "") -> None:
        """A whole list, of one namespace or of all: what it does not hold is gone, but for what is younger."""
        present = set()
        for seen in listed:
            present.add(key_of(seen))
            self.put(seen)
        mine = [key for key in self._objects.get(kind, {}) if not namespace or key[0] == namespace]
        for key in mine:
            if key not in present:
                self.remove(kind, key, version)

    def _enter(self, kind: str, key: Key, old: Object | None, new: Object) -> None:
        if old is not None:
            self._unlink(kind, key, old)
        self._objects[kind][key] = new
        owner = owner_of(new)
        if owner is not None:
            self._members.setdefault(owner, set()).add((kind, key))
        if kind == "Pod":
            if owner is not None:
                pod = self._pods[key] = Pod.of(new)
                if pod.gated:
                    self._gated.add(key)
            self._rooms.put_pod(key, new)
        elif kind == "Node":
            self._rooms.put_node(new)

    def _leave(self, kind: str, key: Key, old: Object) -> None:
        del self._objects[kind][key]
        self._unlink(kind, key, old)
        if kind == "Pod":
            self._rooms.remove_pod(key)
        elif kind == "Node":
            self._rooms.remove_node(key[1])

    def _unlink(self, kind: str, key: Key, old: Object) -> None:
        """It is about to be replaced, or is gone."""
        owner = owner_of(old)
        if owner is not None and owner in self._members:
            self._members[owner].discard((kind, key))
            if not self._members[owner]:
                del self._members[owner]
        if kind == "Pod":
            self._pods.pop(key, None)
            self._gated.discard(key)


def merged(seen: Any, body: Any) -> Any:
    """A JSON merge patch (RFC 7386), applied."""
    if not isinstance(body, Mapping):
        return body
    whole = dict(seen) if isinstance(seen, Mapping) else {}
    for field, value in body.items():
        if value is None:
            whole.pop(field, None)
        else:
            whole[field] = merged(whole.get(field), value)
    return whole


def key_of(seen: Object) -> Key:
    return str(seen["metadata"].get("namespace") or ""), str(seen["metadata"]["name"])


def owner_of(seen: Object) -> Key | None:
    """The deployment that an object belongs to, by its label."""
    metadata = seen["metadata"]
    name = (metadata.get("labels") or {}).get(names.DEPLOYMENT)
    return (str(metadata.get("namespace") or ""), str(name)) if name else None


def version_of(seen: Object) -> int:
    """Resource versions of one object are comparable (KEP-5504); 0 where there is none."""
    version = str(seen["metadata"].get("resourceVersion") or "")
    return int(version) if version.isdecimal() else 0


def matters(kind: str, old: Object | None, new: Object | None) -> bool:
    """Whether a change is one that a decision may depend on: not a heartbeat, nor a controller's count."""
    if old is None or new is None:
        return True
    return bool(_facts(kind, old) != _facts(kind, new))


def _facts(kind: str, seen: Object) -> Any:
    metadata = seen["metadata"]
    common = [metadata.get(field) for field in ("uid", "labels", "annotations", "ownerReferences", "deletionTimestamp")]
    if kind == "Node":
        readiness = condition(seen, "Ready")
        said = (readiness.get("status"), readiness.get("lastTransitionTime"))
        return [metadata.get("labels"), seen.get("spec"), (seen.get("status") or {}).get("allocatable"), said]
    if kind == "Deployment":
        return [*common, metadata.get("generation"), (seen.get("status") or {}).get("availableReplicas")]
    if kind in ("StatefulSet", "PodDisruptionBudget", "NetworkPolicy"):
        return [*common, metadata.get("generation")]
    return {field: value for field, value in seen.items() if field != "metadata"}, common


def _lean(seen: Object) -> Object:
    """Without the bookkeeping of field managers, which is as large as all the rest."""
    metadata = seen["metadata"]
    if "managedFields" not in metadata:
        return seen
    return {**seen, "metadata": {field: value for field, value in metadata.items() if field != "managedFields"}}


def _ours(pod: Object) -> Object:
    """Of a pod that belongs to a deployment, all but what its containers do: that is rendered, and read nowhere."""
    return {**pod, "spec": _demands(pod, "affinity", "tolerations")}


def _foreign(pod: Object) -> Object:
    """Of somebody else's pod, the room that it takes."""
    metadata = pod["metadata"]
    return {
        "kind": "Pod",
        "metadata": {f: metadata[f] for f in ("name", "namespace", "uid", "resourceVersion") if f in metadata},
        "spec": _demands(pod),
        "status": {"phase": (pod.get("status") or {}).get("phase")},
    }


def _demands(pod: Object, *more: str) -> Object:
    """Of a pod's spec, where it is and what it asks for, and `more` fields."""
    spec = pod.get("spec") or {}
    kept = ("nodeName", "nodeSelector", "schedulingGates", "overhead", "resources", *more)
    containers = {
        field: [
            {part: entry[part] for part in ("name", "resources", "restartPolicy") if part in entry}
            for entry in spec.get(field) or []
        ]
        for field in ("containers", "initContainers")
    }
    return {**{field: spec[field] for field in kept if field in spec}, **containers}
