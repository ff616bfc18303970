"""What a LlamaDeployment may say, and the sentence for everything it may not."""

from __future__ import annotations

import pydantic
import pytest
import yaml

from arriero_plan.spec import LlamaDeployment, SpecError, parse_deployment

FULL = """
apiVersion: serving.arriero.dev/v1alpha1
kind: LlamaDeployment
metadata: {name: llama-70b}
spec:
  model:
    name: meta-llama/Llama-3.1-70B-Instruct
    source: {persistentVolumeClaim: {claimName: weights, path: llama-70b}}
    maxContext: 131072
    weights: auto
    kvCache: {dtype: auto}
  replicas: 2
  parallelism: {tensor: 8, pipeline: 2}
  accelerator: {type: H100-80GB, perNode: 8, resourceName: nvidia.com/gpu}
  router: {replicas: 2, policy: prefix}
  autoscaling: {minReplicas: 0, maxReplicas: 8, targetRunningPerReplica: 64}
  rollout: {maxSurge: 1, maxUnavailable: 0, drainSeconds: 120}
  placement: {topologyKey: topology.kubernetes.io/rack, mode: Preferred}
  engine: {maxRunning: 128, threadsPerRank: 2}
  podTemplate: {spec: {tolerations: [{key: gpu, operator: Exists}]}}
"""


def problems_of(text):
    with pytest.raises(SpecError) as caught:
        parse_deployment(text, "llama.yaml")
    return caught.value.problems


def changed(old, new):
    assert FULL.count(old) == 1, old
    return FULL.replace(old, new)


def test_the_documented_resource_parses():
    deployment = parse_deployment(FULL, "llama.yaml")
    spec = deployment.spec
    assert deployment.metadata.name == "llama-70b"
    assert spec.model.source.persistent_volume_claim.claim_name == "weights"
    assert (spec.model.max_context, spec.replicas) == (131072, 2)
    assert (spec.parallelism.tensor, spec.parallelism.pipeline) == (8, 2)
    assert (spec.autoscaling.min_replicas, spec.autoscaling.max_replicas) == (0, 8)
    assert (spec.engine.max_running, spec.engine.threads_per_rank) == (128, 2)
    assert spec.pod_template == {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}


def test_most_fields_may_be_omitted(resource):
    spec = parse_deployment(resource(), "test").spec
    assert (spec.replicas, spec.parallelism.tensor, spec.parallelism.pipeline) == (1, None, None)
    assert (spec.model.weights, spec.model.kv_cache.dtype, spec.model.max_context) == ("auto", "auto", None)
    assert (spec.rollout.max_surge, spec.rollout.max_unavailable, spec.rollout.drain_seconds) == (1, 0, 120)
    assert (spec.autoscaling, spec.placement, spec.pod_template) == (None, None, {})


@pytest.mark.parametrize(
    "source",
    [
        {"hostPath": {"path": "/models/x"}},
        {"image": {"reference": "registry.example/llama:1"}},
        {"huggingFace": {"repo": "meta-llama/Llama-3.1-8B", "tokenSecretRef": {"name": "hf"}}},
        {"objectStore": {"uri": "s3://bucket/llama", "secretRef": {"name": "s3"}}},
        {"persistentVolumeClaim": {"claimName": "weights"}},
    ],
)
def test_every_source_is_accepted_alone_and_survives_a_round_trip(resource, source):
    data = resource()
    data["spec"]["model"]["source"] = source
    deployment = parse_deployment(data, "test")
    again = deployment.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert parse_deployment(yaml.safe_dump(again), "test") == deployment


def test_what_the_api_server_adds_is_accepted(resource):
    data = resource()
    data["metadata"] |= {
        "uid": "0-1",
        "generation": 3,
        "managedFields": [{}],
        "creationTimestamp": "2025-01-01T00:00:00Z",
    }
    data["status"] = {"phase": "Serving"}
    assert parse_deployment(data, "test").metadata.generation == 3


def test_a_deployment_cannot_be_changed(deploy):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        deploy().spec.replicas = 3


INVALID = [
    ("replicas: 2\n  par", "replica: 2\n  par", "spec.replica: unknown field; did you mean replicas?"),
    ("parallelism:", "paralelism:", "spec.paralelism: unknown field; did you mean parallelism?"),
    ("maxContext", "max_context", "spec.model.max_context: unknown field; did you mean maxContext?"),
    ("tensor: 8", "tensr: 8", "spec.parallelism.tensr: unknown field; did you mean tensor?"),
    ("perNode: 8", "PerNode: 8", "spec.accelerator.PerNode: unknown field; did you mean perNode?"),
    (
        "claimName",
        "claimname",
        "spec.model.source.persistentVolumeClaim.claimname: unknown field; did you mean claimName?",
    ),
    ("minReplicas", "floor", "spec.autoscaling.floor: unknown field; known here: minReplicas, maxReplicas"),
    ("{name: llama-70b}", "{name: llama-70b, lables: {}}", "metadata.lables: unknown field; did you mean labels?"),
    ("maxRunning: 128", "maxRuning: 128", "spec.engine.maxRuning: unknown field; did you mean maxRunning?"),
    ("spec:\n", "specs: {}\nspec:\n", "specs: unknown field; did you mean spec?"),
    ("serving.arriero.dev/v1alpha1", "v1", "apiVersion: 'v1' is not serving.arriero.dev/v1alpha1"),
    ("kind: LlamaDeployment", "kind: Deployment", "kind: 'Deployment' is not LlamaDeployment"),
    ("kind: LlamaDeployment\n", "", "kind: missing"),
    ("metadata: {name: llama-70b}\n", "", "metadata: missing"),
    ("{name: llama-70b}", "{}", "metadata.name: missing"),
    ("{name: llama-70b}", "{name: Llama}", "metadata.name: 'Llama' is not valid; expected lower-case letters"),
    ("{name: llama-70b}", "{name: a.b}", "metadata.name: 'a.b' is not valid"),
    ("{name: llama-70b}", "{name: " + "a" * 41 + "}", "metadata.name: 41 characters; expected at most 40"),
    ("{name: llama-70b}", "{name: 70}", "metadata.name: expected a string, found 70"),
    ("    name: meta-llama/Llama-3.1-70B-Instruct\n", "", "spec.model.name: missing"),
    ("meta-llama/Llama-3.1-70B-Instruct", "'two words'", "spec.model.name: 'two words' is not valid"),
    (
        "{persistentVolumeClaim: {claimName: weights, path: llama-70b}}",
        "{}",
        "spec.model.source: expected exactly one of",
    ),
    (
        "claimName: weights, path: llama-70b}}",
        "claimName: weights}, hostPath: {path: /x}}",
        "spec.model.source: expected exactly one of persistentVolumeClaim, hostPath, image, huggingFace, objectStore, "
        "found persistentVolumeClaim and hostPath",
    ),
    ("path: llama-70b", "path: /llama", "spec.model.source.persistentVolumeClaim.path: '/llama' is not valid"),
    ("path: llama-70b", "path: a/../../b", "path is 'a/../../b', which leaves the volume"),
    (
        "weights: auto",
        "weights: fp16",
        "spec.model.weights: 'fp16' is not one of auto, float32, bfloat16, fp8, int8 or int4",
    ),
    ("dtype: auto", "dtype: int8", "spec.model.kvCache.dtype: 'int8' is not one of auto, float32, bfloat16 or fp8"),
    ("maxContext: 131072", "maxContext: 0", "spec.model.maxContext: 0 is out of bounds; expected at least 1"),
    ("maxContext: 131072", "maxContext: 128k", "spec.model.maxContext: expected a whole number, found '128k'"),
    ("maxContext: 131072", "maxContext: 1.5", "spec.model.maxContext: expected a whole number, found 1.5"),
    ("maxContext: 131072", f"maxContext: {10**30}", "spec.model.maxContext: a huge number is out of bounds"),
    ("replicas: 2\n  par", "replicas: '2'\n  par", "spec.replicas: expected a whole number, found '2'"),
    ("replicas: 2\n  par", "replicas: true\n  par", "spec.replicas: expected a whole number, found true"),
    ("replicas: 2\n  par", "replicas: -1\n  par", "spec.replicas: -1 is out of bounds; expected at least 0"),
    ("replicas: 2\n  par", "replicas:\n  par", "spec.replicas: expected a whole number, found nothing"),
    ("tensor: 8", "tensor: 0", "spec.parallelism.tensor: 0 is out of bounds; expected at least 1"),
    ("tensor: 8", "tensor: 2000", "spec.parallelism.tensor: 2000 is out of bounds; expected at most 1024"),
    ("{tensor: 8, pipeline: 2}", "8x2", "spec.parallelism: expected a mapping, found '8x2'"),
    ("type: H100-80GB", "type: A100", "spec.accelerator.type: 'A100' is not one of H100-80GB, H200-141GB or cpu"),
    (
        "type: H100-80GB",
        "type: cpu",
        "spec.accelerator: resourceName is 'nvidia.com/gpu', but a cpu is no extended resource",
    ),
    ("perNode: 8", "perNode: 8, memoryGiB: 0", "spec.accelerator.memoryGiB: 0 is out of bounds; expected above 0"),
    ("perNode: 8", "perNode: 8, memoryGiB: .nan", "spec.accelerator.memoryGiB: expected a finite number, found nan"),
    ("resourceName: nvidia.com/gpu", "resourceName: '*'", "spec.accelerator.resourceName: '*' is not valid"),
    ("policy: prefix", "policy: cheapest", "spec.router.policy: 'cheapest' is not one of prefix, least-load"),
    ("minReplicas: 0", "minReplicas: 9", "spec.autoscaling: minReplicas is 9, above maxReplicas (8)"),
    ("maxReplicas: 8, ", "", "spec.autoscaling.maxReplicas: missing"),
    ("maxSurge: 1", "maxSurge: 0", "spec.rollout: maxSurge and maxUnavailable are both 0"),
    ("mode: Preferred", "mode: Must", "spec.placement.mode: 'Must' is not one of Preferred or Required"),
    ("maxRunning: 128", "maxChunkTokens: 4096", "spec.engine: maxChunkTokens is 4096, above maxBatchTokens (2048)"),
    ("maxRunning: 128", "maxRunning: 4096", "spec.engine: maxRunning is 4096, above maxBatchTokens (2048)"),
    ("threadsPerRank: 2", "prefixCache: 1", "spec.engine.prefixCache: expected true or false, found 1"),
    (
        "{spec: {tolerations: [{key: gpu, operator: Exists}]}}",
        "[]",
        "spec.podTemplate: expected a mapping, found a list",
    ),
    ("key: gpu", "1: gpu", "spec.podTemplate.spec.tolerations[0]: the key 1 is not a string; put it in quotes"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), INVALID)
def test_each_problem_gets_one_sentence_with_its_path(old, new, sentence):
    assert any(problem.startswith(sentence) or sentence in problem for problem in problems_of(changed(old, new)))


def test_every_problem_is_listed_each_on_a_line_with_the_file():
    text = (
        FULL.replace("tensor: 8", "tensor: 0")
        .replace("replicas: 2\n  par", "replicas: x\n  par")
        .replace("type: H1", "type: X1")
    )
    with pytest.raises(SpecError) as caught:
        parse_deployment(text, "llama.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("llama.yaml: spec.") for line in lines)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty: expected a LlamaDeployment"),
        ("---\n---\n", "empty: expected a LlamaDeployment"),
        ("just text", "expected a mapping with apiVersion, kind, metadata and spec, found 'just text'"),
        ("[1, 2]", "expected a mapping with apiVersion, kind, metadata and spec, found a list"),
        (FULL + "---" + FULL, "2 documents: expected one LlamaDeployment"),
        (FULL + "  replicas: 3\n", "line 21, column 3: the key 'replicas' appears twice"),
        ("a: [1, 2", "line 1, column 9: expected ',' or ']'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        ("a: \x00", "not valid YAML: unacceptable character"),
        ("a: 2020-13-45", "not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("x" * 1_100_000, "1100000 characters, more than the 1048576 of a Kubernetes resource"),
    ],
    ids=[f"text{i}" for i in range(14)],  # The texts themselves hold what a test's name must not.
)
def test_text_that_is_no_single_mapping_is_refused(text, sentence):
    assert sentence in problems_of(text)[0]


def test_anchors_that_multiply_are_refused_before_they_are_expanded():
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
    assert problems_of(f"a0: &a0 x\n{levels}") == ("more than 100000 values",)


def test_the_schema_describes_and_bounds_every_property():
    """The cluster's schema is generated from this model; a property without bounds would be unbounded there."""
    schema = LlamaDeployment.model_json_schema(by_alias=True)
    free = {"podTemplate", "status", "labels", "annotations"}
    for name, definition in [("LlamaDeployment", schema), *schema["$defs"].items()]:
        for key, given in definition["properties"].items():
            assert given.get("description"), f"{name}.{key} has no description"
            for choice in given.get("anyOf", [given]):
                if choice.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & choice.keys(), f"{name}.{key} has no lower bound"
                    assert "maximum" in choice, f"{name}.{key} has no upper bound"
                if choice.get("type") == "string":
                    assert {"maxLength", "enum", "const"} & choice.keys(), f"{name}.{key} has no longest length"
                if choice.get("type") == "object" and "$ref" not in choice:
                    assert key in free, f"{name}.{key} is an untyped object"
