"""Stop strings: found wherever pieces of text are cut, with nothing emitted that may still become part of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of a set of stop strings (Aho and Corasick, 1975), shared by the sequences of a request."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.goto: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        """Characters that a state remembers: the longest end of the text that may still become a stop string."""
        self.found: list[str | None] = [None]
        """The longest stop string that is complete in a state."""
        for string in strings:
            state = 0
            for character in string:
                following = self.goto[state].get(character)
                if following is None:
                    following = len(self.goto)
                    self.goto[state][character] = following
                    self.goto.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(None)
                state = following
            self.found[state] = string
        self.fail = [0] * len(self.goto)
        queue = deque(self.goto[0].values())
        while queue:
            state = queue.popleft()
            if self.found[state] is None:
                self.found[state] = self.found[self.fail[state]]
            for character, following in self.goto[state].items():
                queue.append(following)
                back = self.fail[state]
                while back and character not in self.goto[back]:
                    back = self.fail[back]
                self.fail[following] = self.goto[back].get(character, 0)


class StopMatcher:
    """Watches one sequence. The stop string completed first wins; of several at the same place, the longest."""

    __slots__ = ("_held", "_state", "_strings", "matched")

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string found; nothing behind it is looked at."""

    def feed(self, text: str) -> str:
        """What is final now: all up to a stop string, or all but an end that may still become one."""
        goto, fail, state = self._strings.goto, self._strings.fail, self._state
        found = self._strings.found
        for i, character in enumerate(text):
            while state and character not in goto[state]:
                state = fail[state]
            state = goto[state].get(character, 0)
            if found[state] is not None:
                self.matched = stop = found[state]
                assert stop is not None
                whole = self._held + text[: i + 1]
                self._held = ""
                return whole[: len(whole) - len(stop)]
        self._state = state
        whole = self._held + text
        keep = self._strings.depth[state]
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def finish(self) -> str:
        """What was held back and is text after all, the sequence having ended."""
        held, self._held = self._held, ""
        return held
