"""Which files of a repository or prefix a served Llama needs. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from arriero_worker.download.source import RefusedError, RemoteFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"

# '*' of fnmatch crosses '/', so names are matched part by part: nothing of original/, onnx/ or checkpoints within.
_TEXT = (
    ("*.json",),
    ("*.jinja",),
    ("tokenizer.model",),
    ("chat_templates", "*.jinja"),
    ("additional_chat_templates", "*.jinja"),
)
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def small_files(listed: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Configuration, tokenizer, templates and index; weights are not among them."""
    return [file for file in listed if any(_matches(file.path, pattern) for pattern in _TEXT)]


def weight_files(uri: str, listed: Sequence[RemoteFile], index: str | None) -> list[RemoteFile]:
    """What the worker will open: the files that the index (its text) names, or model.safetensors. Raises RefusedError
    where there is no such thing.
    """
    known = {file.path: file for file in listed}
    if index is not None:
        names = _named(uri, index)
        if missing := [name for name in names if name not in known]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RefusedError(f"{uri}: {INDEX} names {missing[0]}{more}, which is not there")
        return [known[name] for name in names]
    if SINGLE in known:
        return [known[SINGLE]]
    others = sorted(file.path for file in listed if file.path.endswith(_OTHER_WEIGHTS) and "/" not in file.path)
    found = f"; {others[0]} is of a format that is not read" if others else ""
    raise RefusedError(f"{uri} holds neither {SINGLE} nor {INDEX}{found}")


def only_files(uri: str, listed: Sequence[RemoteFile], only: Sequence[str]) -> list[RemoteFile]:
    """Files asked for by name. Raises RefusedError for one that is not there."""
    known = {file.path: file for file in listed}
    for name in only:
        if name not in known:
            raise RefusedError(f"{uri} has no {name}" if known else f"{uri} holds no file")
    return [known[name] for name in dict.fromkeys(only)]


def with_sums(uri: str, files: Iterable[RemoteFile], sums: str) -> list[RemoteFile]:
    """`files` with the digests that a SHA256SUMS (its text, as sha256sum writes it) states. Raises RefusedError for a
    line that is none.
    """
    stated: dict[str, str] = {}
    for number, line in enumerate(sums.splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise RefusedError(f"{uri}: line {number} of {SUMS} is not as sha256sum writes it")
        stated[match[2]] = f"sha256:{match[1].lower()}"
    return [RemoteFile(file.path, file.size, stated.get(file.path, file.digest)) for file in files]


def _named(uri: str, index: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
        sound = all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise RefusedError(f"{uri}: {INDEX} has no weight_map of file names")
    return names


def _matches(path: str, pattern: tuple[str, ...]) -> bool:
    parts = path.split("/")
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))
