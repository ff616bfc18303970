"""Sampling: the numbers drawn, the distributions they give, and what a token may depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.worker import sampling_reference as reference

from arriero_worker.engine.messages import SamplingParams
from arriero_worker.engine.step import Admit, Chunk, Grow, StepPlan
from arriero_worker.runner import random
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.filters import filter_rows
from arriero_worker.runner.logprobs import logprobs
from arriero_worker.runner.results import Logprobs, ResultLayout, blank, decode, encode
from arriero_worker.runner.sampler import Sampler

VOCAB = 300  # more than one tile, not a multiple of one


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=100, **fields)


class Rows:
    """Sequences in slots, all sampled in one step; the first half of each one's tokens is its prompt."""

    def __init__(
        self,
        samplings: Sequence[SamplingParams],
        tokens: Sequence[list[int]],
        vocab: int = VOCAB,
        prompt_length: int = 0,
    ) -> None:
        count = len(tokens)
        self.vocab = vocab
        self.prompt_lengths = [prompt_length or max(len(t) // 2, 1) for t in tokens]
        self.state = BatchState(count, 400, 16)
        self.sampler = Sampler(self.state, vocab)
        self.plan = StepPlan(
            0,
            chunks=[Chunk(i, 0, len(tokens[i]), True, samplings[i].prompt_logprobs >= 0) for i in range(count)],
            grows=[Grow(i, list(range(25))) for i in range(count)],
            admits=[Admit(i, tokens[i], self.prompt_lengths[i], samplings[i]) for i in range(count)],
        )
        self.step = self.state.apply(self.plan)
        tops = self.state.logprobs_S[self.step.slots_N]
        asked = np.flatnonzero(tops >= 0)
        self.layout = ResultLayout(0, self.step.slots_N, asked, tops[asked].tolist(), self.step.prompts, vocab)

    def sample(self, logits_NV: np.ndarray, prompts_V: np.ndarray | None = None) -> tuple[list[int], Logprobs | None]:
        """Every prompt row has the logits `prompts_V`."""
        prompt_rows = len(self.step.forward.logits_rows_R) - len(logits_NV)
        prompts_V = np.zeros(self.vocab, dtype=np.float32) if prompts_V is None else prompts_V
        logits = np.concatenate([logits_NV, np.repeat(prompts_V[None], prompt_rows, axis=0)])
        self.sampler.admit(self.plan.admits)
        tokens, found = self.sampler.sample(self.step, self.layout, torch.from_numpy(logits))
        return tokens.tolist(), found


def sample(samplings: Sequence[SamplingParams], tokens: Sequence[list[int]], logits_NV: np.ndarray) -> list[int]:
    return Rows(samplings, tokens, logits_NV.shape[1]).sample(logits_NV)[0]


def draws(logits: np.ndarray, sampling: SamplingParams, count: int, first: int = 0) -> np.ndarray:
    """One row's tokens at `count` positions."""
    rows = np.repeat(logits[None].astype(np.float32), count, axis=0)
    filter_rows(
        rows,
        np.full(count, sampling.temperature, dtype=np.float32),
        np.full(count, sampling.top_k),
        np.full(count, sampling.top_p, dtype=np.float64),
        np.full(count, sampling.min_p, dtype=np.float64),
    )
    tokens = np.empty(count, dtype=np.int64)
    random.choose(rows, np.full(count, sampling.seed, dtype=np.uint64), np.arange(first, first + count), tokens)
    return tokens


def assert_fits(observed: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square at about four standard deviations; nothing where the expected chance is 0."""
    assert observed[expected == 0].sum() == 0
    expected = expected * observed.sum()
    big = expected >= 5
    o = np.append(observed[big], observed[~big].sum())
    e = np.append(expected[big], expected[~big].sum())
    o, e = o[e > 0], e[e > 0]
    degrees = len(e) - 1
    statistic = float(((o - e) ** 2 / e).sum())
    assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 4, f"chi-square {statistic:.1f}, {degrees} degrees"


# The numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    """The known-answer vectors of the authors' Random123."""
    words = [np.uint32(int(word, 16)) for word in (counter + " " + key).split()]
    assert [f"{int(word):08x}" for word in random.philox(*words)] == expected.split()
    numbers = [int(word) for word in words]
    assert [f"{word:08x}" for word in reference.philox(numbers[:4], numbers[4:])] == expected.split()


def edge_words() -> np.ndarray:
    edges = [0, 1, 2, 3, 2**24, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    some = np.random.default_rng(5).integers(0, 2**32, 20_000)
    return np.concatenate([edges, some, some >> 16, some >> 28, 2**32 - 1 - (some >> 20)]).astype(np.uint32)


def test_gumbel_numbers_are_those_of_the_stated_recipe_bit_for_bit() -> None:
    words = edge_words()
    ours = np.array([random.gumbel(word) for word in words], dtype=np.float32)
    np.testing.assert_array_equal(ours, reference.gumbel(words))


def test_gumbel_numbers_are_accurate() -> None:
    words = edge_words()
    exact = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) / 2**32))
    ours = reference.gumbel(words)
    assert np.abs(ours - exact).max() < 2e-6
    assert ours.max() < 22.88  # what `choose` skips tiles by


@pytest.mark.parametrize("vocab", [1, 3, 255, 256, 257, 1030])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, 0x0123456789ABCDEF])
def test_the_choice_is_the_best_score_of_all_tokens(vocab: int, seed: int) -> None:
    rng = np.random.default_rng(vocab)
    positions = np.array([0, 1, 17, 131071, 2**32 + 5, 3, 4, 5], dtype=np.int64)
    depths = (rng.exponential(3.0, (len(positions), vocab))).astype(np.float32)
    depths[2] = 0
    depths[5, rng.random(vocab) < 0.9] = np.inf
    depths[6] = np.float32(1e30)
    depths[:, 0] = np.minimum(depths[:, 0], 30)
    tokens = np.empty(len(positions), dtype=np.int64)
    random.choose(depths, np.full(len(positions), seed % 2**64, dtype=np.uint64), positions, tokens)
    for row, position in enumerate(positions.tolist()):
        scores = reference.gumbel(reference.words(seed, position, vocab)) - depths[row]
        assert tokens[row] == scores.argmax(), f"row {row}"


def test_no_token_left_gives_token_0() -> None:
    tokens = np.full(1, -1, dtype=np.int64)
    random.choose(np.full((1, 5), np.inf, dtype=np.float32), np.zeros(1, np.uint64), np.zeros(1, np.int64), tokens)
    assert tokens.tolist() == [0]


# The distributions


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.85, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(fields: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).normal(size=60).astype(np.float32) * 1.5
    sampling = params(seed=99, **fields)
    observed = np.bincount(draws(logits, sampling, 40_000), minlength=60)
    assert_fits(observed, reference.probabilities(logits, sampling))


def test_flat_and_steep_rows_follow_their_distribution() -> None:
    assert_fits(np.bincount(draws(np.zeros(1000), params(seed=1), 50_000), minlength=1000), np.full(1000, 1e-3))
    steep = np.array([0.0, -7.0, -3.0])
    assert_fits(np.bincount(draws(steep, params(seed=2), 200_000), minlength=3), np.exp(steep) / np.exp(steep).sum())


@pytest.mark.parametrize("pair", ["positions", "seeds", "seeds' high halves"])
def test_neighbouring_draws_are_independent(pair: str) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    first = draws(logits, params(seed=7), 30_000)
    other = {
        "positions": lambda: draws(logits, params(seed=7), 30_000, first=1),
        "seeds": lambda: draws(logits, params(seed=8), 30_000),
        "seeds' high halves": lambda: draws(logits, params(seed=7 + 2**32), 30_000),
    }[pair]()
    observed = np.bincount(first * 3 + other, minlength=9)
    # Overlapping pairs of positions are not independent samples of the pair; every second one is.
    if pair == "positions":
        observed = np.bincount((first * 3 + other)[::2], minlength=9)
    p = np.exp(logits)
    assert_fits(observed, np.outer(p, p).reshape(-1))


def test_last_bits_of_logits_hardly_ever_matter() -> None:
    """With 128,256 tokens, noise of 1e-5 changes at most a few of 1,000 choices (the bound is 2e-5 each)."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=128_256).astype(np.float32) * 2
    noisy = logits + rng.uniform(-1e-5, 1e-5, logits.shape).astype(np.float32)
    assert (draws(logits, params(seed=3), 300) == draws(noisy, params(seed=3), 300)).all()


# The filters


def sampling_strategy() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        params,
        seed=st.integers(-(2**63), 2**64 - 1),
        temperature=st.sampled_from([0.0, 1e-30, 1e-6, 0.3, 1.0, 1.5, 50.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 40, VOCAB - 1, VOCAB, VOCAB + 1, 10**6]),
        top_p=st.sampled_from([1.0, 1.0, 0.0, 1e-6, 0.31, 0.9, 0.99999]),
        min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        presence_penalty=st.sampled_from([0.0, 1.1, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.5]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=3),
        min_tokens=st.integers(0, 6),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True).map(tuple),
        logprobs=st.sampled_from([-1, -1, 0, 3, 20]),
        prompt_logprobs=st.sampled_from([-1, -1, 0, 5]),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sampling=sampling_strategy(),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
)
def test_a_row_is_sampled_as_documented(sampling: SamplingParams, tokens: list[int], seed: int, ties: bool) -> None:
    logits = (np.random.default_rng(seed).normal(size=VOCAB) * 3).astype(np.float32)
    if ties:
        logits = np.round(logits)
    expected = reference.sample(logits, tokens, max(len(tokens) // 2, 1), sampling)
    assert sample([sampling], [tokens], logits[None]) == [expected]


@pytest.mark.parametrize(
    "fields", [{"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.0}, {"min_p": 0.9}, {"top_k": 1}], ids=str
)
def test_equal_logits_are_kept_by_their_ids(fields: dict[str, Any]) -> None:
    logits = np.array([1, 3, 3, 3, 3, 3, 3, 3, 3, 2], dtype=np.float32)
    sampling = params(seed=4, **fields)
    seen = set(draws(logits, sampling, 2000).tolist())
    assert seen == set(np.flatnonzero(reference.probabilities(logits, sampling)).tolist())
    assert seen <= set(range(1, 9))


def test_filters_hold_on_a_real_vocabulary() -> None:
    """Nucleus and top-k sets of 128,256 tokens, against a sort in float64."""
    logits = (np.random.default_rng(9).normal(size=128_256) * 2).astype(np.float32)
    for fields in ({"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.7, "temperature": 0.7}):
        sampling = params(**fields)
        depths = logits[None].copy()
        one = np.ones(1)
        filter_rows(
            depths,
            one.astype(np.float32) * np.float32(sampling.temperature),
            np.array([sampling.top_k]),
            one * sampling.top_p,
            one * sampling.min_p,
        )
        expected = reference.filtered(logits, sampling)
        # float32 weights may move the border of the nucleus by a token or two of tens of thousands.
        assert (np.isfinite(depths[0]) != np.isfinite(expected)).sum() <= 2, fields
        both = np.isfinite(depths[0]) & np.isfinite(expected)
        np.testing.assert_array_equal(depths[0][both], expected[both])


def test_broken_logits_do_not_break_the_batch() -> None:
    """Infinite and undefined logits: a defined token each, and no exclusion of the rows around."""
    logits = np.zeros((5, VOCAB), dtype=np.float32)
    logits[0, 7] = np.inf
    logits[1, :] = -np.inf
    logits[2, :] = np.nan
    logits[3, :] = np.nan
    logits[3, 11] = 0.0
    logits[4] = np.arange(VOCAB)
    logits[4] -= logits[4].max()
    samplings = [params(seed=3, top_p=0.9, top_k=50, min_p=0.01)] * 5
    found = sample(samplings, [[1]] * 5, logits)
    assert found[0] == 7
    assert 0 <= found[1] < VOCAB
    assert found[2] == 0
    assert found[3] == 11
    assert found[4] == reference.sample(logits[4], [1], 1, samplings[4])


# Greedy, penalties, bias, bans


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = np.zeros((2, VOCAB), dtype=np.float32)
    logits[0, [200, 77, 290]] = 5
    assert sample([params(temperature=0)] * 2, [[1], [1]], logits) == [77, 0]


def test_greedy_ignores_seed_and_filters() -> None:
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    many = [params(temperature=0, seed=s, top_k=2, top_p=0.1, min_p=0.5) for s in range(3)]
    assert sample(many, [[1]] * 3, logits) == logits.argmax(axis=1).tolist()


def test_penalties_follow_the_output_as_it_grows() -> None:
    """Counted token by token they give what counting anew gives (a preempted sequence is admitted again)."""
    logits = np.linspace(3, -3, 40, dtype=np.float32)
    sampling = params(temperature=0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3)
    tokens = [3, 39]
    state = BatchState(4, 400, 16)
    sampler = Sampler(state, 40)
    admit = Admit(2, list(tokens), 2, sampling)
    sampler.admit([admit])
    for number in range(300):
        decodes = np.array([2], dtype="<i4").tobytes()
        if number == 0:
            plan = StepPlan(0, b"", [Chunk(2, 0, 2, True)], [Grow(2, list(range(25)))], [admit])
        else:
            plan = StepPlan(number, decodes)
        step = state.apply(plan)
        layout = ResultLayout(number, step.slots_N, np.empty(0, dtype=np.int64), [], [], 40)
        token = int(sampler.sample(step, layout, torch.from_numpy(logits[None].copy()))[0][0])
        assert token == reference.sample(logits, tokens, 2, sampling), f"after {len(tokens) - 2} output tokens"
        if number % 10 == 0:
            assert Rows([sampling], [tokens], 40, prompt_length=2).sample(logits[None])[0] == [token]
        tokens.append(token)
    assert len(set(tokens[2:])) > 10


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    logits = np.zeros((1, 8), dtype=np.float32)
    logits[0, 5] = 1
    sampling = params(temperature=0, presence_penalty=2, frequency_penalty=2)
    assert sample([sampling], [[5, 5, 5, 1, 1, 1]], logits) == [5]
    assert sample([sampling], [[1, 1, 1, 5, 5, 5]], logits) == [0]


def test_no_stop_token_before_min_tokens() -> None:
    logits = np.zeros((1, 8), dtype=np.float32)
    logits[0, 5], logits[0, 6] = 9, 8
    sampling = params(temperature=0, min_tokens=3, stop_token_ids=(5, 6))
    assert sample([sampling], [[1, 2, 3, 4]], logits) == [0]  # two output tokens so far
    assert sample([sampling], [[1, 2, 3, 4, 1, 2]], logits) == [5]  # three


def test_bias_can_force_and_forbid() -> None:
    logits = np.random.default_rng(1).normal(size=(2, VOCAB)).astype(np.float32)
    forced, forbidden = (
        params(seed=1, logit_bias={17: 100.0}),
        params(seed=1, logit_bias=dict.fromkeys(range(299), -100.0)),
    )
    assert sample([forced, forbidden], [[1], [1]], logits) == [17, 299]


def test_tokens_beyond_the_vocabulary_are_passed_over() -> None:
    logits = np.zeros((1, 8), dtype=np.float32)
    sampling = params(temperature=0, logit_bias={8: 5.0, 3: 1.0}, min_tokens=5, stop_token_ids=(9, 3))
    assert sample([sampling], [[1]], logits) == [0]


# What a token may depend on


@settings(max_examples=40, deadline=None, derandomize=True)
@given(samplings=st.lists(sampling_strategy(), min_size=2, max_size=12), seed=st.integers(0, 2**32), data=st.data())
def test_a_row_does_not_depend_on_its_batch(samplings: list[SamplingParams], seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(len(samplings), VOCAB)) * 3).astype(np.float32)
    tokens = [rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist() for _ in samplings]
    together = sample(samplings, tokens, logits)
    order = data.draw(st.permutations(range(len(samplings))))
    shuffled = sample([samplings[i] for i in order], [tokens[i] for i in order], logits[order])
    assert shuffled == [together[i] for i in order]
    alone = data.draw(st.integers(0, len(samplings) - 1))
    assert sample([samplings[alone]], [tokens[alone]], logits[alone][None]) == [together[alone]]


def test_layouts_of_memory_do_not_matter() -> None:
    """A tensor-parallel gather may leave padding behind each row."""
    logits = np.random.default_rng(2).normal(size=(3, VOCAB)).astype(np.float32)
    padded = torch.nn.functional.pad(torch.from_numpy(logits), (0, 20), value=99.0)[:, :VOCAB]
    samplings = [params(seed=s, top_p=0.9, logprobs=2) for s in range(3)]
    plain, strided = Rows(samplings, [[1]] * 3), Rows(samplings, [[1]] * 3)
    strided.sampler.admit(strided.plan.admits)
    found, logs = strided.sampler.sample(strided.step, strided.layout, padded)
    expected, expected_logs = plain.sample(logits)
    assert found.tolist() == expected
    assert logs is not None
    assert expected_logs is not None
    assert torch.equal(logs.values, expected_logs.values)


# Log-probabilities


def test_logprobs_are_of_the_raw_distribution() -> None:
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(4, VOCAB)) * 2).astype(np.float32)
    samplings = [
        params(seed=1, logprobs=5, temperature=0.1, top_k=3, repetition_penalty=1.5),
        params(seed=2),
        params(temperature=0, logprobs=0, logit_bias={8: 100.0}),
        params(seed=3, logprobs=2, prompt_logprobs=4, presence_penalty=1.0),
    ]
    prompt_logits = rng.normal(size=VOCAB).astype(np.float32)
    rows = Rows(samplings, [[5, 6, 7], [1], [2], [9, 8, 7, 6, 5, 4, 3]])
    tokens, found = rows.sample(logits, prompt_logits)
    result = decode(rows.layout, encode(rows.layout, np.array(tokens), found))
    assert result.tokens == tokens
    assert tokens[2] == 8
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    assert [entry.index for entry in result.logprobs] == [0, 2, 3]
    for entry, top in zip(result.logprobs, (5, 0, 2), strict=True):
        row = expected[entry.index]
        assert entry.token == tokens[entry.index]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert entry.rank == 1 + int((row > row[entry.token]).sum())
        values, ids = row.topk(top)
        assert entry.top_ids == ids.tolist()
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)
    [(slot, positions)] = result.prompt_logprobs
    assert slot == 3
    assert [(entry.index, entry.token) for entry in positions] == [(1, 8), (2, 7)]  # of a prompt of three
    row = torch.log_softmax(torch.from_numpy(prompt_logits).double(), -1)
    for entry in positions:
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert entry.top_ids == row.topk(4).indices.tolist()


def test_ranks_and_highest_order_equal_logits_by_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    for top in (0, 2, 4, 5, 9):
        found = [logprobs(logits, np.array([token]), top) for token in range(5)]
        assert [int(one.ids[0, 1]) for one in found] == [5, 1, 2, 4, 3]
        assert all(one.ids[0, 2:].tolist() == [1, 2, 4, 3, 0][:top] for one in found)


@pytest.mark.parametrize("top", [1, 20, 64, 65, 1000])
def test_highest_tokens_of_many_rows(top: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(8).integers(0, 300, (130, 1000)).astype(np.float32))
    found = logprobs(logits, np.arange(130), top)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    assert torch.equal(found.ids[:, 2:], order[:, :top])
    expected = torch.log_softmax(logits, -1).gather(1, order[:, :top])
    torch.testing.assert_close(found.values[:, 1:], expected, atol=2e-5, rtol=0)


# On the wire between stages


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samplings=st.lists(sampling_strategy(), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_both_ends_know_the_shapes(samplings: list[SamplingParams], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist() for _ in samplings]
    rows = Rows(samplings, tokens)
    found, logs = rows.sample(rng.normal(size=(len(samplings), VOCAB)).astype(np.float32))
    sent = encode(rows.layout, np.array(found), logs)
    room = blank(rows.layout)
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in room]
    for target, source in zip(room, sent, strict=True):
        target.copy_(source)
    assert decode(rows.layout, room) == decode(rows.layout, sent)
    assert (len(sent) > 1) == any(
        s.logprobs >= 0 or (s.prompt_logprobs >= 0 and length > 1)
        for s, length in zip(samplings, rows.prompt_lengths, strict=True)
    )


def test_results_of_another_step_are_noticed() -> None:
    rows = Rows([params(temperature=0)], [[1]])
    sent = encode(rows.layout, np.array([3]), None)
    sent[0][0] += 1
    with pytest.raises(AssertionError, match="expected the results of step 0, got those of step 1"):
        decode(rows.layout, sent)
