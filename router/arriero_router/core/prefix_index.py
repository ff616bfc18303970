"""Which replica holds how much of a prompt: marks of prefixes (`arriero_faces.prefix`) -> replicas, a bit each.

A replica's entries are of two kinds:

- *told*: the replica itself said so (`reset`, then `add` and `remove`). They are exact, and only its word ends them.
- *expected*: this process sent the prompt there (`expect`). On a watched replica they stand in until its word comes,
  and after `patience` seconds without it they are dropped. On one that nobody watches they are all there is: the most
  recently used `guesses` of them, less what its answers prove wrong (`missed`).

Memory is bounded by `limit` marks, whoever holds them; the least recently used give way, a prompt's last chunks first.
So the index may know less than there is, and where it was told, never more.

Nothing here takes long: the marks lie in shards of at most `SHARD` each, so that a dict that grows copies few at once,
and a forgotten replica's entries are swept shard by shard, by the calls that follow.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

SHARD = 1024


class _Life:
    """What is known of the replica that has a slot now. Another replica in the slot is another life."""

    __slots__ = ("bit", "expected", "watched")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.expected: OrderedDict[int, float] = OrderedDict()
        """Marks that are expected and not told -> when they were last; the least recent first."""
        self.watched = False


class PrefixIndex:
    def __init__(self, limit: int = 1 << 18, guesses: int = 1 << 14, patience: float = 30.0) -> None:
        """`limit`: marks in all, 120 to 200 bytes each. `guesses`: expected marks of a replica, a chunk of 256 bytes
        each. `patience`: seconds until an expected mark that a watched replica does not confirm is dropped.
        """
        if limit < 1 or guesses < 1 or patience <= 0:
            raise ValueError(f"limit, guesses and patience must be positive: {limit}, {guesses}, {patience}")
        count = 1
        while count * SHARD < limit:
            count *= 2
        self._guesses = guesses
        self._patience = patience
        self._shard_limit = max(1, limit // count)
        self._which = count - 1
        self._shards: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(count)]
        """By a mark's low bits: mark -> bits of the lives that have it; the least recently used first."""
        self._gets = [shard.get for shard in self._shards]
        self._lives: dict[int, _Life] = {}
        self._life_of: dict[int, _Life] = {}
        self._slot_of: dict[int, int] = {}
        self._alive = 0
        self._free_bits: list[int] = []
        self._next_bit = 1
        self._unswept = [0] * count
        """Bits of ended lives that may still stand in each shard."""
        self._to_sweep: deque[int] = deque()
        self._leftovers: dict[int, int] = {}
        """Bit of an ended life -> shards that may still have it."""
        self._aged = float("-inf")

    def __len__(self) -> int:
        """Marks kept, those not yet swept among them."""
        return sum(map(len, self._shards))

    def watched(self, slot: int) -> bool:
        """Whether the replica's own word is followed."""
        life = self._lives.get(slot)
        return life is not None and life.watched

    def match(self, marks: Sequence[int]) -> dict[int, int]:
        """Slot -> how many leading marks it holds without a gap; slots that lack the first are not in it."""
        held: dict[int, int] = {}
        gets, which = self._gets, self._which
        live = self._alive
        if not live:
            return held
        depth = 0
        for mark in marks:
            both = gets[mark & which](mark, 0) & live
            if both != live:
                if depth:
                    self._note(held, live ^ both, depth)
                live = both
                if not live:
                    return held
            depth += 1
        if depth:
            self._note(held, live, depth)
        return held

    def _note(self, held: dict[int, int], bits: int, depth: int) -> None:
        while bits:
            bit = bits & -bits
            held[self._slot_of[bit]] = depth
            bits ^= bit

    # What the replica says

    def reset(self, slot: int, marks: Sequence[int]) -> None:
        """The replica is watched from now on, and holds these marks and no other. Takes time for each mark: a long
        list is better given here in part and then to `add`, in pieces.
        """
        self.forget(slot)
        self._life(slot).watched = True
        self.add(slot, marks)

    def add(self, slot: int, marks: Sequence[int]) -> None:
        """The watched replica holds these, too. Does nothing without a `reset` before: it is late news of another."""
        life = self._lives.get(slot)
        if life is None or not life.watched:
            return
        self._sweep_next()
        bit, expected, which = life.bit, life.expected, self._which
        for mark in reversed(marks):
            at = mark & which
            shard = self._shards[at]
            shard[mark] = shard.get(mark, 0) | bit
            shard.move_to_end(mark)
            if expected:
                expected.pop(mark, None)
            if len(shard) > self._shard_limit:
                self._evict(at)

    def remove(self, slot: int, marks: Sequence[int]) -> None:
        """The watched replica holds these no longer."""
        life = self._lives.get(slot)
        if life is None or not life.watched:
            return
        self._sweep_next()
        for mark in marks:
            life.expected.pop(mark, None)
            self._clear(mark, life.bit)

    def unwatch(self, slot: int) -> None:
        """The replica's word is not followed any more, but it lives: what was told is believed until `reset`."""
        life = self._lives.get(slot)
        if life is not None:
            life.watched = False

    def forget(self, slot: int) -> None:
        """Nothing is known of the slot: its replica is gone, or was started again."""
        self._sweep_next()
        life = self._lives.pop(slot, None)
        if life is None:
            return
        bit = life.bit
        del self._slot_of[bit], self._life_of[bit]
        self._alive &= ~bit
        self._leftovers[bit] = len(self._shards)
        for at, unswept in enumerate(self._unswept):
            if not unswept:
                self._to_sweep.append(at)
            self._unswept[at] = unswept | bit

    # What this process expects

    def expect(self, slot: int, marks: Sequence[int], now: float) -> None:
        """A prompt with these marks was sent to the replica; `now` in seconds, never less than before."""
        if self._to_sweep:
            self._sweep_next()
        if now - self._aged >= 1:
            self.age(now)
        life = self._lives.get(slot) or self._life(slot)
        bit, expected, watched, which, shards = life.bit, life.expected, life.watched, self._which, self._shards
        for mark in reversed(marks):
            shard = shards[mark & which]
            bits = shard.get(mark)
            if bits is None:
                shard[mark] = bit
                expected[mark] = now
                if len(shard) > self._shard_limit:
                    self._evict(mark & which)
                continue
            shard.move_to_end(mark)
            if not bits & bit:
                shard[mark] = bits | bit
                expected[mark] = now
            elif not watched or mark in expected:
                expected[mark] = now
                expected.move_to_end(mark)
        while len(expected) > self._guesses:
            self._clear(expected.popitem(last=False)[0], bit)

    def age(self, now: float) -> None:
        """Drop what watched replicas should have confirmed by now. `expect` does so once a second."""
        self._aged = now
        due = now - self._patience
        for life in self._lives.values():
            expected = life.expected
            while life.watched and expected:
                mark = next(iter(expected))
                if expected[mark] > due:
                    break
                del expected[mark]
                self._clear(mark, life.bit)

    def guessed(self, slot: int, mark: int) -> float:
        """When a mark that is expected on a replica that nobody watches was last used there; else minus infinity."""
        life = self._lives.get(slot)
        return float("-inf") if life is None or life.watched else life.expected.get(mark, float("-inf"))

    def missed(self, slot: int, since: float) -> None:
        """The replica had evicted a prompt that it was last sent at `since`. A cache evicts what was used least
        recently: whatever it was not sent since then is gone, too.
        """
        life = self._lives.get(slot)
        if life is None or life.watched:
            return
        expected = life.expected
        while expected:
            mark = next(iter(expected))
            if expected[mark] > since:
                break
            del expected[mark]
            self._clear(mark, life.bit)

    # Bookkeeping

    def _life(self, slot: int) -> _Life:
        life = self._lives.get(slot)
        if life is None:
            if self._free_bits:
                bit = self._free_bits.pop()
            else:
                bit = self._next_bit
                self._next_bit <<= 1
            life = self._lives[slot] = self._life_of[bit] = _Life(bit)
            self._slot_of[bit] = slot
            self._alive |= bit
        return life

    def _clear(self, mark: int, bit: int) -> None:
        shard = self._shards[mark & self._which]
        bits = shard.get(mark, 0)
        if bits & bit:
            bits ^= bit
            if bits & self._alive:
                shard[mark] = bits
            else:
                del shard[mark]

    def _evict(self, at: int) -> None:
        """Make room in a shard that is over its limit: leftovers go before anything that is known."""
        if self._unswept[at]:
            self._sweep(at)
        shard = self._shards[at]
        while len(shard) > self._shard_limit:
            mark, bits = shard.popitem(last=False)
            while bits:
                bit = bits & -bits
                self._life_of[bit].expected.pop(mark, None)
                bits ^= bit

    def _sweep_next(self) -> None:
        while self._to_sweep:
            at = self._to_sweep.popleft()
            if self._unswept[at]:
                self._sweep(at)
                break

    def _sweep(self, at: int) -> None:
        shard, ended = self._shards[at], self._unswept[at]
        for mark, bits in [item for item in shard.items() if item[1] & ended]:
            if bits & ~ended:
                shard[mark] = bits & ~ended
            else:
                del shard[mark]
        self._unswept[at] = 0
        while ended:
            bit = ended & -ended
            self._leftovers[bit] -= 1
            if not self._leftovers[bit]:
                del self._leftovers[bit]
                self._free_bits.append(bit)
            ended ^= bit
