"""What the operator counts. Names, labels and units are explained in docs/metrics.md."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_PASS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_CALL = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

LEADER = Gauge("arriero_operator_leader", "1 while this process holds the lease, else 0")
PASSES = Counter("arriero_operator_passes_total", "Passes over a LlamaDeployment, by how they ended", ["result"])
PASS_SECONDS = Histogram(
    "arriero_operator_pass_seconds", "Seconds from the start of a pass to its last write", buckets=_CALL
)
DECIDE_SECONDS = Histogram("arriero_operator_decide_seconds", "Seconds that one decision computes", buckets=_PASS)
PLACE_SECONDS = Histogram(
    "arriero_operator_place_seconds", "Seconds that one placement of all gangs computes", buckets=_PASS
)
QUEUE = Gauge("arriero_operator_queue", "LlamaDeployments that wait for a pass")
WRITES = Counter("arriero_operator_writes_total", "Writes to the cluster, by what and of which kind", ["write", "kind"])
API_CALLS = Counter(
    "arriero_operator_api_calls_total", "Calls of the Kubernetes API, by verb and status", ["verb", "code"]
)
API_SECONDS = Histogram("arriero_operator_api_seconds", "Seconds until a call was answered", ["verb"], buckets=_CALL)
RELISTS = Counter("arriero_operator_relists_total", "Lists taken anew because a watch could not go on", ["kind"])
WATCHED = Gauge("arriero_operator_objects", "Objects in view", ["kind"])
STATUS_STREAMS = Gauge("arriero_operator_status_streams", "Worker pods whose Status is being followed")

REPLICAS = Gauge("arriero_deployment_replicas", "Groups wanted", ["namespace", "deployment"])
READY = Gauge("arriero_deployment_ready_replicas", "Groups that answer requests", ["namespace", "deployment"])
PHASE = Gauge(
    "arriero_deployment_phase", "1 for the phase that the deployment is in", ["namespace", "deployment", "phase"]
)
TOKENS = Gauge("arriero_deployment_tokens_per_second", "Tokens that all groups generate", ["namespace", "deployment"])
EPOCH = Gauge("arriero_deployment_epoch", "Highest epoch of its groups", ["namespace", "deployment"])
