"""API keys: who asks, which models they may use, and how much.

Keys are kept as SHA-256 digests and found by digest, so the time of a look-up tells nothing of any key. No message and
no log line contains one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from arriero_faces.http.errors import HttpError
from arriero_plan.document import load_yaml, read_document
from arriero_router.config import WORDS, ConfigError, ModelName, Part, read_file
from arriero_router.core.limits import Allowance, KeyLimit

log = logging.getLogger("arriero.auth")

POLL_SECONDS = 1.0
# A file system's clock ticks as coarsely as this: a file as young can change again and keep its time stamp.
_SETTLED_SECONDS = 2.0
_MAX_KEYS = 100_000
_KEY = re.compile(r"[!-~]{16,1024}")
_NAME = r"^[A-Za-z0-9]([-A-Za-z0-9._@]*[A-Za-z0-9])?$"
_DIGEST = re.compile(r"[0-9a-f]{64}")
KEY_WORDS = {**WORDS, _NAME: "letters, digits and -._@, beginning and ending with a letter or digit"}
_BAD_KEY = "expected a string of 16 to 1024 visible ASCII characters"


class KeysError(ConfigError):
    """Keys that cannot be used; the message names file and field, and never a key."""


def _secret(pattern: re.Pattern[str], sentence: str) -> BeforeValidator:
    """Checked before pydantic does, whose messages show what they found."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(sentence)
        return value

    return BeforeValidator(check)


class KeyEntry(Part):
    """One key of a file: itself, or its SHA-256 digest."""

    name: str = Field(pattern=_NAME, max_length=128, description="whose key it is, in logs and for fairness")
    key: Annotated[str | None, _secret(_KEY, _BAD_KEY)] = Field(
        default=None, max_length=1024, description="the key: 16 to 1024 visible ASCII characters"
    )
    sha256: Annotated[
        str | None,
        _secret(_DIGEST, "expected a string of 64 hexadecimal digits in lower case, as sha256sum prints them"),
    ] = Field(default=None, max_length=64, description="instead of the key: its SHA-256 digest, hexadecimal")
    tokens_per_minute: int = Field(default=0, ge=0, le=2**40, description="tokens of prompts and answers; 0: no limit")
    requests_per_minute: int = Field(default=0, ge=0, le=2**31, description="requests; 0: no limit")
    max_concurrent: int = Field(default=0, ge=0, le=2**20, description="requests at once, held ones too; 0: no limit")
    burst_seconds: float = Field(
        default=60,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="after a pause, so many seconds' worth of the rates may be used at once",
    )
    weight: float = Field(
        default=1, ge=0.001, le=1000, allow_inf_nan=False, description="share among those who wait for a replica"
    )
    priority: int = Field(
        default=0,
        ge=-1000,
        le=1000,
        description="class of its requests, lower goes first; a request may ask for a higher one, never for a lower",
    )
    models: Annotated[tuple[ModelName, ...], Field(strict=False, max_length=1024)] = Field(
        default=(), description="names of the models it may use; none: all"
    )

    @model_validator(mode="after")
    def _one_secret(self) -> KeyEntry:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(
                f"expected exactly one of key and sha256, found {'neither' if self.key is None else 'both'}"
            )
        return self

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 is not None else _digest(self.key or "")

    @property
    def allowance(self) -> Allowance:
        return Allowance(self.tokens_per_minute, self.requests_per_minute, self.max_concurrent, self.burst_seconds)


class KeyFile(Part):
    """What a file of keys holds; the list alone will do, too."""

    keys: Annotated[tuple[KeyEntry, ...], Field(strict=False, max_length=_MAX_KEYS)] = Field(description="the keys")


class Principal:
    """Who asks: the holder of one key. Stays what it is for requests under way when the keys change."""

    __slots__ = ("allowance", "limit", "models", "name", "priority")

    def __init__(self, name: str, priority: int, models: Sequence[str], allowance: Allowance, limit: KeyLimit) -> None:
        self.name = name
        """Empty: nobody in particular."""
        self.priority = priority
        self.models = frozenset(models)
        self.allowance = allowance
        self.limit = limit

    def may_use(self, names: Sequence[str]) -> bool:
        """Whether it may use a model, given all its names."""
        return not self.models or not self.models.isdisjoint(names)

    def check_model(self, names: Sequence[str]) -> None:
        """Raises HttpError 403 unless it may use the model."""
        if not self.may_use(names):
            raise HttpError(
                403,
                f"the key {self.name!r} may not use the model {names[0]!r}",
                param="model",
                code="model_not_allowed",
            )


ANYBODY = Principal("", 0, (), Allowance(), KeyLimit(Allowance(), 1, 0.0))
"""Who asks where no keys are needed."""


class Keys:
    """The keys of a file, or of a directory with a file per key (a mounted Secret), as they change.

    Each of `processes` grants its share of a key's limits; see `arriero_router.core.limits`.
    """

    def __init__(self, path: str, processes: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeysError if the keys cannot be read."""
        self.weights: dict[str, float] = {}
        """Shares of those who wait, by name; the same mapping for good."""
        self.error = ""
        """Why what holds may be out of date; empty: it is not."""
        self._path = path
        self._processes = processes
        self._clock = clock
        self._by_digest: dict[bytes, Principal] = {}
        self._entries: tuple[KeyEntry, ...] | None = None
        self._signature, self._settled = _signature(path)
        self._apply(read_keys(path))

    def __len__(self) -> int:
        return len(self._by_digest)

    def identify(self, authorization: str | None, api_key: str | None) -> Principal:
        """By the headers `Authorization: Bearer KEY` or `x-api-key: KEY`. Raises HttpError 401."""
        given = api_key
        if authorization is not None:
            scheme, _, rest = authorization.partition(" ")
            if scheme.lower() == "bearer":
                given = rest.strip()
        if not given:
            raise _unauthorized("an API key is needed: send the header Authorization: Bearer KEY")
        principal = self._by_digest.get(_digest(given))
        if principal is None:
            raise _unauthorized("the API key is not known")
        return principal

    def admit(self, principal: Principal, tokens: int, now: float) -> None:
        """Count a request that may cost so many tokens. Raises HttpError 429 with the time to wait, counting nothing.

        What is admitted must be settled.
        """
        denied = principal.limit.admit(tokens, now)
        if denied is None:
            return
        allowance = principal.allowance
        limits = {
            "tokens": f"{allowance.tokens_per_minute} tokens per minute",
            "requests": f"{allowance.requests_per_minute} requests per minute",
            "concurrent": f"{allowance.max_concurrent} requests at once",
        }
        raise HttpError(
            429,
            f"the key {principal.name!r} may use {limits[denied.limit]}",
            code="rate_limit_exceeded",
            retry_after=denied.wait,
        )

    def settle(self, principal: Principal, estimated: int, used: int, now: float) -> None:
        """A request that was admitted for `estimated` tokens is over and has used so many. Once for each."""
        principal.limit.settle(estimated, used, now)
        principal.limit.release()

    async def watch(self, poll_seconds: float = POLL_SECONDS) -> None:
        """Follow changes until cancelled. While what is there cannot be used, the last good keys hold."""
        while True:
            await asyncio.sleep(poll_seconds)
            # Off the loop: a thousand keys take a second to parse.
            fresh = await asyncio.to_thread(self._fresh)
            if fresh is not None:
                self._apply(fresh)

    def look(self) -> bool:
        """Read again what may have changed; whether other keys hold now."""
        fresh = self._fresh()
        return fresh is not None and self._apply(fresh)

    def _fresh(self) -> tuple[KeyEntry, ...] | None:
        """The keys that are there, if they may have changed and can be used."""
        try:
            before, self._signature = self._signature, ()
            self._signature, settled = _signature(self._path)
            if self._signature == before and self._settled:
                return None
            self._settled = settled
            entries = read_keys(self._path)
        except KeysError as error:
            more = len(error.problems) - 1
            problem = str(error).splitlines()[0] + (f" (and {more} more)" if more else "")
            if problem != self.error:
                log.error("%s; the API keys stay as they were", problem)
            self.error = problem
            return None
        self.error = ""
        return entries

    def _apply(self, entries: tuple[KeyEntry, ...]) -> bool:
        if entries == self._entries:
            return False
        self._entries = entries
        now = self._clock()
        known = {principal.name: principal.limit for principal in self._by_digest.values()}
        by_digest = {}
        for entry in entries:
            limit = known.get(entry.name)
            if limit is None:
                limit = KeyLimit(entry.allowance, self._processes, now)
            else:
                limit.resize(entry.allowance, now)
            by_digest[entry.digest] = Principal(entry.name, entry.priority, entry.models, entry.allowance, limit)
        self._by_digest = by_digest
        self.weights.clear()
        self.weights.update({entry.name: entry.weight for entry in entries})
        if entries:
            log.info("%s: %d API keys", self._path, len(entries))
        else:
            log.warning("%s: no API key, so nobody may ask", self._path)
        return True


def read_keys(path: str) -> tuple[KeyEntry, ...]:
    """The keys of a file or a directory. Raises KeysError."""
    entries = tuple(_in_directory(path)) if os.path.isdir(path) else _in_file(path)
    names: set[str] = set()
    holders: dict[bytes, str] = {}
    for entry in entries:
        if entry.name in names:
            raise KeysError(path, [f"the name {entry.name} is given twice"])
        names.add(entry.name)
        holder = holders.setdefault(entry.digest, entry.name)
        if holder != entry.name:
            raise KeysError(path, [f"{holder} and {entry.name} have the same key"])
    return entries


def _in_file(path: str) -> tuple[KeyEntry, ...]:
    data = load_yaml(read_file(path, KeysError), path, "list of keys", KeysError)
    if isinstance(data, Mapping):
        listed = data.get("keys")
    else:
        listed = data
        data = {"keys": data}
    # Said here, because the general sentences show what they found.
    if not isinstance(listed, list):
        raise KeysError(path, ["expected a list of keys"])
    if wrong := [i for i, entry in enumerate(listed) if not isinstance(entry, Mapping)]:
        raise KeysError(path, [f"keys[{i}]: expected a mapping with name and key" for i in wrong])
    return read_document(KeyFile, data, path, "list of keys", KEY_WORDS, KeysError).keys


def _in_directory(path: str) -> Iterator[KeyEntry]:
    for name in _names(path):
        text = read_file(os.path.join(path, name), KeysError).strip()
        if not re.fullmatch(_NAME, name) or len(name) > 128:
            raise KeysError(path, [f"{name!r} cannot be a key's name; expected {KEY_WORDS[_NAME]}"])
        if not _KEY.fullmatch(text):
            raise KeysError(os.path.join(path, name), [_BAD_KEY])
        yield KeyEntry.model_validate({"name": name, "key": text})


def _names(directory: str) -> list[str]:
    """Files that hold keys. A mounted Secret has its real files in hidden directories, and links to them."""
    try:
        return sorted(
            entry.name for entry in os.scandir(directory) if not entry.name.startswith(".") and entry.is_file()
        )
    except OSError as error:
        raise KeysError(directory, [error.strerror or str(error)]) from error


def _signature(path: str) -> tuple[tuple[object, ...], bool]:
    """What differs when keys were changed, and whether they are old enough for that to be sure. Raises KeysError."""
    signature: list[object] = []
    newest = 0.0
    names = [os.path.join(path, name) for name in _names(path)] if os.path.isdir(path) else [path]
    for name in names:
        try:
            stat = os.stat(name)
        except OSError as error:
            raise KeysError(name, [error.strerror or str(error)]) from error
        signature.append((name, stat.st_mtime_ns, stat.st_ino, stat.st_size))
        newest = max(newest, stat.st_mtime)
    return tuple(signature), abs(time.time() - newest) > _SETTLED_SECONDS


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(message: str) -> HttpError:
    return HttpError(401, message, code="invalid_api_key", headers=(("www-authenticate", "Bearer"),))
