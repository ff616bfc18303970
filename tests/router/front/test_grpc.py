"""The gRPC face: what comes out of it is what a replica says, whatever happens to replicas on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.router import mocks
from tests.router.mocks import PROMPT_TOKENS, SEED, Mock, text_of
from tests.router.router_process import Backend
from tests.worker.replica import free_ports

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .running import MODEL, PATIENCE, Loop, Running, until

SERVICE = "arriero.inference.v1.Inference"
Fault = Callable[[Any], Any]


class Face(mocks.GrpcFace):
    """A mock's gRPC face that keeps metadata, knows the unary calls, and fails on request."""

    def __init__(self, mock: Mock) -> None:
        super().__init__(mock)
        self.metadata: list[dict[str, str]] = []
        self.fault: Fault | None = None
        """Awaited with the context, before anything else."""
        self.server: grpc.aio.Server | None = None

    async def start(self, port: int) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Generate": stream(self.said),
            "Tokenize": unary(self.tokenize),
            "GetModel": unary(self.get_model),
        }
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    async def note(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        if self.fault is not None:
            await self.fault(context)

    async def said(self, data: bytes, context: Any) -> Any:
        await self.note(context)
        async for message in self.generate(data, context):
            yield message

    async def tokenize(self, data: bytes, context: Any) -> bytes:
        await self.note(context)
        text = pb.TokenizeRequest.FromString(data).text
        result: bytes = pb.TokenizeResponse(ids=list(text.encode()), max_context=100).SerializeToString()
        return result

    async def get_model(self, data: bytes, context: Any) -> bytes:
        await self.note(context)
        result: bytes = pb.GetModelResponse(names=[MODEL], max_context=100, tensor=2).SerializeToString()
        return result


class Fleet:
    """A router before mocks, with a client of it and of each mock."""

    def __init__(self, router: Running, faces: list[Face], ports: list[int], stack: ExitStack) -> None:
        self.router, self.faces, self.ports = router, faces, ports
        self.channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{router.rpc}"))
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.direct = inference_pb2_grpc.InferenceStub(
            stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{ports[0]}"))
        )

    def stat(self, name: str) -> int:
        return sum(face.mock.stats[name] for face in self.faces)

    @property
    def running(self) -> int:
        return sum(face.mock.running for face in self.faces)

    def generate(self, tokens: int, orders: str = "", *metadata: tuple[str, str], **fields: Any) -> Any:
        return self.stub.Generate(ask(tokens, orders, **fields), timeout=PATIENCE, metadata=metadata)


def ask(tokens: int, orders: str = "", **fields: Any) -> pb.GenerateRequest:
    text = f"mock {orders}"
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParameters(max_tokens=tokens), **fields)


@contextmanager
def fleet(loop: Loop, count: int = 2, **options: Any) -> Iterator[Fleet]:
    ports = free_ports(2 * count)
    faces = [Face(Mock("abcd"[index])) for index in range(count)]
    backends = [Backend(face.mock.name, ports[i], ports[count + i]) for i, face in enumerate(faces)]
    router = Running(loop, backends, grpc=True, **options)

    async def serve() -> list[asyncio.Server]:
        servers = []
        for face, backend in zip(faces, backends, strict=True):
            await face.start(backend.grpc_port)
            servers.append(
                await asyncio.get_running_loop().create_server(
                    lambda mock=face.mock: mocks.HttpFace(mock),  # type: ignore[misc]
                    "127.0.0.1",
                    backend.http_port,
                )
            )
        return servers

    servers = loop.wait(serve())
    router.start()
    try:
        with ExitStack() as stack:
            router.ready(count)
            yield Fleet(router, faces, ports[count:], stack)
    finally:
        router.stop()
        for server in servers:
            loop.call(server.close)
        for face in faces:
            loop.wait(face.stop())


def code(call: Callable[[], Any]) -> tuple[str, str, dict[str, str]]:
    """Status, details and trailing metadata of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code().name, error.details(), dict(error.trailing_metadata() or ())


def fails(status: grpc.StatusCode, details: str = "no", *trailing: tuple[str, str]) -> Fault:
    async def fault(context: Any) -> None:
        await context.abort(status, details, trailing)

    return fault


def test_what_comes_out_is_what_a_replica_says(loop: Loop) -> None:
    with fleet(loop) as f:
        assert list(f.generate(20)) == list(f.direct.Generate(ask(20), timeout=PATIENCE))
        resume = (("x-arriero-resume", "1"),)
        through = list(f.generate(5, "", *resume))
        assert through == list(f.direct.Generate(ask(5), timeout=PATIENCE, metadata=resume))
        assert [id for piece in through for id in piece.token_ids] == list(range(5))
        assert through[0].seed == SEED
        f.router.idle()
        assert f.router.metric("arriero_router_requests_total", face="grpc", status="OK", model=MODEL) == 2
        assert f.router.metric("arriero_router_added_latency_seconds_count") == 2


def test_unary_calls(loop: Loop) -> None:
    with fleet(loop) as f:
        assert list(f.stub.Tokenize(pb.TokenizeRequest(text="ab"), timeout=PATIENCE).ids) == [97, 98]
        assert f.stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).tensor == 2
        f.router.idle()


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("ids", [False, True])
def test_a_stream_goes_on_behind_any_token(loop: Loop, at: int, ids: bool) -> None:
    with fleet(loop) as f:
        pieces = list(f.generate(6, f"break={at}", *((("x-arriero-resume", "1"),) if ids else ())))
        assert "".join(piece.text for piece in pieces) == text_of(6)
        assert [id for piece in pieces for id in piece.token_ids] == (list(range(6)) if ids else [])
        usages = [piece.usage for piece in pieces if piece.HasField("usage")]
        assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [(PROMPT_TOKENS, 6)], "told once"
        assert (f.stat("broken"), f.stat("resumed")) == (1, at < 6) if at < 6 else (0, 0)
        resumed = [m for face in f.faces for m in face.metadata if "x-arriero-resume-tokens" in m]
        if at < 6:
            assert resumed[0]["x-arriero-resume-tokens"] == ",".join(map(str, range(at)))
            assert resumed[0]["x-arriero-resume-seed"] == str(SEED)
        f.router.idle()


def test_a_stream_outlives_its_replica(loop: Loop) -> None:
    """The server goes away under it, as with a killed process."""
    with fleet(loop) as f:
        call = f.generate(60, "pace=10000")
        text = next(call).text + next(call).text
        busy = next(face for face in f.faces if face.mock.running)
        loop.wait(busy.stop())
        text += "".join(piece.text for piece in call)
        assert text == text_of(60)
        assert f.stat("resumed") == 1
        f.router.idle()


def test_a_replica_that_is_not_there_costs_nothing(loop: Loop) -> None:
    with fleet(loop) as f:
        loop.wait(f.faces[0].stop())
        for _ in range(8):
            assert "".join(piece.text for piece in f.generate(3)) == text_of(3)
        assert f.faces[1].mock.stats["rpcs"] == 8
        f.router.idle()


def test_a_silent_replica_is_given_up(loop: Loop) -> None:
    with fleet(loop, replay={"stallSeconds": 0.3}) as f:
        call = f.generate(3, "pace=60000000 at=a")
        first = next(call)

        async def go_on() -> None:
            for face in f.faces:
                face.generate = swift(face)  # type: ignore[method-assign]

        def swift(face: Face) -> Any:
            async def generate(data: bytes, context: Any) -> Any:
                sent = dict(context.invocation_metadata())["x-arriero-resume-tokens"]
                for index in range(sent.count(",") + 1, 3):
                    yield face.piece(index, index == 2, True)

            return generate

        loop.wait(go_on())
        assert first.text + "".join(piece.text for piece in call) == text_of(3)
        f.router.idle()


@pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"])
def test_an_error_of_the_clients_own_is_passed_on_and_never_replayed(loop: Loop, status: str) -> None:
    with fleet(loop) as f:
        for face in f.faces:
            face.fault = fails(getattr(grpc.StatusCode, status), "temperature: too hot")
        assert code(lambda: list(f.generate(3)))[:2] == (status, "temperature: too hot")
        assert code(lambda: f.stub.Tokenize(pb.TokenizeRequest(), timeout=PATIENCE))[:2] == (
            status, "temperature: too hot",
        )  # fmt: skip
        assert sum(len(face.metadata) for face in f.faces) == 2
        assert not any(loop.call(lambda: [r.failures for r in f.router.served.pool.replicas]))
        f.router.idle()


@pytest.mark.parametrize("status", ["RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"])
def test_what_one_replica_cannot_another_can(loop: Loop, status: str) -> None:
    with fleet(loop, ejection={"failures": 0}) as f:
        f.faces[0].fault = fails(getattr(grpc.StatusCode, status), "no", ("retry-after", "3"))
        while not f.faces[0].metadata:
            assert "".join(piece.text for piece in f.generate(3)) == text_of(3)
        f.faces[0].metadata.clear()
        while not f.faces[0].metadata:
            assert f.stub.Tokenize(pb.TokenizeRequest(text="a"), timeout=PATIENCE).ids == [97]
        f.router.idle()


def test_attempts_are_bounded(loop: Loop) -> None:
    with fleet(loop, replay={"attempts": 2}, ejection={"failures": 0}) as f:
        for face in f.faces:
            face.fault = fails(grpc.StatusCode.INTERNAL, "broken")
        assert code(lambda: list(f.generate(3)))[:2] == ("INTERNAL", "broken")
        assert sum(len(face.metadata) for face in f.faces) == 3


def test_refusals_of_the_router(loop: Loop) -> None:
    with fleet(loop, 1, hold={"timeoutSeconds": 0.3, "maxQueue": 1}) as f:
        assert code(lambda: list(f.generate(3, model="other")))[0] == "NOT_FOUND"
        assert code(lambda: f.stub.GetModel(pb.GetModelRequest(model="other"), timeout=PATIENCE))[0] == "NOT_FOUND"
        garbage = f.channel.unary_unary(f"/{SERVICE}/Tokenize")
        assert code(lambda: garbage(b"\xff", timeout=PATIENCE))[:2] == (
            "INVALID_ARGUMENT",
            "the message is no TokenizeRequest",
        )
        loop.call(lambda: f.router.served._publish([]))
        waiting = f.generate(3)
        until(lambda: f.router.metric("arriero_router_held") == 1, "it is held")
        status, details, trailing = code(lambda: list(f.generate(3)))
        assert (status, details) == ("RESOURCE_EXHAUSTED", "1 requests are waiting already")
        assert int(trailing["retry-after"]) >= 1
        status, details, trailing = code(lambda: list(waiting))
        assert (status, "there is no replica" in details) == ("UNAVAILABLE", True)
        assert int(trailing["retry-after"]) >= 1
        f.router.idle()


def test_a_call_waits_for_a_replica(loop: Loop) -> None:
    with fleet(loop, 1, hold={"timeoutSeconds": 20}) as f:
        endpoint = loop.call(lambda: f.router.served.pool.replicas[0].endpoint)
        loop.call(lambda: f.router.served._publish([]))
        waiting = f.generate(3)
        until(lambda: f.router.metric("arriero_router_held") == 1, "it is held")
        loop.call(lambda: f.router.served._publish([endpoint]))
        assert "".join(piece.text for piece in waiting) == text_of(3)
        f.router.idle()


def test_a_cancelled_call_is_cancelled_at_its_replica(loop: Loop) -> None:
    with fleet(loop) as f:
        calls = [f.generate(1000, "pace=20000") for _ in range(4)]
        for call in calls:
            next(call)
        assert f.running == 4
        for call in calls:
            call.cancel()
        until(lambda: f.running == 0, "the replicas know")
        f.router.idle()
        assert f.router.metric("arriero_router_requests_total", status="CANCELLED") == 4
        assert f.router.metric("arriero_router_broken_attempts_total") == 0


def test_a_deadline_ends_the_call_everywhere(loop: Loop) -> None:
    with fleet(loop) as f:
        call = f.stub.Generate(ask(1000, "pace=20000"), timeout=0.5)
        assert code(lambda: list(call))[0] == "DEADLINE_EXCEEDED"
        until(lambda: f.running == 0, "the replica knows")
        loop.call(lambda: f.router.served._publish([]))
        began = time.monotonic()
        assert code(lambda: list(f.stub.Generate(ask(3), timeout=0.3)))[0] in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        assert time.monotonic() - began < 5, "a wait does not outlast it"
        f.router.idle()


def test_metadata_is_passed_on_but_for_what_ends_here(loop: Loop) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    given = (("x-own", "1"), ("authorization", "Bearer k"), ("x-api-key", "k"), ("traceparent", parent))
    with fleet(loop, 1) as f:
        list(f.generate(1, "", *given, ("x-request-id", "me")))
        f.stub.Tokenize(pb.TokenizeRequest(), timeout=PATIENCE, metadata=given)
        for seen in f.faces[0].metadata:
            assert seen["x-own"] == "1"
            assert seen["traceparent"] == parent
            assert not {"authorization", "x-api-key"} & set(seen)
            assert seen["x-request-id"]
        assert f.faces[0].metadata[0]["x-request-id"] == "me"
        assert f.faces[0].metadata[0]["x-arriero-resume"] == "1"


BINARY = bytes(range(256))


def test_metadata_of_any_kind_goes_both_ways(loop: Loop) -> None:
    """Binary values, several of one name, initial and trailing; what belongs to a hop or to the routers stays."""
    given = (("x-blob-bin", BINARY), ("x-many", "1"), ("x-many", "2"), ("x-arriero-secret", "s"))
    initial = (("x-from-bin", BINARY[::-1]), ("x-from", "a"), ("x-from", "b"), ("x-arriero-own", "s"))
    trailing = (("x-cost-bin", BINARY), ("x-cost", "7"), ("x-arriero-own", "s"))
    seen: list[tuple[tuple[str, Any], ...]] = []

    async def speak(context: Any) -> None:
        seen.append(tuple(context.invocation_metadata()))
        await context.send_initial_metadata(initial)
        context.set_trailing_metadata(trailing)

    with fleet(loop, 1) as f:
        f.faces[0].fault = speak
        call = f.generate(3, "", *given)
        assert len(list(call)) == 3
        _, other = f.stub.Tokenize.with_call(pb.TokenizeRequest(), timeout=PATIENCE, metadata=given)
        for one in (call, other):
            assert [pair for pair in one.initial_metadata() if pair[0] != "content-type"] == list(initial[:3])
            assert list(one.trailing_metadata()) == list(trailing[:2])
        for pairs in seen:
            assert [pair for pair in pairs if pair[0] in ("x-blob-bin", "x-many")] == list(given[:3])
            assert "x-arriero-secret" not in dict(pairs)
        f.router.idle()


def test_a_failures_details_reach_the_client(loop: Loop) -> None:
    details = (("grpc-status-details-bin", BINARY), ("x-why-bin", BINARY), ("retry-after", "3"))
    with fleet(loop, 1) as f:
        f.faces[0].fault = fails(grpc.StatusCode.FAILED_PRECONDITION, "not so", *details)
        assert code(lambda: list(f.generate(1))) == ("FAILED_PRECONDITION", "not so", dict(details))
        unary = lambda: f.stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)  # noqa: E731
        assert code(unary) == ("FAILED_PRECONDITION", "not so", dict(details))


def test_initial_metadata_is_that_of_the_replica_that_began(loop: Loop) -> None:
    def named(name: str) -> Fault:
        async def speak(context: Any) -> None:
            await context.send_initial_metadata((("x-replica", name),))
            context.set_trailing_metadata((("x-last", name),))

        return speak

    with fleet(loop) as f:
        for face in f.faces:
            face.fault = named(face.mock.name)
        call = f.generate(6, "break=3 at=a")
        assert "".join(piece.text for piece in call) == text_of(6)
        while not f.stat("resumed"):  # until one began at a
            call = f.generate(6, "break=3 at=a")
            assert "".join(piece.text for piece in call) == text_of(6)
        assert dict(call.initial_metadata())["x-replica"] == "a"
        assert dict(call.trailing_metadata())["x-last"] == "b"


def test_a_replica_knows_the_clients_deadline(loop: Loop) -> None:
    left: list[float | None] = []

    async def note(context: Any) -> None:
        left.append(context.time_remaining())

    with fleet(loop, 1) as f:
        f.faces[0].fault = note
        list(f.stub.Generate(ask(1), timeout=17))
        f.stub.Tokenize(pb.TokenizeRequest(), timeout=17)
        list(f.stub.Generate(ask(1)))
        assert left[2] is None
        for seconds in left[:2]:
            assert seconds is not None
            assert 0 < seconds < 18, "the wire rounds up"


def test_a_unary_call_leaves_a_silent_replica(loop: Loop) -> None:
    """A replica that takes a call and never answers it."""
    with fleet(loop, 2, limits={"answerSeconds": 0.2}) as f:

        async def sleep(context: Any) -> None:
            await asyncio.sleep(3600)

        f.faces[0].fault = sleep
        for _ in range(4):
            assert f.stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=PATIENCE).max_context == 100
        f.faces[1].fault = sleep
        assert code(lambda: f.stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=PATIENCE))[0] == "UNAVAILABLE"
        f.router.idle()


def test_health_says_not_serving_while_draining(loop: Loop) -> None:
    with fleet(loop) as f:
        health = health_pb2_grpc.HealthStub(f.channel)
        for service in ("", SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
        assert next(watch).status == 1
        call = f.generate(40, "pace=10000")
        next(call)
        drained = asyncio.run_coroutine_threadsafe(f.router.router.drain(PATIENCE), loop.loop)
        assert next(watch).status == 2
        assert not drained.done()
        assert sum(1 for _ in call) == 39, "what runs goes on"
        watch.cancel()
        assert drained.result(PATIENCE)


def test_reflection_names_the_services(loop: Loop) -> None:
    with fleet(loop, 1) as f:
        stub = reflection_pb2_grpc.ServerReflectionStub(f.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(stub.ServerReflectionInfo(asked, timeout=PATIENCE))
        names = {service.name for service in answer.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_a_slow_reader_loses_nothing(loop: Loop) -> None:
    """Its replica is held up, and all of it arrives."""
    tokens = 3000
    with fleet(loop, 1) as f:
        pad = b"x" * 10_000
        face = f.faces[0]
        plain, made = face.piece, 0

        def padded(index: int, last: bool, ids: bool) -> bytes:
            nonlocal made
            made = index
            message = pb.GenerateResponse.FromString(plain(index, last, ids))
            message.stop = pad.decode()
            return bytes(message.SerializeToString())

        face.piece = padded  # type: ignore[method-assign]
        call = f.generate(tokens)
        text = next(call).text
        last = -1

        def stopped() -> bool:
            nonlocal last
            now, last = last, made
            time.sleep(0.05)
            return now == made

        until(stopped, "the replica is stopped")
        assert made < tokens / 2
        text += "".join(piece.text for piece in call)
        assert text == text_of(tokens)
        f.router.idle()


def test_a_reader_that_takes_nothing_is_cut_off(loop: Loop) -> None:
    with fleet(loop, 1, limits={"takeSeconds": 0.5}) as f:
        face = f.faces[0]
        plain = face.piece

        def padded(index: int, last: bool, ids: bool) -> bytes:
            return plain(index, last, ids) + b"\x22\x90\x4e" + b"x" * 10_000

        face.piece = padded  # type: ignore[method-assign]
        call = f.generate(100_000)
        next(call)
        until(
            lambda: f.router.metric("arriero_router_requests_total", face="grpc", status="RESOURCE_EXHAUSTED") == 1,
            "cut",
        )
        until(lambda: face.mock.running == 0, "the replica knows")
        f.router.idle()
        call.cancel()
