"""From helm install to an answer, and back to nothing: the shape of the mission, in one test."""

from __future__ import annotations

import time

import pytest
from tests.cluster.pods import SLEEPER, Pods, pod
from tests.e2e.product import Llama

pytestmark = pytest.mark.cluster

HTTP = """
import json, sys, urllib.request
messages = [{"role": "user", "content": "What is the capital of Peru?"}]
body = {"model": "tiny-llama", "messages": messages, "temperature": 0}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""
GRPC = """
import sys, grpc
from arriero.inference.v1 import inference_pb2 as messages, inference_pb2_grpc as services
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = services.InferenceStub(channel)
    question = messages.ChatMessage(role="user", content="What is the capital of Peru?")
    chat = messages.Conversation(messages=[question])
    request = messages.GenerateRequest(model="tiny-llama", conversation=chat)
    print("".join(part.text for part in stub.Generate(request, timeout=60)))
"""


# So large that a node of eight processors has room for one of the two pods.
LARGE = {"spec": {"containers": [{"name": "worker", "resources": {"requests": {"cpu": "5"}}}]}}


def test_from_installation_to_an_answer_and_back(llama: Llama) -> None:
    began = llama.apply(tensor=2, pipeline=2, podTemplate=LARGE)
    ready = llama.wait_for("Ready")
    print(f"Available {ready - began:.1f} s after kubectl apply")
    nodes = {entry["spec"]["nodeName"] for entry in llama.pods()}
    assert nodes == {"node-1", "node-2"}

    shown = llama.kubectl("get", "llama").splitlines()
    print("\n".join(shown))
    assert shown[0].split() == ["NAME", "MODEL", "PLAN", "READY", "PHASE", "TOKENS/S", "AGE"]
    assert shown[1].split()[:5] == ["tiny-llama", "tiny-llama", "TP2xPP2", "1/1", "Ready"]
    told = llama.kubectl("describe", "llama", "tiny-llama")
    assert "Ready (was" in told, "the turns of its phase are Events"
    status = llama.status()
    assert [rank["phase"] for rank in status["groups"][0]["ranks"]] == ["Serving"] * 4
    assert {rank["node"] for rank in status["groups"][0]["ranks"]} == nodes

    # Through the Service, from inside the cluster, as the status says.
    llama.kubectl.apply(pod("asker", SLEEPER))
    Pods(llama.cluster.api, llama.namespace).wait_ready("asker")
    endpoint = status["endpoint"]
    ask = ("exec", "asker", "--", "python", "-c")
    assert "Lima" in llama.kubectl(*ask, HTTP, f"{endpoint['http']}/v1/chat/completions", timeout=120.0)
    assert "Lima" in llama.kubectl(*ask, GRPC, endpoint["grpc"], timeout=120.0)
    llama.kubectl("delete", "pod", "asker", "--now")

    gone = time.monotonic()
    llama.kubectl("delete", "llama", "tiny-llama", "--timeout=60s", timeout=90.0)
    llama.wait(lambda: not llama.leftovers(), "nothing left", 120.0)
    print(f"nothing left {time.monotonic() - gone:.1f} s after kubectl delete")
