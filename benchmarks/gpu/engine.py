"""The engine on this machine's GPU: Llama 3.1's shapes with random weights, made on the device.

Throughput is that of all requests queued at once, as TensorRT-LLM's published figures are taken (perf-overview of
release 1.0, FP8); batch 1 stands beside the time that reading the weights takes at the copy bandwidth of the same run;
transformers' `generate` is the floor. Greedy tokens of fixed number, prompts of random tokens, no prefix cache.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from arriero_plan.memory import KvFormat, WeightFormat

Report = dict[str, Any]

PUBLISHED: dict[str, dict[str, dict[tuple[int, int], int]]] = {
    "NVIDIA H200": {
        "8B": {
            (128, 128): 27911,
            (128, 2048): 26221,
            (1000, 1000): 17744,
            (2048, 128): 3538,
            (2048, 2048): 12194,
            (20000, 2000): 1804,
        },
        "70B": {
            (128, 128): 3803,
            (128, 2048): 4336,
            (1000, 1000): 2909,
            (2048, 128): 442,
            (2048, 2048): 2003,
            (20000, 2000): 283,
        },
    },
    "NVIDIA H100": {
        "8B": {
            (128, 128): 28312,
            (128, 2048): 22714,
            (1000, 1000): 15220,
            (2048, 128): 3450,
            (2048, 2048): 9305,
            (20000, 2000): 1351,
        },
    },
}
"""TensorRT-LLM's output tokens per second on one device, by (input, output) tokens."""

_MODELS = {"8B": "meta-llama/Llama-3.1-8B", "70B": "meta-llama/Llama-3.1-70B"}
_RATE = {"8B": 12000, "70B": 2500}
"""Output tokens per second that sizes a load to the seconds it may take."""
_MAX_RUNNING = 512
_MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Load:
    """One measurement. `batch1`: one request alone, else all at once."""

    model: str
    weights: WeightFormat
    kv: KvFormat
    prompt: int
    output: int
    batch1: bool = False

    @property
    def label(self) -> str:
        what = "batch 1" if self.batch1 else "throughput"
        return f"engine: {self.model} {self.weights}, {self.kv} KV, {self.prompt}/{self.output}, {what}"


LOADS = (
    Load("8B", "fp8", "fp8", 128, 256, batch1=True),
    Load("8B", "fp8", "fp8", 128, 128),
    Load("8B", "fp8", "fp8", 1000, 1000),
    Load("8B", "fp8", "fp8", 2048, 128),
    Load("8B", "bfloat16", "bfloat16", 128, 256, batch1=True),
    Load("8B", "bfloat16", "bfloat16", 1000, 1000),
    Load("70B", "fp8", "fp8", 128, 128, batch1=True),
    Load("70B", "fp8", "fp8", 128, 128),
    Load("8B", "int4", "bfloat16", 128, 256, batch1=True),
    Load("8B", "fp8", "fp8", 128, 2048),
    Load("8B", "fp8", "fp8", 2048, 2048),
    Load("8B", "fp8", "fp8", 20000, 2000),
    Load("70B", "fp8", "fp8", 1000, 1000),
)
"""In the order of their importance: what the time does not suffice for is left out. A model is made once for the loads
of it that follow each other.
"""


def missing() -> str:
    """Which packages the engine lacks on this machine; empty: none."""
    absent = [name for name in ("msgspec", "pydantic", "safetensors") if importlib.util.find_spec(name) is None]
    return f"not installed here: {', '.join(absent)}" if absent else ""


def measure_engine(
    minutes: float, bandwidth: float | None, device_name: str, written: Callable[[Report], None]
) -> Report:
    """Measure what the time suffices for. `written` is called with the report after each load."""
    end = time.monotonic() + 60 * minutes
    report: Report = {"models": [], "loads": [], "failed": [], "not_run": [], "floor": None}
    reason = missing()
    if reason:
        report["not_run"] = [{"load": load.label, "reason": reason} for load in LOADS]
        return report
    for key, following in groupby(LOADS, lambda load: (load.model, load.weights, load.kv)):
        loads = list(following)
        if time.monotonic() > end:
            report["not_run"] += [{"load": load.label, "reason": "no time was left"} for load in loads]
            continue
        try:
            for found in _loads(loads, bandwidth, device_name, end, report):
                report["loads"].append(found)
                print(_line(found), flush=True)
                written(report)
        except Exception as error:  # one model that cannot run must not cost the others their figures
            report["failed"].append({"load": str(key), "reason": f"{type(error).__name__}: {error}"})
            print(f"{key}: failed: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    report["floor"] = floor() if time.monotonic() < end else None
    written(report)
    return report


def _loads(
    loads: list[Load], bandwidth: float | None, device_name: str, end: float, report: Report
) -> Iterator[Report]:
    stage, about = _stage(loads[0], longest=max(load.prompt + load.output for load in loads))
    report["models"].append(about)
    for load in loads:
        left = end - time.monotonic()
        if left < 5:
            report["not_run"].append({"load": load.label, "reason": "no time was left"})
            continue
        yield _measured(stage, load, bandwidth, device_name, left, about["read_bytes"])
    stage.shut()


def _stage(load: Load, longest: int) -> tuple[Any, Report]:
    """A warm stage of the whole model, and what was found of its memory beside the plan's figures."""
    from arriero_plan.known import known_config
    from arriero_plan.launch import EngineSettings, Launch, Layout, Pod, Stage
    from arriero_plan.memory import Precision, embedding_bytes, final_norm_bytes, layer_bytes_all
    from arriero_plan.model import ModelShape
    from arriero_worker.cuda_stage import CudaStage
    from arriero_worker.model.cuda.backend import CudaBackend
    from arriero_worker.model.loader import random_weights
    from arriero_worker.model.shard import Shard

    config = known_config(_MODELS[load.model])
    assert config is not None
    shape = ModelShape.from_config(config, load.model)
    context = -(-longest // 1024) * 1024
    settings = EngineSettings(
        dtype="bfloat16",
        weights=load.weights,
        kv_dtype=load.kv,
        max_context=context,
        kv_blocks=1 << 20,
        max_running=_MAX_RUNNING,
        max_batch_tokens=_MAX_BATCH_TOKENS,
        max_waiting=1 << 20,
        prefix_cache=False,
    )
    launch = Launch(
        deployment="benchmark",
        group="benchmark-0",
        backend="cuda",
        model_path="-",
        served_names=(load.model,),
        layout=Layout(tensor=1, pipeline=1, stages=(Stage(first_layer=0, end_layer=shape.num_layers),)),
        pods=(Pod(host="127.0.0.1", ranks=(0,)),),
        engine=settings,
        run_directory="-",
    )
    device = torch.device("cuda", torch.cuda.current_device())
    backend = CudaBackend(torch.bfloat16, device, max_context=context, weights=settings.weights, kv=settings.kv_dtype)
    shard = Shard.of(launch.layout, 0)
    begun = time.monotonic()
    weights = random_weights(shape, shard, backend, device=device)
    torch.cuda.synchronize()
    made = time.monotonic() - begun
    stage = CudaStage(launch, 0, shape, shard, weights, backend, "random")
    stage.warm()
    precision = Precision("bfloat16", settings.weights or "bfloat16", settings.kv_dtype or "bfloat16")
    table = embedding_bytes(shape, 1, precision)
    planned = sum(layer_bytes_all(shape, 1, precision)) + 2 * table + final_norm_bytes(shape, precision)
    linears = (linear for layer in weights.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))
    assert weights.head is not None
    return stage, {
        "model": load.model,
        "weights": load.weights,
        "kv": load.kv,
        "making_seconds": made,
        "planned_weight_bytes": planned,
        "read_bytes": sum(backend.linear_bytes(linear) for linear in linears) + backend.linear_bytes(weights.head),
        "kv_blocks": stage.kv_blocks,
        "block_size": settings.block_size,
        "used_bytes": stage.memory_bytes(),
        **asdict(stage.measured),
    }


def _measured(
    stage: Any, load: Load, bandwidth: float | None, device_name: str, left: float, read_bytes: int
) -> Report:
    from benchmarks.gpu.serving import serve

    from arriero_worker.engine.scheduler import SchedulerSettings

    engine = stage.launch.engine
    settings = SchedulerSettings(
        block_size=engine.block_size,
        kv_blocks=stage.kv_blocks,
        max_context=engine.max_context,
        max_running=engine.max_running,
        max_waiting=engine.max_waiting,
        max_batch_tokens=engine.max_batch_tokens,
        prefix_cache=engine.prefix_cache,
        vocab_size=stage.shape.vocab_size,
    )
    requests = 1
    if not load.batch1:
        requests = max(64, min(4096, int(_RATE[load.model] * min(15.0, left / 2) / load.output)))
    runner = stage.runner(None, leader=True, alive=lambda: True)
    served = serve(
        runner, settings, requests=requests, prompt_tokens=load.prompt, output_tokens=load.output, limit=left
    )
    rate = served.output_tokens / served.seconds
    published = _published(device_name, load)
    bound = read_bytes / bandwidth if bandwidth else None
    return {
        **asdict(load),
        **asdict(served),
        "output_tokens_per_second": rate,
        "published": None if load.batch1 else published,
        "of_published": None if load.batch1 or published is None else rate / published,
        "bound_seconds": bound if load.batch1 else None,
        "of_bound": bound / served.decode_seconds if load.batch1 and bound and served.decode_seconds else None,
    }


def _published(device_name: str, load: Load) -> int | None:
    if load.weights != "fp8":
        return None
    for name, models in PUBLISHED.items():
        if device_name.startswith(name):
            return models.get(load.model, {}).get((load.prompt, load.output))
    return None


def floor() -> Report | None:
    """transformers' `generate` on 8B in bfloat16: seconds per token of one sequence, tokens per second of 32. None
    where it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import LlamaConfig, LlamaForCausalLM

    from arriero_plan.known import known_config

    config = known_config(_MODELS["8B"])
    assert config is not None
    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    try:
        with torch.device("cuda"):
            made: Any = LlamaForCausalLM(LlamaConfig(**known, dtype=torch.bfloat16))
        model = made.to(torch.bfloat16).eval()
        found: Report = {"model": "8B", "weights": "bfloat16"}
        for batch in (1, 32):
            prompt = torch.randint(0, config["vocab_size"], (batch, 128), device="cuda")
            seconds = []
            for tokens in (8, 72):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
            each = (seconds[1] - seconds[0]) / 64
            found[f"batch{batch}_decode_seconds"] = each
            found[f"batch{batch}_tokens_per_second"] = batch / each
        return found
    except Exception as error:  # the floor is a comparison, and must not cost what it is compared with
        return {"failed": f"{type(error).__name__}: {error}"}


def _line(found: Report) -> str:
    label = Load(**{name: found[name] for name in Load.__slots__}).label
    if found["batch1"]:
        bound = "" if found["of_bound"] is None else f", {found['of_bound']:.1%} of the bandwidth bound"
        return f"{label:64} {found['decode_seconds'] * 1e3:10.2f} ms per token{bound}"
    beside = "" if found["of_published"] is None else f", {found['of_published']:.2f}x TensorRT-LLM's"
    return f"{label:64} {found['output_tokens_per_second']:10.0f} tokens per second{beside}"
