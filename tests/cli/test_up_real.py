"""`arriero up` with nothing but the real programs: two replicas of the tiny Llama, and the router in front of them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml
from tests.cli.processes import child, eventually, is_there

ROOT = Path(__file__).parents[2]
TOKENS = 1500
PATIENCE = 240.0
"""Seconds: the first start on a machine compiles the kernels."""
REQUEST = {
    "model": "tiny-llama",
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "temperature": 0,
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def pieces(client: httpx.Client, url: str) -> Iterator[str]:
    """The answer's text as it comes; whole, with its usage told once, or an AssertionError."""
    told = []
    with client.stream("POST", f"{url}/v1/chat/completions", json=REQUEST) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [""]
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                told += [event["usage"]] if event.get("usage") else []
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    assert "data: [DONE]" in lines[-2:]
    assert [usage["completion_tokens"] for usage in told] == [TOKENS]


def in_flight(metrics: str) -> list[int]:
    """Replicas at which the router has a request, by its metrics."""
    found = re.findall(r'^arriero_router_replica_in_flight{.*replica="tiny-llama-(\d)"} 1\.0$', metrics, re.MULTILINE)
    return [int(index) for index in found]


def test_a_stream_outlives_its_replica_and_the_replica_comes_back(start, tmp_path):
    deployment = yaml.safe_load((ROOT / "examples" / "tiny-llama.yaml").read_text())
    deployment["spec"]["model"]["source"]["hostPath"]["path"] = str(ROOT / "examples" / "tiny_llama" / "checkpoint")
    deployment["spec"] |= {"replicas": 2, "parallelism": {"tensor": 1, "pipeline": 1}}
    file, run = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(deployment))
    up = start("arriero_cli.main", "up", file, "--http-port", 0, "--grpc-port", 0, "--run-dir", run)
    up.wait_for("Ctrl-C finishes", 0, PATIENCE)
    assert "2 replicas of tensor 1 x pipeline 1, 2 ranks in 2 pods" in up.output
    url = up.wait_for(r"OpenAI HTTP  (http://\S+)/v1\n")[1]
    pods = [child(up.pid, f"replica-{index}/launch.json") for index in (0, 1)]

    with httpx.Client(timeout=60, trust_env=False) as client:
        undisturbed = "".join(pieces(client, url))
        assert len(undisturbed) > TOKENS / 2
        answer = pieces(client, url)
        text = next(answer) + next(answer)
        (victim,) = in_flight(client.get(f"{url}/metrics").text)
        seen = len(up.output)
        os.kill(pods[victim], signal.SIGKILL)
        assert text + "".join(answer) == undisturbed
        metrics = client.get(f"{url}/metrics").text
    assert 'arriero_router_replays_total{model="tiny-llama"} 1.0' in metrics.splitlines(), "it was over before the kill"

    up.wait_for(rf"replica {victim} pod 0 ended \(SIGKILL\); it starts again at once", seen)
    up.wait_for(f"replica {victim} is not serving: 1 of 2 serve", seen)
    up.wait_for(rf"replica {victim} is serving again after \d+\.\d s: 2 of 2 serve", seen, PATIENCE)
    again = child(up.pid, f"replica-{victim}/launch.json")
    assert not is_there(pods[victim])
    os.kill(up.pid, signal.SIGINT)
    assert up.end() == 0
    assert up.output.rstrip().endswith("drained")
    eventually(lambda: not is_there(again))
