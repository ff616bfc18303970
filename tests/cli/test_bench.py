"""`arriero bench`: what it sends, what it measures, what it writes; against a server without a model."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero_cli.bench_http import BrokenAnswer, Connection
from arriero_cli.bench_report import percentile
from arriero_cli.main import main


@pytest.fixture
def bench(server, tmp_path, capsys):
    """bench(*words) -> (exit status, the JSON report or None, what was printed)."""

    def call(*words):
        file = tmp_path / "report.json"
        status = main(["bench", "--url", server.url, "--json", str(file), *map(str, words)])
        return status, json.loads(file.read_text()) if file.exists() else None, capsys.readouterr()

    return call


def test_closed_loop_keeps_so_many_requests_going(server, bench):
    arrived = threading.Barrier(3)

    def together(number, piece):
        # Requests 2 to 7 are measured, and each waits until three are there.
        if number >= 2 and piece == 0:
            arrived.wait(30)

    server.before_piece = together
    words = ("--concurrency", "3", "--requests", "6", "--warmup", "2", "--input-tokens", "3-5", "--output-tokens", "8")
    status, report, printed = bench(*words)
    assert status == 0
    assert len(server.requests) == 8
    assert server.busiest == 3
    for body in server.requests:
        assert 3 <= len(body["prompt"]) <= 5
        assert set(body["prompt"]) <= {5, 7, 9}
        del body["prompt"]
        assert body == {
            "model": "org/small",
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    (level,) = report["levels"]
    assert (level["mode"], level["value"], level["requests"], level["failures"]) == ("concurrency", 3, 6, {})
    assert level["output_tokens"] == 48
    assert level["output_tokens_per_second"] == pytest.approx(48 / level["seconds"])
    assert 0 < level["ttft"]["p50"] <= level["ttft"]["p99"] <= level["latency"]["p99"]
    assert report["client"]["cpus"] >= 1
    assert "concurrency 3" in printed.out


def test_times_are_those_of_the_server(server, bench):
    """The first piece after 40 ms, each of the next two after 20 ms more."""
    server.pieces = lambda body: ["a", "b", "c"]
    server.before_piece = lambda number, piece: time.sleep(0.04 if piece == 0 else 0.02)
    _, report, _ = bench("--concurrency", "1", "--requests", "5", "--warmup", "1")
    (level,) = report["levels"]
    assert level["ttft"]["p50"] >= 0.04
    assert level["latency"]["p50"] >= 0.08
    # Two gaps of each answer lie between its first piece and its end; how long they seem depends on the client, too.
    assert 0.005 < level["inter_token"]["mean"] * 2 <= level["latency"]["mean"] - level["ttft"]["mean"] + 1e-6


def test_open_loop_counts_from_the_moment_a_request_was_due(server, bench):
    """A server that answers one request at a time, 30 ms each, and gets 200 per second: the last of 40 waits for over a
    second. Times that counted from when a slowed client sent would say 30 ms.
    """
    one_at_a_time = threading.Lock()

    def serial(number, piece):
        if piece == 0:
            with one_at_a_time:
                time.sleep(0.03)

    server.before_piece = serial
    status, report, _ = bench("--rate", "200", "--requests", "40", "--warmup", "0")
    (level,) = report["levels"]
    assert status == 0
    assert (level["mode"], level["value"], level["requests"]) == ("rate", 200, 40)
    due_for = max(server.arrivals) - min(server.arrivals)
    assert level["ttft"]["p99"] >= 40 * 0.03 - due_for - 0.1
    assert level["ttft"]["p99"] > 5 * 0.03
    assert server.busiest > 5


def test_arrivals_do_not_wait_for_answers(server, bench):
    """All requests are sent while the first is still unanswered."""
    all_sent = threading.Event()

    def hold(number, piece):
        if number == 11:
            all_sent.set()
        assert all_sent.wait(30)

    server.before_piece = hold
    status, report, _ = bench("--rate", "100", "--requests", "12", "--warmup", "0")
    assert (status, report["levels"][0]["failures"]) == (0, {})


def test_the_same_seed_sends_the_same_load(server, bench):
    for seed in (1, 1, 2):
        bench("--concurrency", "1", "--requests", "4", "--warmup", "0", "--input-tokens", "2-30", "--seed", seed)
    prompts = [body["prompt"] for body in server.requests]
    assert prompts[:4] == prompts[4:8]
    assert prompts[:4] != prompts[8:]


def test_failures_are_counted_by_status_and_kind(server, bench):
    server.status = lambda number: {0: 429, 1: 503, 2: 429}.get(number, 200)
    status, report, printed = bench("--concurrency", "1", "--requests", "6", "--warmup", "0")
    assert status == 0
    assert report["levels"][0]["failures"] == {"HTTP 429": 2, "HTTP 503": 1}
    assert "2 of 6 failed: HTTP 429" in printed.out


@pytest.mark.parametrize(
    ("last_event", "kind"),
    [
        ("", "connection: the answer broke off"),
        ("\n", "broken stream"),
        ('data: {"error": {"message": "lost"}}\n\n', "error in the stream"),
        ("data: nonsense\n\n", "broken stream"),
    ],
)
def test_answers_that_break_off_are_failures(server, bench, last_event, kind):
    server.last_event = last_event
    status, report, printed = bench("--concurrency", "2", "--requests", "2", "--warmup", "0")
    assert status == 1
    assert report["levels"][0]["failures"] == {kind: 2}
    assert report["levels"][0]["ttft"]["p50"] is None
    assert printed.err.rstrip().endswith("arriero: no request succeeded")


def test_an_answer_that_takes_too_long_is_a_failure(server, bench):
    over = threading.Event()
    server.before_piece = lambda number, piece: over.wait(30) if number == 0 else None
    _, report, _ = bench("--concurrency", "1", "--requests", "2", "--warmup", "0", "--timeout", "0.5")
    over.set()
    assert report["levels"][0]["failures"] == {"timeout": 1}


def test_prompts_are_words_where_the_server_does_not_tokenize(server, bench):
    server.tokens = None
    status, _, printed = bench("--concurrency", "1", "--requests", "1", "--warmup", "0", "--input-tokens", "9")
    assert status == 0
    assert len(server.requests[0]["prompt"].split()) == 9
    assert "has no /tokenize: prompts are words" in printed.out


def test_end_of_text_may_end_answers(server, bench):
    bench("--concurrency", "1", "--requests", "1", "--warmup", "0", "--no-ignore-eos")
    assert "ignore_eos" not in server.requests[0]


def test_plot_is_a_picture(server, bench, tmp_path):
    picture = tmp_path / "load.png"
    status, _, _ = bench("--concurrency", "1,2", "--requests", "2", "--warmup", "0", "--plot", picture)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("load.txt", "load.txt: expected a name that ends in .png, .svg, .pdf"),
        ("none/load.png", "none/load.png: the directory does not exist"),
    ],
)
def test_plot_that_cannot_be_written_is_refused_before_the_load(server, bench, tmp_path, name, sentence):
    status, _, printed = bench("--plot", tmp_path / name)
    assert status == 2
    assert printed.err == f"arriero: {tmp_path}/{sentence}\n"
    assert server.requests == []


def test_plot_without_matplotlib_is_refused_before_the_load(server, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from arriero_cli.main import main; sys.exit(main())"
    words = ["bench", "--url", server.url, "--plot", str(tmp_path / "load.png")]
    outcome = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr == "arriero: --plot needs matplotlib: install the extra arriero[plot]\n"
    assert server.requests == []


@given(st.lists(st.floats(0, 1e6), min_size=2), st.integers(1, 99))
def test_percentiles_are_those_of_statistics(values, percent):
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(sorted(values), percent) == pytest.approx(expected)


def test_percentiles_of_little():
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0


# The HTTP client beneath


async def served(answers, sent=b"{}"):
    """Serve raw bytes, one item for each request (None closes the connection), and collect what a client gets."""
    requests = []

    async def serve(reader, writer):
        while answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            requests.append(head + await reader.readexactly(len(sent)))
            answer = answers.pop(0)
            for part in answer or ():
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if answer is None or answer[-1] == b"":
                break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        connection = Connection(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/base")

        async def post():
            return b"".join([chunk async for chunk in connection.post("/x", sent)])

        yield post, requests, connection
        await connection.close()


CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: t\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_chunks_may_arrive_in_any_pieces(size):
    pieces = [CHUNKED[i : i + size] for i in range(0, len(CHUNKED), size)]
    async for post, requests, connection in served([pieces, [b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno"]]):
        assert await post() == b"hello world"
        assert await post() == b"no"
        assert connection.status == 404
        assert requests[0].startswith(b"POST /base/x HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_interim_answers_are_skipped_and_a_body_may_end_with_the_connection():
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nall of it"
    async for post, _, _ in served([[answer, b""]]):
        assert await post() == b"all of it"


async def test_a_connection_closed_while_idle_is_opened_again():
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async for post, requests, _ in served([[whole, b""], [whole]]):
        assert await post() == b"ok"
        assert await post() == b"ok"
        assert len(requests) == 2


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [b"SSH-2.0-x\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b""],
        [CHUNKED[:60], b""],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b""],
    ],
)
async def test_what_is_no_whole_answer_is_said(answer):
    async for post, _, _ in served([answer]):
        with pytest.raises(BrokenAnswer):
            await post()
