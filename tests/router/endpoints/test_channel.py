"""Reaching a replica: waits between tries, words for failures, TLS."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import sys

import grpc
import pytest
import trustme
from tests.router.endpoints.fakes import Replica, Told, running

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.backoff import Backoff
from arriero_router.endpoints.cache import CacheFollower
from arriero_router.endpoints.channel import Security, knock, unreachable


def test_waits_double_up_to_the_longest() -> None:
    backoff = Backoff(0.1, 1.0)
    for whole in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert 0.8 * whole <= backoff.next() <= whole
    backoff.reset()
    assert backoff.next() <= 0.1


async def test_a_knock_tells_who_listens() -> None:
    with socket.socket() as listening, socket.socket() as bound:
        for one in (listening, bound):
            one.bind(("127.0.0.1", 0))
        listening.listen()
        await knock("127.0.0.1", listening.getsockname()[1], 5)
        with pytest.raises(OSError, match="Connect call failed") as caught:
            await knock("127.0.0.1", bound.getsockname()[1], 5)
    assert unreachable(caught.value) == "Connection refused"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EHOSTUNREACH, "Connect call failed ('10.0.0.1', 1)"), "No route to host"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "wrong version number"), "wrong version number"),
        (OSError("Multiple exceptions: a, b"), "Multiple exceptions: a, b"),
        (TimeoutError(), "no answer in time"),
    ],
)
def test_words_for_failures(error: OSError, words: str) -> None:
    assert unreachable(error) == words


async def test_the_cache_is_followed_over_tls() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("replica.example")
    server = Replica()
    server.held = [1]
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    await server.start(grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)]))
    told = Told()
    endpoint = Endpoint(name="a", host="127.0.0.1", http_port=1, grpc_port=server.port)
    trusting = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    try:
        follower = CacheFollower(endpoint, told.on_marks, Security(grpc=trusting, server_name="replica.example"))
        async with running(follower.run()):
            await told.until(lambda: told.marks.get("a") == {1})
    finally:
        await server.stop()


def test_the_cluster_client_is_loaded_only_by_who_needs_it() -> None:
    """It costs more than all the rest of the router."""
    program = "import sys, arriero_router.endpoints.kubernetes as k; sys.exit('kubernetes.aio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
