"""The launch file of one group."""

from __future__ import annotations

import pytest

from arriero_plan.group import PodAddress, launch_for
from arriero_plan.launch import parse_launch
from arriero_plan.plan import PlanError, make_plan
from arriero_plan.table import STAGE_COLUMNS, stage_rows, summary_rows

CPU = {"accelerator__type": "cpu", "model__maxContext": 1024}


def launch(deployment, plan, addresses, **options):
    return launch_for(
        deployment, plan, "llama-0", addresses, model_path="/models/llama", run_directory="/run/arriero", **options
    )


def test_on_one_machine_a_pod_per_stage(deploy, shape):
    deployment = deploy(
        **CPU,
        parallelism__tensor=2,
        parallelism__pipeline=3,
        rollout__drainSeconds=7,
        engine__maxRunning=9,
        engine__maxWaiting=8,
        engine__maxBatchTokens=70,
        engine__maxChunkTokens=60,
        engine__blockSize=5,
        engine__prefixCache=False,
        engine__queueTimeoutSeconds=1.5,
        engine__runTimeoutSeconds=2.5,
    )
    plan = make_plan(deployment, shape("8B"))
    addresses = [PodAddress("127.0.0.1", 1000 + i, 2000 + i, 3000 + i, 4000 + i) for i in range(3)]
    made = launch(deployment, plan, addresses, threads=4)
    assert [pod.ranks for pod in made.pods] == [(0, 1), (2, 3), (4, 5)]
    assert [pod.control_port for pod in made.pods] == [1000, 1001, 1002]
    assert (made.deployment, made.group, made.backend) == ("llama", "llama-0", "cpu")
    assert (made.served_names, made.drain_seconds) == (("meta-llama/Llama",), 7)
    engine = made.engine
    assert (engine.dtype, engine.max_context, engine.block_size) == ("bfloat16", 1024, 5)
    assert (engine.kv_blocks, engine.max_running, engine.max_waiting) == (plan.kv_blocks, 9, 8)
    assert (engine.max_batch_tokens, engine.max_chunk_tokens, engine.prefix_cache) == (70, 60, False)
    assert (engine.queue_timeout_seconds, engine.run_timeout_seconds, engine.threads) == (1.5, 2.5, 4)
    assert parse_launch(made.model_dump_json(), "launch.json") == made


def test_a_stage_over_two_nodes(deploy, shape):
    deployment = deploy(parallelism__tensor=16, parallelism__pipeline=2)
    made = launch(deployment, make_plan(deployment, shape("405B")), [PodAddress(f"pod-{i}") for i in range(4)])
    assert [(pod.host, pod.ranks[0], len(pod.ranks)) for pod in made.pods] == [
        ("pod-0", 0, 8),
        ("pod-1", 8, 8),
        ("pod-2", 16, 8),
        ("pod-3", 24, 8),
    ]
    assert made.backend == "cuda"
    assert [made.pods[0].http_port, made.pods[0].grpc_port, made.pods[0].control_port, made.pods[0].store_port] == [
        8000,
        9000,
        9100,
        29500,
    ]


def test_threads_of_the_spec_win(deploy, shape):
    deployment = deploy(**CPU, engine__threadsPerRank=3)
    assert launch(deployment, make_plan(deployment, shape("8B")), [PodAddress("a")], threads=8).engine.threads == 3


def test_addresses_must_match_the_pods(deploy, shape):
    deployment = deploy(**CPU)
    with pytest.raises(ValueError, match="2 addresses for the 1 pods of llama-0"):
        launch(deployment, make_plan(deployment, shape("8B")), [PodAddress("a"), PodAddress("b")])


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        ({"model__weights": "fp8"}, {}, "spec.model.weights is fp8; on a cpu the engine runs float32"),
        (
            {"model__kvCache__dtype": "fp8"},
            {},
            "spec.model.kvCache.dtype is fp8; with this accelerator the engine keeps keys and values in bfloat16",
        ),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantised (fp8)"),
    ],
)
def test_what_the_engine_does_not_run_is_refused(deploy, shape, spec, changes, sentence):
    deployment = deploy(**CPU, **spec)
    plan = make_plan(deployment, shape("8B", **changes))
    with pytest.raises(PlanError) as caught:
        launch(deployment, plan, [PodAddress("a")])
    assert sentence in str(caught.value)


@pytest.mark.parametrize("weights", ["bfloat16", "fp8", "int8", "int4"])
def test_a_gpu_runs_every_format(deploy, shape, weights):
    deployment = deploy(model__weights=weights, model__kvCache__dtype="fp8", model__maxContext=4096)
    made = launch(deployment, make_plan(deployment, shape("8B")), [PodAddress("a")])
    assert (made.engine.dtype, made.engine.weights, made.engine.kv_dtype) == ("bfloat16", weights, "fp8")


def test_a_gpu_does_not_keep_keys_wider_than_it_computes(deploy, shape):
    deployment = deploy(model__kvCache__dtype="float32")
    with pytest.raises(PlanError, match="keeps keys and values in bfloat16 or fp8"):
        launch(deployment, make_plan(deployment, shape("8B")), [PodAddress("a")])


def test_a_quantised_checkpoint_runs_on_a_cpu_where_its_weights_are_asked_for_as_floats(deploy, shape):
    deployment = deploy(**CPU, model__weights="bfloat16")
    plan = make_plan(deployment, shape("8B", quantization_config={"quant_method": "fp8"}))
    assert launch(deployment, plan, [PodAddress("a")]).engine.weights == "bfloat16"


def test_the_table(deploy, shape):
    plan = make_plan(deploy(parallelism__tensor=8, parallelism__pipeline=2), shape("405B"))
    summary = dict(summary_rows(plan))
    assert summary["model"] == "meta-llama/Llama, 405.85 B parameters"
    assert summary["layout"] == "tensor 8 x pipeline 2"
    assert summary["devices"] == "16 x H100-80GB, 79.10 GiB each"
    assert summary["pods per replica"] == "2 pods of 8 ranks"
    rows = stage_rows(plan)
    assert [row[:4] for row in rows] == [
        ("0", "0-62 (63)", "0-7", "47.25 GiB"),
        ("1", "63-125 (63)", "8-15", "47.25 GiB"),
    ]
    assert all(len(row) == len(STAGE_COLUMNS) for row in rows)
