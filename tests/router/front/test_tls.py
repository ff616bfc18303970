"""TLS towards clients and replicas: shown, asked for, changed while running."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from tests.faces.raw import Response, events, parse_response, read_all
from tests.router import mocks
from tests.router.mocks import Mock, text_of
from tests.router.router_process import Backend
from tests.worker.replica import free_ports

from arriero.inference.v1 import inference_pb2 as pb
from arriero.inference.v1 import inference_pb2_grpc

from .running import MODEL, PATIENCE, TEXT, Loop, Running, ask, prompt, request, until
from .test_grpc import Face, fleet

HOST = "localhost"


class Papers:
    """An authority, and files of what it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.other = trustme.CA()
        self.ca.cert_pem.write_to_path(self.path("ca.pem"))
        self.issue("server", HOST, "127.0.0.1")
        self.issue("client", "client")

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def issue(self, name: str, *hosts: str, ca: trustme.CA | None = None) -> None:
        """A certificate under this name, in place of an earlier one, file by file."""
        leaf = (ca or self.ca).issue_cert(*hosts)
        for suffix, blob in (("cert.new", leaf.cert_chain_pems[0]), ("key.new", leaf.private_key_pem)):
            blob.write_to_path(self.path(f"{name}.{suffix}"))
        for suffix in ("cert", "key"):
            os.replace(self.path(f"{name}.{suffix}.new"), self.path(f"{name}.{suffix}"))

    def tls(self, mutual: bool = False) -> dict[str, str]:
        files = {"certFile": self.path("server.cert"), "keyFile": self.path("server.key")}
        return files | ({"clientCaFile": self.path("ca.pem")} if mutual else {})

    def client(self, own: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.path("ca.pem"))
        if own:
            context.load_cert_chain(self.path("client.cert"), self.path("client.key"))
        return context

    def credentials(self, own: bool = False) -> grpc.ChannelCredentials:
        read = lambda name: Path(self.path(name)).read_bytes()  # noqa: E731
        if own:
            return grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.cert"))
        return grpc.ssl_channel_credentials(read("ca.pem"))


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path)


def secure(port: int, context: ssl.SSLContext, data: bytes) -> tuple[Response, bytes]:
    """An answer over TLS, and the certificate that was shown. Raises ssl.SSLError, ConnectionError."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as client,
    ):
        client.sendall(data)
        shown = client.getpeercert(binary_form=True)
        assert shown is not None
        return parse_response(read_all(client)), shown


def generate(port: int, credentials: grpc.ChannelCredentials) -> str:
    options = [("grpc.ssl_target_name_override", HOST), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        wanted = pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(max_tokens=3))
        pieces = inference_pb2_grpc.InferenceStub(channel).Generate(wanted, timeout=PATIENCE)
        return "".join(piece.text for piece in pieces)


def test_both_faces_speak_tls_alone(loop: Loop, papers: Papers) -> None:
    with fleet(loop, 1, tls=papers.tls()) as f:
        port, rpc = f.router.port, f.router.rpc
        for stream in (False, True):
            answer, _ = secure(port, papers.client(), request(TEXT, prompt(200, stream=stream)))
            assert answer.status == 200
        assert events(answer.body)[-1] == "[DONE]"
        assert generate(rpc, papers.credentials()) == text_of(3)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:
            plain.sendall(request("/health/live"))
            assert b"HTTP" not in read_all(plain)
        with pytest.raises(ssl.SSLCertVerificationError):
            secure(port, ssl.create_default_context(), request("/health/live"))
        old = papers.client()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert secure(port, old, request("/health/live"))[0].status == 200
        f.router.idle()


def test_requests_in_one_go_over_tls(loop: Loop, papers: Papers) -> None:
    with fleet(loop, 1, tls=papers.tls()) as f:
        data = request(TEXT, prompt(1), close=False) * 3 + request(TEXT, prompt(1))
        with (
            socket.create_connection(("127.0.0.1", f.router.port), timeout=PATIENCE) as plain,
            papers.client().wrap_socket(plain, server_hostname=HOST) as client,
        ):
            client.sendall(data)
            assert read_all(client).count(b"HTTP/1.1 200 OK") == 4


def test_clients_without_a_certificate_are_refused_where_one_is_asked_for(loop: Loop, papers: Papers) -> None:
    with fleet(loop, 1, tls=papers.tls(mutual=True)) as f:
        port, rpc = f.router.port, f.router.rpc
        assert secure(port, papers.client(own=True), request(TEXT, prompt(2)))[0].status == 200
        assert generate(rpc, papers.credentials(own=True)) == text_of(3)
        for context in (papers.client(), stranger(papers)):
            with pytest.raises((ssl.SSLError, ConnectionError, IndexError, ValueError)):
                secure(port, context, request("/health/live"))
        with pytest.raises(grpc.RpcError) as caught:
            generate(rpc, papers.credentials())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert secure(port, papers.client(own=True), request(TEXT, prompt(2)))[0].status == 200
        until(lambda: loop.call(lambda: f.router.router.http.connections) == 0, "none is left")


def stranger(papers: Papers) -> ssl.SSLContext:
    """Shows a certificate of an authority that nobody here knows."""
    leaf = papers.other.issue_cert("client")
    context = papers.client()
    leaf.configure_cert(context)
    return context


def test_a_new_certificate_is_shown_without_a_restart(
    loop: Loop, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero_router.security._LOOK_SECONDS", 0.05)
    with fleet(loop, 1, tls=papers.tls()) as f:
        port, rpc = f.router.port, f.router.rpc

        def shown() -> bytes:
            return secure(port, papers.client(), request("/health/live"))[1]

        first = shown()
        assert generate(rpc, papers.credentials()) == text_of(3)
        papers.issue("server", HOST)
        until(lambda: shown() != first, "the new one is shown")
        assert generate(rpc, papers.credentials()) == text_of(3)
        second = shown()
        # Half of a new pair, or none at all: the one in use goes on.
        Path(papers.path("server.key")).write_bytes(Path(papers.path("client.key")).read_bytes())
        seen = loop.call(lambda: f.router.router._certificates._seen)  # type: ignore[union-attr]
        until(lambda: loop.call(lambda: f.router.router._certificates._seen) != seen, "it was looked at")  # type: ignore[union-attr]
        assert shown() == second
        Path(papers.path("server.cert")).unlink()
        until(lambda: loop.call(lambda: None in f.router.router._certificates._seen), "it was looked at")  # type: ignore[union-attr]
        assert shown() == second
        papers.issue("server", HOST)
        until(lambda: shown() != second, "the third one is shown")


def test_an_authority_taken_away_is_trusted_no_more(
    loop: Loop, papers: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart, by both faces, in new handshakes and by resumed sessions; what stands stays."""
    monkeypatch.setattr("arriero_router.security._LOOK_SECONDS", 0.05)
    files = papers.tls(mutual=True) | {"clientCaFile": papers.path("clients.pem")}
    both = papers.ca.cert_pem.bytes() + papers.other.cert_pem.bytes()
    Path(files["clientCaFile"]).write_bytes(both)
    old, new = papers.client(own=True), stranger(papers)
    tls12 = papers.client(own=True)
    tls12.maximum_version = ssl.TLSVersion.TLSv1_2
    other = papers.other.issue_cert("client")
    fresh = grpc.ssl_channel_credentials(
        papers.ca.cert_pem.bytes(), other.private_key_pem.bytes(), other.cert_chain_pems[0].bytes()
    )
    with fleet(loop, 1, tls=files) as f:
        port, rpc = f.router.port, f.router.rpc
        sessions = [session(port, context) for context in (old, tls12)]
        assert all(resumed(port, context, one) for context, one in zip((old, tls12), sessions, strict=True))
        standing = old.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE), server_hostname=HOST)
        for credentials in (papers.credentials(own=True), fresh):
            assert generate(rpc, credentials) == text_of(3)
        seen = loop.call(lambda: f.router.router._certificates._seen)  # type: ignore[union-attr]
        Path(files["clientCaFile"]).write_bytes(papers.other.cert_pem.bytes())
        until(lambda: loop.call(lambda: f.router.router._certificates._seen) != seen, "it was looked at")  # type: ignore[union-attr]
        for context, one in zip((old, tls12), sessions, strict=True):
            with pytest.raises((ssl.SSLError, ConnectionError, IndexError, ValueError)):
                secure(port, context, request("/health/live"))
            with pytest.raises((ssl.SSLError, ConnectionError, IndexError, ValueError)):
                resumed(port, context, one)
        assert secure(port, new, request("/health/live"))[0].status == 200
        with pytest.raises(grpc.RpcError) as caught:
            generate(rpc, papers.credentials(own=True))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert generate(rpc, fresh) == text_of(3)
        with standing:
            standing.sendall(request("/health/live"))
            assert parse_response(read_all(standing)).status == 200


def session(port: int, context: ssl.SSLContext) -> ssl.SSLSession:
    """What a client may resume."""
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE), server_hostname=HOST) as client:
        client.sendall(request("/health/live"))
        assert parse_response(read_all(client)).status == 200
        assert client.session is not None
        return client.session


def resumed(port: int, context: ssl.SSLContext, session: ssl.SSLSession) -> bool:
    """Whether the session was taken up; a request is answered in any case. Raises as `secure` does."""
    plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
    with context.wrap_socket(plain, server_hostname=HOST, session=session) as client:
        client.sendall(request("/health/live"))
        assert parse_response(read_all(client)).status == 200
        return bool(client.session_reused)


class SecureFleet:
    """A router before one replica that speaks TLS, over HTTP and gRPC, and asks for a certificate."""

    def __init__(self, loop: Loop, papers: Papers, **options: Any) -> None:
        self.loop, self.papers = loop, papers
        http, rpc = free_ports(2)
        self.face = Face(Mock("a"))
        self.router = Running(loop, [Backend("a", http, rpc)], grpc=True, **options)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=papers.path("ca.pem"))
        context.load_cert_chain(papers.path("server.cert"), papers.path("server.key"))
        context.verify_mode = ssl.CERT_REQUIRED

        async def serve() -> asyncio.Server:
            await self.start_grpc(rpc)
            return await asyncio.get_running_loop().create_server(
                lambda: mocks.HttpFace(self.face.mock), "127.0.0.1", http, ssl=context
            )

        self.server = loop.wait(serve())
        self.router.start()

    async def start_grpc(self, port: int) -> None:
        read = lambda name: Path(self.papers.path(name)).read_bytes()  # noqa: E731
        self.face.server = server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((self.face.handler(),))
        pair = (read("server.key"), read("server.cert"))
        server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair], read("ca.pem"), True))
        await server.start()

    def close(self) -> None:
        self.router.stop()
        self.loop.call(self.server.close)
        self.loop.wait(self.face.stop())


@pytest.fixture
def upstream(papers: Papers) -> dict[str, str]:
    return {
        "caFile": papers.path("ca.pem"),
        "certFile": papers.path("client.cert"),
        "keyFile": papers.path("client.key"),
        "serverName": HOST,
    }


@pytest.fixture
def closing() -> Iterator[list[SecureFleet]]:
    made: list[SecureFleet] = []
    yield made
    for one in made:
        one.close()


def test_replicas_are_spoken_to_over_tls(
    loop: Loop, papers: Papers, upstream: dict[str, str], closing: list[SecureFleet]
) -> None:
    f = SecureFleet(loop, papers, upstreamTls=upstream)
    closing.append(f)
    f.router.ready(1)
    for stream in (False, True):
        assert ask(f.router.port, TEXT, prompt(50, stream=stream)).status == 200
    with grpc.insecure_channel(f"127.0.0.1:{f.router.rpc}") as channel:
        wanted = pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(max_tokens=3), model=MODEL)
        pieces = inference_pb2_grpc.InferenceStub(channel).Generate(wanted, timeout=PATIENCE)
        assert "".join(piece.text for piece in pieces) == text_of(3)
    f.router.idle()


@pytest.mark.parametrize("wrong", ["name", "authority", "plain", "no certificate"])
def test_a_replica_that_cannot_be_trusted_is_never_asked(
    loop: Loop, papers: Papers, upstream: dict[str, str], closing: list[SecureFleet], wrong: str
) -> None:
    if wrong == "name":
        upstream["serverName"] = "another.example"
    elif wrong == "authority":
        papers.other.cert_pem.write_to_path(papers.path("other.pem"))
        upstream["caFile"] = papers.path("other.pem")
    elif wrong == "no certificate":
        del upstream["certFile"], upstream["keyFile"]
    given = {} if wrong == "plain" else {"upstreamTls": upstream}
    f = SecureFleet(loop, papers, hold={"timeoutSeconds": 0.5}, **given)
    closing.append(f)
    assert ask(f.router.port, TEXT, prompt(1)).status == 503
    assert loop.call(lambda: f.router.served.pool.ready) == 0
    assert f.face.mock.stats["requests"] == 0
