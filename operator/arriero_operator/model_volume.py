"""How a pod gets at the checkpoint: a volume, the directory in it, and what fetches it first where it is elsewhere."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

from arriero_operator import names
from arriero_operator.settings import Settings
from arriero_plan.resource import ModelSource

MODEL_DIRECTORY = "/model"


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a source becomes in a pod."""

    volume: dict[str, Any]
    """Named `model`, mounted at MODEL_DIRECTORY."""
    path: str
    """The checkpoint's directory as the containers see it."""
    download: dict[str, Any] | None
    """An init container that fills the volume."""


def model_parts(source: ModelSource, settings: Settings) -> ModelParts:
    """The parts of a pod that a model source takes."""
    if (claim := source.persistent_volume_claim) is not None:
        volume: dict[str, Any] = {"persistentVolumeClaim": {"claimName": claim.claim_name, "readOnly": True}}
        return _mounted(volume, posixpath.normpath(posixpath.join(MODEL_DIRECTORY, claim.path)))
    if (host := source.host_path) is not None:
        return _mounted({"hostPath": {"path": host.path, "type": "Directory"}})
    if (image := source.image) is not None:
        return _mounted({"image": {"reference": image.reference, "pullPolicy": "IfNotPresent"}})
    if (hub := source.hugging_face) is not None:
        env = []
        if (token := hub.token_secret_ref) is not None:
            reference = {"secretKeyRef": {"name": token.name, "key": token.key}}
            env = [{"name": "HF_TOKEN", "valueFrom": reference}]
        return _downloaded(f"hf://{hub.repo}@{hub.revision}", settings, env, [])
    store = source.object_store
    assert store is not None, "a source names exactly one place"
    credentials = [{"secretRef": {"name": store.secret_ref.name}}] if store.secret_ref is not None else []
    return _downloaded(store.uri, settings, [], credentials)


def source_problem(source: ModelSource) -> str | None:
    """Why a source that is fine on one machine cannot be mounted in a cluster."""
    host = source.host_path
    if host is not None and (not host.path.startswith("/") or ".." in host.path.split("/")):
        return (
            f"spec.model.source.hostPath.path is {host.path!r}: on a cluster's nodes it must be an absolute path "
            "without '..'"
        )
    return None


def _mounted(volume: dict[str, Any], path: str = MODEL_DIRECTORY) -> ModelParts:
    return ModelParts({"name": "model", **volume}, path, None)


def _downloaded(uri: str, settings: Settings, env: list[dict[str, Any]], env_from: list[dict[str, Any]]) -> ModelParts:
    container: dict[str, Any] = {
        "name": names.DOWNLOAD,
        "image": settings.worker_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [*settings.download_command],
        "args": ["--source", uri, "--directory", MODEL_DIRECTORY],
        "env": [*env, {"name": "HOME", "value": "/tmp"}],
        **({"envFrom": env_from} if env_from else {}),
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # Its own last words say what went wrong; those of one that was killed are the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "model", "mountPath": MODEL_DIRECTORY}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    return ModelParts({"name": "model", "emptyDir": {}}, MODEL_DIRECTORY, container)
