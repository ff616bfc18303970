"""The request core behind both faces: a typed request in, engine requests out, pieces of answers back.

HTTP and gRPC translate to and from what is here, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero_faces.http.errors import HttpError
from arriero_faces.resume import SEED, Resume
from arriero_plan.launch import Launch
from arriero_worker.engine.messages import EngineStatus, SamplingParams
from arriero_worker.front.answer import AnswerRules
from arriero_worker.front.engine_client import EngineClient
from arriero_worker.front.metrics import Metrics
from arriero_worker.front.run import Generation, Run
from arriero_worker.front.sampling import SamplingFields, build_sampling, check_sampling
from arriero_worker.front.text.chat_template import TemplateRefusal, load_chat_template
from arriero_worker.front.text.generation_config import load_generation_defaults
from arriero_worker.front.text.stop import StopStrings
from arriero_worker.front.text.tokenizer import PromptTooLong, load_tokenizer
from arriero_worker.front.text.tools import PYTHON_TAG

MAX_SEQUENCES = 1024
"""Prompts times n of one request."""


class Service:
    """What a replica can do for clients. Every refusal is an HttpError, which gRPC translates by its status."""

    def __init__(self, launch: Launch, client: EngineClient) -> None:
        """Reads tokenizer, chat template and defaults from the model's directory. Raises TokenizerError."""
        path = Path(launch.model_path)
        self.launch = launch
        self.client = client
        self.names = launch.served_names
        self.started = int(time.time())
        self.tokenizer = load_tokenizer(path)
        self.template = load_chat_template(path, self.tokenizer.config, self.tokenizer.special_tokens)
        self.defaults = load_generation_defaults(path, self.tokenizer)
        self.draining = False
        self.metrics = Metrics(
            self.names[0], lambda: client.last_status, lambda: client.status is not None, lambda: self.unready is None
        )
        self._quiet_stops = frozenset(self.defaults.eos)
        tag = self.tokenizer.id_of(PYTHON_TAG)
        self._tool_tokens = frozenset() if tag is None else frozenset({tag})

    # -- the replica

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        status = self.client.last_status
        return status.model.max_context if status is not None else self.launch.engine.max_context

    @property
    def vocab_size(self) -> int:
        status = self.client.last_status
        return status.model.vocab_size if status is not None else self.tokenizer.vocabulary.size

    @property
    def unready(self) -> str | None:
        """Why the replica should get no new requests; None when it should."""
        status = self.client.status
        if self.draining:
            return "draining"
        if status is None:
            return "the engine is not there"
        if status.phase != "Serving":
            return status.reason or f"the engine is {status.phase.lower()}"
        return None

    def check_admission(self) -> None:
        """Raises HttpError 503 where a request could not be run.

        A group that lost a rank and forms again (`Joining` after it has served) takes requests: they wait.
        """
        reason = self.unready
        if reason is None:
            return
        if self.draining:
            raise HttpError(503, "the replica is draining", code="draining", retry_after=1)
        status = self.client.status
        if status is not None and status.phase == "Joining" and status.steps > 0:
            return
        raise HttpError(503, f"the replica is not ready: {reason}", code="not_ready", retry_after=1)

    def resolve_model(self, name: str | None) -> str:
        """The served name asked for; the main one where none was. Raises HttpError 404."""
        if not name:
            return self.names[0]
        if name not in self.names:
            raise HttpError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return name

    # -- text in

    async def tokenize(self, text: str, *, special: bool, param: str = "prompt") -> list[int]:
        """Ids of a text. Raises HttpError 400 where they certainly exceed the context."""
        return (await self.tokenize_all([text], special=special, param=param))[0]

    async def tokenize_all(self, texts: list[str], *, special: bool, param: str = "prompt") -> list[list[int]]:
        """`tokenize`, of each."""
        try:
            return await self.tokenizer.encode_soon(texts, special=special, limit=self.max_context)
        except PromptTooLong as error:
            raise self._too_long(f"at least {error.tokens}", param) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text; the template brings the beginning of text. Raises HttpError 400."""
        try:
            return self.template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        except TemplateRefusal as error:
            raise HttpError(400, str(error), param="messages") from error

    def check_ids(self, ids: list[int], param: str) -> None:
        top = self.vocab_size
        if any(not 0 <= id < top for id in ids):
            raise HttpError(400, f"{param}: token ids are from 0 to {top - 1}", param=param)

    def sampling(
        self,
        fields: SamplingFields,
        prompts: list[list[int]],
        resume: Resume,
        *,
        default_max_tokens: int | None = None,
        param: str = "prompt",
    ) -> SamplingParams:
        """The engine's parameters for these prompts. Raises HttpError 400 naming the field."""
        if resume.seed is not None:
            fields.seed = resume.seed
        check_sampling(fields, self.vocab_size)
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise HttpError(400, f"{param}: the prompt has no tokens", param=param)
        room = self.max_context - longest
        if room < 1:
            raise self._too_long(str(longest), param)
        sampling = build_sampling(fields, self.defaults, room=room, default_max_tokens=default_max_tokens)
        if fields.seed is None and sampling.temperature > 0 and any(was.tokens for was in resume.answers or ()):
            raise HttpError(400, f"{SEED}: a sampled answer cannot go on without its seed", param=SEED)
        return sampling

    def _too_long(self, tokens: str, param: str) -> HttpError:
        return HttpError(
            400,
            f"{param}: {tokens} tokens leave no room for an answer; the context holds {self.max_context}",
            param=param,
            code="context_length_exceeded",
        )

    # -- answers out

    def generate(self, generation: Generation) -> Run:
        """Submit. Raises HttpError; the Run must be closed."""
        self.check_admission()
        if len(generation.prompts) * generation.n > MAX_SEQUENCES:
            raise HttpError(400, f"n: prompts times n is at most {MAX_SEQUENCES}", param="n")
        return Run(self, generation, self._rules(generation))

    def _rules(self, generation: Generation) -> AnswerRules:
        sampling = generation.sampling
        visible = self._tool_tokens if generation.tools is not None else frozenset()
        return AnswerRules(
            vocabulary=self.tokenizer.vocabulary,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_ids=frozenset(sampling.stop_token_ids),
            quiet_stop_ids=self._quiet_stops,
            stop=StopStrings(generation.stop) if generation.stop else None,
            include_stop=generation.include_stop,
            visible=self.tokenizer.vocabulary.special if generation.show_special else visible,
            tools=generation.tools,
        )


def status_report(service: Service) -> dict[str, Any]:
    """The body of /health/ready."""
    status: EngineStatus | None = service.client.status
    reason = service.unready
    report: dict[str, Any] = {"ready": reason is None, "phase": status.phase if status else "Starting"}
    if service.draining:
        report["phase"] = "Draining"
    if reason is not None:
        report["reason"] = reason
    if status is not None:
        report["epoch"] = status.epoch
        report["ranks"] = [
            {"rank": r.rank, "pod": r.pod, "phase": r.phase, "epoch": r.epoch, "step": r.step}
            | ({"bytes_loaded": r.bytes_loaded, "bytes_total": r.bytes_total} if r.phase == "Loading" else {})
            | ({"reason": r.reason} if r.reason else {})
            for r in status.ranks
        ]
    return report
