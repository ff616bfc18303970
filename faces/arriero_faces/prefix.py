"""Marks of a prompt's prefix: a number for each whole chunk of its text, each naming all the text up to its end.

Router and workers compute them from the same bytes of a request, so a worker can tell which prefixes its KV cache
holds in words that the router understands without a tokenizer. Two prompts share their first n marks exactly if their
first n chunks are equal (but for chance, 2^-64 a pair): a collision costs a worse choice of replica, nothing else.

What is marked is what comes first in the prompt, as the client wrote it: for a conversation the JSON of its tools and
then that of its messages; for a completion the JSON of the prompt. So a client that repeats a conversation and adds to
it, as they all do, shares every whole chunk of what it repeats.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

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
