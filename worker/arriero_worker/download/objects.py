"""A prefix of an object store: S3 and what speaks like it (AWS_ENDPOINT_URL), Google Cloud Storage.

Credentials and endpoints come from the usual environment variables, which the library reads. An ETag that is an MD5
digest verifies its object; that of a multipart upload, or where a store encrypts with keys of its own, only names it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import GCSStore, S3Store

from arriero_worker.download.source import Address, DownloadError, RefusedError, RemoteFile, TransientError

_CHUNK = 2**20
_SAMPLE = 2**20  # bytes of an object that is small enough to be read twice
_OPTIONS = {"timeout": "7d", "read_timeout": "30s", "connect_timeout": "10s", "user_agent": "arriero"}
_NO_RETRIES = {"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=30)}
_PASSING = (408, 425, 429)
_UNTRUSTED = "InvalidCertificate("
_NODE_SERVICE = "169.254."  # where clouds give credentials to what runs on their machines
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class ObjectSource:
    """insecure: whether the endpoint may be asked without TLS."""

    def __init__(self, address: Address, *, insecure: bool) -> None:
        self.uri = address.uri
        self._bucket = address.root
        kind = S3Store if address.scheme == "s3" else GCSStore
        options = {**_OPTIONS, **({"allow_http": True} if insecure else {})}
        try:
            self._store = kind(
                address.root,
                prefix=address.rest or None,
                client_options=options,  # type: ignore[arg-type]
                retry_config=_NO_RETRIES,  # type: ignore[arg-type]
            )
        except (BaseError, ValueError) as error:
            raise RefusedError(f"{self.uri}: {_first_line(error)}") from error
        self._etags: dict[str, str | None] = {}

    def listing(self) -> list[RemoteFile]:
        try:
            objects = [entry for batch in obstore.list(self._store) for entry in batch]
        except (BaseError, OSError, ValueError) as error:
            raise self._said(error) from error
        if not objects:
            raise RefusedError(f"{self.uri}: no object has this prefix")
        self._etags = {entry["path"]: entry["e_tag"] for entry in objects}
        listed = [RemoteFile(entry["path"], entry["size"], _digest(entry["e_tag"])) for entry in objects]
        hashed = [file for file in listed if file.verifiable and file.size <= _SAMPLE]
        if hashed and not self._is_md5(min(hashed, key=lambda file: (file.size, file.path))):
            return [RemoteFile(file.path, file.size, file.digest.replace("md5:", "etag:", 1)) for file in listed]
        return listed

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        options: obstore.GetOptions = {"range": (start, stop), "if_match": self._etags[file.path]}
        try:
            yield from map(bytes, obstore.get(self._store, file.path, options=options).stream(_CHUNK))
        except PreconditionError as error:
            raise DownloadError(f"{self.uri}: {file.path} was replaced while it was fetched") from error
        except (BaseError, OSError, ValueError) as error:
            raise self._said(error, file.path) from error

    def _is_md5(self, file: RemoteFile) -> bool:
        """Whether the store's ETags that look like MD5 digests are such: they are not under keys of a key service."""
        wanted = file.digest.partition(":")[2]
        found = [hashlib.md5(b"".join(self.read(file, 0, file.size)), usedforsecurity=False).hexdigest()]
        if found[0] != wanted:  # broken on the way, or no digest
            found.append(hashlib.md5(b"".join(self.read(file, 0, file.size)), usedforsecurity=False).hexdigest())
        return wanted in found or found[0] != found[-1]

    def _said(self, error: Exception, path: str = "") -> RefusedError | TransientError:
        """The error in our words: what passes, and what does not."""
        text = str(error)
        status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
        code = found[1] if (found := re.search(r"<Code>(\w+)</Code>", text)) else ""
        told = f"{status} {code}".strip() if status else _first_line(error)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            if code == "RequestTimeTooSkewed":
                return RefusedError(f"{self.uri}: the clocks of this node and of the store differ ({told})")
            return RefusedError(f"{self.uri}: the store does not accept the credentials given, or any ({told})")
        if code == "NoSuchBucket" or (status == 404 and not path):
            return RefusedError(f"{self.uri}: there is no bucket {self._bucket} ({told})")
        if isinstance(error, FileNotFoundError):
            return RefusedError(f"{self.uri}: the object {path} is gone ({told})")
        if "redirect without LOCATION" in text:
            return RefusedError(f"{self.uri}: the bucket is in another region: set AWS_REGION to it")
        if 400 <= status < 500 and status not in _PASSING:
            return RefusedError(f"{self.uri}: the store answered {told}{f' for {path}' if path else ''}")
        if "URL scheme is not allowed" in text or isinstance(error, ValueError):
            return RefusedError(f"{self.uri}: {told}")
        if _UNTRUSTED in text:
            return RefusedError(
                f"{self.uri}: the store's certificate is not trusted: set SSL_CERT_FILE to its issuer's"
            )
        return TransientError(f"the store answered {told}" if status else _cause(text))


def _digest(etag: str | None) -> str:
    if not etag:
        return ""
    found = _MD5.fullmatch(etag)
    return f"md5:{found[1]}" if found else f"etag:{etag}"


def _cause(text: str) -> str:
    """Why no answer came, from the library's account of it."""
    found = re.findall(r'(?:message|error): "([^"]+)"', text)
    why = f" ({found[-1]})" if found else ""
    if _NODE_SERVICE in text:
        return f"no credentials are given, and the node's own service gives none{why}"
    if "kind: Connect" in text:
        return f"the store cannot be reached{why}"
    if "TimedOut" in text:
        return "the store said nothing for 30 s"
    return f"the connection to the store broke{why}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
