"""An inference engine in virtual time, for benchmarks of routing: continuous batching, a prefix cache, no tokens.

A step prefills up to `budget` tokens in order of arrival while everything else decodes. The cache is in blocks of 16
tokens, least recently used out first, the last of a prompt before the first. A request's blocks are taken at once and
held until its end; prompts are computed beyond what the cache holds when they are admitted.

Step times are those of two engines, fitted to TensorRT-LLM's published FP8 throughput (8B on one H100: 3,450 output
tokens/s at 2048/128, 22,714 at 128/2048; 70B on two H100: 762 and 6,651), weights read at 3.35 TB/s a device:

    step = overhead + max(weights, tokens * token) + context of what decodes * kv
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK = 16
MARK = 64
"""Tokens that a mark covers: a chunk of 256 bytes, 4 bytes a token."""


@dataclass(frozen=True)
class Model:
    """Seconds of a step's parts."""

    overhead: float
    weights: float
    token: float
    kv: float
    cache_tokens: int = 225_000
    budget: int = 8192
    max_running: int = 256


MODELS = {
    "70B FP8, 2 x H100": Model(overhead=0.0015, weights=0.0104, token=0.0729e-3, kv=0.055e-6),
    "8B FP8, 1 x H100": Model(overhead=0.001, weights=0.0024, token=0.0154e-3, kv=0.024e-6),
}


@dataclass(slots=True, eq=False)
class Request:
    number: int
    came: float
    conversation: Conversation
    prefix: int
    prompt: int
    answer: int
    hit: int = 0
    """Tokens of the prompt that were in the cache."""
    work: int = 0
    """Tokens to prefill, as it looked when it came."""
    left: int = 0
    """Tokens to prefill yet."""
    private: int = 0
    """Blocks that are its own."""
    first: float = 0.0
    """When its first token came."""
    pins: list[Node] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Conversation:
    """One client's chat: its tenant's prefix, then turns. Its marks beyond the prefix are its own."""

    tenant: int
    shared: list[int]
    turns: int
    rng: random.Random
    number: int
    own: list[int] = field(default_factory=list)
    length: int = 0

    def marks(self, tokens: int) -> list[int]:
        count = tokens // MARK - len(self.shared)
        while len(self.own) < count:
            self.own.append(self.rng.getrandbits(64))
        return self.shared + self.own[: max(0, count)]


@dataclass(slots=True, eq=False)
class Node:
    """A run of cached blocks: a tenant's prefix, or what a conversation put behind it."""

    key: object
    first_mark: int
    """Of the prompt's marks, the first whose chunk ends here."""
    start: int
    """Tokens before it."""
    marks: list[int]
    blocks: int = 0
    pins: int = 0

    def held(self, blocks: int) -> list[int]:
        """Marks whose chunks end within the first so many blocks."""
        return self.marks[: max(0, (self.start + blocks * BLOCK) // MARK - self.first_mark)]


class Engine:
    """One simulated replica."""

    def __init__(self, model: Model, slot: int, tell: Callable[[int, list[int], list[int]], None]) -> None:
        self.model = model
        self.slot = slot
        self.tell = tell
        self.free = model.cache_tokens // BLOCK
        self.nodes: dict[object, Node] = {}
        self.idle_nodes: OrderedDict[object, Node] = OrderedDict()
        self.evictable = 0
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.ends: list[tuple[int, int, Request]] = []
        self.running = 0
        self.context = 0
        self.steps = 0
        self.step_ends = 0.0
        self.stepping = False
        self.backlog = 0
        """Tokens to prefill of requests whose first token has not come, as they looked when they came."""
        self.coming: dict[int, int] = {}
        """Tenant -> its requests here whose first token has not come."""

    # Cache

    def cached(self, request: Request) -> int:
        """Leading tokens of the prompt in the cache; the last token is always computed."""
        prefix = self.nodes.get(request.conversation.tenant)
        if prefix is None:
            return 0
        tokens = prefix.blocks * BLOCK
        if tokens >= request.prefix and (tail := self.nodes.get(request.conversation)) is not None:
            tokens += tail.blocks * BLOCK
        return min(tokens, (request.prompt - 1) // BLOCK * BLOCK)

    def pin(self, node: Node, request: Request) -> None:
        if not node.pins and node.blocks:
            del self.idle_nodes[node.key]
            self.evictable -= node.blocks
        node.pins += 1
        request.pins.append(node)

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        if not node.pins:
            self.idle_nodes[node.key] = node
            self.evictable += node.blocks

    def take(self, blocks: int) -> None:
        gone: list[int] = []
        while self.free < blocks:
            node = next(iter(self.idle_nodes.values()))
            out = min(node.blocks, blocks - self.free)
            before = node.held(node.blocks)
            node.blocks -= out
            gone += before[len(node.held(node.blocks)) :]
            self.free += out
            self.evictable -= out
            if not node.blocks:
                del self.idle_nodes[node.key], self.nodes[node.key]
        self.free -= blocks
        if gone:
            self.tell(self.slot, [], gone)

    def grow(self, node: Node, blocks: int, request: Request) -> None:
        """The request's own blocks become the cache's: the node is to have so many."""
        if blocks <= node.blocks:
            return
        request.private -= blocks - node.blocks
        before = len(node.held(node.blocks))
        node.blocks = blocks
        new = node.held(blocks)[before:]
        if new:
            self.tell(self.slot, new, [])

    # Batching

    def admit(self, request: Request) -> bool:
        hit = self.cached(request)
        need = math.ceil((request.prompt + request.answer) / BLOCK) - hit // BLOCK
        pinned = [
            node
            for key in (request.conversation.tenant, request.conversation)
            if (node := self.nodes.get(key)) is not None and hit > node.start
        ]
        room = self.free + self.evictable - sum(node.blocks for node in pinned if not node.pins)
        if need > room:
            return False
        for node in pinned:
            self.pin(node, request)
        self.take(need)
        request.hit, request.private, request.left = hit, need, request.prompt - hit
        return True

    def start_step(self, now: float) -> bool:
        model = self.model
        room = model.budget - self.running
        while room > 0 and (self.waiting or self.prefilling):
            if not self.prefilling or not self.prefilling[-1].left:
                if not self.waiting or self.running + len(self.prefilling) >= model.max_running:
                    break
                if not self.admit(self.waiting[0]):
                    break
                self.prefilling.append(self.waiting.popleft())
            chunk = min(room, self.prefilling[-1].left)
            self.prefilling[-1].left -= chunk
            room -= chunk
        tokens = model.budget - room
        if not tokens:
            self.stepping = False
            return False
        duration = model.overhead + max(model.weights, tokens * model.token) + self.context * model.kv
        self.step_ends = now + duration
        self.stepping = True
        return True

    def end_step(self, now: float) -> tuple[list[Request], list[Request]]:
        """Requests whose first token came, and requests that ended."""
        self.steps += 1
        self.context += self.running
        first = [request for request in self.prefilling if not request.left]
        self.prefilling = [request for request in self.prefilling if request.left]
        for request in first:
            self.backlog -= request.work
            self.coming[request.conversation.tenant] -= 1
            self.publish(request, now)
            heapq.heappush(self.ends, (self.steps + request.answer - 1, request.number, request))
        ended = []
        while self.ends and self.ends[0][0] <= self.steps:
            request = heapq.heappop(self.ends)[2]
            self.finish(request)
            ended.append(request)
        return first, ended

    def publish(self, request: Request, now: float) -> None:
        self.running += 1
        self.context += request.prompt
        request.first = now
        conversation = request.conversation
        node = self.nodes.get(request.conversation.tenant)
        if node is None:
            node = self.nodes[request.conversation.tenant] = Node(
                request.conversation.tenant, 0, 0, conversation.shared
            )
        if node not in request.pins:
            self.pin(node, request)
        self.grow(node, request.prefix // BLOCK, request)

    def finish(self, request: Request) -> None:
        self.running -= 1
        self.context -= request.prompt + request.answer - 1
        conversation = request.conversation
        tail = self.nodes.get(conversation)
        if tail is None:
            tail = Node(conversation, len(conversation.shared), request.prefix, [])
            self.nodes[conversation] = tail
        if tail not in request.pins:
            self.pin(tail, request)
        tail.marks = conversation.marks(request.prompt)[tail.first_mark :]
        self.grow(tail, (request.prompt + request.answer - request.prefix) // BLOCK, request)
        self.free += request.private
        for node in sorted(request.pins, key=lambda node: node.start, reverse=True):
            self.unpin(node)
        request.pins.clear()

    def arrive(self, request: Request) -> None:
        request.work = self.uncached(request)
        self.backlog += request.work
        tenant = request.conversation.tenant
        self.coming[tenant] = self.coming.get(tenant, 0) + 1
        self.waiting.append(request)

    @property
    def requests(self) -> int:
        return self.running + len(self.prefilling) + len(self.waiting)

    # What an oracle asks

    def uncached(self, request: Request) -> int:
        """Tokens of the prompt that will have to be computed, should it come now."""
        cached = self.cached(request)
        if self.coming.get(request.conversation.tenant):
            cached = max(cached, request.prefix)
        return request.prompt - cached

    def first_token(self, request: Request, now: float) -> float:
        """Seconds to its first token, should it come now: the rest of the step, then the prefill of what is before it
        and its own, beside what decodes; and what must end first, where blocks are scarce.
        """
        model = self.model
        tokens = self.backlog + self.uncached(request)
        room = max(1, model.budget - self.running)
        steps = math.ceil(tokens / room)
        fixed = model.overhead + self.context * model.kv
        seconds = steps * fixed + max(model.weights, (tokens + steps * self.running) * model.token)
        need = math.ceil((tokens + request.answer) / BLOCK) - self.free - self.evictable
        if need > 0 and self.running:
            seconds += need * BLOCK / (self.context + 1) * 250 * fixed
        return seconds + max(0.0, self.step_ends - now if self.stepping else 0.0)
