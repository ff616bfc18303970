"""Objects in front of the groups: the leaders' Service, the router and what it needs, disruption budgets. Pure."""

from __future__ import annotations

from typing import Any

import yaml

from arriero_operator import names
from arriero_operator.children import Child
from arriero_operator.wanted import CONTROL, GRPC, HTTP, Wanted, digest

_CONFIG_DIRECTORY = "/etc/arriero"
_RBAC = "rbac.authorization.k8s.io"
_USER = 65532
# The router ends within drainSeconds by itself; what comes on top is a process's end.
_AFTER_DRAIN = 15
# Endpoints stop naming a terminating pod a moment after it was told to end; kube-proxy needs that moment.
_LEAVE_SECONDS = 5
_WAKE_SECONDS = 900


def deployment_objects(wanted: Wanted) -> list[dict[str, Any]]:
    """Everything of a deployment but its groups, in the order in which it is made."""
    return [child.render(wanted) for child in deployment_children(wanted.name)]


def deployment_children(deployment: str) -> list[Child]:
    """The same, not yet rendered."""
    name = names.router_name(deployment)
    return [
        Child("Service", names.leaders_service(deployment), leaders_service),
        # The router may see EndpointSlices of its namespace, and nothing else.
        Child("ServiceAccount", name, _account),
        Child("Role", name, _role),
        Child("RoleBinding", name, _role_binding),
        Child("ConfigMap", name, _router_config),
        Child("Service", name, _router_service),
        Child("Deployment", name, _router_deployment),
        Child("PodDisruptionBudget", name, _budget, (name, names.ROUTER)),
        Child(
            "PodDisruptionBudget",
            names.workers_name(deployment),
            _budget,
            (names.workers_name(deployment), names.WORKER),
        ),
    ]


def leaders_service(wanted: Wanted) -> dict[str, Any]:
    """All groups' leaders that are ready: the pod's readiness and the replica's own Status must both be good."""
    ports = (("http", HTTP), ("grpc", GRPC), ("control", CONTROL))
    return wanted.child(
        "v1",
        "Service",
        names.leaders_service(wanted.name),
        names.WORKER,
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": False,
            "selector": {**names.selector(wanted.name, names.WORKER), names.POD_INDEX: "0"},
            "ports": [{"name": n, "port": p, "protocol": "TCP", "targetPort": p} for n, p in ports],
        },
    )


def router_settings(wanted: Wanted) -> dict[str, Any]:
    """What `arriero-router --config` reads."""
    spec = wanted.deployment.spec
    from_zero = spec.autoscaling is not None and spec.autoscaling.min_replicas == 0
    return {
        # Who wakes a deployment from zero waits for its pods and its weights.
        **({"hold": {"timeoutSeconds": _WAKE_SECONDS}} if from_zero else {}),
        "models": [
            {
                "name": spec.model.name,
                "policy": spec.router.policy,
                "endpoints": {"kubernetes": {"service": names.leaders_service(wanted.name)}},
            }
        ],
        "drainSeconds": spec.rollout.drain_seconds,
        "leaveSeconds": _LEAVE_SECONDS,
    }


def _router_config(wanted: Wanted) -> dict[str, Any]:
    text = yaml.safe_dump(router_settings(wanted), sort_keys=False)
    return wanted.child("v1", "ConfigMap", names.router_name(wanted.name), names.ROUTER, data={"router.yaml": text})


def _account(wanted: Wanted) -> dict[str, Any]:
    name = names.router_name(wanted.name)
    return wanted.child("v1", "ServiceAccount", name, names.ROUTER, automountServiceAccountToken=False)


def _role(wanted: Wanted) -> dict[str, Any]:
    rule = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    return wanted.child(f"{_RBAC}/v1", "Role", names.router_name(wanted.name), names.ROUTER, rules=[rule])


def _role_binding(wanted: Wanted) -> dict[str, Any]:
    name = names.router_name(wanted.name)
    return wanted.child(
        f"{_RBAC}/v1",
        "RoleBinding",
        name,
        names.ROUTER,
        roleRef={"apiGroup": _RBAC, "kind": "Role", "name": name},
        subjects=[{"kind": "ServiceAccount", "name": name, "namespace": wanted.namespace}],
    )


def _router_service(wanted: Wanted) -> dict[str, Any]:
    """Where clients ask."""
    return wanted.child(
        "v1",
        "Service",
        names.router_name(wanted.name),
        names.ROUTER,
        spec={
            "type": "ClusterIP",
            "selector": names.selector(wanted.name, names.ROUTER),
            "ports": [
                {"name": "http", "port": 8000, "protocol": "TCP", "targetPort": "http", "appProtocol": "http"},
                {"name": "grpc", "port": 9000, "protocol": "TCP", "targetPort": "grpc", "appProtocol": "grpc"},
            ],
        },
    )


def _router_deployment(wanted: Wanted) -> dict[str, Any]:
    spec, settings = wanted.deployment.spec, wanted.settings
    name = names.router_name(wanted.name)
    pod: dict[str, Any] = {
        "serviceAccountName": name,
        "automountServiceAccountToken": True,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds + _AFTER_DRAIN + _LEAVE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **(
            {"imagePullSecrets": [{"name": n} for n in settings.image_pull_secrets]}
            if settings.image_pull_secrets
            else {}
        ),
        # A router keeps nothing: rather another one at once than, as by default, five minutes of none.
        "tolerations": [
            {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            for state in ("not-ready", "unreachable")
        ],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": names.HOSTNAME,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": names.selector(wanted.name, names.ROUTER)},
            }
        ],
        "containers": [_router_container(wanted)],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return wanted.child(
        "apps/v1",
        "Deployment",
        name,
        names.ROUTER,
        spec={
            "replicas": spec.router.replicas,
            "revisionHistoryLimit": 2,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": names.selector(wanted.name, names.ROUTER)},
            "template": {
                "metadata": {
                    "labels": names.labels(wanted.name, names.ROUTER),
                    # Another configuration is another pod: old and new ones then differ in nothing but their files.
                    "annotations": {names.PREFIX + "config": digest(router_settings(wanted))},
                },
                "spec": pod,
            },
        },
    )


def _router_container(wanted: Wanted) -> dict[str, Any]:
    settings = wanted.settings
    return {
        "name": names.ROUTER,
        "image": settings.router_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["arriero-router"],
        "args": ["--config", f"{_CONFIG_DIRECTORY}/router.yaml"],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "ports": [
            {"name": "http", "containerPort": 8000, "protocol": "TCP"},
            {"name": "grpc", "containerPort": 9000, "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}},
        "startupProbe": _probe("/health/live", periodSeconds=1, failureThreshold=60),
        "livenessProbe": _probe("/health/live", periodSeconds=10, failureThreshold=3),
        "readinessProbe": _probe("/health/ready", periodSeconds=2, failureThreshold=2),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG_DIRECTORY, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _budget(wanted: Wanted, name: str, component: str) -> dict[str, Any]:
    """One pod at a time may be evicted, so at most one group is taken from its requests; pods that do nothing yet or
    any more never hold up a node's drain.
    """
    return wanted.child(
        "policy/v1",
        "PodDisruptionBudget",
        name,
        component,
        spec={
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": names.selector(wanted.name, component)},
        },
    )


def _probe(path: str, **numbers: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "timeoutSeconds": 2,
        "successThreshold": 1,
        **numbers,
    }
