"""The resume contract: how a stream that broke on another replica is continued here, without a gap or a repetition.

A client (the router) that sends `x-arriero-resume: 1` gets, behind each piece, the token ids of that piece; over HTTP
the answer bears the same header, by which it is known that they will come. To continue, it sends the same request
again with

- `x-arriero-resume-tokens`: the ids received, comma-separated; for several answers one group each in order of their
  index, separated by `;`. A group ending in `!` had its finish delivered: nothing more is sent for that answer.
- `x-arriero-resume-seed`: the seed received. Needed unless the request itself has a seed or is greedy.
- `x-arriero-resume-id`, `x-arriero-resume-created` (optional): to go on under the same id and time.
- `x-arriero-resume-cached` (optional): the cached prompt tokens last told; the usage repeats it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from arriero_faces.http.errors import HttpError

HEADER = "x-arriero-resume"
TOKENS = "x-arriero-resume-tokens"
SEED = "x-arriero-resume-seed"
ID = "x-arriero-resume-id"
CREATED = "x-arriero-resume-created"
CACHED = "x-arriero-resume-cached"


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where one answer stood."""

    tokens: list[int] = field(default_factory=list)
    delivered: bool = False
    """Its finish was delivered too."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What the resume headers ask for."""

    wanted: bool = False
    """Token ids behind each piece."""
    answers: list[Resumed] | None = None
    """Where each answer stood; None: a new request."""
    seed: int | None = None
    id: str | None = None
    created: int | None = None
    cached: int | None = None
    """Prompt tokens found in the first replica's prefix cache: what usage says then."""


def parse_resume(header: Callable[[str], str | None], vocab_size: int) -> Resume:
    """Read the headers (or metadata) through `header`. Raises HttpError naming the one that is wrong."""
    flag = header(HEADER)
    if flag not in (None, "0", "1"):
        raise _wrong(HEADER, "must be 0 or 1")
    tokens, seed, created, id = header(TOKENS), header(SEED), header(CREATED), header(ID)
    cached = header(CACHED)
    if id is not None and not valid_id(id):
        raise _wrong(ID, "must be 1 to 128 letters, digits, dots, dashes or underscores")
    return Resume(
        wanted=flag == "1",
        answers=None if tokens is None else [_group(part, vocab_size) for part in tokens.split(";")],
        seed=None if seed is None else _whole(SEED, seed, 2**64 - 1),
        id=id,
        created=None if created is None else _whole(CREATED, created, 2**53),
        cached=None if cached is None else _whole(CACHED, cached, 2**31 - 1),
    )


def valid_id(id: str) -> bool:
    return 0 < len(id) <= 128 and id.isascii() and all(c.isalnum() or c in "-_." for c in id)


def _group(text: str, vocab_size: int) -> Resumed:
    text = text.strip()
    delivered = text.endswith("!")
    text = text.removesuffix("!").strip()
    ids = [_whole(TOKENS, part, vocab_size - 1) for part in text.split(",")] if text else []
    return Resumed(ids, delivered)


def _whole(name: str, text: str, maximum: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 20) or int(text) > maximum:
        raise _wrong(name, f"must hold whole numbers from 0 to {maximum}")
    return int(text)


def _wrong(name: str, message: str) -> HttpError:
    return HttpError(400, f"{name}: {message}", param=name)
