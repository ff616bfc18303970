"""One line of JSON for each answered request."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import Any

import msgspec

log = logging.getLogger("arriero.access-log")

_FLUSH_SECONDS = 0.5
_FLUSH_LINES = 256
_MAX_LINES = 65536


class AccessLog:
    """Lines are gathered and written together, twice a second or sooner; what a full disk or a pipe that nobody reads
    does not take is dropped, counted, and said so in the log, for a log must not stop the service.
    """

    def __init__(self, path: str) -> None:
        """path: a file, or "stdout". Raises OSError."""
        self.dropped = 0
        self._path = path
        self._lines: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._encode = msgspec.json.Encoder().encode
        self._rest = b""
        self._fd = self._open()

    def _open(self) -> int:
        if self._path == "stdout":
            return os.dup(sys.stdout.fileno())
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def reopen(self) -> None:
        """The file was moved away by whoever rotates logs. Raises OSError, and goes on with the old one."""
        self.flush()
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def write(self, fields: dict[str, Any]) -> None:
        """`time` is put in front."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        if len(self._lines) >= _MAX_LINES:
            self.dropped += 1
            return
        self._lines.append(
            b'{"time":"%b.%03dZ",%b' % (stamp.encode(), int(now * 1000) % 1000, self._encode(fields)[1:])
        )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        elif len(self._lines) == _FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines and not self._rest:
            return
        data = self._rest + b"".join([line + b"\n" for line in self._lines])
        count = len(self._lines)
        self._lines = []
        self._rest = b""
        try:
            os.set_blocking(self._fd, False)
            written = os.write(self._fd, data)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self.dropped += count
            log.warning("cannot write the access log: %s; %d lines lost so far", error.strerror, self.dropped)
            return
        finally:
            if self._path == "stdout":
                os.set_blocking(self._fd, True)  # the flag is shared with whoever else writes there
        rest = data[written:]
        if len(rest) <= 1 << 20:
            self._rest = rest
            if rest:
                self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        else:
            # Keep the line that was cut, so that what follows is whole lines again.
            cut, _, _ = rest.partition(b"\n")
            self._rest = cut + b"\n" if written else b""
            self.dropped += rest.count(b"\n") - bool(written)
            log.warning("the access log is not taken fast enough; %d lines lost so far", self.dropped)

    def close(self) -> None:
        self.flush()
        os.close(self._fd)
