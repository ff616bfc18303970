"""Marks of a prompt's prefix: a number for each whole chunk of its text, each naming all the text up to its end.

Router and workers compute them from the same bytes of a request, so a worker can tell which prefixes its KV cache
holds in words that the router understands without a tokenizer. Two prompts share their first n marks exactly if their
first n chunks are equal (but for chance, 2^-64 a pair): a collision costs a worse choice of replica, nothing else.

What is marked is what comes first in the prompt, as the client wrote it: for a conversation the JSON of its tools and
then that of its messages; for a completion the JSON of the prompt. So a client that repeats a conversation and adds to
it, as they all do, shares every whole chunk of what it repeats. Over gRPC, where bytes may be laid out in more than one
way, it is a form made from the parsed message, in which a longer prompt begins with the bytes of a shorter one.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from arriero.inference.v1.inference_pb2 import Conversation, GenerateRequest

CHUNK = 256
"""Bytes: some 60 tokens of English, four blocks of 16."""


def prefix_marks(salt: bytes, *parts: bytes) -> list[int]:
    """Marks of the whole chunks of the parts put together; prompts of another `salt` share none."""
    mark = xxh3_64_intdigest(salt)
    text = parts[0] if len(parts) == 1 else b"".join(parts)
    marks = []
    for end in range(CHUNK, len(text) + 1, CHUNK):
        mark = xxh3_64_intdigest(text[end - CHUNK : end], mark)
        marks.append(mark)
    return marks


class Marked(NamedTuple):
    """A prompt's marks, and how many bytes its text has, the rest behind the last whole chunk included."""

    marks: list[int]
    size: int


NOTHING = Marked([], 0)


class RoutedFields(msgspec.Struct, kw_only=True):
    """What a router must know of an HTTP request's body, and the bytes that are marked (see `fields_of`)."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    messages: msgspec.Raw = msgspec.Raw(b"")
    """The field's JSON, exactly the bytes of the body; empty where the field is absent. So are the next two."""
    tools: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    cache_salt: str | None = None
    user: str | None = None
    priority: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def chat(self) -> Marked:
        """Marks of a chat completion."""
        return chat_marks(bytes(self.tools), bytes(self.messages), self.cache_salt or "")

    def text(self) -> Marked:
        """Marks of a completion."""
        return text_marks(bytes(self.prompt), self.cache_salt or "")


def fields_of(body: bytes) -> RoutedFields:
    """The body of an HTTP request; what RoutedFields does not have is skipped unread.

    Raises ValueError: msgspec.ValidationError where one of the fields has another type than in the API, others where
    the body is not JSON. A worker refuses such a request with 400. RecursionError: nested too deeply, likewise.
    """
    return _decoder.decode(body)


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


_decoder = msgspec.json.Decoder(RoutedFields)


def chat_marks(tools: bytes, messages: bytes, cache_salt: str) -> Marked:
    """Marks of a conversation; `tools` and `messages` are the fields' JSON as sent, empty or null where there is
    none.
    """
    if tools == b"null":
        tools = b""
    return Marked(prefix_marks(b"chat\0" + cache_salt.encode(), tools, messages), len(tools) + len(messages))


def text_marks(prompt: bytes, cache_salt: str) -> Marked:
    """Marks of a completion; `prompt` is the field's JSON as sent: a string or a list of token ids. A list of several
    prompts has none, for it has no one prefix; its size is told.
    """
    if prompt[:1] == b'"' or (prompt[:1] == b"[" and prompt[1:64].lstrip()[:1].isdigit()):
        return Marked(prefix_marks(b"text\0" + cache_salt.encode(), prompt), len(prompt))
    return Marked([], len(prompt))


def grpc_marks(request: GenerateRequest) -> Marked:
    """Marks of a gRPC request, of a form that does not begin with any length: a text's UTF-8, four bytes per token id,
    or a conversation's tools and then its turns, each in protobuf's wire format.
    """
    kind = request.WhichOneof("input")
    if kind == "text":
        text = request.text.encode()
    elif kind == "token_ids":
        ids = array("I", request.token_ids.ids)
        if sys.byteorder == "big":
            ids.byteswap()
        text = ids.tobytes()
    elif kind == "conversation":
        text = _conversation(request.conversation)
    else:
        return NOTHING
    return Marked(prefix_marks(b"grpc\0" + request.cache_salt.encode(), text), len(text))


def _conversation(conversation: Conversation) -> bytes:
    parts = []
    for tool in conversation.tools_json:
        data = tool.encode()
        parts += [len(data).to_bytes(4, "little"), data]
    for message in conversation.messages:
        data = message.SerializeToString(deterministic=True)
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)
