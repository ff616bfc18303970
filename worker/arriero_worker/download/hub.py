"""A repository of the Hugging Face hub, or of a mirror that speaks like it (HF_ENDPOINT).

Files are asked for by the commit that the revision named when they were listed, so a branch may move meanwhile. Their
content is verified by what the listing states: SHA-256 of large files, git's SHA-1 of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from arriero_worker.download.source import Address, RefusedError, RemoteFile, TransientError
from arriero_worker.download.storage import PASSING, SILENCE, UNTRUSTED, offset, skipped, storage

_CHUNK = 2**18  # of one broken off, the connection's last bytes are lost
_REDIRECTS = 10


class HubSource:
    """token: of a user that may read the repository; empty: none. endpoint: None is HF_ENDPOINT, or the hub itself."""

    def __init__(self, address: Address, token: str, version: str, endpoint: str | None = None) -> None:
        self.uri = address.uri
        self._repo, self._revision, self._commit = address.root, address.rest, address.rest
        self._token, self._endpoint = token or False, endpoint
        self._headers = {"user-agent": f"arriero/{version}", "accept-encoding": "identity"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._api = HfApi(endpoint=endpoint, token=self._token, library_name="arriero", library_version=version)

    def listing(self) -> list[RemoteFile]:
        try:
            info = self._api.model_info(
                self._repo, revision=self._revision, files_metadata=True, timeout=SILENCE, token=self._token
            )
        except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, ValueError) as error:
            raise self._said(error) from error
        self._commit = info.sha or self._revision
        return [self._file(sibling) for sibling in info.siblings or []]

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes | memoryview]:
        url = self._url(file.path)
        headers = {**self._headers, "range": f"bytes={start}-{stop - 1}"}
        try:
            for _ in range(_REDIRECTS):
                with get_session().stream(
                    "GET", url, headers=headers, timeout=SILENCE, follow_redirects=False
                ) as response:
                    if not response.has_redirect_location:
                        if response.is_error:
                            response.read()
                        hf_raise_for_status(response)
                        skip = offset(self.uri, file, start, response.status_code, response.headers)
                        yield from skipped(response.iter_raw(_CHUNK), skip)
                        return
                    target = response.url.join(response.headers["location"])
                if not _same_origin(target, response.url):
                    # Storage elsewhere, opened by a signed address: the token is none of its business.
                    yield from storage(self.uri, str(target), file, start, stop)
                    return
                url = str(target)
        except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled) as error:
            raise self._said(error, file.path) from error
        raise RefusedError(f"{self.uri}: {file.path} is redirected without an end")

    def _file(self, sibling: RepoSibling) -> RemoteFile:
        """A file of the listing, or where a mirror lists bare names what a question about the file itself tells."""
        path, size = sibling.rfilename, sibling.size
        if size is None:
            return self._asked(path)
        if sibling.lfs is not None:
            return RemoteFile(path, size, f"sha256:{sibling.lfs.sha256}")
        return RemoteFile(path, size, f"git-sha1:{sibling.blob_id}" if sibling.blob_id else "")

    def _asked(self, path: str) -> RemoteFile:
        try:
            told = get_hf_file_metadata(self._url(path), token=self._token, timeout=SILENCE)
        except (HfHubHTTPError, httpx2.HTTPError, FileMetadataError, OfflineModeIsEnabled) as error:
            raise self._said(error, path) from error
        if told.size is None:
            raise RefusedError(f"{self.uri}: the server does not say how large {path} is")
        etag = told.etag or ""
        kind = {64: "sha256", 40: "git-sha1"}.get(len(etag)) if re.fullmatch("[0-9a-f]+", etag) else None
        return RemoteFile(path, told.size, f"{kind}:{etag}" if kind else "")

    def _url(self, path: str) -> str:
        return hf_hub_url(self._repo, path, revision=self._commit, endpoint=self._endpoint)

    def _said(self, error: Exception, path: str = "") -> RefusedError | TransientError:
        """The error in our words: what passes, and what does not."""
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status in PASSING or status >= 500:
                return TransientError(f"the server answered {status}", _retry_after(error.response.headers))
            return RefusedError(self._refusal(error, status, path))
        if UNTRUSTED in str(error):
            return RefusedError(
                f"{self.uri}: the server's certificate is not trusted: set SSL_CERT_FILE to its issuer's"
            )
        if isinstance(error, httpx2.HTTPError) and not isinstance(error, httpx2.UnsupportedProtocol):
            return TransientError(f"{_kind(error)} ({error})" if str(error) else _kind(error))
        return RefusedError(f"{self.uri}: {' '.join(str(error).split())}")

    def _refusal(self, error: HfHubHTTPError, status: int, path: str) -> str:
        if isinstance(error, GatedRepoError):
            if self._token:
                way = "the token given does not open it: its owner must accept the repository's terms on the hub"
            else:
                way = "no token is given: one of a user who may read it is needed"
            return f"{self.uri} is gated, and {way}"
        if isinstance(error, DisabledRepoError):
            return f"{self.uri}: the hub has disabled access to this repository"
        if isinstance(error, RevisionNotFoundError):
            return f"{self.uri}: the repository has no revision {self._revision!r}"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{self.uri}: the file {path} is gone"
        if status == 401 and self._token and not isinstance(error, RepositoryNotFoundError):
            return f"{self.uri}: the token given is not valid (401)"
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            closed = "closed to the token given" if self._token else "private, and no token is given"
            return f"{self.uri}: there is no such repository, or it is {closed} ({status})"
        if status == 403:
            return f"{self.uri}: {'the token given may not read it' if self._token else 'no token is given'} (403)"
        return f"{self.uri}: the server answered {status}{f' for {path}' if path else ''}"


def _retry_after(headers: httpx2.Headers) -> float:
    told = headers.get("Retry-After", "")
    if told.isdecimal():
        return float(told)
    # The hub's own: "api";r=0;t=55 is no request left for 55 s.
    limit = re.search(r"\br=0;t=(\d+)", headers.get("RateLimit", "").replace(" ", ""))
    return float(limit[1]) if limit else 0.0


def _same_origin(one: httpx2.URL, other: httpx2.URL) -> bool:
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def _kind(error: httpx2.HTTPError) -> str:
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        return "the server cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return f"the server said nothing for {SILENCE:g} s"
    return "the connection broke"
