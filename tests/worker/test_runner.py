"""Runners of whole groups under the real scheduler: every sequence gets the tokens that it would get alone."""

from __future__ import annotations

import random as stdlib_random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.worker import sampling_reference as reference
from tests.worker.checkpoints import make_checkpoint, random_model
from tests.worker.runner_group import TIME_LIMIT, Group, Pipe, pipes_of, serve
from tests.worker.stages import ThreadedGroup
from tests.worker.stub_model import StubModel, next_logits

from arriero_worker.engine.messages import EngineRequest, SamplingParams, TokenLogprobs
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.group.comm import GroupAborted, Solo
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.runner import Runner

VOCAB = 61
LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 3)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings_of(pipeline: int, **fields: Any) -> SchedulerSettings:
    defaults: dict[str, Any] = {
        "block_size": 4,
        "kv_blocks": 40,
        "max_context": 64,
        "max_running": 6,
        "max_waiting": 100,
        "max_batch_tokens": 24,
        "vocab_size": VOCAB,
    }
    return SchedulerSettings(pipeline=pipeline, **{**defaults, **fields})


def stub_group(tensor: int, settings: SchedulerSettings) -> tuple[Group, list[np.ndarray]]:
    pipeline = settings.pipeline
    models = [StubModel(rank // tensor, pipeline, VOCAB, settings.block_size) for rank in range(tensor * pipeline)]
    kvs = [model.empty_kv(settings.kv_blocks) for model in models]
    ranks = list(zip(models, kvs, pipes_of(tensor, pipeline), strict=True))
    return Group(ranks, settings, tensor=tensor, hidden_size=1), kvs


def random_requests(seed: int, count: int) -> list[EngineRequest]:
    rng = stdlib_random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(16)]
    requests = []
    for id_ in range(count):
        prompt = shared[: rng.choice([0, 0, 9, 16])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 24),
            seed=rng.getrandbits(64),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            logit_bias=rng.choice([{}, {3: 2.0, 7: -100.0}]),
            min_tokens=rng.choice([0, 3]),
            stop_token_ids=rng.choice([(), (5, 11)]),
            logprobs=rng.choice([-1, 0, 2]),
            prompt_logprobs=rng.choice([-1, -1, 3]),
        )
        output = [rng.randrange(12, VOCAB) for _ in range(rng.choice([0, 0, 0, 4]))][: sampling.max_tokens - 1]
        requests.append(EngineRequest(id=id_, prompt=prompt, sampling=sampling, output=output))
    return requests


def alone(request: EngineRequest, pipeline: int) -> list[int]:
    """The new tokens of a request, by the slowest way there is."""
    sampling, tokens, new = request.sampling, request.prompt + request.output, []
    while len(request.output) + len(new) < sampling.max_tokens:
        logits = next_logits(tokens, pipeline, VOCAB)
        token = reference.sample(logits, tokens, len(request.prompt), sampling)
        tokens = [*tokens, token]
        new.append(token)
        if token in sampling.stop_token_ids:
            break
    return new


def check_logprobs(told: Sequence[TokenLogprobs], tokens: list[int], first: int, top: int, pipeline: int) -> None:
    """Of the tokens from position `first` on."""
    assert [one.token for one in told] == tokens[first:]
    for position, one in enumerate(told, first):
        expected = torch.log_softmax(torch.from_numpy(next_logits(tokens[:position], pipeline, VOCAB)), -1)
        assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-5)
        order = torch.sort(expected, descending=True, stable=True)
        assert [token for token, _ in one.top] == order.indices[:top].tolist()
        assert [value for _, value in one.top] == pytest.approx(order.values[:top].tolist(), abs=1e-5)
        assert one.rank == order.indices.tolist().index(one.token) + 1


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize(
    "limits",
    [{}, {"kv_blocks": 17, "max_batch_tokens": 7}, {"max_chunk_tokens": 1}, {"prefix_cache": False, "max_running": 2}],
    ids=["roomy", "preempting", "chunks of 1", "two slots"],
)
def test_every_sequence_gets_the_tokens_it_would_get_alone(
    tensor: int, pipeline: int, limits: dict[str, Any], campaign: int
) -> None:
    settings = settings_of(pipeline, **limits)
    for seed in range(campaign):
        scheduler = Scheduler(settings, lambda: 0.0)
        requests = random_requests(1000 * seed + 10 * tensor + pipeline, 14)
        group, kvs = stub_group(tensor, settings)
        try:
            served = serve(group, scheduler, requests, at_once=5)
        finally:
            group.close()
        if "kv_blocks" in limits:
            assert scheduler.stats.preemptions > 0
        for request in requests:
            expected = alone(request, pipeline)
            assert served.tokens[request.id] == expected, request
            sampling, tokens = request.sampling, request.prompt + request.output + expected
            ended = "stop" if expected[-1] in sampling.stop_token_ids else "length"
            assert served.reasons[request.id] == ended
            if sampling.logprobs >= 0:
                first = len(request.prompt) + len(request.output)
                check_logprobs(served.logprobs[request.id], tokens, first, sampling.logprobs, pipeline)
            if sampling.prompt_logprobs >= 0:
                told = served.prompt_logprobs[request.id]
                check_logprobs(told, request.prompt, 1, sampling.prompt_logprobs, pipeline)
        for rank in range(0, len(kvs), tensor):
            for other in kvs[rank + 1 : rank + tensor]:
                np.testing.assert_array_equal(kvs[rank], other, "tensor ranks fed different tokens")


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_request_replayed_from_its_tokens_continues_as_if_it_had_never_stopped(pipeline: int) -> None:
    """On another replica, in another batch, after any of its tokens."""
    settings = settings_of(pipeline)
    sampling = SamplingParams(max_tokens=12, seed=77, temperature=1.0, top_p=0.95, frequency_penalty=0.4)
    whole = EngineRequest(id=0, prompt=[4, 8, 15, 16, 23, 42], sampling=sampling)
    tokens = alone(whole, pipeline)
    resumed = [
        EngineRequest(id=cut, prompt=whole.prompt, sampling=sampling, output=tokens[:cut]) for cut in range(1, 12)
    ]
    group, _ = stub_group(1, settings)
    try:
        served = serve(group, Scheduler(settings, lambda: 0.0), resumed)
    finally:
        group.close()
    assert {cut: tokens[:cut] + told for cut, told in served.tokens.items()} == dict.fromkeys(range(1, 12), tokens)


# The order of results


def runner_of(stage: int, pipeline: int, pipe: Any, comm: Any) -> Runner:
    model = StubModel(stage, pipeline, VOCAB, 4)
    return Runner(
        model,
        model.empty_kv(16),
        BatchState(4, 32, 4),
        comm,
        pipe,
        stage=stage,
        pipeline=pipeline,
        leader=stage == 0,
        vocab_size=VOCAB,
        hidden_size=1,
        dtype=torch.float32,
    )


def admission(step: int, slot: int, length: int = 3, sample: bool = True) -> StepPlan:
    tokens = list(range(1 + slot, 1 + slot + length))
    return StepPlan(
        step,
        chunks=[Chunk(slot, 0, length if sample else length - 1, sample)],
        grows=[Grow(slot, [slot * 2, slot * 2 + 1])],
        admits=[Admit(slot, tokens, length, SamplingParams(max_tokens=9, temperature=0))],
    )


def decode(step: int, *slots: int) -> StepPlan:
    return StepPlan(step, np.array(slots, dtype="<i4").tobytes())


class WatchedPipe(Pipe):
    """Tells when someone waits in it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)

    def recv_results(self, tensors: Sequence[torch.Tensor]) -> None:
        self.entered.release()
        super().recv_results(tensors)


def test_stage_0_waits_for_the_results_it_may_feed_and_for_no_later_ones() -> None:
    pipe = WatchedPipe()
    first_comm, last_comm = pipes_of(1, 2)
    first, last = runner_of(0, 2, pipe, first_comm), runner_of(1, 2, pipe, last_comm)
    plans = [admission(0, 0), admission(1, 1), decode(2, 0), decode(3, 1)]
    assert first.execute(plans[0]) is None
    assert first.execute(plans[1]) is None
    thread = threading.Thread(target=first.execute, args=(plans[2],))
    thread.start()
    assert pipe.entered.acquire(timeout=TIME_LIMIT)
    assert thread.is_alive()
    last.execute(plans[0])
    thread.join(TIME_LIMIT)
    assert not thread.is_alive()
    assert not pipe.entered.acquire(blocking=False), "it took the result of step 1 as well"
    for plan in plans[1:3]:
        last.execute(plan)
    expected = [int(next_logits([1, 2, 3], 2, VOCAB).argmax()), int(next_logits([2, 3, 4], 2, VOCAB).argmax())]
    results = [first.collect() for _ in range(3)]
    assert [result.step for result in results] == [0, 1, 2]
    assert [result.tokens[0] for result in results[:2]] == expected


def test_a_step_without_samples_is_reported_when_the_last_stage_has_done_it() -> None:
    pipe = WatchedPipe()
    first_comm, last_comm = pipes_of(1, 2)
    first, last = runner_of(0, 2, pipe, first_comm), runner_of(1, 2, pipe, last_comm)
    plan = admission(0, 0, sample=False)
    first.execute(plan)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(first.collect()))
    thread.start()
    assert pipe.entered.acquire(timeout=TIME_LIMIT)
    assert not results
    last.execute(plan)
    thread.join(TIME_LIMIT)
    assert [(result.step, result.tokens) for result in results] == [(0, [])]


def test_a_single_stage_reports_on_its_leader_at_once() -> None:
    runner = runner_of(0, 1, None, Solo())
    result = runner.execute(admission(0, 2))
    assert result is not None
    token = int(next_logits([3, 4, 5], 1, VOCAB).argmax())
    assert (result.step, result.tokens) == (0, [token])
    result = runner.execute(decode(5, 2))
    assert result is not None
    assert result.tokens == [int(next_logits([3, 4, 5, token], 1, VOCAB).argmax())]


# The end of an epoch


class BrokenPipe(WatchedPipe):
    """Waits until it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = threading.Event()

    def recv_results(self, tensors: Sequence[torch.Tensor]) -> None:
        self.entered.release()
        assert self.broken.wait(TIME_LIMIT)
        raise GroupAborted("epoch 7: a peer's connection broke")


def caught(call: Any, *args: Any) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call(*args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_a_broken_channel_ends_whoever_waits_for_results() -> None:
    pipe = BrokenPipe()
    first = runner_of(0, 2, pipe, pipes_of(1, 2)[0])
    first.execute(admission(0, 0))
    collecting, collect_errors = caught(first.collect)
    assert pipe.entered.acquire(timeout=TIME_LIMIT)
    executing, execute_errors = caught(first.execute, decode(2, 0))
    pipe.broken.set()
    for thread, errors in ((collecting, collect_errors), (executing, execute_errors)):
        thread.join(TIME_LIMIT)
        assert [str(error) for error in errors] == ["epoch 7: a peer's connection broke"]
        assert isinstance(errors[0], GroupAborted)
    with pytest.raises(GroupAborted, match="connection broke"):
        first.execute(decode(3, 0))


def test_close_ends_a_collector_that_waits_for_a_step() -> None:
    first = runner_of(0, 2, Pipe(), pipes_of(1, 2)[0])
    thread, errors = caught(first.collect)
    first.close("epoch 3 ended")
    thread.join(TIME_LIMIT)
    assert [str(error) for error in errors] == ["epoch 3 ended"]
    with pytest.raises(GroupAborted, match="epoch 3 ended"):
        first.execute(admission(0, 0))


# A real model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def real_requests() -> list[EngineRequest]:
    rng = stdlib_random.Random(8)
    requests = []
    for id_ in range(8):
        sampling = SamplingParams(max_tokens=16, seed=id_, temperature=0.0 if id_ % 2 else 1.0, top_p=0.95)
        requests.append(
            EngineRequest(id=id_, prompt=[rng.randrange(131) for _ in range(3 + 4 * id_)], sampling=sampling)
        )
    return requests


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_a_real_model_samples_the_same_in_every_layout(checkpoint: Path, tensor: int, pipeline: int) -> None:
    """Greedy and drawn tokens, against transformers' logits over the whole sequence at each step."""
    settings = settings_of(pipeline, vocab_size=131, kv_blocks=48, max_batch_tokens=13)
    ranks = ThreadedGroup(checkpoint, tensor=tensor, pipeline=pipeline, kv_blocks=48, block_size=4)
    group = Group(
        [(stage, kv, stage.comm) for stage, kv in zip(ranks.ranks, ranks.caches, strict=True)],
        settings,
        tensor=tensor,
        hidden_size=ranks.shape.hidden_size,
    )
    requests = real_requests()
    try:
        served = serve(group, Scheduler(settings, lambda: 0.0), requests, at_once=3)
    finally:
        group.close()
        ranks.close()
    model = random_model(seed=3)
    for request in requests:
        tokens = request.prompt + served.tokens[request.id]
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        for at in range(len(request.prompt), len(tokens)):
            expected = reference.sample(logits[at - 1], tokens[:at], len(request.prompt), request.sampling)
            assert tokens[at] == expected, f"request {request.id}, position {at}"
        assert len(served.tokens[request.id]) == 16
