"""spec.podTemplate: a strategic overlay on the pods that the operator renders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from arriero_operator import names

# Of lists of mappings, the field that tells entries apart, by the list's name (Kubernetes' patchMergeKey).
_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
}
_OURS = (
    "schedulingGates",
    "nodeName",
    "restartPolicy",
    "hostname",
    "subdomain",
    "terminationGracePeriodSeconds",
    "activeDeadlineSeconds",
)
_WHY = {
    "schedulingGates": "the operator places whole groups with its own gate",
    "nodeName": "use nodeSelector or affinity",
    "restartPolicy": "workers always restart",
    "hostname": "pods of a group find each other by it",
    "subdomain": "pods of a group find each other by it",
    "terminationGracePeriodSeconds": "set spec.rollout.drainSeconds",
    "activeDeadlineSeconds": "workers have no deadline",
}
_CONTAINER_OURS = ("command", "args")


def merge(base: Any, overlay: Any, name: str = "") -> Any:
    """`overlay` on `base`: mappings field by field, lists of named entries entry by entry, anything else replaced; null
    removes.
    """
    if isinstance(base, Mapping) and isinstance(overlay, Mapping):
        merged = dict(base)
        for field, value in overlay.items():
            if value is None:
                merged.pop(field, None)
            else:
                merged[field] = merge(merged.get(field), value, field)
        return merged
    if isinstance(overlay, Mapping):
        return {field: merge(None, value, field) for field, value in overlay.items() if value is not None}
    if isinstance(overlay, list) and isinstance(base, list) and name in _KEYS:
        return _merge_entries(base, overlay, _KEYS[name])
    return [*overlay] if isinstance(overlay, list) else overlay


def _merge_entries(base: Sequence[Any], overlay: Sequence[Any], key: str) -> list[Any]:
    """Entries of `base` in their order, changed by their namesakes of `overlay`, then the new ones."""
    changes = {entry[key]: entry for entry in overlay if isinstance(entry, Mapping) and key in entry}
    known = {entry.get(key) for entry in base}
    return [
        *(merge(entry, changes[entry[key]]) if entry.get(key) in changes else entry for entry in base),
        *(merge(None, entry) for entry in overlay if not isinstance(entry, Mapping) or entry.get(key) not in known),
    ]


def overlay_problems(template: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing in a podTemplate that pods of a group could not work with."""
    return list(_problems(template))


def _problems(template: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(template.keys() - {"metadata", "spec"}):
        yield f"spec.podTemplate.{field}: expected only metadata and spec, as in a pod; did you mean spec.{field}?"
    metadata, spec = template.get("metadata"), template.get("spec")
    for path, part in (("metadata", metadata), ("spec", spec)):
        if part is not None and not isinstance(part, Mapping):
            yield f"spec.podTemplate.{path}: expected a mapping"
    if isinstance(metadata, Mapping):
        yield from _metadata_problems(metadata)
    if isinstance(spec, Mapping):
        yield from _spec_problems(spec)


def _metadata_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted(metadata.keys() - {"labels", "annotations"}):
        yield f"spec.podTemplate.metadata.{field}: only labels and annotations can be added"
    for part in ("labels", "annotations"):
        entries = metadata.get(part)
        if entries is None:
            continue
        if not isinstance(entries, Mapping):
            yield f"spec.podTemplate.metadata.{part}: expected a mapping"
            continue
        for key, value in entries.items():
            if str(key).startswith(names.PREFIX) or key in names.labels("", ""):
                yield f"spec.podTemplate.metadata.{part}: {key} is written by the operator; leave it out"
            if not isinstance(value, str):
                yield f"spec.podTemplate.metadata.{part}: {key} is not a string; put it in quotes"


def _spec_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    for field in _OURS:
        if field in spec:
            yield f"spec.podTemplate.spec.{field}: leave it out; {_WHY[field]}"
    for field, key in _KEYS.items():
        if field in spec:
            yield from _list_problems(f"spec.podTemplate.spec.{field}", spec[field], key)
    for field in ("nodeSelector", "affinity", "securityContext"):
        if spec.get(field) is not None and not isinstance(spec[field], Mapping):
            yield f"spec.podTemplate.spec.{field}: expected a mapping"
    tolerations = spec.get("tolerations")
    if tolerations is not None and not (
        isinstance(tolerations, list) and all(isinstance(entry, Mapping) for entry in tolerations)
    ):
        yield "spec.podTemplate.spec.tolerations: expected a list of mappings"
    for part, ours in (("containers", names.WORKER), ("initContainers", names.DOWNLOAD)):
        for container in _mappings(spec.get(part)):
            where = f"spec.podTemplate.spec.{part}[{container.get('name')}]"
            if container.get("name") == ours:
                for field in _CONTAINER_OURS:
                    if field in container:
                        yield f"{where}.{field}: leave it out; the operator starts the {ours} itself"
            for field, key in _KEYS.items():
                if field in container:
                    yield from _list_problems(f"{where}.{field}", container[field], key)


def _list_problems(path: str, entries: Any, key: str) -> Iterator[str]:
    if entries is None:
        return
    if not isinstance(entries, list):
        yield f"{path}: expected a list"
        return
    seen: set[Any] = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), str | int):
            yield f"{path}[{position}]: expected a mapping with {key}"
        elif entry[key] in seen:
            yield f"{path}: {key} {entry[key]!r} appears twice"
        else:
            seen.add(entry[key])


def _mappings(entries: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
