"""What clients of a real replica see when its processes die: a pause where a rank is lost, a refusal at once where
the leader is, and nothing wrong ever.
"""

import asyncio
import json
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from tests.worker.replica import Replica

from arriero.inference.v1 import worker_pb2 as pb

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama" / "checkpoint"
LAYERS = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
STREAMS = 8
TOKENS = 120


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with Replica(MODEL, layers=LAYERS, tensor=2, pipeline=2, max_context=512, kv_blocks=512) as running:
        yield running


def prompt(index: int) -> list[int]:
    return [1] + [(17 * index + 31 * i) % 500 + 20 for i in range(12)]


class Stream:
    """One greedy completion as its client sees it."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        self.text = ""
        self.finish: str | None = None
        self.status = 0
        self.error: str | None = None
        self.cut = False
        self.times: list[float] = []
        self.begun = asyncio.Event()

    async def run(self, client: httpx.AsyncClient, url: str, index: int) -> None:
        body = {
            "model": "tiny",
            "prompt": prompt(index),
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            self.status = response.status_code
            try:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        self.take(line[6:])
            except httpx.RemoteProtocolError:
                self.cut = True

    def take(self, data: str) -> None:
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.times.append(time.monotonic())
        self.begun.set()
        self.text += event["choices"][0]["text"]
        self.finish = event["choices"][0]["finish_reason"] or self.finish


async def run_streams(url: str, first: int, streams: list[Stream]) -> None:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(stream.run(client, url, first + i) for i, stream in enumerate(streams)))


async def first_tokens(streams: list[Stream]) -> None:
    """Returns when each of the streams has had one."""
    await asyncio.gather(*(stream.begun.wait() for stream in streams))


async def test_a_killed_rank_is_a_pause(replica: Replica, campaign: int, seed: int) -> None:
    """Twenty times as a campaign: kill -9 of a random rank but the leader, at a random moment, under load."""
    rng = random.Random(seed)
    expected = [Stream() for _ in range(STREAMS)]
    began = time.monotonic()
    await run_streams(replica.url, 0, expected)
    undisturbed = time.monotonic() - began
    assert all(stream.finish == "length" for stream in expected)
    noticed, pauses = [], []
    rounds = 20 if campaign > 1 else 3
    for round_ in range(rounds):
        epoch = replica.status().epoch
        streams = [Stream() for _ in range(STREAMS)]
        load = asyncio.create_task(run_streams(replica.url, 0, streams))
        await first_tokens(streams[:1])
        await asyncio.sleep(rng.uniform(0, undisturbed / 2))
        victim = rng.choice([1, 2, 3])
        watch = replica.stub().Status(pb.StatusRequest(), timeout=60)
        killed = time.monotonic()
        replica.kill_rank(victim)
        await asyncio.to_thread(
            lambda watch=watch, victim=victim: next(s for s in watch if s.ranks[victim].phase != pb.PHASE_SERVING)
        )
        noticed.append(time.monotonic() - killed)
        await load
        after = [t for stream in streams for t in stream.times if t > killed + noticed[-1]]
        if after:
            pauses.append(min(after) - killed)
        for index, (stream, wanted) in enumerate(zip(streams, expected, strict=True)):
            assert (stream.status, stream.error, stream.finish) == (200, None, "length"), f"round {round_}, {index}"
            assert stream.text == wanted.text, f"round {round_}, stream {index} after the loss of rank {victim}"
        await asyncio.to_thread(replica.await_ready, epoch + 1)
    print(f"{rounds} kills: noticed in {max(noticed):.3f} s at most; kill to next token: ", end="")
    print(f"median {statistics.median(pauses):.2f} s, worst {max(pauses):.2f} s" if pauses else "all had finished")
    assert max(noticed) < 1.0
    assert replica.status().recoveries >= rounds


async def test_a_killed_leader_is_a_refusal_at_once_and_the_group_comes_back(replica: Replica) -> None:
    epoch = replica.status().epoch
    streams = [Stream() for _ in range(4)]
    load = asyncio.create_task(run_streams(replica.url, 0, streams))
    await first_tokens(streams)
    survivors = [replica.process_of(rank).pid for rank in (1, 2, 3)]
    killed = time.monotonic()
    replica.kill_rank(0)
    await load
    assert time.monotonic() - killed < 1.0
    # Nobody can take a cut answer for a whole one: an error event, then an end in the middle of the body.
    assert all(stream.error is not None and stream.cut and stream.finish is None for stream in streams)
    async with httpx.AsyncClient() as client:
        # Both at once: the leader may be back a quarter of a second later.
        answer, ready = await asyncio.gather(
            client.post(f"{replica.url}/v1/completions", json={"model": "tiny", "prompt": "x"}),
            client.get(f"{replica.url}/health/ready"),
        )
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert ready.status_code == 503
        assert (await client.get(f"{replica.url}/health/live")).status_code == 200
    await asyncio.to_thread(replica.await_ready, epoch + 1)
    print(f"leader killed: ready again after {time.monotonic() - killed:.2f} s")
    assert [replica.process_of(rank).pid for rank in (1, 2, 3)] == survivors
    again = [Stream()]
    await run_streams(replica.url, 0, again)
    assert again[0].finish == "length"


async def test_a_silent_rank_counts_as_lost(replica: Replica) -> None:
    epoch = replica.status().epoch
    process = replica.process_of(3)
    process.send_signal(signal.SIGSTOP)
    streams = [Stream() for _ in range(2)]
    await run_streams(replica.url, 0, streams)
    assert all(stream.finish == "length" for stream in streams)
    assert not process.is_running() or process.status() == "zombie"
    assert replica.status().epoch > epoch


def test_a_killed_supervisor_takes_its_ranks_along_and_its_pod_comes_back(replica: Replica) -> None:
    epoch = replica.status().epoch
    rank = replica.process_of(2)
    pod = replica.pods[1]
    assert pod is not None
    replica.pods[1] = None
    pod.kill()
    pod.wait()
    replica.until(lambda: not rank.is_running() or rank.status() == "zombie", "the rank to end with its supervisor")
    replica.start_pod(1)
    replica.await_ready(epoch + 1)


def test_a_pod_that_is_asked_to_stop_waits_for_what_runs(replica: Replica) -> None:
    epoch = replica.status().epoch

    async def load() -> list[Stream]:
        streams = [Stream() for _ in range(4)]
        running = asyncio.create_task(run_streams(replica.url, 0, streams))
        await first_tokens(streams)
        pod = replica.pods[1]
        assert pod is not None
        replica.pods[1] = None
        pod.terminate()
        await running
        assert await asyncio.to_thread(pod.wait, 60) == 0
        return streams

    assert all(stream.finish == "length" for stream in asyncio.run(load()))
    replica.start_pod(1)
    replica.await_ready(epoch + 1)


def test_sigterm_drains_the_leaders_pod() -> None:
    with Replica(MODEL, layers=LAYERS, max_context=512, kv_blocks=2048, drain_seconds=300) as replica:

        async def load() -> None:
            # Seconds of work, so that the drain is under way for as long as the questions below take.
            streams = [Stream(tokens=450) for _ in range(48)]
            running = asyncio.create_task(run_streams(replica.url, 0, streams))
            await first_tokens(streams[:1])
            pod = replica.pods[0]
            assert pod is not None
            pod.terminate()
            async with httpx.AsyncClient() as client:
                while (await client.get(f"{replica.url}/health/ready")).status_code == 200:
                    pass
                refused = await client.post(f"{replica.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
                assert refused.status_code == 503
            await running
            assert all(stream.finish == "length" for stream in streams)
            assert await asyncio.to_thread(pod.wait, 60) == 0

        asyncio.run(load())


def test_the_control_port_refuses_an_old_epoch(replica: Replica) -> None:
    with pytest.raises(grpc.RpcError) as error:
        next(replica.stub().Run(pb.RunRequest(epoch=1, pod=1), timeout=10))
    assert error.value.code() == grpc.StatusCode.ABORTED
