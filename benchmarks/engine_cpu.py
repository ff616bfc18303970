"""The engine on a CPU against transformers and llama.cpp: one run, one checkpoint, the same threads.

    python benchmarks/engine_cpu.py [--parts equality,batch1,batch8,serving,layouts] [--json FILE]

Every figure of ours is taken from outside, over HTTP, on a replica of real processes. Peers run in processes of
their own, one at a time, nothing beside them. The checkpoint is a Llama of 1.1 B random bfloat16 parameters written
to a scratch directory. With `--parts`, FILE keeps the other parts as they were. llama.cpp is measured where the
`bench` extra is installed, and named as absent where not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from engine_peers import PEERS  # noqa: E402

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SMALL = SHAPE | {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 704,
}
THREADS = 2
PROMPT = 32


def write_checkpoint(directory: Path, shape: dict[str, Any], dtype: str) -> None:
    """Random weights in transformers' format, and a tokenizer for the faces (prompts here are token ids)."""
    import torch
    from safetensors.torch import save_file
    from tests.worker.front.replica import write_model
    from transformers import LlamaConfig

    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, dtype=getattr(torch, dtype))
    config.architectures = ["LlamaForCausalLM"]
    write_model(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    # A word for every id, so that each token is text at once and its time of arrival is seen.
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    taken = {token["id"] for token in tokenizer["added_tokens"]} | set(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"] |= {f"w{i}": i for i in range(shape["vocab_size"]) if i not in taken}
    path.write_text(json.dumps(tokenizer))
    config.save_pretrained(directory)
    h, i, v, d = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * d, shape["num_key_value_heads"] * d
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        scale = (3.0 / columns) ** 0.5
        return torch.empty(rows, columns).uniform_(-scale, scale, generator=generator).to(getattr(torch, dtype))

    tensors = {"model.embed_tokens.weight": draw(v, h), "lm_head.weight": draw(v, h)}
    ones = torch.ones(h, dtype=getattr(torch, dtype))
    tensors["model.norm.weight"] = ones.clone()
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes = {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }
        tensors |= {f"{at}.{name}.weight": draw(*size) for name, size in sizes.items()}
        tensors |= {f"{at}.{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_bandwidth() -> float:
    """Bytes a second that all threads together read from memory, the best of ten."""
    import torch

    torch.set_num_threads(THREADS)
    numbers = torch.ones(1 << 28)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.numel() * 4 / (time.perf_counter() - began))
    return best


def prompts_of(count: int, length: int, vocab: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300, vocab) for _ in range(length)] for _ in range(count)]


def mixed(count: int, vocab: int) -> list[tuple[list[int], int]]:
    """Requests of 32-512 tokens in and 16-128 out."""
    rng = random.Random(9)
    return [
        ([rng.randrange(300, vocab) for _ in range(rng.randint(32, 512))], rng.randint(16, 128)) for _ in range(count)
    ]


class Ours:
    """A replica of real processes, driven over HTTP."""

    def __init__(
        self,
        checkpoint: Path,
        shape: dict[str, Any],
        dtype: str,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        threads: int = THREADS,
    ) -> None:
        from tests.worker.replica import Replica

        self._replica = Replica(
            checkpoint,
            layers=shape["num_hidden_layers"],
            tensor=tensor,
            pipeline=pipeline,
            dtype=dtype,
            threads=threads,
            max_context=1024,
            kv_blocks=2048,
            max_batch_tokens=512,
            prefix_cache=False,
        )

    def __enter__(self) -> Ours:
        self._replica.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._replica.__exit__()

    def run(self, requests: list[tuple[list[int], int]]) -> tuple[list[list[float]], float, list[str]]:
        """All at once, greedy. The arrival times of each request's tokens, the seconds in all, and the texts."""
        return asyncio.run(self._run(requests))

    async def _run(self, requests: list[tuple[list[int], int]]) -> tuple[list[list[float]], float, list[str]]:
        import httpx

        async def one(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> tuple[list[float], str]:
            body = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            times, text, got = [], "", 0
            headers = {"x-arriero-resume": "1"}
            async with client.stream(
                "POST", f"{self._replica.url}/v1/completions", json=body, headers=headers
            ) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith(": arriero "):
                        ids = json.loads(line.removeprefix(": arriero "))["tokens"]
                        got += len(ids)
                        times += [time.perf_counter()] * len(ids)
                    elif line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            assert got == tokens, f"{got} tokens came, {tokens} were asked for"
            return times, text

        async with httpx.AsyncClient(timeout=3600, limits=httpx.Limits(max_connections=None)) as client:
            began = time.perf_counter()
            answers = await asyncio.gather(*(one(client, prompt, tokens) for prompt, tokens in requests))
            return [times for times, _ in answers], time.perf_counter() - began, [text for _, text in answers]


def decode_rate(times: list[list[float]]) -> float:
    """Output tokens a second between the moment all have their first token and the moment the first is done."""
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    return sum(sum(begin < at <= end for at in t) for t in times) / (end - begin)


def peer(name: str, task: str, checkpoint: Path, **arguments: Any) -> dict[str, Any] | None:
    """Run a peer in a process of its own; None where it is not installed."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "engine_peers.py"),
        name,
        task,
        str(checkpoint),
        json.dumps(arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
    if outcome.returncode == 75:
        return None
    if outcome.returncode:
        raise RuntimeError(f"{name} {task} failed:\n{outcome.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return answer


def equality(directory: Path) -> dict[str, Any]:
    """In float32 on a small model, greedy: the same tokens as transformers."""
    write_checkpoint(directory, SMALL, "float32")
    prompts = prompts_of(4, PROMPT, SMALL["vocab_size"])
    with Ours(directory, SMALL, "float32") as ours:
        _, _, texts = ours.run([(prompt, 32) for prompt in prompts])
    reference = peer("transformers", "texts", directory, prompts=prompts, tokens=32, dtype="float32")
    assert reference is not None
    return {"equal": texts == reference["texts"]}


def decoding(checkpoint: Path, batch: int, tokens: int, runs: int) -> dict[str, Any]:
    """In turns, the read bandwidth beside them: what else the machine does falls on all alike."""
    prompts = prompts_of(batch, PROMPT, SHAPE["vocab_size"])
    result: dict[str, Any] = {"arriero": [], "bandwidth": []}
    with Ours(checkpoint, SHAPE, "bfloat16") as ours:
        ours.run([(prompt, 4) for prompt in prompts])
        for _ in range(runs):
            result["bandwidth"].append(read_bandwidth())
            result["arriero"].append(decode_rate(ours.run([(prompt, tokens) for prompt in prompts])[0]))
            for name in PEERS:
                answer = peer(name, "decode", checkpoint, prompts=prompts, tokens=tokens, runs=1, dtype="bfloat16")
                if answer is not None:
                    result.setdefault(name, []).extend(answer["rates"])
    return result


def serving(checkpoint: Path, count: int) -> dict[str, Any]:
    requests = mixed(count, SHAPE["vocab_size"])
    output = sum(tokens for _, tokens in requests)
    with Ours(checkpoint, SHAPE, "bfloat16") as ours:
        ours.run(requests[:2])
        _, seconds, _ = ours.run(requests)
    answer = peer("transformers", "continuous", checkpoint, requests=requests, dtype="bfloat16")
    assert answer is not None
    tokens_in = sum(len(prompt) for prompt, _ in requests)
    return {
        "tokens_in": tokens_in,
        "tokens_out": output,
        "arriero": output / seconds,
        "transformers": output / answer["seconds"],
    }


def layouts(checkpoint: Path, runs: int) -> dict[str, Any]:
    """Concurrency 16: one rank of two threads, two ranks of one thread each, in turns; all stand, one works."""
    requests = [(prompt, 24) for prompt in prompts_of(16, PROMPT, SHAPE["vocab_size"])]
    options: dict[str, dict[str, int]] = {
        "one": {},
        "tensor 2": {"tensor": 2, "threads": 1},
        "pipeline 2": {"pipeline": 2, "threads": 1},
    }
    result: dict[str, list[float]] = {name: [] for name in options}
    with contextlib.ExitStack() as stack:
        replicas = {
            name: stack.enter_context(Ours(checkpoint, SHAPE, "bfloat16", **layout)) for name, layout in options.items()
        }
        for ours in replicas.values():
            ours.run(requests[:2])
        for _ in range(runs):
            for name, ours in replicas.items():
                result[name].append(decode_rate(ours.run(requests)[0]))
    return result


def middle(values: Any) -> float:
    return statistics.median(values) if isinstance(values, list) else float(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="equality,batch1,batch8,serving,layouts")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="of the serving part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": THREADS,
        },
        "bandwidth": read_bandwidth(),
    }
    print(f"read bandwidth {report['bandwidth'] / 1e9:.1f} GB/s", flush=True)
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as scratch:
        if "equality" in parts:
            report["equality"] = equality(Path(scratch, "small"))
            print(f"float32 tokens equal to transformers': {report['equality']['equal']}", flush=True)
        big = Path(scratch, "big")
        if set(parts) & {"batch1", "batch8", "serving", "layouts"}:
            write_checkpoint(big, SHAPE, "bfloat16")
        for part, batch, tokens in (("batch1", 1, 32), ("batch8", 8, 16)):
            if part in parts:
                report[part] = rates = decoding(big, batch, tokens, options.runs)
                mine = rates["arriero"]
                for name in ("arriero", *PEERS):
                    if name in rates:
                        ratio = statistics.median(x / y for x, y in zip(mine, rates[name], strict=True))
                        beside = f", ours is {ratio:.2f}x" if name != "arriero" else ""
                        print(f"decode, batch {batch}: {name} {middle(rates[name]):.2f} tokens/s{beside}", flush=True)
                if batch == 1:
                    # Every weight but the embedding table is read once per token.
                    size = (big / "model.safetensors").stat().st_size - 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
                    shares = [rate * size / speed for rate, speed in zip(mine, rates["bandwidth"], strict=True)]
                    report["of_bandwidth"] = middle(shares)
                    print(f"decode, batch 1: {report['of_bandwidth']:.0%} of the read bandwidth", flush=True)
        if "serving" in parts:
            report["serving"] = found = serving(big, options.requests)
            print(
                f"{options.requests} concurrent requests, {found['tokens_in']} tokens in, {found['tokens_out']} out: "
                f"ours {found['arriero']:.2f} output tokens/s, transformers' continuous batching "
                f"{found['transformers']:.2f}: {found['arriero'] / found['transformers']:.2f}x",
                flush=True,
            )
        if "layouts" in parts:
            report["layouts"] = rates = layouts(big, options.runs)
            for name, values in rates.items():
                share = statistics.median(x / y for x, y in zip(values, rates["one"], strict=True))
                print(f"concurrency 16, {name}: {middle(values):.2f} tokens/s, {share:.2f} of one rank", flush=True)
    if options.json:
        # Parts of an earlier run stay: the serving part takes far longer than the others together.
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(known | report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
