"""A replica of real processes gives transformers' tokens, in every layout, while it preempts, chunks and shares
prefixes.
"""

import asyncio
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from tests.worker.checkpoints import llama3_rope, make_checkpoint, random_model
from tests.worker.front.replica import write_model
from tests.worker.replica import Replica

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

# Odd sizes on purpose: the vocabulary is divisible by no tensor size, heads are smaller than hidden / heads, tensor
# 4 has more ranks than KV heads, and sequences run past the original context of the rope scaling.
SHAPE: dict[str, Any] = {
    "vocab_size": 409,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "rope_parameters": llama3_rope(original=32),
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NEW_TOKENS = 64
LENGTHS = (1, 5, 16, 33, 70, 90)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(directory, sharded=True, seed=3, **SHAPE)
    texts = tmp_path_factory.mktemp("texts")
    write_model(texts)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(texts / name, directory / name)
    return directory


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    long = torch.randint(2, 409, (max(LENGTHS),), generator=generator).tolist()
    own = [torch.randint(2, 409, (length,), generator=generator).tolist() for length in LENGTHS]
    # The second half shares a prefix with the longest, so that cached blocks are taken up.
    return own + [long[:length] for length in (40, 70, 90)]


@cache
def expected() -> tuple[list[list[int]], list[torch.Tensor]]:
    """transformers' greedy tokens, and the log-probabilities of every prompt position's next token."""
    torch.set_num_threads(1)
    model = random_model(3, **SHAPE)
    tokens, prompt_logprobs = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens.append(out[0, len(prompt) :].tolist())
        prompt_logprobs.append(torch.log_softmax(model(ids).logits[0].float(), dim=-1))
    return tokens, prompt_logprobs


async def generate(address: str, prompt: list[int]) -> list[int]:
    """Over gRPC, with the token ids behind the text."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(
            model="tiny",
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParameters(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True),
        )
        tokens: list[int] = []
        async for answer in stub.Generate(request, metadata=(("x-arriero-resume", "1"),), timeout=120):
            tokens += answer.token_ids
        return tokens


async def prompt_logprobs(url: str, prompt: list[int]) -> list[dict[str, dict[str, Any]] | None]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 3}
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, dict[str, Any]] | None] = answer.json()["choices"][0]["prompt_logprobs"]
    return found


LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2, 3)]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
async def test_every_layout_answers_like_transformers(checkpoint: Path, tensor: int, pipeline: int) -> None:
    chunk = (1, 7, 64)[(tensor + pipeline) % 3]
    # 26 blocks of 16 hold two and a half of the longest sequences: the nine requests push each other out.
    options: dict[str, Any] = {"max_chunk_tokens": chunk, "kv_blocks": 26, "max_running": 16, "max_batch_tokens": 80}
    tokens, logprobs = expected()
    replica = Replica(checkpoint, layers=5, tensor=tensor, pipeline=pipeline, **options)
    await asyncio.to_thread(replica.__enter__)
    try:
        answers = await asyncio.gather(*(generate(replica.grpc_address, prompt) for prompt in prompts()))
        assert answers == tokens
        again = await asyncio.gather(*(generate(replica.grpc_address, prompt) for prompt in prompts()[-2:]))
        assert again == tokens[-2:]
        for index in (3, 5):
            found = await prompt_logprobs(replica.url, prompts()[index])
            assert found[0] is None
            for position, entry in enumerate(found[1:], start=1):
                assert entry is not None
                for token, detail in entry.items():
                    wanted = logprobs[index][position - 1, int(token)].item()
                    assert detail["logprob"] == pytest.approx(wanted, abs=1e-4)
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{replica.url}/metrics")).text
    finally:
        await asyncio.to_thread(replica.__exit__)
    values = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line and line[0] != "#"}
    assert sum(value for name, value in values.items() if name.startswith("arriero_preemptions_total")) > 0
    assert sum(value for name, value in values.items() if name.startswith("arriero_cached_tokens_total")) > 0
