"""Decoding sequences, in columns.

With `pipeline` P there are P lanes, and step n decodes every sequence of lane n % P: so a sequence is fed the token
it sampled P steps before, which has come back from the last stage by then. A decode step must not cost Python per
sequence: a lane holds columns that a step copies whole, and a timer that fires for the few sequences that need
something else.
"""

from __future__ import annotations

from array import array

from arriero_worker.engine.sequence import Sequence


class Lane:
    """Rows of decoding sequences in columns: `slots`, `ids`, `tokens` and `sequences` have equal length and order.

    `tick` counts how often the lane was served; each time, every row advances by one position.
    """

    __slots__ = ("_block_size", "_due", "ids", "sequences", "slots", "tick", "tokens")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.slots = array("i")
        self.ids: list[int] = []
        self.tokens: list[array[int]] = []
        self.sequences: list[Sequence] = []
        self.tick = 0
        self._due: dict[int, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequence: Sequence) -> None:
        """It is fed position `sequence.origin` when the lane is served next."""
        sequence.lane = self
        sequence.row = len(self.sequences)
        self.slots.append(sequence.slot)
        self.ids.append(sequence.id)
        self.tokens.append(sequence.tokens)
        self.sequences.append(sequence)
        position = sequence.origin
        sequence.origin -= self.tick
        self._arm(sequence, position, -position % self._block_size)

    def remove(self, sequence: Sequence) -> None:
        """The last row takes its place. `sequence.origin` is again the position to feed next."""
        row = sequence.row
        last = self.sequences.pop()
        slot, id_, tokens = self.slots.pop(), self.ids.pop(), self.tokens.pop()
        if last is not sequence:
            self.slots[row], self.ids[row], self.tokens[row], self.sequences[row] = slot, id_, tokens, last
            last.row = row
        sequence.lane = None
        sequence.row = -1
        sequence.due = -1
        sequence.origin += self.tick

    def due(self) -> tuple[list[Sequence], list[Sequence]]:
        """The rows that need their next block at this tick, and those that are served for the last time at it."""
        growing: list[Sequence] = []
        last: list[Sequence] = []
        later: list[Sequence] = []
        tick, size = self.tick, self._block_size
        for sequence in self._due.pop(tick, ()):
            if sequence.lane is not self or sequence.due != tick:
                continue  # an entry of an earlier stay
            position = sequence.origin + tick
            if position % size == 0:
                growing.append(sequence)
            left = sequence.limit - 2 - position
            if left >= size and position % size == 0:
                sequence.due = tick + size
                later.append(sequence)
            elif left:
                self._arm(sequence, position, size - position % size)
            else:
                sequence.due = -1
                last.append(sequence)
        if later:
            self._due.setdefault(tick + size, []).extend(later)
        return growing, last

    def _arm(self, sequence: Sequence, position: int, ticks_to_block: int) -> None:
        ticks = min(ticks_to_block, sequence.limit - 2 - position)
        sequence.due = due = self.tick + ticks
        bucket = self._due.get(due)
        if bucket is None:
            self._due[due] = [sequence]
        else:
            bucket.append(sequence)


class Lanes:
    """The lanes, kept even, and the sequences between two lanes or between prefill and their first decode."""

    __slots__ = ("_between", "_lanes")

    def __init__(self, pipeline: int, block_size: int) -> None:
        self._lanes = [Lane(block_size) for _ in range(pipeline)]
        self._between: dict[Sequence, int] = {}
        """Those in no lane, with the first step that may decode them, in order of arrival."""

    def __len__(self) -> int:
        return len(self._between) + sum(map(len, self._lanes))

    def join(self, sequence: Sequence, ready: int) -> None:
        """Decode it from step `ready` on, in whichever lane is short of one then."""
        self._between[sequence] = ready

    def leave(self, sequence: Sequence) -> None:
        """Decode it no further, wherever it is; no error where it is nowhere."""
        if sequence.lane is not None:
            sequence.lane.remove(sequence)
        else:
            self._between.pop(sequence, None)

    def at(self, step: int) -> Lane:
        """The lane that `step` serves, after evening it out.

        With D sequences and P lanes, D % P lanes have D // P + 1 and the others D // P. A lane above its share gives
        before it is served: what it gives was last decoded P steps ago or earlier, so the next lane may serve it at
        once.
        """
        lane = self._lanes[step % len(self._lanes)]
        share, extra = divmod(len(self), len(self._lanes))
        full = sum(len(other) > share for other in self._lanes if other is not lane)
        share += full < extra
        while len(lane) > share:
            sequence = lane.sequences[-1]
            lane.remove(sequence)
            self._between[sequence] = step
        if self._between and len(lane) < share:
            ready = [sequence for sequence, earliest in self._between.items() if earliest <= step]
            for sequence in ready[: share - len(lane)]:
                del self._between[sequence]
                lane.add(sequence)
        return lane
