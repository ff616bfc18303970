"""What is refused of a request's head although the parser lets it through."""

from __future__ import annotations

from arriero_faces.http.errors import HttpError
from arriero_faces.http.exchange import Exchange


def check_head(exchange: Exchange, upgrade: bool, max_body: int) -> bool:
    """Whether a body follows. Raises HttpError for a head that is not acceptable.

    `upgrade`: the parser would leave HTTP behind this request; it then skips the body. (RFC 9110, 9112 for the rest.)
    """
    if exchange.version not in ("1.1", "1.0"):
        raise HttpError(505, f"HTTP/{exchange.version} is not spoken here")
    hosts = length = 0
    encoding = None
    for name, value in exchange.headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            encoding = value.strip().lower() if encoding is None else encoding + b"," + value
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise HttpError(415, "compressed bodies are not accepted")
        elif name == b"expect" and value.strip().lower() != b"100-continue":
            raise HttpError(417, "only 100-continue can be expected")
    if hosts > 1 or (hosts == 0 and exchange.version == "1.1"):
        raise HttpError(400, "exactly one Host header is needed")
    if encoding is not None and encoding != b"chunked":
        raise HttpError(501, "the only transfer encoding is chunked")
    if encoding is not None and exchange.version == "1.0":
        raise HttpError(400, "HTTP/1.0 has no transfer encoding")
    if exchange.method == "CONNECT":
        raise HttpError(405, "CONNECT is not served here")
    expects_body = encoding is not None or length > 0
    if expects_body and upgrade:
        raise HttpError(400, "a request with a body cannot ask to upgrade")
    if length > max_body:
        raise too_large(max_body)
    return expects_body


def too_large(max_body: int) -> HttpError:
    return HttpError(413, f"the body is larger than {max_body} bytes", code="request_too_large")
