"""The prefix cache as sequences see it: what of theirs is there, what they add, and what is worth waiting for."""

from __future__ import annotations

from arriero_worker.engine.blocks import BlockPool, extend_keys, next_key
from arriero_worker.engine.sequence import NEVER, Sequence


class Prefixes:
    """Matches and publishes the full blocks of sequences in a `BlockPool`. Switched off, it finds and adds nothing."""

    __slots__ = ("_block_size", "_enabled", "_pool", "_promised")

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self._pool, self._block_size, self._enabled = pool, block_size, enabled
        self._promised: dict[bytes, Sequence] = {}
        """Keys of blocks that sequences in prefill will publish."""

    def reset(self) -> None:
        self._promised.clear()

    def match(self, sequence: Sequence) -> list[int] | None:
        """Its cached blocks, or None where waiting a step or so will bring many more.

        At least one token is left to compute: its logits choose the next. Where one that goes before it is just
        computing most of what it lacks (the same prompt, sampled several times), it waits for these blocks instead of
        computing them too. The first of all sequences waits for nobody.
        """
        if not self._enabled:
            return []
        size, tokens, keys = self._block_size, sequence.tokens, sequence.keys
        extend_keys(keys, tokens, size, len(tokens) // size, sequence.salt)
        if sequence.wants_prompt_logprobs:
            return []
        limit = (len(tokens) - 1) // size
        cached = self._pool.match(keys, limit)
        coming = 0
        for key in keys[len(cached) : limit]:
            owner = self._promised.get(key)
            if owner is None or owner.order > sequence.order:
                break
            coming += 1
        return None if 2 * coming * size > len(tokens) - len(cached) * size else cached

    def promise(self, sequence: Sequence) -> None:
        """It was admitted and will compute what it did not find. What it found is in its words, too, from now on."""
        if sequence.published * self._block_size >= sequence.mark_depth:
            self._mark(sequence)
        for key in sequence.keys[sequence.published :]:
            self._promised.setdefault(key, sequence)

    def publish(self, sequence: Sequence) -> None:
        """Offer its full blocks to others, from the next step on: every rank runs the steps in order."""
        if not self._enabled:
            return
        start, stop = sequence.published, sequence.full_blocks(self._block_size)
        if stop > start:
            if stop > len(sequence.keys):
                extend_keys(sequence.keys, sequence.tokens, self._block_size, stop, sequence.salt)
            self._pool.publish(sequence.keys, sequence.blocks, start, stop)
            if self._promised:
                self._forget(sequence, start, stop)
            sequence.published = stop
            if stop * self._block_size >= sequence.mark_depth:
                self._mark(sequence)

    def publish_grown(self, grown: list[tuple[Sequence, int]]) -> None:
        """`publish` for those of (sequence, run) that still run: in a decode step, one new full block each.

        One in `block_size` of all sequences passes here at every step, hence the short way for the usual case.
        """
        if not self._enabled:
            return
        size, put = self._block_size, self._pool.put
        for sequence, run in grown:
            if sequence.run != run:
                continue
            index, keys, tokens = sequence.published, sequence.keys, sequence.tokens
            start = index * size
            end = start + size
            if index and len(keys) == index and end < len(tokens) <= end + size and end < sequence.mark_depth:
                key = next_key(keys[-1], tokens[start:end].tobytes())
                keys.append(key)
                put(key, sequence.blocks[index])
                sequence.published = index + 1
            else:
                self.publish(sequence)

    def abandon(self, sequence: Sequence) -> None:
        """It leaves its slot: what it has not published it will not."""
        self._forget(sequence, sequence.published, len(sequence.keys))

    def _mark(self, sequence: Sequence) -> None:
        """Put those of its marks on their blocks that lie in what it has published, found ones included."""
        marks, keys, size = sequence.request.marks, sequence.keys, self._block_size
        end = sequence.published * size
        at = sequence.marked
        for depth, mark in marks[at:] if at else marks:
            if depth > end:
                sequence.mark_depth = depth
                break
            self._pool.mark(keys[(depth - 1) // size], mark)
            at += 1
        else:
            sequence.mark_depth = NEVER
        sequence.marked = at

    def _forget(self, sequence: Sequence, start: int, stop: int) -> None:
        for key in sequence.keys[start:stop]:
            if self._promised.get(key) is sequence:
                del self._promised[key]
