"""KV blocks: who holds which, and which ones hold a prefix worth keeping.

A block is free, or held by one or more sequences. A full block whose content is known is also in the prefix cache,
under its key. A cached block that nobody holds counts as available: it is evicted, least recently used first, when no
empty block is left.

A key names the whole prefix up to the block's end: blake2b (128 bits) over the key of the block before and this
block's tokens; the chain begins with a keyed hash of the request's cache salt under a secret of this process. So a
look-up need not compare tokens: neither chance (below 2^-60 for billions of blocks) nor a client who chooses tokens
can make two prefixes share a key. Python's own `hash` of a tuple of integers is neither wide nor secret; half a
microsecond per block is well spent.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from arriero_worker.engine.marks import Marks

_SECRET = secrets.token_bytes(32)
_KEY_BYTES = 16


def next_key(key: bytes, data: bytes) -> bytes:
    """The key of the block behind that of `key`; `data` are its tokens' bytes."""
    return blake2b(key + data, digest_size=_KEY_BYTES).digest()


def extend_keys(keys: list[bytes], tokens: array[int], block_size: int, count: int, salt: str) -> None:
    """Bring `keys`, the chain of keys of the full blocks of `tokens`, to `count` blocks.

    `tokens` are C ints and hold at least `count * block_size`; `salt` separates callers who must not share blocks.
    """
    if len(keys) >= count:
        return
    key = keys[-1] if keys else blake2b(salt.encode(), digest_size=_KEY_BYTES, key=_SECRET).digest()
    data = tokens[len(keys) * block_size : count * block_size].tobytes()
    width = block_size * tokens.itemsize
    for start in range(0, len(data), width):
        key = next_key(key, data[start : start + width])
        keys.append(key)


class BlockPool:
    """The blocks 0 .. `size` - 1 of one replica; every rank holds the same ids."""

    __slots__ = ("_cached", "_free", "_idle", "_key", "_references", "marks", "size")

    def __init__(self, size: int, marks_per_block: int = 16) -> None:
        self.size = size
        self.marks = Marks(marks_per_block)
        """Of the cached blocks."""
        self.reset()

    def reset(self) -> None:
        """Forget everything: all blocks are free and the prefix cache is empty."""
        self._free = list(range(self.size - 1, -1, -1))
        self._references = [0] * self.size
        self._key: list[bytes | None] = [None] * self.size
        self._cached: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody holds, least recently used first."""
        self.marks.reset()

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.size - len(self._free) - len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, at most `available`; cached content is given up where no empty block is left."""
        blocks = []
        marked = self.marks.of
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _nothing = self._idle.popitem(last=False)
                key = self._key[block]
                assert key is not None
                del self._cached[key]
                self._key[block] = None
                if block in marked:
                    self.marks.drop(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Sequence[bytes], limit: int) -> list[int]:
        """The blocks of the longest cached prefix of `keys`, `limit` at most. Holds none of them."""
        blocks = []
        for index in range(min(limit, len(keys))):
            block = self._cached.get(keys[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these cached blocks nobody holds, so that holding them makes fewer available."""
        return sum(1 for block in blocks if not self._references[block])

    def hold(self, blocks: Sequence[int]) -> None:
        """Share cached blocks, as `match` found them."""
        for block in blocks:
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1

    def publish(self, keys: Sequence[bytes], blocks: Sequence[int], start: int, stop: int) -> None:
        """Put blocks [start, stop) of a sequence into the cache; a key that is there already keeps its block."""
        for index in range(start, stop):
            self.put(keys[index], blocks[index])

    def put(self, key: bytes, block: int) -> None:
        """Put one held block into the cache; a key that is there already keeps its block."""
        if key not in self._cached:
            self._cached[key] = block
            self._key[block] = key

    def mark(self, key: bytes, mark: int) -> None:
        """Let the cached block of `key` carry a mark; without effect where there is none."""
        block = self._cached.get(key)
        if block is not None:
            self.marks.attach(block, mark)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back what one sequence held, its last block first: a prefix outlives what continues it."""
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if not references[block]:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None
