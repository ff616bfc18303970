"""The model's tokenizer (tokenizer.json), with long texts kept off the event loop."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from arriero_worker.front.text.vocabulary import TokenizerError, Vocabulary

_INLINE = 4096
"""Characters up to which a text is tokenized on the event loop (about a millisecond)."""


class PromptTooLong(ValueError):
    """A text with more tokens than fit, found out without tokenizing it. `tokens` is a lower bound."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"at least {tokens} tokens")
        self.tokens = tokens


class Tokenizer:
    """Text to ids; `vocabulary` leads back. `special_tokens` are those tokenizer_config.json names, for templates."""

    def __init__(self, backend: Backend, config: dict[str, Any], origin: str) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.config = config
        self.vocabulary = Vocabulary(backend, origin)
        self.special_tokens = _special_tokens(config)
        self._threads = ThreadPoolExecutor(2, "tokenizer")

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; with `special`, what the tokenizer's post-processor puts around it (the beginning of text)."""
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    async def encode_soon(self, texts: list[str], *, special: bool, limit: int) -> list[list[int]]:
        """`encode` of each, in a thread where there is much to do: it releases the interpreter's lock.

        Raises PromptTooLong where one has certainly more than `limit` tokens.
        """
        if sum(map(len, texts)) <= _INLINE:
            return [self.encode(text, special=special) for text in texts]
        least = max(map(len, texts)) // self.vocabulary.longest
        if least > limit:
            raise PromptTooLong(least)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: [self.encode(text, special=special) for text in texts])

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        vocabulary = self.vocabulary
        text = b"".join(vocabulary.token_bytes(id) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if vocabulary.strips_first_space else text

    def id_of(self, name: str) -> int | None:
        id: int | None = self._backend.token_to_id(name)
        return id

    def name_of(self, id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._backend.id_to_token(id) or ""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def load_tokenizer(model_path: Path) -> Tokenizer:
    """Read tokenizer.json and tokenizer_config.json. Raises TokenizerError."""
    path = model_path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; the model needs its tokenizer beside its weights")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: {error}") from error
    return Tokenizer(backend, read_json(model_path / "tokenizer_config.json"), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; {} where there is no file. Raises TokenizerError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like; a value may be a string or an object with `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens
