"""Following a cluster: list, watch, and every way in which an API server lets its watchers down."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from tests.router.endpoints.api_server import ApiServer, api_server, entry, piece
from tests.router.endpoints.fakes import Told, running, until

from arriero_router.endpoints.kubernetes import Access, KubernetesSource, Selection

WAITS = (0.01, 0.05)


def kubeconfig(folder: Path, port: int, token: str = "") -> str:
    path = folder / "kubeconfig"
    path.write_text(settings(port, token))
    return str(path)


def settings(port: int, token: str = "") -> str:
    """The content of a kubeconfig."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": token} if token else {}}],
        }
    )


class Followed:
    def __init__(self, api: ApiServer, source: KubernetesSource, told: Told) -> None:
        self.api = api
        self.source = source
        self.told = told

    async def sees(self, *names: str) -> None:
        await self.told.until(lambda: self.told.published and [e.name for e in self.told.published[-1]] == list(names))


@asynccontextmanager
async def followed(tmp_path: Path, relist: float = 60.0, **selection: Any) -> AsyncIterator[Followed]:
    """A source that has seen pod a, and watches."""
    told = Told()
    async with api_server() as api:
        api.put(piece("s1", entry("a", "10.0.0.1")))
        source = KubernetesSource(
            Selection(**(selection or {"service": "svc"}), namespace="llamas"),
            Access(kubeconfig(tmp_path, api.port)),
            relist,
            WAITS,
        )
        async with running(source.run(told.publish)):
            one = Followed(api, source, told)
            await one.sees("a")
            await until(lambda: api.watched)
            yield one


async def test_changes_arrive_by_watch(tmp_path: Path) -> None:
    async with followed(tmp_path) as it:
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")
        it.api.put(piece("s1", entry("a", "10.0.0.1", ready=False, terminating=True)))
        await it.told.until(lambda: it.told.published[-1][0].terminating)
        it.api.remove("s1")
        await it.sees("b")
        it.api.put(piece("s3", entry("c", "10.0.0.3"), service="other"))
        it.api.remove("s2")
        await it.sees()
    assert it.api.lists == 1
    assert it.api.queries[0] == {"labelSelector": "kubernetes.io/service-name=svc"}
    assert it.api.queries[1]["allowWatchBookmarks"].lower() == "true"


async def test_what_changes_nothing_is_not_published(tmp_path: Path) -> None:
    async with followed(tmp_path) as it:
        it.api.put(piece("s1", entry("a", "10.0.0.1")))
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")
    assert len(it.told.published) == 2


async def test_a_label_selector_instead_of_a_name(tmp_path: Path) -> None:
    label = "serving.arriero.dev/deployment"
    async with api_server() as api:
        api.put(piece("s1", entry("llama-0-0", "10.0.0.1"), service="llama-0", **{label: "llama"}))
        api.put(piece("s2", entry("llama-1-0", "10.0.0.2"), service="llama-1", **{label: "llama"}))
        told = Told()
        selection = Selection(selector=f"{label}=llama", namespace="llamas")
        source = KubernetesSource(selection, Access(kubeconfig(tmp_path, api.port)), waits=WAITS)
        async with running(source.run(told.publish)):
            await told.until(lambda: told.published)
    assert [e.name for e in told.published[0]] == ["llama-0", "llama-1"]


@pytest.mark.parametrize("arguments", [{}, {"service": "s", "selector": "a=b"}])
def test_a_selection_is_one_or_the_other(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="either a service or a selector"):
        Selection(**arguments)


async def test_a_cut_watch_goes_on_where_it_was(tmp_path: Path) -> None:
    async with followed(tmp_path) as it:
        for i in range(3):
            watches = len(it.api.watched)
            it.api.cut()
            it.api.put(piece(f"more{i}", entry(f"b{i}", f"10.0.1.{i}")))
            await it.sees("a", *(f"b{j}" for j in range(i + 1)))
            await until(lambda watches=watches: len(it.api.watched) > watches)
    assert it.api.lists == 1


async def test_a_bookmark_moves_the_place_to_go_on_from(tmp_path: Path) -> None:
    async with followed(tmp_path) as it:
        it.api.bookmark()
        at = it.api.version
        it.api.put(piece("s2", entry("b", "10.0.0.2")))  # the bookmark was heard before this
        await it.sees("a", "b")
        it.api.cut()
        await until(lambda: len(it.api.watched) == 2)
        assert int(it.api.watched[1]) > at
        it.api.bookmark()
        it.api.put(piece("s2", entry("b", "10.0.0.9")))
        await it.told.until(lambda: it.told.published[-1][1].host == "10.0.0.9")
    assert it.api.lists == 1


@pytest.mark.parametrize("in_stream", [True, False])
async def test_a_forgotten_version_is_listed_anew(tmp_path: Path, in_stream: bool) -> None:
    async with followed(tmp_path) as it:
        it.api.gone_in_stream = in_stream
        it.api.deaf = True
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        it.api.forget()
        it.api.deaf = False
        it.api.cut()
        await it.sees("a", "b")
        assert it.source.error == ""
        it.api.put(piece("s3", entry("c", "10.0.0.3")))
        await it.sees("a", "b", "c")
    assert it.api.lists == 2


async def test_a_lost_event_heals_with_the_next_list(tmp_path: Path) -> None:
    async with followed(tmp_path, relist=0.5) as it:
        it.api.deaf = True
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")
    assert it.api.lists >= 2


@pytest.mark.parametrize("status", [403, 500, 503])
async def test_a_refused_list_keeps_the_last_one(tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with followed(tmp_path, relist=0.2) as it:
        it.api.fail_list = (status, "endpointslices is forbidden to you")
        await until(lambda: it.source.error)
        assert it.source.error == f"the API server answers {status} endpointslices is forbidden to you"
        lists = it.api.lists
        await until(lambda: it.api.lists > lists + 3)
        assert it.told.published[1:] == []
        it.api.fail_list = None
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")
        await until(lambda: not it.source.error)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1, said
    assert said[0].endswith("; the last list stays")


async def test_a_refused_watch_still_lists(tmp_path: Path) -> None:
    async with followed(tmp_path) as it:
        it.api.fail_watch = (403, "cannot watch")
        it.api.cut()
        await until(lambda: "cannot watch" in it.source.error)
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")
        assert "cannot watch" in it.source.error, "a list alone is not all well"


async def test_an_api_server_that_is_away_is_waited_for(tmp_path: Path) -> None:
    async with followed(tmp_path, relist=0.2) as it:
        await it.api.stop()
        await until(lambda: "cannot be asked" in it.source.error)
        assert it.told.published[1:] == []
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.api.start()
        await it.sees("a", "b")
        await until(lambda: not it.source.error)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "MODIFIED"},
        {"type": "MODIFIED", "object": {"metadata": {}}},
        {"type": "MODIFIED", "object": None},
        {"type": "MODIFIED", "object": {"metadata": {"name": "x" * (5 << 20)}}},
        {"type": "ERROR", "object": {"code": 500, "message": "etcd is on fire"}},
    ],
)
async def test_events_that_are_none(tmp_path: Path, event: dict[str, Any]) -> None:
    async with followed(tmp_path) as it:
        it.api.say(event)
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        await it.sees("a", "b")


async def test_new_credentials_are_read_after_a_401(tmp_path: Path) -> None:
    async with followed(tmp_path, relist=0.2) as it:
        it.api.token = "second"
        await until(lambda: "401" in it.source.error)
        it.api.put(piece("s2", entry("b", "10.0.0.2")))
        kubeconfig(tmp_path, it.api.port, token="second")
        await it.sees("a", "b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        ("", "no usable credentials"),
        ("{]", "no usable credentials"),
        ("{}", "current-context"),
    ],
)
async def test_an_unusable_kubeconfig_is_said_and_mended(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    told = Told()
    async with api_server() as api:
        api.put(piece("s1", entry("a", "10.0.0.1")))
        source = KubernetesSource(Selection("svc", namespace="llamas"), Access(str(path)), waits=WAITS)
        async with running(source.run(told.publish)):
            await until(lambda: source.error)
            assert said in source.error
            kubeconfig(tmp_path, api.port)
            await told.until(lambda: told.published)


async def test_inside_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service account's folder: TLS by its ca.crt, a token that is exchanged, and the namespace."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "namespace").write_text("llamas\n")
    (tmp_path / "token").write_text("first")
    told = Told()
    async with api_server(context) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        api.token = "first"
        api.put(piece("s1", entry("a", "10.0.0.1")))
        source = KubernetesSource(Selection("svc"), Access(service_account=str(tmp_path)), 0.3, WAITS)
        async with running(source.run(told.publish)):
            await told.until(lambda: told.published)
            (tmp_path / "token").write_text("second")
            api.token = "second"
            api.put(piece("s2", entry("b", "10.0.0.2")))
            api.cut()
            await told.until(lambda: len(told.published[-1]) == 2)
            await until(lambda: not source.error)


async def test_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = KubernetesSource(Selection("svc"), Access(service_account=str(tmp_path)), waits=WAITS)
    async with running(source.run(Told().publish)):
        await until(lambda: source.error)
    assert source.error == (
        "no usable credentials for a cluster: this is no pod of a cluster, KUBECONFIG is not set, and there is no file "
        "~/.kube/config"
    )


@pytest.mark.parametrize("in_a_pod", [False, True])
async def test_a_kubeconfig_goes_before_the_pods_own_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_pod: bool
) -> None:
    if in_a_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    else:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with api_server() as api:
        api.put(piece("s1", entry("a", "10.0.0.1")))
        await sees(KubernetesSource(Selection("svc"), Access(kubeconfig(tmp_path, api.port)), waits=WAITS))
        assert api.namespaces == {"default"}


async def test_the_users_own_kubeconfig_outside_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = tmp_path / ".kube"
    usual.mkdir()
    async with api_server() as api:
        api.put(piece("s1", entry("a", "10.0.0.1")))
        (usual / "config").write_text(settings(api.port))
        await sees(KubernetesSource(Selection("svc"), waits=WAITS))


async def test_a_context_of_several_files_and_its_namespace(tmp_path: Path) -> None:
    """As kubectl takes KUBECONFIG: files with a colon between them, of which one may be missing."""
    async with api_server() as api:
        api.put(piece("s1", entry("a", "10.0.0.1")))
        first, second = tmp_path / "first", tmp_path / "second"
        first.write_text(settings(1))
        other = json.loads(settings(1))
        other["clusters"] = [{"name": "far", "cluster": {"server": f"http://127.0.0.1:{api.port}"}}]
        other["contexts"] = [{"name": "d", "context": {"cluster": "far", "user": "u", "namespace": "llamas"}}]
        second.write_text(json.dumps(other))
        files = f"{tmp_path / 'none'}:{first}:{second}"
        await sees(KubernetesSource(Selection("svc"), Access(files, "d"), waits=WAITS))
        assert api.namespaces == {"llamas"}


async def sees(source: KubernetesSource) -> None:
    told = Told()
    async with running(source.run(told.publish)):
        await told.until(lambda: told.published and [e.name for e in told.published[-1]] == ["a"])


async def test_it_ends_while_it_waits_for_an_answer(tmp_path: Path) -> None:
    stuck = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        stuck.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    source = KubernetesSource(Selection("svc", namespace="x"), Access(kubeconfig(tmp_path, port)), waits=WAITS)
    async with server, running(source.run(Told().publish)):
        await stuck.wait()
