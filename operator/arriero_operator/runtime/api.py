"""The Kubernetes API, as far as the operator needs it: JSON in and out, every call counted."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode
from urllib.request import getproxies

import aiohttp
import msgspec
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from arriero_operator.runtime import metrics
from arriero_operator.runtime.kinds import Kind

log = logging.getLogger("arriero.operator")

_SECONDS = 30.0


class NoCluster(Exception):
    """No cluster is known, or its credentials are unusable; the message says which."""


class ApiError(Exception):
    """The API server refused a call. `status` is HTTP's; 0: it could not be reached, or did not answer in time."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    @property
    def may_pass(self) -> bool:
        """Whether the same call may succeed later: nobody answered, or too busily, or our token had expired."""
        return self.status in (0, 401, 408, 429) or self.status >= 500


class Api:
    """One connection pool to one API server. Every method raises ApiError."""

    def __init__(self, api_client: Any, renew: Callable[[], None] = lambda: None) -> None:
        """renew: read the credentials anew, for they were refused."""
        self._client = api_client
        self._renew = renew

    async def get(self, path: str, **query: str) -> Any:
        return await self._json("get", "GET", path, query)

    async def create(self, kind: Kind, namespace: str, body: Mapping[str, Any], **query: str) -> Any:
        return await self._json("create", "POST", kind.path(namespace), query, body)

    async def apply(
        self, kind: Kind, namespace: str, name: str, body: Mapping[str, Any], manager: str, subresource: str = ""
    ) -> Any:
        """Server-side apply, forced."""
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        path = kind.path(namespace, name) + (f"/{subresource}" if subresource else "")
        return await self._json("apply", "PATCH", path, query, body, "application/apply-patch+yaml")

    async def patch(self, kind: Kind, namespace: str, name: str, body: Mapping[str, Any], manager: str) -> Any:
        """A JSON merge patch (RFC 7386)."""
        query = {"fieldManager": manager}
        path = kind.path(namespace, name)
        return await self._json("patch", "PATCH", path, query, body, "application/merge-patch+json")

    async def delete(self, kind: Kind, namespace: str, name: str, options: Mapping[str, Any]) -> Any:
        return await self._json("delete", "DELETE", kind.path(namespace, name), {}, options)

    @asynccontextmanager
    async def stream(self, path: str, seconds: float, **query: str) -> AsyncIterator[aiohttp.StreamReader]:
        """The lines of a watch, read as they come; what goes wrong with the connection meanwhile is an ApiError too."""
        try:
            response = await self._send("GET", path, query, None, "", seconds)
            try:
                metrics.API_CALLS.labels("watch", str(response.status)).inc()
                if response.status != 200:
                    raise self._refused(response.status, response.reason or "", await response.read())
                yield response.content
            finally:
                response.close()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, f"the API server cannot be reached: {words(error)}") from error

    async def _json(
        self,
        verb: str,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        begun = time.perf_counter()
        status = 0
        try:
            response = await self._send(method, path, query, body, content_type, _SECONDS)
            try:
                status = response.status
                text = await response.read()
            finally:
                response.close()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, f"the API server cannot be reached: {words(error)}") from error
        finally:
            metrics.API_CALLS.labels(verb, str(status) if status else "unreachable").inc()
            metrics.API_SECONDS.labels(verb).observe(time.perf_counter() - begun)
        if status >= 300:
            raise self._refused(status, response.reason or "", text)
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ApiError(0, f"the API server's answer is no JSON: {words(error)}") from error

    def _refused(self, status: int, reason: str, body: bytes) -> ApiError:
        if status == 401:
            self._renew()
        return _refused(status, reason, body)

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        content_type: str,
        seconds: float,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "User-Agent": "arriero-operator"}
        if content_type:
            headers["Content-Type"] = content_type
        # The library's way to fresh tokens: in a cluster they are renewed on disk every hour.
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        answer = await self._client.rest_client.request(method, url, headers, body, _request_timeout=seconds)
        response: aiohttp.ClientResponse = answer.response
        return response


@asynccontextmanager
async def connected(kubeconfig: str = "", context: str = "") -> AsyncIterator[Api]:
    """The API of the cluster that the operator's pod runs in; outside of one, of a kubeconfig (`KUBECONFIG`, or the
    usual place). Raises NoCluster.
    """
    configuration = client.Configuration()
    named = kubeconfig or os.environ.get("KUBECONFIG", "")
    in_a_pod = not named and bool(server_of_pod())

    def log_in() -> None:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]

    def renew() -> None:
        try:
            log_in()
        except (ConfigException, OSError) as error:
            log.warning("the account's token cannot be read: %s", words(error))

    try:
        if in_a_pod:
            log_in()
        else:
            await load_kube_config(  # type: ignore[no-untyped-call]
                config_file=named or None,
                context=context or None,
                client_configuration=configuration,
                persist_config=False,
            )
    except (ConfigException, OSError, ValueError, KeyError, TypeError) as error:
        raise NoCluster(f"no usable credentials for a cluster: {words(error)}") from error
    # For proxies alone: trusting the environment also means to read ~/.netrc before each request, in a thread.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
    async with client.ApiClient(configuration) as api_client:
        yield Api(api_client, renew) if in_a_pod else Api(api_client)


def server_of_pod() -> str:
    """Where the API server is, as kubelets tell pods, without DNS. Empty: this is no pod, or KUBECONFIG is set."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
    if os.environ.get("KUBECONFIG") or not host or not port:
        return ""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _refused(status: int, reason: str, body: bytes) -> ApiError:
    """The body is a Status object, if the API server itself answered."""
    try:
        told = json.loads(body)
        return ApiError(status, str(told["message"]), str(told.get("reason") or ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(status, f"the API server answers {status} {reason}".rstrip())
