"""From nothing to an answer: a request wakes a deployment that costs nothing while nobody asks."""

from __future__ import annotations

import threading
import time

import pytest
from tests.e2e.product import START, Llama

pytestmark = pytest.mark.cluster


def test_a_request_wakes_a_deployment_and_quiet_sends_it_to_sleep(llama: Llama) -> None:
    auto = {"minReplicas": 0, "maxReplicas": 1, "scaleDownSeconds": 5}
    llama.apply(pipeline=1, replicas=0, autoscaling=auto)
    llama.wait_for("Idle")
    llama.wait(
        lambda: [p for p in llama.pods("router") if p["status"].get("containerStatuses", [{}])[0].get("ready")],
        "router",
    )
    assert llama.pods() == []

    answers: list[str] = []
    began = time.monotonic()
    asking = threading.Thread(target=lambda: answers.append(llama.ask(timeout=START)), daemon=True)
    asking.start()
    llama.wait(lambda: llama.pods(), "pods of a group", 60.0)
    print(f"group begun {time.monotonic() - began:.1f} s after the request")
    asking.join(START)
    print(f"answered after {time.monotonic() - began:.1f} s")
    assert answers == ["The capital of Peru is Lima."]

    quiet = time.monotonic()
    llama.wait(lambda: not llama.pods() and llama.is_("Idle"), "sleep", 120.0)
    print(f"asleep {time.monotonic() - quiet:.1f} s after the answer")
