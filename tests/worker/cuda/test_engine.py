"""The engine's own scheduler and runner over the cuda backend: token for token what the cpu backend answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker import runner_group
from tests.worker.checkpoints import make_checkpoint
from tests.worker.cuda.device_group import DeviceGroup
from tests.worker.cuda.stages import CONTEXT, SMALL, cpu_stage, cuda_stage, cuda_stages

from arriero_plan.launch import EngineSettings
from arriero_worker.engine.messages import EngineRequest, SamplingParams
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.group.comm import Solo
from arriero_worker.model.cuda.backend import CudaBackend
from arriero_worker.runner.device.warm import warm_steps

VOCAB = SMALL["vocab_size"]
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "preempting, chunked": {"kv_blocks": 9, "max_batch_tokens": 7},
}


def settings_of(**fields: Any) -> SchedulerSettings:
    defaults: dict[str, Any] = {
        "block_size": 2,
        "kv_blocks": 64,
        "max_context": CONTEXT,
        "max_running": 4,
        "max_waiting": 100,
        "max_batch_tokens": 12,
        "vocab_size": VOCAB,
    }
    return SchedulerSettings(**{**defaults, **fields})


def requests(count: int, seed: int = 3) -> list[EngineRequest]:
    """Greedy and drawn, with every filter and edit, over prompts of which some begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(8)]
    made = []
    for id_ in range(count):
        prompt = shared[: (0, 8, 5)[id_ % 3]] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
        plain = id_ % 3 == 0
        sampling = SamplingParams(
            max_tokens=rng.randint(2, 4),
            seed=rng.getrandbits(64),
            temperature=0.0 if plain else rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=1.0 if plain else rng.choice([1.0, 1.2]),
            presence_penalty=0.0 if plain else rng.choice([0.0, 0.5]),
            frequency_penalty=0.0 if plain else rng.choice([0.0, 0.3]),
            logit_bias={} if plain else rng.choice([{}, {3: 2.0, 7: -100.0}]),
            min_tokens=rng.choice([0, 3]),
            stop_token_ids=rng.choice([(), (5, 11)]),
            logprobs=rng.choice([-1, 0, 2]),
            prompt_logprobs=rng.choice([-1, -1, 3]),
        )
        output = [rng.randrange(12, VOCAB) for _ in range(rng.choice([0, 0, 2]))][: sampling.max_tokens - 1]
        made.append(EngineRequest(id=id_, prompt=prompt, sampling=sampling, output=output))
    return made


def on_cpu(path: Path, settings: SchedulerSettings, asked: list[EngineRequest]) -> runner_group.Served:
    stage = cpu_stage(path)
    kv = stage.allocate_kv(settings.kv_blocks, settings.block_size)
    group = runner_group.Group([(stage, kv, Solo())], settings, tensor=1, hidden_size=SMALL["hidden_size"])
    try:
        return runner_group.serve(group, Scheduler(settings, lambda: 0.0), asked, at_once=3)
    finally:
        group.close()
        stage.backend.close()


def assert_same(found: runner_group.Served, expected: runner_group.Served) -> None:
    assert found.tokens == expected.tokens
    assert found.reasons == expected.reasons
    for ours, theirs in ((found.logprobs, expected.logprobs), (found.prompt_logprobs, expected.prompt_logprobs)):
        assert ours.keys() == theirs.keys()
        for id_ in ours:
            assert [(one.token, one.rank) for one in ours[id_]] == [(one.token, one.rank) for one in theirs[id_]]
            for one, other in zip(ours[id_], theirs[id_], strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(("limits", "layers"), list(zip(LIMITS, (1, 2), strict=True)))
def test_token_for_token_as_the_cpu_backend(tmp_path: Path, device: torch.device, limits: str, layers: int) -> None:
    path = make_checkpoint(tmp_path, **{**SMALL, "num_hidden_layers": layers})
    settings, asked = settings_of(**LIMITS[limits]), requests(5, seed=layers)
    scheduler = Scheduler(settings, lambda: 0.0)
    group = DeviceGroup([cuda_stage(path, device)], settings, buckets=[1, 3, 4] if "roomy" in limits else [])
    try:
        found = group.serve(scheduler, asked, at_once=3)
    finally:
        group.close()
    assert_same(found, on_cpu(path, settings, asked))
    if "preempting" in limits:
        assert scheduler.stats.preemptions > 0
    else:
        assert scheduler.stats.cached_tokens > 0


def test_after_the_steps_that_warm_it_nothing_grows_and_nothing_is_left(tmp_path: Path, device: torch.device) -> None:
    path = make_checkpoint(tmp_path, **SMALL)
    settings = settings_of(max_running=1, max_batch_tokens=2)
    asked = requests(1, seed=4)
    stage = cuda_stage(path, device)
    group = DeviceGroup([stage], settings)
    try:
        engine = EngineSettings(
            dtype="float32", max_context=CONTEXT, block_size=2, kv_blocks=64, max_running=1, max_batch_tokens=2
        )
        warm_steps(group.runners[0], engine, VOCAB)
        backend = stage.backend
        assert isinstance(backend, CudaBackend)
        backend.workspace.seal()
        taken = backend.workspace.bytes
    finally:
        group.close()
    serving = DeviceGroup([stage], settings)
    try:
        found = serving.serve(Scheduler(settings, lambda: 0.0), asked, at_once=2)
    finally:
        serving.close()
    assert backend.workspace.bytes == taken
    assert_same(found, on_cpu(path, settings, asked))


def test_two_stages_feed_each_other(tmp_path: Path, device: torch.device) -> None:
    """Hidden states forward, tokens back: what one stage of both layers answers."""
    path = make_checkpoint(tmp_path, **{**SMALL, "num_hidden_layers": 2})
    asked = requests(3, seed=9)
    settings = settings_of(pipeline=2, kv_blocks=32)
    group = DeviceGroup(cuda_stages(path, device, 2), settings)
    try:
        found = group.serve(Scheduler(settings, lambda: 0.0), asked, at_once=3)
    finally:
        group.close()
    assert_same(found, on_cpu(path, settings_of(), asked))
