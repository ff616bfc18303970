"""A Hugging Face checkpoint directory: config.json and safetensors, one file or several with an index.

Format: https://huggingface.co/docs/safetensors (header of 8 length bytes and JSON, then the tensors' bytes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from arriero_plan.model import ModelShape
from arriero_worker.model.shard import FLOATS, TensorSlice

__all__ = ["FLOATS", "Checkpoint", "CheckpointError", "quantization_config", "read_shape", "weights_digest"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "I32": 4}
_SAMPLE = 256
_HEADER_LIMIT = 100_000_000  # safetensors' own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: one sentence naming the file and the tensor."""


def read_shape(directory: Path) -> ModelShape:
    """The model's shape from config.json. Raises CheckpointError, or ModelError for what the engine does not run."""
    path = directory / CONFIG
    return ModelShape.from_config(_read_json(path), str(path))


def quantization_config(directory: Path) -> Mapping[str, Any]:
    """`quantization_config` of a config.json that `read_shape` has accepted; empty where there is none."""
    return _read_json(directory / CONFIG).get("quantization_config") or {}


class Checkpoint:
    """Opens a directory's files lazily; `read` touches a part of one tensor and nothing else.

    Raises CheckpointError from every method.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = self._directory = directory
        self._files: dict[Path, Any] = {}
        self._index = _read_index(directory)

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def read(self, part: TensorSlice) -> torch.Tensor:
        """The rank's part, in the checkpoint's dtype, without the zeros behind it; a view of the mapped file where
        safetensors gives one, which stays valid after `close`.
        """
        path, handle = self._check(part)
        try:
            if not part.shape:
                return handle.get_tensor(part.name)  # type: ignore[no-any-return]
            start, stop = part.stored
            data = handle.get_slice(part.name)
            tensor: torch.Tensor = data[start:stop] if part.dim == 0 else data[:, start:stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {part.name} cannot be read: {error}") from error
        return tensor

    def stored_bytes(self, part: TensorSlice) -> int:
        """What `read` would copy, after the same checks."""
        _, handle = self._check(part)
        return part.stored_elements * _SIZES[handle.get_slice(part.name).get_dtype()]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        if self._index is not None:
            return name in self._index
        return name in self._open(self._directory / SINGLE).keys()  # noqa: SIM118 - no mapping

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        path = self._path_of(name)
        try:
            return tuple(self._open(path).get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} is missing") from error

    def _check(self, part: TensorSlice) -> tuple[Path, Any]:
        path = self._path_of(part.name)
        handle = self._open(path)
        try:
            data = handle.get_slice(part.name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {part.name} is missing") from error
        found = tuple(data.get_shape())
        if found != part.shape:
            raise CheckpointError(
                f"{path}: tensor {part.name} has shape {list(found)}, config.json asks for {list(part.shape)}"
            )
        dtype = data.get_dtype()
        if dtype not in part.dtypes:
            expected = [known for known in _SIZES if known in part.dtypes]
            raise CheckpointError(
                f"{path}: tensor {part.name} has dtype {dtype}, expected {'one of ' * (len(expected) > 1)}"
                f"{', '.join(expected)}"
            )
        return path, handle

    def _path_of(self, name: str) -> Path:
        if self._index is None:
            return self._directory / SINGLE
        if name not in self._index:
            raise CheckpointError(f"{self._directory / INDEX}: tensor {name} is missing from weight_map")
        return self._directory / self._index[name]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            if not path.is_file():
                raise CheckpointError(f"{self._directory / INDEX} names {path.name}, which does not exist")
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
        return self._files[path]


def weights_digest(directory: Path) -> str:
    """Names a checkpoint, 16 hex digits: the same files give the same digest on every node, wherever they lie.

    Hashed are config.json, each file's name, size and header, and of each tensor three samples of 256 bytes: reading
    405B parameters to the last byte would cost minutes, and two checkpoints that differ in their weights differ in
    nearly all of them. Raises CheckpointError.
    """
    digest = hashlib.sha256()
    index = _read_index(directory)
    names = sorted({SINGLE} if index is None else set(index.values()))
    try:
        digest.update((directory / CONFIG).read_bytes())
        for name in names:
            _hash_file(digest, directory / name)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _hash_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path} is truncated or corrupt: its header does not fit into the file")
        header = file.read(length)
        digest.update(f"{path.name} {size}\n".encode() + header)
        for start, end in sorted(_spans(header, path)):
            for offset in (start, (start + end) // 2, max(start, end - _SAMPLE)):
                file.seek(8 + length + offset)
                digest.update(file.read(min(_SAMPLE, end - offset)))


def _spans(header: bytes, path: Path) -> list[tuple[int, int]]:
    try:
        entries = json.loads(header)
        spans = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        return [(int(start), int(end)) for start, end in spans]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: its header is not safetensors'") from error


def _read_index(directory: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name, or None for a checkpoint in one file."""
    if (directory / SINGLE).is_file():
        return None
    path = directory / INDEX
    if not path.is_file():
        raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    index = _read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: weight_map gives {name!r} for tensor {tensor}, expected a file's name")
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise CheckpointError(f"{path} names {name}, which does not exist")
    return weight_map


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
