"""How the operator learns the shape of a model that it has never seen: a pod copies config.json into its last words.

A plan needs config.json, and the checkpoint is where only pods can read it. A pod's termination message is kept by the
kubelet and reaches the operator with the pod's status, so no connection and no further permission is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero_operator import names
from arriero_operator.model_volume import MODEL_DIRECTORY, ModelParts, model_parts
from arriero_operator.observe import Object, Pod
from arriero_operator.overlay import merge
from arriero_operator.settings import Settings
from arriero_operator.wanted import digest
from arriero_plan.known import known_config
from arriero_plan.resource import API_VERSION, KIND, LlamaDeployment

SOURCE = names.PREFIX + "source"
"""On the inspector: digest of the source that it looks into."""
_MESSAGE_LIMIT = 4096  # bytes that the kubelet keeps
_LAST_WORDS = "/dev/termination-log"
_SHARED = ("nodeSelector", "tolerations", "serviceAccountName", "imagePullSecrets", "hostAliases", "dnsConfig")
"""Of spec.podTemplate: where a worker pod may run, and what it reaches a model with."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of a checkpoint's config.json."""

    config: Mapping[str, Any] | None = None
    origin: str = ""
    """Names the file in messages."""
    waiting: str = ""
    """What is being done to know it."""
    problem: str = ""
    """Why it cannot be known."""


def source_digest(deployment: LlamaDeployment) -> str:
    return digest(deployment.spec.model.source.model_dump(mode="json"))


def inspect(deployment: LlamaDeployment, given: Object | None, pods: Sequence[Pod]) -> Inspection:
    """What `given` (read by other means), the table of public models, or the inspector's last words say."""
    if given is not None:
        return Inspection(config=given, origin="config.json")
    hub = deployment.spec.model.source.hugging_face
    if hub is not None and (config := known_config(hub.repo)) is not None:
        return Inspection(config=config, origin=hub.repo)
    pod = next((pod for pod in pods if _looks_into(pod, deployment)), None)
    if pod is None:
        return Inspection(waiting="reading the checkpoint's config.json")
    return _last_words(pod)


def stale(deployment: LlamaDeployment, pod: Pod) -> bool:
    """Whether it is an inspector of another source."""
    return pod.labels.get(names.COMPONENT) == names.INSPECTOR and not _looks_into(pod, deployment)


def _looks_into(pod: Pod, deployment: LlamaDeployment) -> bool:
    inspects = pod.labels.get(names.COMPONENT) == names.INSPECTOR
    return inspects and pod.annotations.get(SOURCE) == source_digest(deployment)


def _last_words(pod: Pod) -> Inspection:
    status = pod.raw.get("status") or {}
    statuses = status.get("containerStatuses") or []
    state: Mapping[str, Any] = (statuses[0].get("state") or {}) if statuses else {}
    for entry in status.get("initContainerStatuses") or []:
        told = entry.get("state") or {}
        if (told.get("terminated") or {}).get("exitCode") != 0:  # the container after it waits, and cannot say for what
            state = told
    ended = state.get("terminated")
    if ended is None:
        reason = (state.get("waiting") or {}).get("reason")
        told = f" ({reason}: {(state.get('waiting') or {}).get('message') or 'no more is said'})" if reason else ""
        return Inspection(waiting=f"pod {pod.name} reads the checkpoint's config.json{told}")
    message = str(ended.get("message") or "")
    if ended.get("exitCode") != 0:
        why = message.strip() or ended.get("reason")
        return Inspection(problem=f"spec.model.source: its config.json could not be read (pod {pod.name}: {why})")
    try:
        config = json.loads(message)
    except ValueError:
        if len(message.encode()) >= _MESSAGE_LIMIT:
            return Inspection(problem=f"spec.model.source: its config.json is larger than {_MESSAGE_LIMIT} bytes")
        return Inspection(problem="spec.model.source: its config.json is not valid JSON")
    if not isinstance(config, Mapping):
        return Inspection(problem="spec.model.source: its config.json is not a JSON object")
    return Inspection(config=config, origin="config.json of the checkpoint")


def inspector_pod(deployment: LlamaDeployment, namespace: str, uid: str, settings: Settings) -> dict[str, Any]:
    """A pod that ends with config.json as its termination message. It asks for no device and runs where it can."""
    model = model_parts(deployment.spec.model.source, settings)
    template = deployment.spec.pod_template.get("spec") or {}
    shared = {field: template[field] for field in _SHARED if template.get(field)}
    download, volumes = _download(model, template)
    name = deployment.metadata.name
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": names.inspector_name(name),
            "namespace": namespace,
            "labels": names.labels(name, names.INSPECTOR),
            "annotations": {SOURCE: source_digest(deployment)},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": name,
                    "uid": uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **(
                {"imagePullSecrets": [{"name": n} for n in settings.image_pull_secrets]}
                if settings.image_pull_secrets
                else {}
            ),
            **({"initContainers": [download]} if download else {}),
            "containers": [
                {
                    "name": names.INSPECTOR,
                    "image": settings.worker_image,
                    "imagePullPolicy": settings.image_pull_policy,
                    "command": ["cp", f"{model.path}/config.json", _LAST_WORDS],
                    "terminationMessagePath": _LAST_WORDS,
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "model", "mountPath": MODEL_DIRECTORY, "readOnly": True}],
                }
            ],
            "volumes": volumes,
        },
    }
    return merge(pod, {"spec": shared})  # type: ignore[no-any-return]


def _download(model: ModelParts, template: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The download of config.json alone, with what spec.podTemplate changes in a worker's download (a mirror's address,
    a proxy, a certificate), and the volumes that it takes.
    """
    if model.download is None:
        return None, [model.volume]
    changes = [entry for entry in template.get("initContainers") or [] if entry.get("name") == names.DOWNLOAD]
    container: dict[str, Any] = merge(model.download, changes[0]) if changes else model.download
    mounted = {mount.get("name") for mount in container.get("volumeMounts") or []}
    added = [volume for volume in template.get("volumes") or [] if volume.get("name") in mounted - {"model", "tmp"}]
    container = {**container, "args": [*container["args"], "--only", "config.json"]}
    return container, [model.volume, {"name": "tmp", "emptyDir": {}}, *added]
