"""A hub and an object store on loopback, with the faults that networks and people make."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_PIECE = 64 * 1024
LARGE = 100_000
"""Files from this size on are kept in LFS, that is behind a redirect to another origin."""


@dataclass
class Fault:
    """What happens to GETs whose path contains `path`, `times` times."""

    path: str
    times: int
    status: int = 0
    """Answered instead of the content."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1
    """Bytes of the body after which the connection is closed."""
    corrupt: bool = False
    """One bit of the body is turned."""
    ignore_range: bool = False


@dataclass
class Request:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Loopback:
    """An HTTP server in threads. `answer` makes the whole answer to a request; ranges and faults are applied to it."""

    def __init__(self, answer: Callable[[Request], Answer], host: str = "127.0.0.1") -> None:
        self._answer = answer
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.body_bytes = 0
        """Bytes of content sent."""
        self.limit = -1
        """Of `body_bytes`: where it is reached, connections stay open and silent. -1: none."""
        self._lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                loopback._serve(self)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients are killed here

        self._server = Server((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """From the next connection on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def close(self) -> None:
        self.limit = -1
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, path: str) -> int:
        """GETs of paths that contain it."""
        return sum(path in request.path for request in self.requests)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        headers = {key.lower(): value for key, value in handler.headers.items()}
        request = Request(unquote(parts.path), query, headers)
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.times and f.path in request.path), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status:
            answer = Answer(fault.status, b"", fault.headers)
        else:
            answer = self._answer(request)
            if answer.status == 200 and "range" in headers and not (fault and fault.ignore_range):
                answer = _ranged(answer, headers["range"])
        body = bytearray(answer.body)
        if fault is not None and fault.corrupt and body:
            body[len(body) // 2] ^= 1
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        cut = fault.cut_after if fault is not None else -1
        self._send(handler, bytes(body if cut < 0 else body[:cut]))
        if 0 <= cut < len(body):
            handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        for at in range(0, len(body), _PIECE):
            while True:
                with self._lock:
                    if self.limit < 0 or self.body_bytes < self.limit:
                        self.body_bytes += len(body[at : at + _PIECE])
                        break
                time.sleep(0.01)
            handler.wfile.write(body[at : at + _PIECE])


def _ranged(answer: Answer, asked: str) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    assert match, asked
    start, size = int(match[1]), len(answer.body)
    stop = min(int(match[2]) + 1, size) if match[2] else size
    if start >= size:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Answer(206, answer.body[start:stop], headers)


class Hub:
    """One repository, of the endpoints that the hub's clients use. Large files are served by another origin."""

    def __init__(self, files: dict[str, bytes], repo: str = "meta-llama/tiny") -> None:
        self.files, self.repo = files, repo
        self.commit = "c0ffee" + "0" * 34
        self.token = ""
        """The only one that opens the repository; empty: it is public."""
        self.gated = False
        self.lists_sizes = True
        self.main = Loopback(self._hub)
        self.cdn = Loopback(self._content)

    def close(self) -> None:
        self.main.close()
        self.cdn.close()

    @property
    def body_bytes(self) -> int:
        """Content of files that was sent."""
        return self.cdn.body_bytes

    def _hub(self, request: Request) -> Answer:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", request.path):
            return self._info(match[1], match[2], blobs="blobs" in request.query)
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", request.path):
            return self._resolve(match[1], match[2], match[3])
        return Answer(404)

    def _refusal(self, request: Request) -> Answer | None:
        given = request.headers.get("authorization", "")
        if self.gated and given != f"Bearer {self.token}":
            return Answer(403 if given else 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        if self.token and given and given != f"Bearer {self.token}":
            return Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.token and not given:
            return Answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        return None

    def _info(self, repo: str, revision: str, blobs: bool) -> Answer:
        if repo != self.repo:
            return Answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.commit):
            return Answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, Any]] = []
        for path, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if blobs and self.lists_sizes:
                entry |= {"size": len(content), "blobId": _git_sha1(content)}
                if len(content) >= LARGE:
                    entry["lfs"] = {"size": len(content), "sha256": _sha256(content), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repo, "modelId": repo, "sha": self.commit, "siblings": siblings}).encode()
        return Answer(200, body, {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, path: str) -> Answer:
        if repo != self.repo or revision != self.commit:
            return Answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path not in self.files:
            return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.files[path]
        headers = {"X-Repo-Commit": self.commit}
        if len(content) < LARGE:
            return Answer(200, content, headers | {"ETag": f'"{_git_sha1(content)}"'})
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{_sha256(content)}"'}
        return Answer(302, b"", headers | linked | {"Location": f"{self.cdn.url}/{quote(path)}?signature=s"})

    def _content(self, request: Request) -> Answer:
        # A signed address is all that opens it; a token that comes here has leaked to a third party.
        if request.query.get("signature") != "s" or "authorization" in request.headers:
            return Answer(403)
        return Answer(200, self.files[request.path.removeprefix("/")])


class ObjectStore:
    """S3's ListObjectsV2 and GetObject for one bucket, addressed by path. Signatures are looked for, not computed."""

    def __init__(self, objects: dict[str, bytes], bucket: str = "models", host: str = "127.0.0.1") -> None:
        self.objects, self.bucket = objects, bucket
        self.page = 3
        """Keys of one page of a listing."""
        self.key = "AKIATEST"
        """Whose signatures are accepted; empty: the bucket is public."""
        self.etag: Callable[[bytes], str] = lambda content: hashlib.md5(content).hexdigest()
        self.main = Loopback(self._answer, host)

    def close(self) -> None:
        self.main.close()

    @property
    def body_bytes(self) -> int:
        return self.main.body_bytes

    def _answer(self, request: Request) -> Answer:
        if self.key and f"Credential={self.key}/" not in request.headers.get("authorization", ""):
            return _refused(403, "InvalidAccessKeyId")
        bucket, _, key = request.path.removeprefix("/").partition("/")
        if bucket != self.bucket:
            return _refused(404, "NoSuchBucket")
        if request.query.get("list-type") == "2":
            return self._list(request.query)
        if key not in self.objects:
            return _refused(404, "NoSuchKey")
        content = self.objects[key]
        etag = f'"{self.etag(content)}"'
        if request.headers.get("if-match", etag) != etag:
            return _refused(412, "PreconditionFailed")
        return Answer(200, content, {"ETag": etag, "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"})

    def _list(self, query: dict[str, str]) -> Answer:
        keys = sorted(key for key in self.objects if key.startswith(query.get("prefix", "")))
        begin = int(query.get("continuation-token", "0"))
        shown, more = keys[begin : begin + self.page], begin + self.page < len(keys)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>&quot;{self.etag(self.objects[key])}&quot;</ETag><Size>{len(self.objects[key])}</Size></Contents>"
            for key in shown
        )
        token = f"<NextContinuationToken>{begin + self.page}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{self.bucket}</Name><KeyCount>{len(shown)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def _refused(status: int, code: str) -> Answer:
    return Answer(status, f'<?xml version="1.0"?><Error><Code>{code}</Code></Error>'.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
