"""Endpoints that a file lists, read again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from pathlib import Path

from arriero_plan.document import DocumentError, read_document
from arriero_router.config import WORDS, Part, StaticEndpoints
from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.model import Publish, summary

log = logging.getLogger("arriero.endpoints")

POLL_SECONDS = 0.5
_MAX_BYTES = 1 << 20
# A file system's clock ticks as coarsely as this: a file as young as that can change again and keep its time stamp.
_SETTLED_SECONDS = 2.0


class EndpointsError(DocumentError):
    """Not a list of endpoints."""


class EndpointsDocument(Part):
    """An endpoints file: the same entries as in a configuration's `static` list."""

    endpoints: StaticEndpoints


def read_endpoints(text: str, origin: str) -> list[Endpoint]:
    """The endpoints of a YAML or JSON text, in its order. Raises EndpointsError with a sentence for each problem."""
    document = read_document(EndpointsDocument, text, origin, "mapping with endpoints", WORDS, EndpointsError)
    endpoints = [entry.endpoint() for entry in document.endpoints]
    names = Counter(endpoint.name for endpoint in endpoints)
    if twice := [name for name, count in names.items() if count > 1]:
        raise EndpointsError(origin, [f"endpoints: the replica {twice[0]} is named twice"])
    return endpoints


class FileSource:
    """Watches a YAML or JSON file (`EndpointsDocument`). It may be written in place or, better, replaced by a rename;
    the link swaps of a mounted ConfigMap are seen as well. While the file is missing or wrong, the last good list
    stays, and `error` says what is wrong.
    """

    def __init__(self, path: str | Path, poll_seconds: float = POLL_SECONDS) -> None:
        self.error = ""
        self._path = Path(path)
        self._poll = poll_seconds
        self._signature: tuple[int, ...] | None = None
        self._settled = False
        self._published: list[Endpoint] | None = None

    async def run(self, publish: Publish) -> None:
        while True:
            endpoints = self._look()
            if endpoints is not None and endpoints != self._published:
                log.info("%s: %s", self._path, summary(endpoints))
                self._published = endpoints
                publish(list(endpoints))
            await asyncio.sleep(self._poll)

    def _look(self) -> list[Endpoint] | None:
        """The file's endpoints if it may have changed and is good."""
        try:
            stat = os.stat(self._path)
            signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if signature == self._signature and self._settled:
                return None
            self._signature = signature
            self._settled = abs(time.time() - stat.st_mtime) > _SETTLED_SECONDS
            text = self._read(stat.st_size)
            endpoints = read_endpoints(text, str(self._path))
        except EndpointsError as error:
            rest = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            self._failed(error.problems[0] + rest)
        except OSError as error:
            self._signature = None
            self._failed(f"cannot be read: {error.strerror or error}")
        except UnicodeDecodeError:
            self._failed("not a text in UTF-8")
        else:
            if self.error:
                log.info("%s: good again", self._path)
                self.error = ""
            return endpoints
        return None

    def _read(self, size: int) -> str:
        if size > _MAX_BYTES:
            raise EndpointsError(str(self._path), [f"{size} bytes, more than the {_MAX_BYTES} of an endpoints file"])
        return self._path.read_bytes().decode()

    def _failed(self, problem: str) -> None:
        if problem == self.error:
            return
        self.error = problem
        kept = "no endpoints are known" if self._published is None else "the last good list stays"
        log.warning("%s: %s; %s", self._path, problem, kept)
