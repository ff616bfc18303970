"""Static lists and watched files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from tests.router.endpoints.fakes import Told, running, until

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.file import EndpointsError, FileSource, read_endpoints
from arriero_router.endpoints.model import Source, address, summary
from arriero_router.endpoints.static import StaticSource

A = Endpoint(name="a", host="10.0.0.1", http_port=8000, grpc_port=9000, control_port=9100)
B = Endpoint(name="b", host="10.0.0.2", http_port=8000, grpc_port=9000, control_port=9100)
POLL = 0.01


def text(*endpoints: Endpoint) -> str:
    return json.dumps({"endpoints": [{"name": e.name, "host": e.host} for e in endpoints]})


def replace(path: Path, content: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    os.replace(fresh, path)


async def test_a_static_list_is_published_once() -> None:
    told = Told()
    source: Source = StaticSource([A, B])
    async with running(source.run(told.publish)):
        await told.until(lambda: told.published == [[A, B]])
    assert source.error == ""


def test_an_endpoints_file_reads_as_a_static_list() -> None:
    first = "{host: '::1', httpPort: 80, grpcPort: 0, controlPort: 0}"
    listed = read_endpoints(f"endpoints:\n- {first}\n- {{host: h}}\n", "f")
    assert listed[0] == Endpoint(name="[::1]:80", host="::1", http_port=80)
    assert listed[1] == Endpoint(name="h:8000", host="h", http_port=8000, grpc_port=9000, control_port=9100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("[]", "expected a mapping with endpoints, found a list"),
        ("endpoints: {}", "endpoints: expected a list, found a mapping"),
        ("endpoints: [{name: a}]", "endpoints[0].host: missing"),
        ("endpoints: [{host: a, port: 1}]", "endpoints[0].port: unknown field"),
        ("endpoints: [{host: a, httpPort: 99999}]", "endpoints[0].httpPort: 99999 is out of bounds"),
        ("endpoints: [{host: a}, {host: a}]", "the replica a:8000 is named twice"),
        ("endpoints: [", "line 1"),
    ],
)
def test_a_wrong_file_is_named_in_one_sentence(content: str, said: str) -> None:
    with pytest.raises(EndpointsError) as caught:
        read_endpoints(content, "list.yaml")
    assert str(caught.value).startswith("list.yaml: ")
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


async def test_changes_are_published_however_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.json"
    path.write_text(text(A))
    told = Told()
    async with running(FileSource(path, POLL).run(told.publish)):
        await told.until(lambda: told.published == [[A]])
        replace(path, text(A, B))
        await told.until(lambda: told.published[-1] == [A, B])
        path.write_text(text(B))  # in place
        await told.until(lambda: told.published[-1] == [B])
        path.write_text(text(A))  # in place, of the same length, perhaps within one tick of the file system's clock
        await told.until(lambda: told.published[-1] == [A])
        replace(path, text())
        await told.until(lambda: told.published[-1] == [])
    assert len(told.published) == 5, "what has not changed is not published"


async def test_a_mounted_config_map_is_followed_through_its_links(tmp_path: Path) -> None:
    for version, endpoint in (("v1", A), ("v2", B)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "endpoints.yaml").write_text(text(endpoint))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "endpoints.yaml").symlink_to("..data/endpoints.yaml")
    told = Told()
    async with running(FileSource(tmp_path / "endpoints.yaml", POLL).run(told.publish)):
        await told.until(lambda: told.published == [[A]])
        (tmp_path / "..tmp").symlink_to("v2")
        os.replace(tmp_path / "..tmp", tmp_path / "..data")
        await told.until(lambda: told.published == [[A], [B]])


async def test_a_bad_file_keeps_the_last_good_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(A))
    told = Told()
    source = FileSource(path, POLL)
    async with running(source.run(told.publish)):
        await told.until(lambda: told.published == [[A]])
        replace(path, "endpoints: [{host: a")
        await until(lambda: source.error)
        assert "line 1" in source.error
        path.unlink()
        await until(lambda: "No such file" in source.error)
        path.write_bytes(b"\xff\xfe")
        await until(lambda: "UTF-8" in source.error)
        path.write_bytes(b" " * (1 << 21))
        await until(lambda: "of an endpoints file" in source.error)
        assert told.published == [[A]]
        replace(path, text(A))
        await until(lambda: not source.error)
        replace(path, text(B))
        await told.until(lambda: told.published == [[A], [B]])
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 4, warnings
    assert all(line.endswith("the last good list stays") for line in warnings)


async def test_a_file_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    told = Told()
    source = FileSource(path, POLL)
    async with running(source.run(told.publish)):
        await until(lambda: source.error)
        assert told.published == []
        path.write_text(text(A))
        await told.until(lambda: told.published == [[A]])
    assert source.error == ""


def test_words_for_logs() -> None:
    assert address("::1", 80) == "[::1]:80"
    assert address("h", 80) == "h:80"
    assert summary([]) == "no endpoints"
    assert summary([A]) == "1 endpoint: a"
    leaving = Endpoint(name="c", host="h", http_port=1, terminating=True)
    assert summary([A, leaving] + [B] * 8) == "10 endpoints: a, c (terminating), b, b, b, b, b, b and 2 more"
