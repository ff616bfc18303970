"""Frames between the faces and the engine, and the documents that promise what is served."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_worker.engine.frames import FrameError, FrameReader, decode_from_engine, decode_to_engine, encode_frame
from arriero_worker.engine.messages import (
    Abort,
    Drain,
    EngineRequest,
    EngineStatus,
    Finish,
    Model,
    Outputs,
    PrefixNews,
    RankStatus,
    Refusal,
    SamplingParams,
    Submit,
    TokenLogprobs,
)
from arriero_worker.front.openai.schema import ChatRequest, CompletionRequest

from .replica import Replica

DOCS = Path(__file__).resolve().parents[3] / "docs"
REQUEST = EngineRequest(
    id=2**40,
    prompt=[1, 2],
    output=[3],
    sampling=SamplingParams(max_tokens=4, seed=2**64 - 1, logit_bias={7: -1.5}),
    marks=[(1, 2**64 - 1), (2, 0)],
)
TO_ENGINE = [Submit([REQUEST, REQUEST]), Abort([1, 2]), Drain()]
FROM_ENGINE = [
    Outputs(1, [1], [2]),
    Outputs(
        2,
        [1, 2],
        [3, 4],
        [Finish(1, "stop", 4)],
        [Refusal(9, "queue_full", "full", 1.5)],
        [(1, TokenLogprobs(3, -0.5, 1, [(3, -0.5), (5, float("-inf"))]))],
        [(2, [TokenLogprobs(4, -1.0, 2)])],
        [(1, 16)],
    ),
    EngineStatus("Serving", 3, Model(2048, 300), running=1, ranks=[RankStatus(0, 0, "Serving", 3, 9)]),
    PrefixNews(True, [2**64 - 1, 0], [5], 2**60),
]


def test_messages_survive_the_way() -> None:
    for message in TO_ENGINE:
        assert decode_to_engine(encode_frame(message)[4:]) == message
    for message in FROM_ENGINE:
        assert decode_from_engine(encode_frame(message)[4:]) == message


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 30), max_size=60))
def test_frames_are_found_however_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    reader, found = FrameReader(), []
    for size in [*cuts, len(stream)]:
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == bodies
    assert reader.pending == 0


def test_what_is_not_a_frame_is_refused() -> None:
    for data in (b"\xff\xff\xff\xff", b"\x0b\x00\x00\x00"):
        with pytest.raises(FrameError, match="longer than allowed"):
            FrameReader(max_frame=10).feed(data)
    reader = FrameReader(max_frame=10)
    assert reader.feed(b"\xff") == []
    with pytest.raises(FrameError):
        reader.feed(b"\xff\xff\xff")
    for body in (b"", b"\xc1", b"\x93\x01\x02\x03", encode_frame(FROM_ENGINE[0])[4:], b"\x91" * 100_000):
        with pytest.raises(FrameError):
            decode_to_engine(body)
    with pytest.raises(FrameError):
        decode_from_engine(encode_frame(TO_ENGINE[0])[4:])


def test_every_metric_is_documented(replica: Replica) -> None:
    text = (DOCS / "metrics.md").read_text()
    shown = replica.request("GET", "/metrics").body.decode()
    names = {line.split()[2] for line in shown.splitlines() if line.startswith("# TYPE arriero_")}
    assert len(names) > 15
    undocumented = {name for name in names if f"`{name}`" not in text and f"`{name.removesuffix('_total')}" not in text}
    assert not {name for name in undocumented if not name.endswith("_created")}


def test_every_field_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert not {field for field in fields if f"`{field}`" not in text and f"`{field}." not in text}
