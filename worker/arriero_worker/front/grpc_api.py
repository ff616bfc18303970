"""The gRPC face: arriero.inference.v1.Inference, Prefixes beside it, standard health and reflection."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.inference.v1 import inference_pb2 as pb
from arriero_faces.http.errors import HttpError
from arriero_faces.http.server import ANY, HttpLimits
from arriero_faces.prefix import grpc_marks
from arriero_faces.resume import Resume, parse_resume
from arriero_worker.engine.messages import TokenLogprobs
from arriero_worker.front import grpc_prefixes
from arriero_worker.front.answer import Piece
from arriero_worker.front.grpc_calls import CODES, abort, parsed, write
from arriero_worker.front.run import Generation, Run
from arriero_worker.front.sampling import SamplingFields, bounded, refuse
from arriero_worker.front.service import Service
from arriero_worker.front.text.vocabulary import Vocabulary

log = logging.getLogger("arriero.grpc")

_T = TypeVar("_T")
SERVICE = "arriero.inference.v1.Inference"
_MAX_METADATA = 2 * 1024 * 1024
_MAX_MESSAGE = 4 * 1024 * 1024
_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "timeout": pb.FINISH_REASON_TIMEOUT,
}
_ROLES = ("system", "developer", "user", "assistant", "tool")


class GrpcFace:
    """A grpc.aio server over the request core."""

    def __init__(self, service: Service, limits: HttpLimits) -> None:
        self._service = service
        self._limits = limits
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._inference = _Inference(service, limits.stall_seconds)
        self._prefixes = grpc_prefixes.Prefixes(service, limits.stall_seconds)
        self._serving: asyncio.Task[None] | None = None

    @property
    def busy(self) -> int:
        """Calls being answered."""
        return self._inference.running

    async def start(self, address: str, port: int) -> int:
        """Listen; returns the port. Raises OSError."""
        self._server = server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", _MAX_METADATA),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA),
                ("grpc.so_reuseport", 0),
                ("grpc.max_connection_idle_ms", 600_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=self._limits.max_connections,
        )
        server.add_generic_rpc_handlers((self._inference.handler(), self._prefixes.handler()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, grpc_prefixes.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        await self.set_serving(False)
        host = "[::]" if address in ANY else f"[{address}]" if ":" in address else address
        try:
            bound: int = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on port {port}: {error}") from error
        await server.start()
        return bound

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the server and for the service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    def serving_soon(self, serving: bool) -> None:
        """`set_serving` from where nothing can be awaited; the latest word wins."""
        before = self._serving

        async def change() -> None:
            if before is not None:
                await before
            await self.set_serving(serving)

        self._serving = asyncio.get_running_loop().create_task(change())

    async def stop(self) -> None:
        if self._serving is not None:
            await self._serving
        if self._server is not None:
            await self._server.stop(None)


class _Inference:
    """The service's methods."""

    def __init__(self, service: Service, stall_seconds: float) -> None:
        self._service = service
        self._stall = stall_seconds
        self.running = 0

    def handler(self) -> Any:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Generate": stream(self.Generate, response_serializer=pb.GenerateResponse.SerializeToString),
            "Tokenize": unary(self.Tokenize, response_serializer=pb.TokenizeResponse.SerializeToString),
            "GetModel": unary(self.GetModel, response_serializer=pb.GetModelResponse.SerializeToString),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def Generate(self, data: bytes, context: Any) -> None:
        async def call() -> None:
            await self._generate(parsed(pb.GenerateRequest, data), context)

        await self._guarded("Generate", context, call)

    async def Tokenize(self, data: bytes, context: Any) -> pb.TokenizeResponse:
        async def call() -> pb.TokenizeResponse:
            return await self._tokenize(parsed(pb.TokenizeRequest, data))

        return await self._guarded("Tokenize", context, call)

    async def GetModel(self, data: bytes, context: Any) -> pb.GetModelResponse:
        async def call() -> pb.GetModelResponse:
            return self._get_model(parsed(pb.GetModelRequest, data))

        return await self._guarded("GetModel", context, call)

    async def _guarded(self, method: str, context: Any, call: Callable[[], Awaitable[_T]]) -> _T:
        """Count the call, and turn errors into statuses."""
        status = "CANCELLED"
        self.running += 1
        try:
            result = await call()
            status = "OK"
            return result
        except HttpError as error:
            status = CODES.get(error.status, grpc.StatusCode.INTERNAL).name
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            status = "INTERNAL"
            log.exception("failed on %s", method)
            await abort(context, HttpError(500, "the server failed on this request"))
        finally:
            self.running -= 1
            self._service.metrics.request("grpc", method, status)

    def _get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        service = self._service
        service.resolve_model(request.model)
        layout = service.launch.layout
        return pb.GetModelResponse(
            names=service.names,
            max_context=service.max_context,
            vocab_size=service.vocab_size,
            dtype=service.launch.engine.dtype,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
        )

    async def _tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        service = self._service
        service.resolve_model(request.model)
        kind = request.WhichOneof("input")
        if kind == "text":
            ids = await service.tokenize(request.text, special=not request.no_special_tokens, param="text")
        elif kind == "conversation":
            ids = await self._conversation(request.conversation)
        else:
            raise refuse("input", "exactly one of text and conversation is needed")
        return pb.TokenizeResponse(ids=ids, max_context=service.max_context)

    async def _conversation(self, conversation: pb.Conversation) -> list[int]:
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        if not messages:
            raise refuse("conversation.messages", "must not be empty")
        for i, message in enumerate(messages):
            if message["role"] not in _ROLES:
                raise refuse(f"conversation.messages[{i}].role", f"must be one of {', '.join(_ROLES)}")
        text = self._service.render(
            messages,
            _tools(conversation) or None,
            add_generation_prompt=not conversation.continue_final_message,
            continue_final_message=conversation.continue_final_message,
        )
        return await self._service.tokenize(text, special=False, param="conversation")

    async def _generate(self, request: pb.GenerateRequest, context: Any) -> None:
        arrived = time.monotonic()
        service = self._service
        service.resolve_model(request.model)
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        resume = parse_resume(lambda name: _text(metadata.get(name)), service.vocab_size)
        generation, echo = await self._generation(request, resume)
        generation.arrived = arrived
        run = service.generate(generation)
        shape = _Responses(service.tokenizer.vocabulary, run, generation, echo)
        try:
            pieces = await run.next()
            if not pieces:
                await write(context, shape.usage_alone(), self._stall)
            while pieces:
                over = run.over
                for at, piece in enumerate(pieces, 1):
                    # While the client does not take it, output gathers in the Run (bounded).
                    await write(context, shape.response(piece, over and at == len(pieces)), self._stall)
                pieces = [] if over else await run.next()
        finally:
            run.close()

    async def _generation(self, request: pb.GenerateRequest, resume: Resume) -> tuple[Generation, str]:
        service = self._service
        fields = _fields(request.sampling)
        bounded("queue_timeout_seconds", request.queue_timeout_seconds, 0, 1e9)
        if len(request.cache_salt) > 256:
            raise refuse("cache_salt", "at most 256 characters")
        kind = request.WhichOneof("input")
        if kind == "text":
            prompt = await service.tokenize(request.text, special=True, param="text")
            echo = request.text
        elif kind == "token_ids":
            prompt = list(request.token_ids.ids)
            service.check_ids(prompt, "token_ids")
            echo = service.tokenizer.decode(prompt) if request.echo else ""
        elif kind == "conversation":
            prompt = await self._conversation(request.conversation)
            echo = service.tokenizer.decode(prompt) if request.echo else ""
        else:
            raise refuse("input", "exactly one of text, token_ids and conversation is needed")
        generation = Generation(
            prompts=[prompt],
            sampling=service.sampling(fields, [prompt], resume, param=kind),
            n=1 if fields.n is None else fields.n,
            stop=fields.stop,
            priority=request.priority,
            cache_salt=request.cache_salt,
            marked=grpc_marks(request),
            queue_timeout=request.queue_timeout_seconds,
            resume=resume,
        )
        return generation, echo if request.echo and resume.answers is None else ""


def _fields(parameters: pb.SamplingParameters) -> SamplingFields:
    def optional(name: str) -> Any:
        return getattr(parameters, name) if parameters.HasField(name) else None

    return SamplingFields(
        max_tokens=optional("max_tokens"),
        min_tokens=parameters.min_tokens,
        temperature=optional("temperature"),
        top_p=optional("top_p"),
        top_k=parameters.top_k or None,
        min_p=parameters.min_p or None,
        repetition_penalty=optional("repetition_penalty"),
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        logit_bias=dict(parameters.logit_bias),
        seed=optional("seed"),
        stop=list(parameters.stop),
        stop_token_ids=list(parameters.stop_token_ids),
        ignore_eos=parameters.ignore_eos,
        n=optional("n"),
        logprobs=optional("logprobs"),
        prompt_logprobs=optional("prompt_logprobs"),
    )


def _tools(conversation: pb.Conversation) -> list[dict[str, Any]]:
    tools = []
    for i, text in enumerate(conversation.tools_json):
        try:
            tool = json.loads(text)
        except (ValueError, RecursionError):
            tool = None
        if not isinstance(tool, dict):
            raise refuse(f"conversation.tools_json[{i}]", "must be a JSON object")
        tools.append(tool)
    return tools


def _text(value: str | bytes | None) -> str | None:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Responses:
    """Pieces as GenerateResponses."""

    def __init__(self, vocabulary: Vocabulary, run: Run, generation: Generation, echo: str) -> None:
        self._vocabulary = vocabulary
        self._run = run
        self._resume = generation.resume
        self._echo = echo
        self._begun: set[int] = set()
        self._seed_told = not self._resume.wanted

    def response(self, piece: Piece, last: bool) -> pb.GenerateResponse:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        response = pb.GenerateResponse(
            index=piece.index,
            text=self._echo + piece.text if first else piece.text,
            finish_reason=_FINISH[piece.finish],
            stop=self._ended_by(piece),
            logprobs=[self._logprob(position) for position in piece.logprobs],
            prompt_logprobs=[self._logprob(position) for position in piece.prompt_logprobs or ()],
            token_ids=piece.tokens if self._resume.wanted else (),
        )
        if not self._seed_told:
            self._seed_told = True
            response.seed = self._run.seed
        if last:
            response.usage.CopyFrom(self._usage())
        return response

    def usage_alone(self) -> pb.GenerateResponse:
        """For a resumed request whose answers were all delivered."""
        return pb.GenerateResponse(usage=self._usage())

    def _usage(self) -> pb.Usage:
        usage = self._run.usage
        return pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )

    def _ended_by(self, piece: Piece) -> str:
        if isinstance(piece.ended_by, int):
            return self._vocabulary.text_of(piece.ended_by)
        return piece.ended_by or ""

    def _logprob(self, position: TokenLogprobs) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            id=position.token,
            text=self._vocabulary.text_of(position.token),
            logprob=position.logprob,
            rank=position.rank,
            top=[pb.TopLogprob(id=id, text=self._vocabulary.text_of(id), logprob=value) for id, value in position.top],
        )
