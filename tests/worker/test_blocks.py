"""What the block pool promises."""

from __future__ import annotations

import random
from array import array

from arriero_worker.engine.blocks import BlockPool, extend_keys

SIZE = 4


def keys_of(tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, array("i", tokens), SIZE, len(tokens) // SIZE, salt)
    return keys


def cached(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Blocks of a sequence that computed `tokens`, published them and still holds them."""
    keys = keys_of(tokens, salt)
    blocks = pool.allocate(len(keys))
    pool.publish(keys, blocks, 0, len(keys))
    return blocks


class TestKeys:
    def test_only_full_blocks_have_keys(self) -> None:
        assert len(keys_of([1, 2, 3])) == 0
        assert len(keys_of([1, 2, 3, 4, 5])) == 1

    def test_a_key_names_the_whole_prefix(self) -> None:
        here = keys_of([1, 2, 3, 4, 9, 9, 9, 9])
        there = keys_of([4, 3, 2, 1, 9, 9, 9, 9])
        assert here[1] != there[1]
        assert keys_of([1, 2, 3, 4, 9, 9, 9, 9, 7]) == here

    def test_salts_share_nothing(self) -> None:
        plain, salted = keys_of([1] * 8), keys_of([1] * 8, "tenant")
        assert not set(plain) & set(salted)

    def test_extending_in_parts_is_extending_at_once(self) -> None:
        tokens = array("i", range(20))
        keys: list[bytes] = []
        for count in (1, 1, 3, 2, 5):
            extend_keys(keys, tokens, SIZE, count, "s")
        assert keys == keys_of(list(range(20)), "s")

    def test_keys_are_128_bits(self) -> None:
        assert {len(key) for key in keys_of(list(range(40)))} == {16}


class TestPool:
    def test_what_is_released_can_be_allocated_again(self) -> None:
        pool = BlockPool(3)
        blocks = pool.allocate(3)
        assert sorted(blocks) == [0, 1, 2]
        assert (pool.used, pool.available) == (3, 0)
        pool.release(blocks[1:])
        assert (pool.used, pool.available) == (1, 2)
        assert sorted(pool.allocate(2)) == sorted(blocks[1:])

    def test_a_released_prefix_stays_found_until_its_blocks_are_needed(self) -> None:
        pool = BlockPool(4)
        blocks = cached(pool, list(range(8)))
        pool.release(blocks)
        assert pool.match(keys_of(list(range(8))), 9) == blocks
        assert pool.available == 4
        pool.allocate(2)  # there were two empty ones
        assert pool.match(keys_of(list(range(8))), 9) == blocks
        pool.allocate(2)
        assert pool.match(keys_of(list(range(8))), 9) == []

    def test_a_prefix_is_evicted_from_its_end(self) -> None:
        pool = BlockPool(3)
        blocks = cached(pool, list(range(12)))
        pool.release(blocks)
        assert pool.allocate(1) == [blocks[2]]
        assert pool.match(keys_of(list(range(12))), 9) == blocks[:2]

    def test_the_least_recently_used_prefix_is_evicted_first(self) -> None:
        pool = BlockPool(3)
        first, second, third = (cached(pool, [i] * SIZE) for i in range(3))
        for blocks in (first, second, third):
            pool.release(blocks)
        pool.hold(first)
        pool.release(first)
        assert pool.allocate(2) == second + third

    def test_a_shared_block_is_free_when_its_last_holder_goes(self) -> None:
        pool = BlockPool(2)
        blocks = cached(pool, [1] * SIZE)
        assert pool.idle(blocks) == 0
        pool.hold(blocks)
        assert pool.used == 1
        pool.release(blocks)
        assert pool.used == 1
        pool.release(blocks)
        assert pool.used == 0
        assert pool.idle(blocks) == 1

    def test_a_match_ends_at_the_first_gap_and_at_the_limit(self) -> None:
        pool = BlockPool(4)
        tokens = list(range(16))
        keys, blocks = keys_of(tokens), pool.allocate(4)
        pool.publish(keys, blocks, 0, 2)
        pool.publish(keys, blocks, 3, 4)
        assert pool.match(keys, 4) == blocks[:2]
        assert pool.match(keys, 1) == blocks[:1]

    def test_computing_a_prefix_twice_keeps_the_first_and_frees_the_second(self) -> None:
        pool = BlockPool(2)
        first, second = cached(pool, [1] * SIZE), cached(pool, [1] * SIZE)
        assert pool.match(keys_of([1] * SIZE), 1) == first
        pool.release(second)
        assert pool.allocate(1) == second
        assert pool.match(keys_of([1] * SIZE), 1) == first

    def test_reset_forgets_everything(self) -> None:
        pool = BlockPool(2)
        cached(pool, [1] * SIZE)
        pool.reset()
        assert (pool.used, pool.available) == (0, 2)
        assert pool.match(keys_of([1] * SIZE), 1) == []


def test_random_use_agrees_with_counting_by_hand(campaign: int, seed: int) -> None:
    """The plainest possible pool beside it: a list of holders, and what each block contains."""
    for trace in range(100 * campaign):
        rng = random.Random(seed + trace)
        pool = BlockPool(rng.randint(1, 12))
        held: list[list[int]] = []
        contents: dict[int, bytes] = {}
        for _ in range(200):
            if rng.random() < 0.5:
                keys = keys_of(rng.choices(range(2), k=rng.randint(0, 4) * SIZE))
                shared = pool.match(keys, len(keys))
                assert [contents[block] for block in shared] == keys[: len(shared)]
                fresh = len(keys) - len(shared)
                if fresh + pool.idle(shared) > pool.available:
                    continue
                pool.hold(shared)
                blocks = shared + pool.allocate(fresh)
                contents.update(zip(blocks, keys, strict=True))
                pool.publish(keys, blocks, len(shared), len(keys))
                held.append(blocks)
            elif held:
                pool.release(held.pop(rng.randrange(len(held))))
            assert pool.used == len({block for blocks in held for block in blocks})
            assert pool.available == pool.size - pool.used
        for blocks in held:
            pool.release(blocks)
        assert pool.available == pool.size
