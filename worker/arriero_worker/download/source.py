"""What a source of models offers, and how it says no."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from arriero_plan.resource import HUB_REPO

_BLOCK = 2**20


class DownloadError(Exception):
    """One sentence for people: why the download ended. It may go well next time."""


class RefusedError(DownloadError):
    """Trying again does not help: somebody must change the source, the token or what is stored."""


class StoppedError(DownloadError):
    """The process was asked to stop."""


class TransientError(Exception):
    """A single request failed in a way that passes. `retry_after`: seconds that the server asks to wait; 0: unsaid."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a source."""

    path: str
    """Below the checkpoint's directory, with '/'."""
    size: int
    digest: str = ""
    """`algorithm:value` with one of ALGORITHMS; `etag:value` names the content but cannot be computed from it; empty:
    nothing but the size is known.
    """

    @property
    def identity(self) -> str:
        """The same for the same content."""
        return f"{self.size} {self.digest}"

    @property
    def verifiable(self) -> bool:
        return self.digest.partition(":")[0] in ALGORITHMS


class Source(Protocol):
    """A place that holds one checkpoint. Methods may be called from several threads."""

    uri: str
    """As the user wrote it, for messages."""

    def listing(self) -> list[RemoteFile]:
        """All files. Raises RefusedError or TransientError. What `read` gives later are the files of this listing."""

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """Bytes [start, stop) of a listed file, in order; a chunk is good until the next is asked for. It may end early
        or raise TransientError anywhere: then what came is good. Raises RefusedError where asking again is in vain.
        """


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed source URI."""

    uri: str
    scheme: str
    """hf, s3 or gs."""
    root: str
    """owner/name of a repository, or the bucket."""
    rest: str
    """Revision of a repository, or the prefix in the bucket, without slashes at its ends."""


def parse_address(uri: str) -> Address:
    """Raises ValueError with one sentence."""
    scheme, found, rest = uri.partition("://")
    if found and scheme == "hf":
        repo, _, revision = rest.partition("@")
        if re.match(HUB_REPO, repo) and not re.search(r"\s", revision):
            return Address(uri, scheme, repo, revision or "main")
        raise ValueError(f"--source is {uri!r}: expected hf://owner/name@revision")
    if found and scheme in ("s3", "gs"):
        bucket, _, prefix = rest.partition("/")
        if bucket:
            return Address(uri, scheme, bucket, prefix.strip("/"))
    raise ValueError(
        f"--source is {uri!r}: expected hf://owner/name@revision, s3://bucket/prefix or gs://bucket/prefix"
    )


def _git_blob(size: int) -> hashlib._Hash:
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % size)
    return digest


ALGORITHMS: dict[str, Callable[[int], hashlib._Hash]] = {
    "sha256": lambda size: hashlib.sha256(),
    "git-sha1": _git_blob,  # git's name of a file's content
    "md5": lambda size: hashlib.md5(usedforsecurity=False),
}


def digest_of(path: Path, algorithm: str, stopped: Callable[[], bool]) -> str:
    """`algorithm:value` of a whole file. Raises StoppedError once `stopped`."""
    with path.open("rb") as file:
        digest = ALGORITHMS[algorithm](os.fstat(file.fileno()).st_size)
        while block := file.read(_BLOCK):
            digest.update(block)
            if stopped():
                raise StoppedError("stopped while verifying")
    return f"{algorithm}:{digest.hexdigest()}"
