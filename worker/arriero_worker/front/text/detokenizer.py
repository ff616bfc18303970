"""Tokens to text as they come: each token costs the same, and no character is ever cut."""

from __future__ import annotations

import codecs

from arriero_worker.front.text.vocabulary import Vocabulary

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of a growing sequence; joined, the pieces are the decoded whole, U+FFFD for what is not UTF-8.

    Special tokens have no text, except those of `visible`.
    """

    __slots__ = ("_bytes_of", "_decoder", "_first", "_hidden", "_size")

    def __init__(self, vocabulary: Vocabulary, visible: frozenset[int] = frozenset()) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._size = vocabulary.size
        self._hidden = vocabulary.special - visible if visible else vocabulary.special
        self._decoder = _Utf8("replace")
        self._first = vocabulary.strips_first_space

    def feed(self, token: int) -> str:
        """The characters that became whole with `token`; often "", while one is split over tokens."""
        if token in self._hidden or token >= self._size:
            return ""
        data = self._bytes_of[token]
        if self._first and data:
            self._first = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if the sequence ended inside a character."""
        return self._decoder.decode(b"", True)
