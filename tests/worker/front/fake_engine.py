"""An engine for the faces' tests: the real messages over a real Unix socket, a model that echoes.

The answer to a prompt is its own text: the last user's turn of a conversation, or every token of a plain prompt that is
not special; then the end of text. With a temperature above 0 the answer begins with the seed's last digit, so that
answers can be told apart. All is a function of (prompt, seed, position), so a resumed request goes on where it broke.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from arriero_worker.engine.frames import FrameReader, decode_to_engine, encode_frame
from arriero_worker.engine.messages import (
    Abort,
    Drain,
    EngineRequest,
    EngineStatus,
    Finish,
    FromEngine,
    Model,
    Outputs,
    Phase,
    PrefixNews,
    RankStatus,
    Refusal,
    RefusalCode,
    Submit,
    TokenLogprobs,
)


@dataclass
class Script:
    """What the echo needs to know of the test's tokenizer."""

    special: frozenset[int]
    user: int
    """The token that opens a user's turn; the turn ends with the next special token."""
    eos: int
    digits: list[int]
    vocab_size: int


@dataclass
class Running:
    request: EngineRequest
    answer: list[int]
    at: int
    told: bool = False


def answer_of(request: EngineRequest, script: Script) -> list[int]:
    """The whole answer, its end of text included."""
    prompt = request.prompt
    if script.user in prompt:
        start = len(prompt) - prompt[::-1].index(script.user)
        stop = next((i for i in range(start, len(prompt)) if prompt[i] in script.special), len(prompt))
        prompt = prompt[start:stop]
    text = [id for id in prompt if id not in script.special]
    seed = [script.digits[request.sampling.seed % 10]] if request.sampling.temperature > 0 else []
    return [*seed, *text, script.eos]


def logprob_of(token: int, k: int, vocab_size: int) -> TokenLogprobs:
    value = -0.5 - (token % 7) / 10
    top = [(token, value), *((((token + j) % vocab_size), value - j) for j in range(1, k))][:k]
    return TokenLogprobs(token, value, 1, top)


@dataclass
class FakeEngine:
    path: str
    script: Script
    max_context: int = 2048
    phase: Phase = "Serving"
    refuse: tuple[RefusalCode, str] | None = None
    """Refuse every request with this."""
    end: Finish | None = None
    """End every request so after its second token (its id is filled in)."""
    max_running: int = 10_000
    chunk: int = 1
    """Steps sent back to back, so that the faces see several tokens at once."""
    running: dict[int, Running] = field(default_factory=dict)
    submitted: list[EngineRequest] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    drained: bool = False
    run: int = 1
    marks: set[int] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        self._go = asyncio.Event()
        self._go.set()
        self._wake = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._budget = -1

    # -- what tests steer

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        self._loop_task = asyncio.create_task(self._run())

    async def die(self) -> None:
        """As kill -9 would: the connection is gone, and with it everything that ran."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()
        self.running.clear()
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task

    def hold(self, after: int = 0) -> None:
        """Run `after` more steps, then stand still until `go`."""
        self._budget = after
        if after == 0:
            self._go.clear()
        else:
            self._go.set()

    def go(self) -> None:
        self._budget = -1
        self._go.set()

    def set_phase(self, phase: Phase) -> None:
        self.phase = phase
        self._send(self.status())

    def tell_marks(self, added: set[int], removed: set[int], reset: bool = False) -> None:
        self.marks = ((set() if reset else self.marks) | added) - removed
        self._send(PrefixNews(reset, list(added), list(removed), self.run))

    def status(self) -> EngineStatus:
        return EngineStatus(
            phase=self.phase,
            epoch=3,
            model=Model(self.max_context, self.script.vocab_size),
            running=len(self.running),
            kv_blocks=100,
            kv_blocks_used=len(self.running),
            steps=self.steps,
            generated_tokens=self.steps,
            ranks=[RankStatus(0, 0, self.phase, 3, self.steps, 50, 100, 1 << 20)],
            run=self.run,
        )

    # -- inside

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        frames = FrameReader()
        try:
            writer.write(encode_frame(PrefixNews(True, list(self.marks), [], self.run)))
            writer.write(encode_frame(self.status()))
            while data := await reader.read(1 << 16):
                for body in frames.feed(data):
                    self._received(decode_to_engine(body))
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _received(self, message: Submit | Abort | Drain) -> None:
        if isinstance(message, Drain):
            self.drained = True
        elif isinstance(message, Abort):
            self.aborted += message.ids
            for id in message.ids:
                self.running.pop(id, None)
        else:
            self._submit(message.requests)

    def _submit(self, requests: list[EngineRequest]) -> None:
        refused = []
        for request in requests:
            self.submitted.append(request)
            assert request.id not in self.running
            assert len(request.prompt) + len(request.output) < self.max_context
            if self.refuse is not None:
                refused.append(Refusal(request.id, *self.refuse, 7.0 if self.refuse[0] == "queue_full" else 0.0))
            elif len(self.running) >= self.max_running:
                refused.append(Refusal(request.id, "queue_full", "the queue is full", 2.0))
            else:
                answer = answer_of(request, self.script)
                self.running[request.id] = Running(request, answer, len(request.output))
        if refused:
            self._send(Outputs(self.steps, [], [], refused=refused))
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await self._go.wait()
            if not self.running:
                self._wake.clear()
                continue
            for _ in range(self.chunk):
                if self._budget == 0:
                    self._go.clear()
                    break
                self._budget -= 1
                self._step()
            await asyncio.sleep(0)

    def _step(self) -> None:
        self.steps += 1
        out = Outputs(self.steps, [], [])
        for id, sequence in list(self.running.items()):
            self._continue(id, sequence, out)
        self._send(out)

    def _continue(self, id: int, sequence: Running, out: Outputs) -> None:
        request, sampling = sequence.request, sequence.request.sampling
        if not sequence.told:
            sequence.told = True
            out.cached.append((id, len(request.prompt) // 2))
            if sampling.prompt_logprobs >= 0:
                k = sampling.prompt_logprobs
                out.prompt_logprobs.append(
                    (id, [logprob_of(token, k, self.script.vocab_size) for token in request.prompt[1:]])
                )
        token = sequence.answer[sequence.at % len(sequence.answer)]
        if token == self.script.eos and sequence.at < sampling.min_tokens:
            token = sequence.answer[0]
        sequence.at += 1
        out.ids.append(id)
        out.tokens.append(token)
        if sampling.logprobs >= 0:
            out.logprobs.append((id, logprob_of(token, sampling.logprobs, self.script.vocab_size)))
        if self.end is not None and sequence.at >= 2:
            out.finished.append(Finish(id, self.end.reason, message=self.end.message))
        elif token in sampling.stop_token_ids:
            out.finished.append(Finish(id, "stop", token))
        elif sequence.at >= sampling.max_tokens:
            out.finished.append(Finish(id, "length"))
        else:
            return
        del self.running[id]

    def _send(self, message: FromEngine) -> None:
        frame = encode_frame(message)
        for writer in self._writers:
            writer.write(frame)
