"""One client's connection: bytes in, exchanges in order, bytes out, and every way a client can misbehave."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import httptools

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Disconnected, Exchange
from arriero_faces.http.head import check_head, too_large

if TYPE_CHECKING:
    from arriero_faces.http.server import HttpServer

log = logging.getLogger("arriero.http")

_FOREVER = float("inf")
_CHUNK_OVERHEAD = 64
"""Bytes of framing (size line, extension) tolerated per chunk of a body."""
_FRAMING_SLACK = 65536
_IDLE, _HEAD, _BODY = range(3)
"""What is being read: nothing, a request's head, its body."""


class Connection(asyncio.Protocol):
    """Parses requests and answers them one after the other, in the order they came (pipelining).

    `deadline` is when the client must have moved on (head, body, next request, taking what was written); the server's
    sweep closes connections behind theirs.
    """

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.blocked = False
        self.peer = ""
        """The client's address."""
        self.deadline = _FOREVER
        self._limits = server.limits
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made, before all else
        self._parser: Any = None
        self._waiting: deque[Exchange] = deque()
        self._answering: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        """Answers it, where the handler is a coroutine."""
        self._going_on = False
        self._writable: asyncio.Future[None] | None = None
        self._buffered = 0
        """Bytes this connection holds of the server's common budget."""
        self._deaf = False
        """No further request is read: the last one was seen or the input is broken."""
        self._closing = False
        self._paused = False
        self._lingered = False
        self._continue_owed = False
        self._messages = 0
        self._phase = _IDLE
        self._reserved = 0
        """Of what is buffered, the bytes of the request that is being read."""
        self._raw_counted = 0
        self._begin_message()

    def _begin_message(self) -> None:
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._body: bytes | bytearray = b""
        self._framing = 0
        self._exchange: Exchange | None = None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        name = self._transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else ""
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer)
        self._parser = httptools.HttpRequestParser(self)
        self.deadline = self.server.now + self._limits.head_seconds
        if not self.server.admit(self):
            self._fail(HttpError(503, "too many connections", retry_after=1, code="overloaded"))

    def connection_lost(self, error: Exception | None) -> None:
        self.server.forget(self)
        self._release(self._buffered)
        self._closing = True
        self._waiting.clear()
        self._body = b""
        self._desert()
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(Disconnected())
            self._writable.exception()

    def data_received(self, data: bytes) -> None:
        while data and not self._deaf:
            data = self._feed(data)
        if self._waiting and self._answering is None:
            self._go_on()

    def _feed(self, data: bytes) -> bytes:
        """Parse; returns what a parser is to see that starts afresh."""
        phase, begun = self._phase, self._messages
        size_before = len(self._body)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The request itself was whole and is answered as if it had not asked to upgrade; HTTP follows still.
            self._parser = httptools.HttpRequestParser(self)
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            if not self._deaf:
                self._fail(_parse_error(error))
            return b""
        if self._deaf:
            return b""
        if self._phase == _HEAD:
            # httptools shows a header only when it is whole; this is what bounds one that never ends. Bytes that share
            # their arrival with an earlier message are held too, but not counted as this head's.
            if begun + (phase == _IDLE) == self._messages:
                self._raw_counted += len(data)
                if self._raw_counted > self._limits.max_head:
                    self._fail(self._head_too_large())
                    return b""
            self._hold(self._reserved + len(data))
        elif self._phase == _BODY:
            if phase == _BODY and begun == self._messages:
                self._framing += len(data) - (len(self._body) - size_before)
                if self._framing > _FRAMING_SLACK:
                    self._fail(HttpError(400, "the chunked body has more framing than content"))
                    return b""
            self._hold(self._head_bytes + len(self._body))
        if self._phase != _IDLE and (phase != self._phase or begun != self._messages):
            self._set_deadline()
        return b""

    def eof_received(self) -> bool:
        # A client that closes its side gives up on its answers: half-open clients cannot be told from gone ones.
        self._closing = self._deaf = True
        self._waiting.clear()
        self._desert()
        self._set_deadline()  # what is still being written is waited for, but not for ever
        return False

    def pause_writing(self) -> None:
        self.blocked = True
        self.deadline = self.server.now + self._limits.stall_seconds

    def resume_writing(self) -> None:
        self.blocked = False
        self._set_deadline()
        if self._waiting and self._answering is None:
            self._go_on()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._answering is not None and self._answering.on_writable is not None:
            self._answering.on_writable()

    # -- httptools

    def on_message_begin(self) -> None:
        if self._deaf:
            return
        self._begin_message()
        self._raw_counted = 0
        self._messages += 1
        self._phase = _HEAD

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > self._limits.max_head and not self._deaf:
            self._fail(self._head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == _HEAD:  # a trailer: nothing here has a use for one
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._deaf:
            return
        headers, limits = self._headers, self._limits
        self._head_bytes = size = len(self._target) + sum([len(name) + len(value) + 4 for name, value in headers])
        parser = self._parser
        self._exchange = exchange = Exchange(
            self,
            parser.get_method().decode("latin-1"),
            self._target,
            parser.get_http_version(),
            headers,
            parser.should_keep_alive(),
        )
        if len(headers) > limits.max_headers:
            self._fail(HttpError(431, f"more than {limits.max_headers} headers"))
            return
        if size > limits.max_head:
            self._fail(self._head_too_large())
            return
        try:
            expects_body = check_head(exchange, parser.should_upgrade(), limits.max_body)
        except HttpError as error:
            self._fail(error)
            return
        self._phase = _BODY
        if expects_body and exchange.header(b"expect") is not None:
            self._continue_owed = True
            self._pay_continue()

    def on_body(self, body: bytes) -> None:
        if self._deaf:
            return
        if not self._body:
            self._body = body
        elif isinstance(self._body, bytearray):
            self._body += body
        else:
            self._body = bytearray(self._body) + body
        if len(self._body) > self._limits.max_body:
            self._fail(too_large(self._limits.max_body))

    def on_chunk_header(self) -> None:
        self._framing -= _CHUNK_OVERHEAD

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if self._deaf or exchange is None:
            return
        exchange.body = body = bytes(self._body)
        exchange.held = size = self._head_bytes + len(body)
        if not self._hold(size):
            return
        self._reserved = 0
        self._phase = _IDLE
        self._body = b""
        self._exchange = None
        self._continue_owed = False
        if not exchange.keep_alive:
            self._deaf = True
        self._waiting.append(exchange)
        if not self._paused and len(self._waiting) >= self._limits.max_pipelined:
            self._paused = True
            self._transport.pause_reading()

    # -- answering

    def send(self, data: bytes) -> None:
        if not self._closing:
            self._transport.write(data)

    async def drained(self) -> None:
        if self._closing:
            raise Disconnected
        if self.blocked:
            self._writable = asyncio.get_running_loop().create_future()
            try:
                await self._writable
            finally:
                self._writable = None

    @property
    def busy(self) -> bool:
        return self._answering is not None or bool(self._waiting)

    def _go_on(self) -> None:
        """Answer those who wait, one after the other, until one takes its time."""
        if self._going_on:
            return
        self._going_on = True
        try:
            while self._answering is None and not self._closing and self._turn():
                pass
        finally:
            self._going_on = False

    def _turn(self) -> bool:
        """Begin to answer the next; False if there is none to begin with."""
        if not self._waiting:
            self._set_deadline()
            self._pay_continue()
            if self.server.draining and self._phase == _IDLE:
                self._close()
            return False
        if self.blocked:
            return False  # answers to a client that does not read would pile up; resume_writing goes on
        self._answering = exchange = self._waiting.popleft()
        if self._paused and len(self._waiting) < self._limits.max_pipelined // 2:
            self._paused = False
            self._transport.resume_reading()
        self.deadline = _FOREVER
        self._answer(exchange)
        return True

    def _answer(self, exchange: Exchange) -> None:
        try:
            if exchange.refusal is not None:
                self.server.refused(exchange, exchange.refusal)
                raise exchange.refusal
            answering = self.server.handler(exchange)
        except Exception as error:
            self.ended(exchange, error)
            return
        if answering is not None:
            self._task = task = self.server.loop.create_task(answering)
            task.add_done_callback(functools.partial(self._answered, exchange))

    def _answered(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.ended(exchange, task.exception())
            return
        self._leave(exchange)
        self._close()

    def ended(self, exchange: Exchange, error: BaseException | None = None) -> None:
        """The handler is done with it, one way or the other."""
        if self._answering is not exchange:
            return  # the client has gone, and that was the end of it
        if error is None and not exchange.finished:
            error = RuntimeError(f"{exchange.method} {exchange.path} was left without an answer")
        if error is not None and not isinstance(error, Disconnected):
            if not isinstance(error, HttpError):
                log.error("failed on %s %s", exchange.method, exchange.path, exc_info=error)
                error = HttpError(500, "the server failed on this request")
            if not exchange.started:
                exchange.refuse(error)
            else:
                exchange.cut()
        self._leave(exchange)
        if self._closing:
            return
        if exchange.finished and exchange.keep_alive:
            self._go_on()
        else:
            self._close()

    def _leave(self, exchange: Exchange) -> None:
        self._answering = self._task = None
        self._release(exchange.held)

    def _desert(self) -> None:
        """The client is gone: nobody is waiting for the answer."""
        if self._task is not None:
            self._task.cancel()
        elif (exchange := self._answering) is not None:
            self._leave(exchange)
            if exchange.on_gone is not None:
                exchange.on_gone()

    # -- limits

    def _head_too_large(self) -> HttpError:
        return HttpError(431, f"the head is larger than {self._limits.max_head} bytes")

    def _hold(self, size: int) -> bool:
        """So many bytes are held now for the request that is being read; False if that is more than the server has."""
        more = size - self._reserved
        if not self.server.reserve(more):
            self._fail(HttpError(503, "the server holds too many unanswered bytes", retry_after=1, code="overloaded"))
            return False
        self._buffered += more
        self._reserved = size
        return True

    def _release(self, size: int) -> None:
        size = min(size, self._buffered)
        self._buffered -= size
        self.server.reserve(-size)

    def _pay_continue(self) -> None:
        """100 Continue may only be written when no earlier answer is under way."""
        if self._continue_owed and not self.busy:
            self._continue_owed = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _set_deadline(self) -> None:
        if self.blocked:
            return
        limits = self._limits
        if self._closing:
            self.deadline = self.server.now + limits.linger_seconds
        elif self._answering is not None:
            self.deadline = _FOREVER
        elif self._phase == _IDLE:
            self.deadline = self.server.now + limits.idle_seconds
        else:
            self.deadline = self.server.now + (limits.head_seconds if self._phase == _HEAD else limits.body_seconds)

    def expire(self) -> None:
        """The deadline has passed."""
        if self.blocked:
            log.info("a client took nothing for %g s and is cut off", self._limits.stall_seconds)
            self._transport.abort()
        elif self._closing:
            if self._transport.get_write_buffer_size() and not self._lingered:
                self._lingered = True
                self.deadline = self.server.now + self._limits.stall_seconds
            else:
                self._transport.abort()
        elif self._phase != _IDLE:
            self._fail(HttpError(408, "the request did not arrive in time"))
        else:
            self._close()

    # -- ending

    def _fail(self, error: HttpError) -> None:
        """Refuse what is being read, behind the answers still owed, and read no further."""
        self._deaf = True
        self._continue_owed = False
        self._phase = _IDLE
        self._release(self._reserved)
        self._reserved = 0
        self._body = b""
        exchange = self._exchange or Exchange(self, "GET", b"*", "1.1", [], False)
        exchange.keep_alive = False
        self._exchange = None
        if self.busy:
            exchange.refusal = error
            self._waiting.append(exchange)
        else:
            self.server.refused(exchange, error)
            exchange.refuse(error)
            self._close()

    def close_if_idle(self) -> None:
        """For a drain: a connection between requests has nothing to lose."""
        if not self.busy and self._phase == _IDLE and not self._closing:
            self._close()

    def abort(self) -> None:
        self._transport.abort()

    def _close(self) -> None:
        """Say no more, and give the client time to read what was said: closing at once on unread input resets."""
        if self._closing:
            return
        self._closing = self._deaf = True
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._set_deadline()
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
                return
            except OSError:
                pass
        self._transport.close()


def _parse_error(error: Exception) -> HttpError:
    return HttpError(400, f"not an HTTP request: {str(error) or type(error).__name__}")
