"""Bytes from where a hub redirects to: plain HTTP, straight into a buffer.

It holds the interpreter's lock for a tenth of the time that a general client does, which decides how fast one process
can fetch.
Proxies (HTTPS_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE) are those of the environment.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from arriero_worker.download.source import RefusedError, RemoteFile, TransientError

SILENCE = 30.0
"""Seconds that a server may say nothing."""
PASSING = (408, 409, 425, 429)
"""Status codes, besides those from 500 on, that are worth another attempt."""
UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
"""In what OpenSSL says of a certificate that nobody known has signed."""
_CHUNK = 2**18

Chunk = TypeVar("Chunk", bytes, memoryview)


def storage(uri: str, url: str, file: RemoteFile, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes [start, stop) of the file at `url`. Each view is good until the next is asked for. It may end early. Raises
    TransientError and RefusedError; `uri` is the source's, for messages.
    """
    host = urlsplit(url).netloc
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "arriero"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SILENCE) as response:
            skip = offset(uri, file, start, response.status, response.headers)
            yield from skipped(_chunks(response), skip)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in PASSING or error.code >= 500:
                raise TransientError(f"{host} answered {error.code}") from error
            raise RefusedError(f"{uri}: {host} answered {error.code} for {file.path}") from error
    except urllib.error.URLError as error:
        if UNTRUSTED in str(error.reason):
            words = f"the certificate of {host} is not trusted: set SSL_CERT_FILE to its issuer's"
            raise RefusedError(f"{uri}: {words}") from error
        raise TransientError(f"{host} cannot be reached ({error.reason})") from error
    except TimeoutError as error:
        raise TransientError(f"{host} said nothing for {SILENCE:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f"the connection to {host} broke ({error})") from error


def offset(uri: str, file: RemoteFile, start: int, status: int, headers: Mapping[str, str]) -> int:
    """How many bytes of the answer's body come before `start`: none where the server knows ranges."""
    if status != 206:
        return start
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range") or "")
    if told is None or int(told[1]) != start:
        raise TransientError("the server answered with another range than it was asked for")
    if told[2] not in ("*", str(file.size)):
        raise RefusedError(f"{uri}: {file.path} has {told[2]} bytes, its listing says {file.size}")
    return 0


def skipped(chunks: Iterable[Chunk], skip: int) -> Iterator[Chunk]:
    """The chunks without their first `skip` bytes."""
    for data in chunks:
        if skip < len(data):
            yield data[skip:]
        skip = max(0, skip - len(data))


def _chunks(response: http.client.HTTPResponse) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    while count := response.readinto(buffer):
        yield buffer[:count]
