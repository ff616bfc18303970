"""On a device: a rank's whole stage, measured and with its graphs, against transformers there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels import mode
from tests.worker.checkpoints import make_checkpoint, random_model
from tests.worker.cuda.stages import forward
from tests.worker.replica import launch_replica
from tests.worker.stages import Blocks, make_batch

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "vocab_size": 2048,
}
TOKENS = 40


@pytest.fixture(autouse=True)
def _on_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if mode.interpreted():
        pytest.skip("kernels run in the interpreter in this process; on the device: pytest -m gpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **SHAPE)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in (1, 7, 60, 130)
    ]


def loaded(path: Path, **engine: Any) -> Any:
    from arriero_worker.cuda_stage import CudaStage

    settings = {"dtype": "bfloat16", "max_context": 512, "kv_blocks": 4096, "max_running": 8, **engine}
    launch = launch_replica(path, os.path.join(path, "run"), layers=SHAPE["num_hidden_layers"], **settings)
    stage = CudaStage.load(launch.model_copy(update={"backend": "cuda"}), 0, lambda done, total: None)
    stage.warm()
    return stage


@pytest.fixture(scope="module")
def stage(checkpoint: Path) -> Iterator[Any]:
    if not torch.cuda.is_available() or mode.interpreted():
        pytest.skip("no CUDA device, or kernels are interpreted")
    made = loaded(checkpoint)
    yield made
    made.shut()


def served(stage: Any, asked: list[list[int]], at_once: int) -> dict[int, list[int]]:
    """Greedy answers, through the engine's scheduler."""
    from tests.worker.cuda.device_group import DeviceGroup

    from arriero_worker.engine.messages import EngineRequest, SamplingParams
    from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings

    engine = stage.launch.engine
    settings = SchedulerSettings(
        block_size=engine.block_size,
        kv_blocks=stage.kv_blocks,
        max_context=engine.max_context,
        max_running=engine.max_running,
        max_waiting=100,
        max_batch_tokens=engine.max_batch_tokens,
        vocab_size=SHAPE["vocab_size"],
    )
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    requests = [EngineRequest(id=i, prompt=prompt, sampling=sampling) for i, prompt in enumerate(asked)]
    group = DeviceGroup.over([stage.runner(None, leader=True, alive=lambda: True)])
    try:
        return group.serve(Scheduler(settings, lambda: 0.0), requests, at_once).tokens
    finally:
        group.close()


def test_bfloat16_logits_err_at_most_twice_as_much_as_transformers(stage: Any) -> None:
    half = random_model(dtype=torch.bfloat16, **SHAPE).cuda()
    exact = random_model(dtype=torch.bfloat16, **SHAPE).double().cuda()
    model = stage._model(None)
    kv = model.allocate_kv(64, 16)
    for prompt in prompts():
        ids = torch.tensor([prompt], device="cuda")
        wanted = exact(ids).logits[0].double().cpu()
        theirs = half(ids).logits[0].double().cpu()
        ours = forward(model, make_batch(Blocks(64, 16), [(0, prompt, 0)]), kv).double()
        for measure in (torch.Tensor.max, torch.Tensor.mean):
            assert measure((ours - wanted).abs()) <= 2 * measure((theirs - wanted).abs()) + 1e-3


def test_greedy_answers_are_those_of_transformers_but_where_two_tokens_are_as_good(stage: Any) -> None:
    """Through graphs, in batches that grow and shrink."""
    exact = random_model(dtype=torch.bfloat16, **SHAPE).double().cuda()
    half = random_model(dtype=torch.bfloat16, **SHAPE).cuda()
    answers = served(stage, prompts(), at_once=2)
    for prompt, answer in zip(prompts(), answers.values(), strict=True):
        assert len(answer) == TOKENS
        ids = torch.tensor([prompt + answer], device="cuda")
        wanted, theirs = exact(ids).logits[0].double(), half(ids).logits[0].double()
        slack = 4 * float((theirs - wanted).abs().max())
        rows = wanted[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        assert float((rows.max(1).values - chosen).max()) <= slack


def test_a_batch_of_many_answers_as_one_alone(stage: Any) -> None:
    """Graphs of other sizes, chunks beside decodes: the answers differ nowhere that matters."""
    together = served(stage, prompts() * 3, at_once=12)
    for first, second in ((0, 4), (1, 5), (3, 11)):
        same = sum(a == b for a, b in zip(together[first], together[second], strict=True))
        assert same >= TOKENS // 2


def test_memory_is_what_was_measured(stage: Any) -> None:
    measured = stage.measured
    assert stage.kv_blocks == min(measured.room_blocks, 4096)
    assert measured.weights > 0
    assert measured.graph_seconds < 30


@pytest.mark.parametrize(("weights", "kv"), [("fp8", "fp8"), ("int8", None), ("int4", None)])
def test_quantised_logits_stay_near_bfloat16s(checkpoint: Path, weights: Any, kv: Any) -> None:
    made = loaded(checkpoint, weights=weights, kv_dtype=kv)
    try:
        exact = random_model(dtype=torch.bfloat16, **SHAPE).double().cuda()
        model = made._model(None)
        cache = model.allocate_kv(64, 16)
        for prompt in prompts()[1:]:
            wanted = exact(torch.tensor([prompt], device="cuda")).logits[0].double().cpu()
            ours = forward(model, make_batch(Blocks(64, 16), [(0, prompt, 0)]), cache).double()
            assert float((ours - wanted).norm() / wanted.norm()) < {"fp8": 0.15, "int8": 0.08, "int4": 0.3}[weights]
    finally:
        made.shut()


def test_a_sequence_that_does_not_fit_is_refused_with_the_numbers(checkpoint: Path) -> None:
    from arriero_worker.model.backend import DeviceError

    held = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.97), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(DeviceError, match=r"one sequence of .* tokens needs"):
            loaded(checkpoint, max_context=400_000)
    finally:
        del held
        torch.cuda.empty_cache()
