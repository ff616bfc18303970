"""Endpoints that a Kubernetes cluster knows: the EndpointSlices of a Service, listed and watched.

What the router expects of an Arriero deployment, in its namespace, is one Service for all its groups:

    metadata: {name: <deployment>-leaders, labels: {serving.arriero.dev/deployment: <deployment>}}
    spec:
      clusterIP: None
      publishNotReadyAddresses: false
      selector: {serving.arriero.dev/deployment: <deployment>, apps.kubernetes.io/pod-index: "0"}
      ports: [{name: http, port: 8000}, {name: grpc, port: 9000}, {name: control, port: 9100}]

The StatefulSet controller itself writes `apps.kubernetes.io/pod-index` on every pod, so the Service selects the leader
pod of each group and no other; slices carry their Service's labels, so the router knows whose pods they are and names
the endpoints by their groups (see `slices`). With `publishNotReadyAddresses: false` the pod's readiness and the
replica's own Status must both be good; with `true` Status alone decides, which is faster by the probe's period when a
container is started again, and still honours a terminating pod. A group's own headless Service, which lists all its
pods whether they are ready or not, is for the ranks; a router that is given the labels of the deployment instead of a
Service's name finds the leaders through those as well.

The router's service account needs `list` and `watch` on `endpointslices` of `discovery.k8s.io` in that namespace.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.backoff import Backoff
from arriero_router.endpoints.model import Publish, summary
from arriero_router.endpoints.slices import SERVICE_LABEL, Ports, endpoints_of

log = logging.getLogger("arriero.endpoints")

_LIST_SECONDS = 30.0
_USUAL = "~/.kube/config"
# A watch that stood so long was a good one, however quiet.
_LONG_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Access:
    """How the API server is reached: by a kubeconfig where one is named, else, in a pod (as the environment shows that
    Kubernetes gives to all of them), as its service account, else by the user's own kubeconfig, ~/.kube/config.
    """

    kubeconfig: str = ""
    """A file, or several with ':' between them, which are merged as kubectl merges them."""
    context: str = ""
    """Of the kubeconfig; empty: its current one."""
    service_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Folder with token, ca.crt and namespace."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which endpoints."""

    service: str = ""
    """Name of the Service."""
    selector: str = ""
    """Instead of a name: a label selector for EndpointSlices."""
    namespace: str = ""
    """Empty: the router's own; with a kubeconfig, that of its context, or `default`."""
    ports: Ports = field(default_factory=Ports)
    family: str = "IPv4"
    """Address family taken of dual-stack pods."""

    def __post_init__(self) -> None:
        if bool(self.service) == bool(self.selector):
            raise ValueError("kubernetes endpoints: give either a service or a selector")

    @property
    def labels(self) -> str:
        return self.selector or f"{SERVICE_LABEL}={self.service}"


class _Trouble(Exception):
    """The API server could not be asked, or refused; the message says why."""


class _Cut(Exception):
    """The connection to the API server failed; the message says how."""


class _Gone(Exception):
    """The API server has forgotten the version to go on from."""


class KubernetesSource:
    """Lists, then watches from there; lists anew when the server has forgotten the place, and every `relist_seconds` in
    any case, so a lost event heals. While the API server is away, what was published last stays: replicas do not go
    away with it, and their own Status still tells who is well.
    """

    def __init__(
        self,
        selection: Selection,
        access: Access | None = None,
        relist_seconds: float = 60.0,
        waits: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        """waits: the shortest and the longest between two tries, in seconds"""
        self.error = ""
        self._selection = selection
        self._access = access or Access()
        self._relist = relist_seconds
        self._backoff = Backoff(*waits)
        self._what = f"endpoint slices with {selection.labels}"
        self._namespace = selection.namespace or "default"
        self._slices: dict[str, dict[str, Any]] = {}
        self._version = ""
        self._published: list[Endpoint] | None = None

    async def run(self, publish: Publish) -> None:
        while True:
            try:
                # Credentials and certificates are read anew after each trouble: they may have been the reason.
                async with self._connected() as api:
                    while True:
                        await self._cycle(api, publish)
            except _Trouble as trouble:
                self._failed(str(trouble))
            await asyncio.sleep(self._backoff.next())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        """A `DiscoveryV1Api`. Raises _Trouble if there are no usable credentials."""
        # Imported here: it costs more than a second and 50 MiB, which only who watches a cluster should pay.
        from kubernetes.aio import client
        from kubernetes.aio.config import incluster_config, kube_config

        in_cluster: Any = incluster_config  # untyped
        from_file: Any = kube_config
        access = self._access
        configuration = client.Configuration()
        try:
            if not access.kubeconfig and in_cluster.SERVICE_HOST_ENV_NAME in os.environ:
                folder = Path(access.service_account)
                loader = in_cluster.InClusterConfigLoader(str(folder / "token"), str(folder / "ca.crt"))
                loader.load_and_set(configuration)
                own = (folder / "namespace").read_text().strip()
            else:
                files = _kubeconfig(access)
                await from_file.load_kube_config(
                    config_file=files,
                    context=access.context or None,
                    client_configuration=configuration,
                    persist_config=False,
                )
                own = _namespace_of(from_file.list_kube_config_contexts(files), access.context)
            self._namespace = self._selection.namespace or own
            api_client = client.ApiClient(configuration)
        except Exception as error:  # a malformed file shows itself as whatever the library stumbles over
            raise _Trouble(f"no usable credentials for a cluster: {_words(error)}") from error
        api_client.user_agent = "arriero-router"
        async with api_client:
            yield client.DiscoveryV1Api(api_client)

    async def _cycle(self, api: Any, publish: Publish) -> None:
        """One list and the watch that follows it, until the next list is due. Raises _Trouble."""
        loop = asyncio.get_running_loop()
        await self._list(api)
        self._publish(publish)
        due = loop.time() + self._relist
        while (left := due - loop.time()) > 0:
            begun = loop.time()
            try:
                async with asyncio.timeout(left):
                    await self._watch(api, left, publish)
            except _Gone:
                log.debug("%s: listing anew, version %s is forgotten", self._what, self._version)
                await asyncio.sleep(self._backoff.next())
                return
            except TimeoutError:
                self._backoff.reset()
                return
            except _Cut as cut:
                log.debug("%s: the watch was cut: %s", self._what, cut)
            if loop.time() - begun > _LONG_SECONDS:
                self._backoff.reset()
            await asyncio.sleep(min(self._backoff.next(), max(0.0, due - loop.time())))

    async def _list(self, api: Any) -> None:
        """Everything there is, and the version to watch from. Raises _Trouble."""
        try:
            async with self._get(api, _LIST_SECONDS) as response:
                body = json.loads(await response.read())
            self._slices = {piece["metadata"]["name"]: piece for piece in body.get("items") or []}
            self._version = body["metadata"]["resourceVersion"]
        except (_Cut, _Gone) as error:
            raise _Trouble(f"the API server cannot be asked: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Trouble(f"the API server answers no list of endpoint slices ({error!r})") from error

    async def _watch(self, api: Any, seconds: float, publish: Publish) -> None:
        """Keep up to date until the connection ends. Raises _Cut, _Gone or _Trouble."""
        limits = {"watch": True, "allow_watch_bookmarks": True, "timeout_seconds": math.ceil(seconds)}
        async with self._get(api, seconds + _LIST_SECONDS, resource_version=self._version, **limits) as response:
            if self.error:
                log.info("%s: followed again", self._what)
                self.error = ""
            while True:
                try:
                    line = await response.content.readline()
                except Exception as error:  # of the connection, or of a line without an end
                    raise _Cut(_words(error)) from error
                if not line:
                    return
                try:
                    changed = self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise _Cut(f"a line is no event ({error!r})") from error
                self._backoff.reset()
                if changed:
                    self._publish(publish)

    def _take(self, event: dict[str, Any]) -> bool:
        """Whether the event changed a slice. Raises _Gone or _Trouble, or what reading a malformed event raises."""
        kind, piece = event["type"], event["object"]
        if kind == "ERROR":
            if piece.get("code") == 410:
                raise _Gone
            raise _Trouble(f"the API server ended the watch: {piece.get('message') or piece}")
        name, version = piece["metadata"].get("name", ""), piece["metadata"]["resourceVersion"]
        self._version = version
        if kind == "BOOKMARK":
            return False
        if kind == "DELETED":
            self._slices.pop(name, None)
        else:
            self._slices[name] = piece
        return True

    @asynccontextmanager
    async def _get(self, api: Any, seconds: float, **arguments: Any) -> AsyncIterator[Any]:
        """The response to a list or watch call, whatever its length, once its status is 200. Raises _Cut, _Gone or
        _Trouble, also for what happens while it is read.
        """
        import aiohttp

        try:
            response = await api.list_namespaced_endpoint_slice_without_preload_content(
                self._namespace, label_selector=self._selection.labels, _request_timeout=float(seconds), **arguments
            )
        except Exception as error:  # of the connection, or of the library's way to fresh credentials
            raise _Cut(_words(error)) from error
        try:
            if response.status == 410:
                raise _Gone(f"version {self._version} is forgotten")
            if response.status != 200:
                raise _Trouble(_refusal(response.status, response.reason or "", await response.read()))
            yield response
        except (aiohttp.ClientError, OSError) as error:
            raise _Cut(_words(error)) from error
        finally:
            response.close()

    def _publish(self, publish: Publish) -> None:
        selection = self._selection
        endpoints = endpoints_of(self._slices.values(), selection.ports, selection.family)
        if endpoints != self._published:
            log.info("%s: %s", self._what, summary(endpoints))
            self._published = endpoints
            publish(list(endpoints))

    def _failed(self, problem: str) -> None:
        if problem == self.error:
            return
        self.error = problem
        kept = "no endpoints are known" if self._published is None else "the last list stays"
        log.warning("%s: %s; %s", self._what, problem, kept)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _kubeconfig(access: Access) -> str:
    """The file or files. Raises FileNotFoundError where none of them is there: the library would go on with nothing."""
    paths = access.kubeconfig or os.path.expanduser(_USUAL)
    if not any(Path(path).is_file() for path in paths.split(os.pathsep)):
        nowhere = f"this is no pod of a cluster, KUBECONFIG is not set, and there is no file {_USUAL}"
        raise FileNotFoundError(f"there is no file {paths}" if access.kubeconfig else nowhere)
    return paths


def _namespace_of(listed: tuple[list[dict[str, Any]], dict[str, Any]], name: str) -> str:
    """Of the context with this name, or of the current one: `listed` holds all, and the current one."""
    contexts, current = listed
    chosen = next((context for context in contexts if context["name"] == name), current)
    return str(chosen["context"].get("namespace") or "default")


def _refusal(status: int, reason: str, body: bytes) -> str:
    """An error of the API in one sentence; its body is a Status object, if it came from the API server itself."""
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = ""
    return f"the API server answers {status} {message or reason}".rstrip()
