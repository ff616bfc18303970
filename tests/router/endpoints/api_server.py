"""An API server that knows EndpointSlices alone, and can be made to fail in the ways of a real one."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

PATH = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


def entry(pod: str, *addresses: str, **conditions: bool) -> dict[str, Any]:
    return {
        "addresses": list(addresses),
        "conditions": {"ready": True, "serving": True, "terminating": False, **conditions},
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "llamas", "uid": f"uid-{pod}"},
    }


def piece(name: str, *entries: dict[str, Any], service: str = "svc", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service, **labels}},
        "addressType": "IPv4",
        "endpoints": list(entries),
        "ports": [{"name": n, "port": p} for n, p in (("http", 8000), ("grpc", 9000), ("control", 9100))],
    }


class ApiServer:
    """Slices live here; `put` and `remove` are told to watchers unless `deaf`. What happened is remembered from version
    `oldest` on: a watch from before is answered with 410.
    """

    def __init__(self) -> None:
        self.port = 0
        self.version = 100
        self.oldest = 0
        self.slices: dict[str, dict[str, Any]] = {}
        self.fail_list: tuple[int, str] | None = None
        self.fail_watch: tuple[int, str] | None = None
        self.gone_in_stream = True
        self.deaf = False
        """Watchers stay connected and hear nothing."""
        self.token = ""
        self.lists = 0
        self.watched: list[str] = []
        """Versions that watches began from."""
        self.queries: list[dict[str, str]] = []
        self.namespaces: set[str] = set()
        """That were asked for."""
        self._log: list[tuple[int, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self._watches: set[web.StreamResponse] = set()
        self._runner: web.AppRunner | None = None

    def put(self, slice_: dict[str, Any]) -> None:
        kind = "MODIFIED" if slice_["metadata"]["name"] in self.slices else "ADDED"
        self._record(kind, slice_)
        self.slices[slice_["metadata"]["name"]] = slice_

    def remove(self, name: str) -> None:
        self._record("DELETED", self.slices.pop(name))

    def bookmark(self) -> None:
        """Tell watchers the present version, as if other objects had changed."""
        self._record("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def say(self, event: dict[str, Any]) -> None:
        """Any event, out of order."""
        self._log.append((self.version, event))
        self._wake()

    def forget(self) -> None:
        """All versions so far are too old to watch from."""
        self.version += 1
        self.oldest = self.version

    def cut(self) -> None:
        """Every watch's connection breaks in the middle of a message."""
        for response in self._watches:
            transport = response._req.transport if response._req else None
            if transport is not None:
                transport.abort()

    def _record(self, kind: str, slice_: dict[str, Any]) -> None:
        self.version += 1
        slice_["metadata"]["resourceVersion"] = str(self.version)
        self._log.append((self.version, {"type": kind, "object": json.loads(json.dumps(slice_))}))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_get(PATH, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            self.cut()
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.queries.append(dict(request.query))
        self.namespaces.add(request.match_info["namespace"])
        if self.token and request.headers.get("Authorization", "").lower() != f"bearer {self.token}":
            return refusal(401, "Unauthorized")
        if request.query.get("watch", "").lower() == "true":
            return await self._watch(request)
        self.lists += 1
        if self.fail_list:
            return refusal(*self.fail_list)
        items = [s for s in self.slices.values() if selected(s, request.query["labelSelector"])]
        return web.json_response(
            {"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(self.version)}, "items": items}
        )

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.watched.append(request.query["resourceVersion"])
        if self.fail_watch:
            return refusal(*self.fail_watch)
        since = int(request.query["resourceVersion"])
        if since < self.oldest and not self.gone_in_stream:
            return refusal(410, "too old resource version")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self._watches.add(response)
        try:
            async with asyncio.timeout(int(request.query["timeoutSeconds"])):
                if since < self.oldest:
                    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
                    await self._send(response, {"type": "ERROR", "object": status})
                    return response
                sent = next((i for i, (version, _) in enumerate(self._log) if version > since), len(self._log))
                while True:
                    changed = self._changed
                    for _, event in self._log[sent:]:
                        if not self.deaf and wanted(event, request.query["labelSelector"]):
                            await self._send(response, event)
                    sent = len(self._log)
                    await changed.wait()
        except (TimeoutError, ConnectionError):
            return response
        finally:
            self._watches.discard(response)

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        # In two pieces: an event is a line, wherever the network cuts it.
        await response.write(line[: len(line) // 2])
        await asyncio.sleep(0)
        await response.write(line[len(line) // 2 :])


def wanted(event: dict[str, Any], selector: str) -> bool:
    labels = ((event.get("object") or {}).get("metadata") or {}).get("labels")
    return labels is None or selected(event["object"], selector)


def selected(slice_: dict[str, Any], selector: str) -> bool:
    labels = slice_["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in (term.split("=") for term in selector.split(",")))


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": status, "message": message}, status=status)


@asynccontextmanager
async def api_server(context: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    server = ApiServer()
    await server.start(context)
    try:
        yield server
    finally:
        await server.stop()
