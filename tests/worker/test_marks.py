"""Marks on blocks: what is told is what is held, and it goes with its last block."""

from __future__ import annotations

import random

from tests.worker.scheduler_model import Harness
from tests.worker.test_blocks import SIZE, cached, keys_of

from arriero_worker.engine.blocks import BlockPool
from arriero_worker.engine.marks import MarkNews, Marks


def test_a_mark_is_told_once_and_goes_with_its_last_block() -> None:
    marks = Marks(limit=4)
    marks.attach(1, 77)
    marks.attach(1, 77)
    marks.attach(2, 77)
    assert marks.take() == MarkNews(False, [77], [])
    assert marks.take() is None
    marks.drop(1)
    assert marks.take() is None
    marks.drop(2)
    marks.drop(3)
    assert marks.take() == MarkNews(False, [], [77])
    assert not marks.held


def test_what_comes_and_goes_between_two_looks_is_no_news() -> None:
    marks = Marks(limit=4)
    marks.attach(1, 5)
    marks.drop(1)
    assert marks.take() is None
    marks.attach(1, 5)
    marks.take()
    marks.drop(1)
    marks.attach(2, 5)
    assert marks.take() is None
    assert set(marks.held) == {5}


def test_a_block_carries_the_latest() -> None:
    marks = Marks(limit=2)
    for mark in (1, 2, 3):
        marks.attach(9, mark)
    assert marks.take() == MarkNews(False, [2, 3], [])
    marks.attach(9, 1)
    assert marks.take() == MarkNews(False, [1], [2])


def test_a_reset_is_told_with_what_came_after_it() -> None:
    marks = Marks(limit=2)
    marks.reset()
    assert marks.take() is None, "nothing was held"
    marks.attach(1, 5)
    marks.attach(2, 6)
    marks.take()
    marks.drop(2)
    marks.reset()
    marks.attach(3, 7)
    assert marks.take() == MarkNews(True, [7], [])
    assert set(marks.held) == {7}


def test_random_use_agrees_with_counting_by_hand(seed: int, campaign: int) -> None:
    for trace in range(50 * campaign):
        rng = random.Random(seed + trace)
        marks, told = Marks(limit=3), set[int]()
        by_hand: dict[int, list[int]] = {}
        for _ in range(300):
            block, mark, chance = rng.randrange(6), rng.randrange(9), rng.random()
            if chance < 0.7:
                marks.attach(block, mark)
                carried = by_hand.setdefault(block, [])
                if mark not in carried:
                    by_hand[block] = [*carried, mark][-3:]
            elif chance < 0.99:
                marks.drop(block)
                by_hand.pop(block, None)
            else:
                marks.reset()
                by_hand.clear()
            if rng.random() < 0.4:
                news = marks.take() or MarkNews(False, [], [])
                told = set() if news.reset else told
                assert not told & set(news.added)
                assert told >= set(news.removed)
                told = (told | set(news.added)) - set(news.removed)
                assert told == set(marks.held) == {mark for carried in by_hand.values() for mark in carried}


def test_a_pool_marks_the_block_that_its_cache_has() -> None:
    pool = BlockPool(3)
    tokens = list(range(SIZE))
    first, second = cached(pool, tokens), cached(pool, tokens)  # computed twice: the first is the cached one
    pool.mark(keys_of(tokens)[0], 5)
    pool.mark(keys_of([9] * SIZE)[0], 6)
    assert pool.marks.take() == MarkNews(False, [5], [])
    pool.release(second)
    pool.allocate(2)
    assert pool.marks.take() is None
    pool.release(first)
    assert pool.marks.take() is None, "it rests, and can be found"
    pool.allocate(1)
    assert pool.marks.take() == MarkNews(False, [], [5])


class TestScheduler:
    """Marks every 4 tokens in blocks of 4, unless a test says otherwise."""

    def test_marks_are_there_once_their_blocks_are(self) -> None:
        harness = Harness()
        id_ = harness.submit([1] * 10, max_tokens=3, stride=4)
        assert not harness.told
        harness.schedule()
        assert harness.told == {mark for _depth, mark in harness.taken[id_].marks}
        assert len(harness.told) == 2

    def test_a_mark_in_a_block_that_decodes_fill_comes_when_it_is_full(self) -> None:
        harness = Harness()
        id_ = harness.submit([1] * 10, max_tokens=6, stride=5)
        harness.step()
        assert len(harness.told) == 1
        harness.finish()
        harness.check()
        assert harness.told == {mark for _depth, mark in harness.taken[id_].marks}

    def test_a_hit_marks_what_it_found(self) -> None:
        """A prompt that continues an answer: its text was not known when the blocks were filled."""
        harness = Harness()
        first = harness.submit([1] * 8, max_tokens=9)
        harness.finish()
        assert not harness.told
        prompt = [1] * 8 + harness.received[first]
        second = harness.submit([*prompt, 3], max_tokens=1, stride=4)
        harness.finish()
        harness.check()
        assert harness.cached[second] == 16
        assert len(harness.told) == len(harness.taken[second].marks) == 4

    def test_eviction_takes_marks_from_the_end(self) -> None:
        harness = Harness(kv_blocks=6)
        id_ = harness.submit([1] * 16, max_tokens=1, stride=4)
        harness.finish()
        marks = [mark for _depth, mark in harness.taken[id_].marks]
        assert harness.told == set(marks)
        harness.submit([2] * 15, max_tokens=1)
        harness.finish()
        harness.check()
        assert harness.told == set(marks[:2])

    def test_losing_a_rank_loses_all_and_recomputing_brings_it_back(self) -> None:
        harness = Harness()
        harness.submit([1] * 10, max_tokens=3, stride=4)
        harness.step()
        before = set(harness.told)
        harness.reset()
        assert not harness.told
        harness.finish()
        harness.check()
        assert harness.told == before

    def test_without_a_prefix_cache_there_are_none(self) -> None:
        harness = Harness(prefix_cache=False)
        harness.submit([1] * 10, max_tokens=8, stride=4)
        harness.finish()
        harness.check()
        assert not harness.told

    def test_depths_outside_the_prompt_are_refused(self) -> None:
        harness = Harness()
        for marks in ([(0, 5)], [(1, 5), (4, 6)], [(2, 5), (1, 6)]):
            id_ = harness.submit([1] * 3, marks=marks)
            assert harness.ended[id_] == "refused: invalid"
