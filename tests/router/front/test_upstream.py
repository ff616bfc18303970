"""Connections to replicas: kept and used again, broken in every way, given up when they are silent."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from arriero_router.front.upstream import MAX_HEAD, Upstream, UpstreamError, UpstreamPool

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Answer:
    """A receiver that keeps all."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.data = b""
        self.reason = ""
        self.untouched = False
        self.whole: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert not self.status, "one head"
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        assert data, "something came"
        self.data += data

    def end(self) -> None:
        self.whole.set_result(True)

    def broken(self, reason: str, untouched: bool) -> None:
        self.reason, self.untouched = reason, untouched
        self.whole.set_result(False)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def replica(talk: Talk) -> AsyncIterator[UpstreamPool]:
    """A pool of connections to a server that talks so on each of them."""
    tasks = set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    pool = UpstreamPool("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield pool
    finally:
        pool.close(busy=True)
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def replies(*answers: bytes) -> Talk:
    """The n-th request on a connection gets the n-th answer; then the connection is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    return talk


async def ask(pool: UpstreamPool) -> tuple[Answer, Upstream]:
    upstream = pool.lease() or await pool.connect()
    answer = Answer()
    upstream.send(GET, answer)
    async with asyncio.timeout(10):
        await asyncio.shield(answer.whole)
    return answer, upstream


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_a_connection_is_used_again() -> None:
    async with replica(replies(OK, OK, OK)) as pool:
        used = [await ask(pool) for _ in range(3)]
        assert all(answer.data == b"hi" for answer, _ in used)
        assert len({id(upstream) for _, upstream in used}) == 1
        assert pool.connections == 1
        await until(lambda: pool.connections == 0)
        assert pool.lease() is None, "the replica has closed it"


async def test_the_one_used_last_is_used_first() -> None:
    async with replica(replies(OK, OK)) as pool:
        first, second = [await pool.connect() for _ in range(2)]
        for upstream in (first, second):
            answer = Answer()
            upstream.send(GET, answer)
            await answer.whole
        assert pool.lease() is second
        assert pool.lease() is first


async def test_an_answer_that_says_close_is_the_last() -> None:
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    async with replica(replies(closing, OK)) as pool:
        answer, upstream = await ask(pool)
        assert answer.data == b"hi"
        assert upstream.closed
        assert pool.lease() is None


async def test_http_1_0_is_not_kept() -> None:
    async with replica(replies(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi")) as pool:
        answer, upstream = await ask(pool)
        assert answer.data == b"hi"
        assert upstream.closed


async def test_a_kept_connection_that_closes_under_a_request_was_not_touched() -> None:
    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")

    async with replica(closes) as pool:
        await ask(pool)
        answer, _ = await ask(pool)
        assert not answer.whole.result()
        assert answer.untouched


async def test_a_new_connection_that_closes_was_touched() -> None:
    async with replica(replies(b"")) as pool:
        answer, _ = await ask(pool)
        assert not answer.whole.result()
        assert not answer.untouched
        assert answer.reason == "the replica closed the connection"


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhi", OK[:20], b"HTTP/1.1 200 OK\r\n\r\nhi"]
)
async def test_a_close_in_the_middle_breaks(data: bytes) -> None:
    """Replicas frame their answers: one without a length is not taken for whole, either."""
    async with replica(replies(OK, data)) as pool:
        await ask(pool)
        answer, _ = await ask(pool)
        assert not answer.whole.result()
        assert not answer.untouched


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi!",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nbytes",
    ],
)  # fmt: skip
async def test_an_answer_that_is_not_http_breaks(data: bytes) -> None:
    async with replica(replies(data)) as pool:
        answer, upstream = await ask(pool)
        assert not answer.whole.result(), (answer.status, answer.headers, answer.data)
        assert upstream.closed
        assert pool.lease() is None


@pytest.mark.parametrize(
    "flood",
    [
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1000,
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 1000,
    ],
)
async def test_heads_and_trailers_without_end_are_cut_short(flood: bytes) -> None:
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(flood)
        rest = flood if flood.endswith(b"\r\n\r\n") else flood[-6:] * 200
        while not writer.is_closing() and sent < 50 * MAX_HEAD:
            writer.write(rest)
            sent += len(rest)
            await writer.drain()

    async with replica(talk) as pool:
        answer, _ = await ask(pool)
        assert not answer.whole.result()
        assert str(MAX_HEAD) in answer.reason
        assert len(answer.headers) < 100


async def test_informational_answers_are_skipped() -> None:
    async with replica(replies(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + OK, OK)) as pool:
        answer, _ = await ask(pool)
        assert (answer.status, answer.data) == (200, b"hi")
        assert answer.headers == [(b"content-length", b"2")]
        assert (await ask(pool))[0].data == b"hi"


async def test_trailers_are_no_headers() -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nhi\r\n0\r\nset-cookie: no\r\n\r\n"
    async with replica(replies(chunked, OK)) as pool:
        answer, _ = await ask(pool)
        assert answer.data == b"hi"
        assert answer.headers == [(b"transfer-encoding", b"chunked")]
        assert (await ask(pool))[0].data == b"hi"


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def in_steps(*steps: bytes) -> Talk:
    """One answer, each step an arrival of its own."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for step in steps:
            writer.write(step)
            await writer.drain()
            await asyncio.sleep(0.01)
        await reader.read()

    return talk


BODY = b"".join(b"%x\r\n%b\r\n" % (size, b"c" * size) for size in (1, 15, 16, 255, 256, 4095, 4096, 70_000))


@pytest.mark.parametrize("cuts", [[], [3], [6], [7], [4, 5, 6, 30], [600], [700, 4800, 4805, 10_000]])
async def test_chunks_are_whole_however_they_arrive(cuts: list[int]) -> None:
    edges = [0, *cuts, len(BODY)]
    steps = [BODY[a:b] for a, b in itertools.pairwise(edges)]
    async with replica(in_steps(CHUNKED, *steps, b"0\r\n\r\n")) as pool:
        answer, upstream = await ask(pool)
        assert answer.whole.result()
        assert answer.data == b"c" * (1 + 15 + 16 + 255 + 256 + 4095 + 4096 + 70_000)
        assert not upstream.closed
        assert pool.lease() is upstream


@pytest.mark.parametrize("line", [b"0x2", b"+2", b"-2", b" 2", b"2 2", b"2_0", b"", b"g"])
async def test_a_chunk_of_no_proper_size_breaks(line: bytes) -> None:
    """What stands for a size in Python need not do so in HTTP."""
    async with replica(in_steps(CHUNKED + b"1\r\na\r\n", line + b"\r\nhi\r\n", b"0\r\n\r\n")) as pool:
        answer, upstream = await ask(pool)
        assert not answer.whole.result()
        assert answer.data == b"a"
        assert upstream.closed


@pytest.mark.parametrize("line", [b"2;x=y", b"02", b"2\t", b"00000002"])
async def test_other_spellings_of_a_size_are_the_parsers(line: bytes) -> None:
    async with replica(in_steps(CHUNKED + b"1\r\na\r\n", line + b"\r\nhi\r\n", b"1\r\nb\r\n0\r\n\r\n")) as pool:
        answer, _ = await ask(pool)
        assert answer.data in (b"ahib", b"a"), "taken for what it is, or refused"
        assert answer.whole.result() is (answer.data == b"ahib")


async def test_a_body_without_chunks_may_look_like_one() -> None:
    looks = b"2\r\nhi\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(looks))
    async with replica(in_steps(head, looks, looks)) as pool:
        answer, _ = await ask(pool)
        assert answer.data == 2 * looks


async def test_more_behind_chunks_taken_by_hand_ends_the_connection() -> None:
    async with replica(
        in_steps(CHUNKED, b"2\r\nhi\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
    ) as pool:
        answer, upstream = await ask(pool)
        assert answer.whole.result()
        assert answer.data == b"hi"
        assert upstream.closed
        assert pool.lease() is None


async def test_more_than_was_asked_for_ends_the_connection() -> None:
    """A second answer would be taken for that of the next request."""
    async with replica(replies(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")) as pool:
        answer, upstream = await ask(pool)
        assert answer.data == b"hi"
        assert upstream.closed
        assert pool.lease() is None


async def test_bytes_on_an_idle_connection_end_it() -> None:
    release = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await release.wait()
        writer.write(OK)
        await reader.read()

    async with replica(talk) as pool:
        _, upstream = await ask(pool)
        assert not upstream.closed
        release.set()
        await until(lambda: upstream.closed)
        assert pool.lease() is None


async def test_nobody_listens() -> None:
    async with replica(replies()) as pool:
        gone = UpstreamPool("127.0.0.1", 1)
        with pytest.raises(UpstreamError, match="Connection refused"):
            await gone.connect()
        assert gone.connections == 0
        assert pool.connections == 0


async def test_a_connection_may_take_only_so_long() -> None:
    """A host that does not answer at all: a listener whose queue is full drops what comes."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        filled = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
            filled.append(one)
        pool = UpstreamPool("127.0.0.1", port, connect_seconds=0.2)
        with pytest.raises(UpstreamError, match=r"no connection within 0\.2 s"):
            await asyncio.gather(*(pool.connect() for _ in range(4)))
        pool.close(busy=True)
        for one in filled:
            one.close()


async def test_idle_connections_are_swept() -> None:
    async with replica(replies(OK, OK, OK)) as pool:
        _, upstream = await ask(pool)
        now = pool.loop.time()
        pool.sweep(now + 9, idle=10, head=0, silence=0)
        assert not upstream.closed
        pool.sweep(now + 11, idle=10, head=0, silence=0)
        assert upstream.closed
        await until(lambda: pool.connections == 0)


async def test_a_new_connection_is_not_taken_for_an_idle_one() -> None:
    async with replica(replies(OK)) as pool:
        upstream = await pool.connect()
        pool.sweep(pool.loop.time(), idle=0.5, head=0, silence=0)
        assert not upstream.closed


async def test_silence_before_and_within_an_answer() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await begin.wait()
        writer.write(OK[:-1])
        await reader.read()

    begin = asyncio.Event()
    async with replica(talk) as pool:
        answer = Answer()
        upstream = await pool.connect()
        upstream.send(GET, answer)
        now = pool.loop.time()
        pool.sweep(now + 100, idle=1, head=0, silence=1)
        assert not answer.whole.done(), "without a limit for the head it may take any time"
        begin.set()
        await until(lambda: answer.status == 200)
        now = pool.loop.time()
        pool.sweep(now + 4, idle=1, head=1, silence=5)
        assert not answer.whole.done()
        upstream.pause()
        pool.sweep(now + 50, idle=1, head=1, silence=5)
        assert not answer.whole.done(), "it is the client that does not read"
        upstream.resume()
        pool.sweep(now + 60, idle=1, head=1, silence=5)
        assert answer.reason == "the replica said nothing for 5 s"
        other = Answer()
        begin.clear()
        late = await pool.connect()
        late.send(GET, other)
        pool.sweep(pool.loop.time() + 3, idle=1, head=2, silence=5)
        assert other.reason == "the replica did not answer within 2 s"


async def test_a_pool_that_is_closed_lets_running_answers_end() -> None:
    release = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK[:-1])
        await release.wait()
        writer.write(OK[-1:])
        await reader.read()

    async with replica(talk) as pool:
        answer = Answer()
        upstream = await pool.connect()
        upstream.send(GET, answer)
        await until(lambda: answer.status == 200)
        pool.close()
        release.set()
        assert await answer.whole
        assert upstream.closed, "it is not kept"


async def test_no_more_than_so_many_are_kept() -> None:
    async with replica(replies(OK, OK)) as pool:
        pool._max_idle = 2
        upstreams = [await pool.connect() for _ in range(4)]
        answers = []
        for upstream in upstreams:
            answers.append(Answer())
            upstream.send(GET, answers[-1])
        for answer in answers:
            await answer.whole
        assert sum(not upstream.closed for upstream in upstreams) == 2


async def test_an_answer_that_is_not_wanted_any_more() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK[:-1])
        await reader.read()
        gone.set()

    async with replica(talk) as pool:
        answer = Answer()
        upstream = await pool.connect()
        upstream.send(GET, answer)
        await until(lambda: answer.status == 200)
        upstream.abandon()
        async with asyncio.timeout(10):
            await gone.wait()
        assert not answer.whole.done(), "who left hears nothing"
        await until(lambda: pool.connections == 0)
