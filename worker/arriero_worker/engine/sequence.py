"""One request while the engine knows it."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

from arriero_worker.engine.messages import EngineRequest

if TYPE_CHECKING:
    from arriero_worker.engine.lanes import Lane


NEVER = sys.maxsize


class Sequence:
    """A request's tokens and its place: waiting (`slot` -1), prefilling, or decoding. Only the scheduler changes it.

    Compared and hashed by identity: a thousand of them are handled per step.
    """

    __slots__ = (
        "blocks",
        "due",
        "id",
        "keys",
        "lane",
        "limit",
        "losses",
        "lost_at",
        "mark_depth",
        "marked",
        "needs",
        "order",
        "origin",
        "planned",
        "prompt_length",
        "prompt_reported",
        "published",
        "request",
        "row",
        "run",
        "salt",
        "slot",
        "started",
        "stops",
        "submitted",
        "target",
        "tokens",
    )

    def __init__(self, request: EngineRequest, arrival: int, submitted: float, limit: int) -> None:
        self.request = request
        self.id = request.id
        self.order = (request.priority, arrival)
        """Who goes first: lower priority, then earlier arrival. Unique, and never changes."""
        self.submitted = submitted
        self.tokens = array("i", request.prompt)
        """Prompt and committed output."""
        self.tokens.extend(request.output)
        self.prompt_length = len(request.prompt)
        self.limit = limit
        """Length at which it ends with `length`."""
        self.stops = frozenset(request.sampling.stop_token_ids)
        self.salt = request.cache_salt
        self.keys: list[bytes] = []
        """Prefix-cache keys of its first full blocks, as far as they were needed."""
        self.started = False
        """Whether a chunk of it was ever scheduled."""
        self.prompt_reported = 0
        """Last prompt position whose log-probabilities were delivered."""
        self.losses = 0
        """Epochs in a row that ended under it without a token gained."""
        self.lost_at = -1
        """Its length when the last of them ended."""
        self.needs = 0
        """Blocks it lacked at the last attempt to admit it."""
        self.run = 0
        """Raised whenever it gives its slot up: what an earlier run still has in flight is dropped."""
        self.vacate()

    def vacate(self) -> None:
        """Give up slot, blocks and place; tokens stay."""
        self.run += 1
        self.slot = -1
        self.blocks: list[int] = []
        self.published = 0
        """Its first blocks that are cached, or whose content was cached already."""
        self.marked = 0
        """Its first marks that its published blocks were given."""
        self.mark_depth = self.request.marks[0][0] if self.request.marks else NEVER
        """Tokens that must be published for the next one; NEVER: there is none."""
        self.target = 0
        """Tokens known at admission: prefill ends there."""
        self.planned = 0
        """Tokens whose KV is computed or planned, up to `target`."""
        self.lane: Lane | None = None
        self.row = -1
        """Its row in the lane."""
        self.origin = 0
        """The token position fed at tick t of its lane is `origin + t`; outside a lane, the position to feed next."""
        self.due = -1
        """The lane's tick at which it next needs a block or is served last."""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt positions are still owed, so that cached blocks will not do."""
        return self.request.sampling.prompt_logprobs >= 0 and self.prompt_reported < self.prompt_length - 1

    def full_blocks(self, block_size: int) -> int:
        """Blocks whose every token is known and computed, or planned in a step that was issued."""
        if self.planned < self.target:
            return self.planned // block_size
        return max(len(self.tokens) - 1, self.planned) // block_size  # the last token is not fed yet
