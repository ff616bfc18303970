"""The engine's Llama against transformers' on the same checkpoint: every layout, every way to cut a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.checkpoints import TINY, llama3_rope, make_checkpoint, random_model
from tests.worker.stages import Blocks, ThreadedGroup, make_batch
from transformers import MistralConfig, MistralForCausalLM

LIMIT = 1e-4
LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2, 3)]
SHAPES: dict[str, dict[str, Any]] = {
    "every head its own KV": {"num_key_value_heads": 8},
    "GQA 4, vocabulary not divisible": {"num_key_value_heads": 2, "vocab_size": 131},
    "one KV head for 8, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads, biases": {"head_dim": 20, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama3 rope past the original context": {"rope_parameters": llama3_rope(original=32), "head_dim": 32},
}
LENGTH = 150


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(count: int, seed: int = 1, vocab: int = TINY["vocab_size"]) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits.float()


def run_in_chunks(group: ThreadedGroup, prompt: list[int], chunk: int, block_size: int = 16) -> torch.Tensor:
    blocks = Blocks(64, block_size)
    parts = []
    for past in range(0, len(prompt), chunk):
        parts.append(group.forward(make_batch(blocks, [(0, prompt[past : past + chunk], past)])))
    return torch.cat(parts)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_in_every_layout(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, sharded=True, **SHAPES[name])
    prompt = tokens(LENGTH)
    expected = reference(random_model(**SHAPES[name]), prompt)
    for tensor, pipeline in LAYOUTS:
        group = ThreadedGroup(path, tensor=tensor, pipeline=pipeline)
        found = run_in_chunks(group, prompt, 64)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=LIMIT, rtol=0, msg=f"tensor {tensor}, pipeline {pipeline}")


@pytest.mark.parametrize("block_size", [4, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_gets_the_same_bits_however_it_is_cut(tmp_path: Path, block_size: int, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path)
    prompt = tokens(LENGTH)
    group = ThreadedGroup(path, dtype=dtype, block_size=block_size)
    whole = run_in_chunks(group, prompt, LENGTH, block_size)
    for chunk in (1, 7, 64):
        assert torch.equal(run_in_chunks(group, prompt, chunk, block_size), whole), f"chunk {chunk}"


def test_a_mixed_batch_gives_each_sequence_what_it_gets_alone(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, num_key_value_heads=4)
    group = ThreadedGroup(path, tensor=2, pipeline=2)
    prompts = {i: tokens(length, seed=i) for i, length in enumerate((70, 33, 1, 16, 17, 90))}
    model = random_model(num_key_value_heads=4)
    expected = {i: reference(model, prompt) for i, prompt in prompts.items()}
    blocks = Blocks(64, 16)
    found: dict[int, list[torch.Tensor]] = {i: [] for i in prompts}
    past = dict.fromkeys(prompts, 0)
    # Sequences begin at different steps and bring 1, 7 or 64 tokens: every batch mixes chunks and single tokens.
    steps = 0
    while any(past[i] < len(prompts[i]) for i in prompts):
        work = []
        for i, prompt in prompts.items():
            new = prompt[past[i] :][: (1, 7, 64)[(i + steps) % 3]]
            if new and steps >= i:
                work.append((i, new, past[i]))
        logits = group.forward(make_batch(blocks, work))
        row = 0
        for i, new, _ in work:
            found[i].append(logits[row : row + len(new)])
            row += len(new)
            past[i] += len(new)
        steps += 1
    for i in prompts:
        torch.testing.assert_close(torch.cat(found[i]), expected[i], atol=LIMIT, rtol=0)


def test_only_the_rows_asked_for_are_returned_even_none(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    prompt = tokens(40)
    expected = reference(random_model(), prompt)
    for tensor in (1, 4):
        group = ThreadedGroup(path, tensor=tensor)
        blocks = Blocks(64, 16)
        none = group.forward(make_batch(blocks, [(0, prompt[:30], 0)], logits=[]))
        assert none.shape == (0, group.shape.vocab_size)
        some = group.forward(make_batch(blocks, [(0, prompt[30:], 30)], logits=[2, 9]))
        torch.testing.assert_close(some, expected[[32, 39]], atol=LIMIT, rtol=0)


def test_several_threads_give_the_bits_of_one(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    prompt = tokens(100)
    one, three = ThreadedGroup(path), ThreadedGroup(path, threads=3)
    try:
        for chunk in (1, 64):
            assert torch.equal(run_in_chunks(one, prompt, chunk), run_in_chunks(three, prompt, chunk))
    finally:
        three.close()


def test_greedy_decoding_follows_transformers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    prompt = tokens(20)
    ids = (
        random_model()
        .generate(torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)[0]
        .tolist()
    )
    group = ThreadedGroup(path, tensor=2)
    blocks = Blocks(64, 16)
    found = list(prompt)
    logits = group.forward(make_batch(blocks, [(0, found, 0)], logits=[len(found) - 1]))
    while len(found) < len(ids):
        logits[0, TINY["eos_token_id"]] = -torch.inf  # as min_new_tokens asks of transformers
        found.append(int(logits[0].argmax()))
        logits = group.forward(make_batch(blocks, [(0, found[-1:], len(found) - 1)]))
    assert found == ids


@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_a_sliding_window_equals_mistrals(tmp_path: Path, window: int) -> None:
    # transformers' Llama ignores the field; its Mistral is the same network and honours it.
    path = make_checkpoint(tmp_path, sliding_window=window)
    fields = {**TINY, "sliding_window": window}
    del fields["attention_bias"], fields["mlp_bias"]
    mistral = MistralForCausalLM(MistralConfig(**fields, attn_implementation="eager")).eval().requires_grad_(False)
    mistral.load_state_dict(random_model().state_dict())
    prompt = tokens(LENGTH)
    group = ThreadedGroup(path)
    assert group.shape.sliding_window == window
    for chunk in (1, 7, LENGTH):
        found = run_in_chunks(group, prompt, chunk)
        torch.testing.assert_close(found, reference(mistral, prompt), atol=LIMIT, rtol=0)


def test_bfloat16_errs_at_most_twice_as_much_as_transformers(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 320}
    path = make_checkpoint(tmp_path, dtype=torch.bfloat16, **shape)
    half = random_model(dtype=torch.bfloat16, **shape)
    prompt = tokens(LENGTH)
    theirs = reference(half, prompt)
    exact = reference(half.float(), prompt)
    for tensor, pipeline in ((1, 1), (2, 3)):
        group = ThreadedGroup(path, tensor=tensor, pipeline=pipeline, dtype=torch.bfloat16)
        ours = run_in_chunks(group, prompt, 64)
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
        assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()
