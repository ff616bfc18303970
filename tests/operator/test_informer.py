"""What an informer makes of a watch, from an API server of the test's own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web
from kubernetes.aio import client

from arriero_operator.runtime.api import Api
from arriero_operator.runtime.informer import Informer
from arriero_operator.runtime.kinds import POD
from arriero_operator.runtime.store import Store

Parts = list[bytes]


def pod(name: str, version: int, **annotations: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "space", "uid": name, "resourceVersion": str(version)}
    labels = {"serving.arriero.dev/deployment": "llama"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**metadata, "labels": labels, "annotations": annotations}}


def event(kind: str, seen: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": seen}).encode() + b"\n"


async def followed(parts: Parts) -> Store:
    """The store after an empty list and a watch that comes in these parts."""
    over = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})
        if over.is_set():
            return web.json_response({"kind": "Status", "message": "enough"}, status=503)
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        over.set()
        return response

    app = web.Application()
    app.add_routes([web.get("/api/v1/pods", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    store = Store(lambda *_: None)
    configuration = client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        async with client.ApiClient(configuration) as api_client:
            informer = Informer(Api(api_client), store, POD)
            task = asyncio.create_task(informer.run())
            async with asyncio.timeout(10.0):
                await over.wait()
                while not informer.trouble and not task.done():  # noqa: ASYNC110 - the next watch is refused then
                    await asyncio.sleep(0.01)
            assert not task.done(), "no line may end an informer"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    finally:
        await runner.cleanup()
    return store


async def test_an_object_of_any_size_is_read() -> None:
    huge = event("ADDED", pod("huge", 2, text="x" * 1_400_000))
    store = await followed([huge, event("ADDED", pod("small", 3))])
    seen = store.get("Pod", ("space", "huge"))
    assert seen is not None
    assert len(seen["metadata"]["annotations"]["text"]) == 1_400_000
    assert store.get("Pod", ("space", "small")) is not None


async def test_lines_may_come_in_any_pieces() -> None:
    text = event("ADDED", pod("a", 2)) + event("ADDED", pod("b", 3)) + event("DELETED", pod("a", 4))
    store = await followed([text[i : i + 7] for i in range(0, len(text), 7)])
    assert store.get("Pod", ("space", "a")) is None
    assert store.get("Pod", ("space", "b")) is not None
