"""Which bytes a token stands for, taken from a tokenizer's own vocabulary and decoder."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file."""


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes every byte as one printable character (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


_BYTE_OF = _byte_of_character()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Bytes, plain names and special tokens of a vocabulary.

    `bytes_of[id]` is what token `id` contributes to a text's UTF-8; ids the tokenizer does not know contribute nothing.
    """

    def __init__(self, backend: Backend, origin: str) -> None:
        names: dict[int, str] = {id: name for name, id in backend.get_vocab(with_added_tokens=True).items()}
        added = backend.get_added_tokens_decoder()
        kind = _decoder_kind(json.loads(backend.to_str()).get("decoder"))
        if kind is None:
            raise TokenizerError(f"{origin}: the decoder is neither byte-level nor SentencePiece's: Llama has no other")
        self.size = max(names, default=-1) + 1
        self.special = frozenset(id for id, token in added.items() if token.special)
        self.strips_first_space = kind == "sentencepiece"
        """SentencePiece writes a space in front of a text; its decoder takes it away again."""
        self.bytes_of: list[bytes] = [b""] * self.size
        for id, name in names.items():
            if id in added and added[id].special:
                self.bytes_of[id] = name.encode()
            elif kind == "byte-level":
                self.bytes_of[id] = _byte_level(name)
            else:
                self.bytes_of[id] = _sentencepiece(name)
        self.longest = max((len(value) for value in self.bytes_of), default=1) or 1

    def token_bytes(self, id: int) -> bytes:
        return self.bytes_of[id] if id < self.size else b""

    def text_of(self, id: int) -> str:
        """One token alone, as text; U+FFFD where its bytes are not whole characters."""
        return self.token_bytes(id).decode("utf-8", "replace")


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    return name.replace("\u2581", " ").encode()


def _decoder_kind(decoder: Any) -> str | None:
    kinds = _kinds(decoder)
    if "ByteLevel" in kinds:
        return "byte-level"
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return "sentencepiece"
    return None


def _kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*(_kinds(part) for part in decoder.get("decoders", [])))
    return {str(decoder.get("type"))}
