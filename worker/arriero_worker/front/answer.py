"""One sequence's way back from tokens to text: detokenizer, stop strings, tool calls, in that order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from arriero_worker.engine.messages import TokenLogprobs
from arriero_worker.front.engine_client import Delta
from arriero_worker.front.text.detokenizer import Detokenizer
from arriero_worker.front.text.stop import StopMatcher, StopStrings
from arriero_worker.front.text.tools import ToolCall, ToolGate
from arriero_worker.front.text.vocabulary import Vocabulary

FinishReason = Literal["stop", "length", "timeout", "tool_calls"]


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What all answers of one request share."""

    vocabulary: Vocabulary
    max_tokens: int
    min_tokens: int = 0
    """Neither stop strings nor stop tokens are looked for before."""
    stop_ids: frozenset[int] = frozenset()
    quiet_stop_ids: frozenset[int] = frozenset()
    """Those that are the model's own ends of text, and not worth naming as a reason."""
    stop: StopStrings | None = None
    include_stop: bool = False
    visible: frozenset[int] = frozenset()
    """Special tokens whose text is shown."""
    tools: frozenset[str] | None = None


@dataclass(slots=True)
class Piece:
    """News of one answer: final text, and the tokens behind it."""

    index: int
    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    """What ended it, unless that was the model's own end of text."""
    ended_by: str | int | None = None
    """The stop string, or the id of the stop token, that ended it."""
    calls: list[ToolCall] = field(default_factory=list)


class Answer:
    """`take` what the engine brought until `finish` is set."""

    __slots__ = (
        "_detokenizer",
        "_gate",
        "_logprobs",
        "_matcher",
        "_prompt_logprobs",
        "_rules",
        "_tokens",
        "count",
        "ended_by",
        "finish",
        "index",
    )

    def __init__(self, index: int, rules: AnswerRules) -> None:
        self.index = index
        self.count = 0
        """Output tokens so far, those resumed behind included."""
        self.finish: FinishReason | None = None
        self.ended_by: str | int | None = None
        self._rules = rules
        self._detokenizer = Detokenizer(rules.vocabulary, rules.visible)
        self._matcher = StopMatcher(rules.stop) if rules.stop is not None else None
        self._gate = ToolGate(rules.tools) if rules.tools is not None else None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None

    def resume(self, tokens: list[int]) -> None:
        """Stand where the answer stood after these tokens; their text was emitted elsewhere. May set `finish`."""
        self._feed(tokens)
        if self.finish is not None:
            self._end()

    def take(self, delta: Delta) -> Piece | None:
        """The piece that `delta` completes; None while all of it is held back (its tokens come with a later one)."""
        used, text = self._feed(delta.tokens)
        self._tokens += delta.tokens[:used]
        self._logprobs += delta.logprobs[:used]
        if delta.prompt_logprobs:
            self._prompt_logprobs = (self._prompt_logprobs or []) + delta.prompt_logprobs
        if self.finish is None and delta.finish is not None:
            reason = delta.finish.reason
            self.finish = reason if reason in ("stop", "length", "timeout") else "stop"
        calls: list[ToolCall] = []
        if self.finish is not None:
            rest, calls = self._end()
            text += rest
        elif not text:
            return None
        piece = self._piece(text, calls)
        piece.tokens, piece.logprobs, piece.prompt_logprobs = self._tokens, self._logprobs, self._prompt_logprobs
        self._tokens, self._logprobs, self._prompt_logprobs = [], [], None
        return piece

    def last_piece(self) -> Piece:
        """The finish alone, of an answer that was over when it was resumed."""
        return self._piece("", [])

    def _piece(self, text: str, calls: list[ToolCall]) -> Piece:
        reason = None if self.ended_by in self._rules.quiet_stop_ids else self.ended_by
        return Piece(self.index, text, finish=self.finish, stop_reason=reason, ended_by=self.ended_by, calls=calls)

    def _feed(self, tokens: list[int]) -> tuple[int, str]:
        """(tokens used, text that became final); fewer are used where the answer ended before the last."""
        rules = self._rules
        parts = []
        for used, token in enumerate(tokens, 1):
            self.count += 1
            if token in rules.stop_ids and self.count >= rules.min_tokens:
                self.finish = "stop"
                self.ended_by = token
                text = self._detokenizer.feed(token) if rules.include_stop else ""
            else:
                text = self._detokenizer.feed(token)
            if text:
                parts.append(self._pass(text))
            if self.finish is None and self.count >= rules.max_tokens:
                self.finish = "length"
            if self.finish is not None:
                return used, "".join(parts)
        return len(tokens), "".join(parts)

    def _pass(self, text: str) -> str:
        """Text through stop matcher and tool gate; sets `finish` where a stop string is complete."""
        matcher = self._matcher
        if matcher is None:
            pass
        elif self.finish is not None or self.count <= self._rules.min_tokens:
            text = matcher.finish() + text
        else:
            text = matcher.feed(text)
            if matcher.matched is not None:
                self.finish = "stop"
                self.ended_by = matcher.matched
                if self._rules.include_stop:
                    text += matcher.matched
        return text if self._gate is None else self._gate.feed(text)

    def _end(self) -> tuple[str, list[ToolCall]]:
        """Text that was held back and tool calls, the answer having ended."""
        text = ""
        if not isinstance(self.ended_by, str):
            reason, self.finish = self.finish, None
            tail = self._detokenizer.finish()
            text = self._pass(tail) if tail else ""
            if self.finish is None:
                self.finish = reason
                if self._matcher is not None:
                    held = self._matcher.finish()
                    text += held if self._gate is None else self._gate.feed(held)
        if self._gate is None:
            return text, []
        rest, calls = self._gate.finish()
        if calls:
            self.finish = "tool_calls"
        return text + rest, calls
