"""What is to be written to the cluster, and what is already there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero_operator import names
from arriero_operator.observe import Object, Pod
from arriero_operator.quantity import same_quantity

FIELD_MANAGER = "arriero"

# Lists whose entries other managers and admission add to, by the field that tells entries apart.
_KEYS = ("name", "mountPath", "containerPort", "key", "uid")
_EMPTY: tuple[Any, ...] = ({}, [], "", 0, False, None)
# Fields that mean something only as a whole (the API's atomic maps and lists): one entry more selects other pods, or
# lets somebody else in.
_WHOLE = ("selector", "podSelector", "namespaceSelector", "nodeSelector", "roleRef", "rules", "subjects", "ingress")


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply, forced, with the field manager `arriero`."""

    object: Mapping[str, Any]
    new: bool = False
    """It was not observed. Whoever carries this out looks for its name first: what is there without being ours is left
    alone and belongs into the next observation.
    """


@dataclass(frozen=True, slots=True)
class Patch:
    """A JSON merge patch (RFC 7386). It is refused (409) if the object is no longer the one with `uid`, which the patch
    names; that is no error, the next pass sees what is there.
    """

    api_version: str
    kind: str
    name: str
    uid: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete in the background, only the object with `uid` (404 and 409 are no errors)."""

    api_version: str
    kind: str
    name: str
    uid: str
    grace_seconds: int | None = None
    """0 fences: the object goes at once, whatever its node would say. None: its own time."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Emit:
    """Create a Kubernetes Event; 409 is no error: it was emitted before."""

    name: str
    type: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class SetStatus:
    """Server-side apply of the status subresource, forced: `status` is whole, what is not in it goes away."""

    status: Mapping[str, Any]


Write = Apply | Patch | Delete | Emit | SetStatus


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask the engine of a leader's pod to drain (Worker.Drain). Asking again changes nothing."""

    pod: str
    seconds: float


def delete_of(seen: Object, why: str) -> Delete:
    metadata = seen["metadata"]
    uid = str(metadata.get("uid") or "")
    return Delete(seen["apiVersion"], seen["kind"], metadata["name"], uid, None, why)


def delete_pod(pod: Pod, why: str, grace_seconds: int | None = None) -> Delete:
    return Delete("v1", "Pod", pod.name, pod.uid, grace_seconds, why)


def up_to_date(seen: Object | None, rendered: Mapping[str, Any]) -> bool:
    """Whether applying `rendered` would change nothing: it is what was applied last, and nobody has changed a field of
    it since. What others have added (defaults, injected containers, labels) does not count.
    """
    if seen is None:
        return False
    applied = (seen["metadata"].get("annotations") or {}).get(names.APPLIED)
    return applied == rendered["metadata"]["annotations"][names.APPLIED] and covers(seen, rendered)


def covers(seen: Any, rendered: Any) -> bool:
    """Whether every value of `rendered` is in `seen`, as the API server keeps it."""
    if isinstance(rendered, dict):
        if not isinstance(seen, dict):
            return seen is None and all(value in _EMPTY for value in rendered.values())
        return all(
            covers(seen.get(key), value) and (key not in _WHOLE or not _adds(seen.get(key), value))
            for key, value in rendered.items()
        )
    if isinstance(rendered, list):
        return _covers_list(seen if isinstance(seen, list) else [], rendered)
    if seen == rendered and isinstance(seen, bool) == isinstance(rendered, bool):
        return True
    if seen is None:
        return rendered in _EMPTY
    return isinstance(rendered, str) and isinstance(seen, str | int) and same_quantity(seen, rendered)


def _adds(seen: Any, rendered: Any) -> bool:
    """Whether `seen`, which covers `rendered`, has an entry that is not in it."""
    if isinstance(rendered, dict) and isinstance(seen, dict):
        return any(
            _adds(value, rendered[key]) if key in rendered else value not in _EMPTY for key, value in seen.items()
        )
    if isinstance(rendered, list) and isinstance(seen, list):
        if len(seen) != len(rendered):
            return True
        return any(_adds(s, r) for s, r in zip(seen, rendered, strict=True))
    return False


def _covers_list(seen: Sequence[Any], rendered: Sequence[Any]) -> bool:
    key = _key(rendered)
    if key is None:
        return len(seen) == len(rendered) and all(covers(s, r) for s, r in zip(seen, rendered, strict=True))
    found = {entry.get(key): entry for entry in seen if isinstance(entry, dict)}
    return all(entry[key] in found and covers(found[entry[key]], entry) for entry in rendered)


def _key(rendered: Sequence[Any]) -> str | None:
    """The field that tells the entries of a list apart; None: their places do."""
    if not rendered or not all(isinstance(entry, dict) for entry in rendered):
        return None
    return next((key for key in _KEYS if len({entry.get(key) for entry in rendered} - {None}) == len(rendered)), None)
