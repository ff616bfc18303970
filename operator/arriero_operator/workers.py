"""Objects of one group: launch file, StatefulSet, headless Service, NetworkPolicy. Pure."""

from __future__ import annotations

from typing import Any

from arriero_operator import names
from arriero_operator.children import Child
from arriero_operator.model_volume import MODEL_DIRECTORY, model_parts
from arriero_operator.overlay import merge
from arriero_operator.quantity import GIB, format_bytes
from arriero_operator.wanted import CONTROL, GRPC, HTTP, STORE, Wanted, digest, sealed
from arriero_plan.group import PodAddress, launch_for
from arriero_plan.launch import Launch

RUN_DIRECTORY = "/run/arriero"
LAUNCH_DIRECTORY = "/etc/arriero"
_ANY_GROUP = "group"
_USER = 65532

# Beyond the drain itself, the supervisor allows its processes 5 s to end; the kubelet's SIGKILL comes after both.
_AFTER_DRAIN = 15
# What a rank on a GPU needs of the host besides the device: an interpreter, pinned buffers, a file's page of weights.
_GPU_HOST_CORES, _GPU_HOST_BYTES = 2, 8 * GIB
_SHM_BYTES = {"cuda": 8 * GIB, "cpu": 1 * GIB}


def revision_of(wanted: Wanted) -> str:
    """Names all that a running group cannot take over: a group of another revision is replaced, never changed.

    It is the same for every group of a deployment, and does not depend on scheduling, which is nobody's business once
    a pod runs.
    """
    known = wanted.known.get("revision")
    if known is None:
        launch = group_launch(wanted, _ANY_GROUP).model_dump(mode="json")
        known = digest([_template(wanted, _ANY_GROUP, "", gated=False, domain=None), launch])
        wanted.known["revision"] = known
    return str(known)


def group_launch(wanted: Wanted, group: str) -> Launch:
    """The launch file of a group. Raises PlanError for a plan that the engine does not run."""
    suffix = f".{wanted.settings.cluster_domain}" if wanted.settings.cluster_domain else ""
    hosts = [names.pod_host(group, pod, wanted.namespace) + suffix for pod in range(wanted.plan.pods_per_group)]
    return launch_for(
        wanted.deployment,
        wanted.plan,
        group,
        [PodAddress(host, CONTROL, STORE, HTTP, GRPC) for host in hosts],
        model_path=model_parts(wanted.deployment.spec.model.source, wanted.settings).path,
        run_directory=RUN_DIRECTORY,
    )


def group_access(deployment: str, replica: int) -> list[Child]:
    """What a group is reached by, and by whom."""
    group = names.group_name(deployment, replica)
    return [
        Child("Service", group, group_service, (replica,)),
        Child("NetworkPolicy", group, group_policy, (replica,)),
    ]


def group_config(deployment: str, replica: int, revision: str) -> Child:
    name = names.launch_name(names.group_name(deployment, replica), revision)
    return Child("ConfigMap", name, launch_config, (replica, revision))


def group_pods(
    deployment: str, replica: int, revision: str, *, gated: bool, domain: tuple[str, str] | None = None
) -> Child:
    group = names.group_name(deployment, replica)
    return Child("StatefulSet", group, _stateful_set, (replica, revision, gated, domain))


def _stateful_set(
    wanted: Wanted, replica: int, revision: str, gated: bool, domain: tuple[str, str] | None
) -> dict[str, Any]:
    return stateful_set(wanted, replica, revision, gated=gated, domain=domain)


def launch_config(wanted: Wanted, replica: int, revision: str) -> dict[str, Any]:
    """The ConfigMap with the launch file. Immutable: a container that starts again reads what its group agreed on."""
    group = names.group_name(wanted.name, replica)
    text = group_launch(wanted, group).model_dump_json(indent=2) + "\n"
    return wanted.child(
        "v1",
        "ConfigMap",
        names.launch_name(group, revision),
        names.WORKER,
        {names.GROUP: group, names.REVISION: revision},
        immutable=True,
        data={"launch.json": text},
    )


def group_service(wanted: Wanted, replica: int) -> dict[str, Any]:
    """The headless Service that gives each pod of the group its name, ready or not: ranks meet before they serve."""
    group = names.group_name(wanted.name, replica)
    return wanted.child(
        "v1",
        "Service",
        group,
        names.WORKER,
        {names.GROUP: group},
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {**names.selector(wanted.name, names.WORKER), names.GROUP: group},
            "ports": [_service_port("control", CONTROL), _service_port("store", STORE)],
        },
    )


def group_policy(wanted: Wanted, replica: int) -> dict[str, Any]:
    """Who may reach the group's pods: each other on any port, since ranks connect to ports of the moment; the router on
    faces and control, whose Status it follows; the operator on control.
    """
    group = names.group_name(wanted.name, replica)
    settings = wanted.settings
    faces = [_policy_port(HTTP), _policy_port(GRPC)]
    rules: list[dict[str, Any]] = [
        {"from": [{"podSelector": {"matchLabels": {names.GROUP: group}}}]},
        {
            "from": [{"podSelector": {"matchLabels": names.selector(wanted.name, names.ROUTER)}}],
            "ports": [*faces, _policy_port(CONTROL)],
        },
        {
            "from": [
                {
                    "namespaceSelector": _namespace(settings.operator_namespace),
                    "podSelector": {"matchLabels": {names.COMPONENT: "operator"}},
                }
            ],
            "ports": [_policy_port(CONTROL)],
        },
    ]
    if settings.metrics_namespace:
        scrapers = {"namespaceSelector": _namespace(settings.metrics_namespace)}
        rules.append({"from": [scrapers], "ports": [_policy_port(HTTP)]})
    return wanted.child(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        group,
        names.WORKER,
        {names.GROUP: group},
        spec={
            "podSelector": {"matchLabels": {**names.selector(wanted.name, names.WORKER), names.GROUP: group}},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    )


def stateful_set(
    wanted: Wanted,
    replica: int,
    revision: str,
    *,
    gated: bool,
    domain: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The group's pods.

    gated: whether pods are born with the scheduling gate: until the group has been placed as a whole.
    domain: label and value of the nodes that a lost pod's successor belongs on, once the group has its place.
    """
    group = names.group_name(wanted.name, replica)
    rendered = wanted.child(
        "apps/v1",
        "StatefulSet",
        group,
        names.WORKER,
        {names.GROUP: group, names.REPLICA: str(replica), names.REVISION: revision},
        spec={
            "replicas": wanted.plan.pods_per_group,
            "serviceName": group,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 1,
            "selector": {"matchLabels": {**names.selector(wanted.name, names.WORKER), names.GROUP: group}},
            "template": _template(wanted, group, revision, gated=gated, domain=domain),
        },
    )
    return sealed(rendered, **{names.DOMAIN: "=".join(domain)}) if domain else rendered


def _template(
    wanted: Wanted, group: str, revision: str, *, gated: bool, domain: tuple[str, str] | None
) -> dict[str, Any]:
    spec, plan = wanted.deployment.spec, wanted.plan
    model = model_parts(spec.model.source, wanted.settings)
    placement = spec.placement
    annotations = {
        names.GROUP_SIZE: str(plan.pods_per_group),
        names.PODS_PER_STAGE: str(plan.pods_per_stage),
        names.ORDER: wanted.created,
        **({names.TOPOLOGY: f"{placement.mode}={placement.topology_key}"} if placement else {}),
    }
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds + _AFTER_DRAIN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **(
            {"imagePullSecrets": [{"name": n} for n in wanted.settings.image_pull_secrets]}
            if wanted.settings.image_pull_secrets
            else {}
        ),
        **({"initContainers": [model.download]} if model.download else {}),
        "containers": [_container(wanted)],
        "volumes": [
            {"name": "launch", "configMap": {"name": names.launch_name(group, revision)}},
            {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": format_bytes(_SHM_BYTES[plan.backend])}},
            model.volume,
        ],
    }
    template: dict[str, Any] = {
        "metadata": {
            "labels": {
                **names.labels(wanted.name, names.WORKER),
                names.GROUP: group,
                names.REPLICA: group.rpartition("-")[2],
                names.REVISION: revision,
            },
            "annotations": annotations,
        },
        "spec": pod,
    }
    template = merge(template, spec.pod_template)
    if gated:
        template["spec"]["schedulingGates"] = [{"name": names.GATE}]
    elif domain is not None and placement is not None:
        template["spec"]["affinity"] = _within(
            template["spec"].get("affinity") or {}, domain, required=placement.mode == "Required"
        )
    return template


def _container(wanted: Wanted) -> dict[str, Any]:
    plan = wanted.plan
    env: list[dict[str, Any]] = [
        {
            "name": "ARRIERO_POD_INDEX",
            "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{names.POD_INDEX}']"}},
        },
        {"name": "HOME", "value": "/tmp"},
    ]
    host_network = bool((wanted.deployment.spec.pod_template.get("spec") or {}).get("hostNetwork"))
    if plan.backend == "cuda" and not host_network:
        # The interface that pods' DNS names resolve to; others (RDMA, secondary networks) are for NCCL_IB_HCA to name.
        env.append({"name": "NCCL_SOCKET_IFNAME", "value": "=eth0"})
    return {
        "name": names.WORKER,
        "image": wanted.settings.worker_image,
        "imagePullPolicy": wanted.settings.image_pull_policy,
        "args": ["--launch", f"{LAUNCH_DIRECTORY}/launch.json", "--pod-index", "$(ARRIERO_POD_INDEX)"],
        "command": ["arriero-worker"],
        "env": env,
        "ports": [
            {"name": "http", "containerPort": HTTP, "protocol": "TCP"},
            {"name": "grpc", "containerPort": GRPC, "protocol": "TCP"},
            {"name": "control", "containerPort": CONTROL, "protocol": "TCP"},
            {"name": "store", "containerPort": STORE, "protocol": "TCP"},
        ],
        "resources": _resources(wanted),
        # The control port answers for the engine: `liveness` is the supervisor's word, `readiness` that of the ranks.
        # Reading the weights takes as long as it takes, and is no reason to kill a pod that is alive.
        "startupProbe": _probe("liveness", periodSeconds=2, failureThreshold=60),
        "livenessProbe": _probe("liveness", periodSeconds=10, failureThreshold=3),
        # The router hears of trouble from the engine itself, at once; this one must not flap on a busy node.
        "readinessProbe": _probe("readiness", periodSeconds=2, failureThreshold=3),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "launch", "mountPath": LAUNCH_DIRECTORY, "readOnly": True},
            {"name": "run", "mountPath": RUN_DIRECTORY},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "model", "mountPath": MODEL_DIRECTORY, "readOnly": True},
        ],
    }


def _resources(wanted: Wanted) -> dict[str, Any]:
    spec, plan = wanted.deployment.spec, wanted.plan
    ranks = plan.ranks_per_pod
    if plan.backend == "cpu":
        memory = max(stage.total_bytes for stage in plan.stages) * ranks
        return {"requests": {"cpu": str(ranks * (spec.engine.threads_per_rank or 1)), "memory": format_bytes(memory)}}
    device = spec.accelerator.resource_name or "nvidia.com/gpu"
    return {
        "requests": {"cpu": str(ranks * _GPU_HOST_CORES), "memory": format_bytes(ranks * _GPU_HOST_BYTES)},
        "limits": {device: str(ranks)},
    }


def _within(affinity: dict[str, Any], domain: tuple[str, str], *, required: bool) -> dict[str, Any]:
    """A pod's affinity, and besides it a domain of nodes."""
    key, value = domain
    match = {"key": key, "operator": "In", "values": [value]}
    node = dict(affinity.get("nodeAffinity") or {})
    if required:
        name = "requiredDuringSchedulingIgnoredDuringExecution"
        # Terms are alternatives, so the domain belongs into each of them.
        terms = (node.get(name) or {}).get("nodeSelectorTerms") or [{}]
        expanded = [{**term, "matchExpressions": [*(term.get("matchExpressions") or []), match]} for term in terms]
        node[name] = {"nodeSelectorTerms": expanded}
    else:
        name = "preferredDuringSchedulingIgnoredDuringExecution"
        node[name] = [*(node.get(name) or []), {"weight": 100, "preference": {"matchExpressions": [match]}}]
    return {**affinity, "nodeAffinity": node}


def _probe(service: str, **numbers: int) -> dict[str, Any]:
    return {"grpc": {"port": CONTROL, "service": service}, "timeoutSeconds": 5, "successThreshold": 1, **numbers}


def _service_port(name: str, port: int) -> dict[str, Any]:
    return {"name": name, "port": port, "protocol": "TCP", "targetPort": port}


def _policy_port(port: int) -> dict[str, Any]:
    return {"port": port, "protocol": "TCP"}


def _namespace(name: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}
