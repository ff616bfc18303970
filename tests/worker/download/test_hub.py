"""`arriero-download --source hf://...` against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero_worker.download.hub import HubSource
from arriero_worker.download.source import RefusedError, parse_address

from .program import MIB, UNNEEDED, Program, checkpoint, found, until
from .servers import Fault, Hub

SOURCE = "hf://meta-llama/tiny@main"


@pytest.fixture
def hub(seed: int) -> Iterator[Hub]:
    made = Hub(checkpoint(seed) | UNNEEDED)
    yield made
    made.close()


def program(hub: Hub, directory: Path, *arguments: str, source: str = SOURCE, **environment: str) -> Program:
    return Program(source, directory, {"HF_ENDPOINT": hub.main.url, **environment}, *arguments)


def needed(hub: Hub) -> dict[str, bytes]:
    return {path: content for path, content in hub.files.items() if path not in UNNEEDED}


def test_what_a_served_llama_needs_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    ended = program(hub, model).run()
    assert ended.code == 0
    assert ended.words == ""
    assert found(model) == needed(hub)
    assert hub.body_bytes == sum(len(content) for content in needed(hub).values() if len(content) >= 100_000)
    assert "complete: " in ended.out
    assert not list((model / ".arriero" / "parts").iterdir())
    marker = json.loads((model / ".arriero" / "complete").read_text())
    shard = "model-00001-of-00002.safetensors"
    (entry,) = [entry for entry in marker["files"] if entry["path"] == shard]
    assert entry["digest"] == f"sha256:{hashlib.sha256(hub.files[shard]).hexdigest()}"

    hub.main.requests.clear()
    again = program(hub, model).run()
    assert again.code == 0
    assert "is in" in again.out
    assert hub.main.requests == [], "a marker says that all is there: nobody is asked"


def test_only_the_file_asked_for(hub: Hub, tmp_path: Path) -> None:
    ended = program(hub, tmp_path / "model", "--only", "config.json").run()
    assert ended.code == 0
    assert found(tmp_path / "model") == {"config.json": hub.files["config.json"]}
    whole = program(hub, tmp_path / "model").run()
    assert whole.code == 0
    assert found(tmp_path / "model") == needed(hub), "the marker of a part is none of the whole"
    assert hub.main.count("resolve/" + hub.commit + "/config.json") == 1


def test_killed_midway_it_fetches_the_rest_only(seed: int, tmp_path: Path) -> None:
    hub = Hub(checkpoint(seed, shards=3, shard_bytes=16 * MIB))
    try:
        model = tmp_path / "model"
        whole = sum(len(content) for content in hub.files.values() if len(content) >= 100_000)
        hub.cdn.limit = 30 * MIB
        process = program(hub, model, "--connections", "2").start()
        until(lambda: hub.body_bytes >= 30 * MIB, "30 MiB served")
        until(lambda: sum(_recorded(model).values()) + _final_bytes(model) >= 26 * MIB, "26 MiB recorded")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (model / ".arriero" / "complete").exists()
        for name, content in found(model).items():
            assert content == hub.files[name], "whatever has its final name is whole"

        first, hub.cdn.limit = hub.body_bytes, -1
        ended = program(hub, model, "--connections", "2").run()
        assert ended.code == 0
        assert found(model) == hub.files
        # Two connections had bytes on their way that were not recorded.
        assert hub.body_bytes - first <= whole - 26 * MIB
        print(f"{first} bytes before the kill, {hub.body_bytes - first} after it, of {whole}")
    finally:
        hub.close()


def _recorded(model: Path) -> dict[str, int]:
    """Bytes recorded as present, by part."""
    counts = {}
    for path in (model / ".arriero" / "parts").glob("*.ranges"):
        try:
            lines = [line.split() for line in path.read_text().splitlines()[1:]]
        except FileNotFoundError:
            continue
        counts[path.name] = sum(int(line[1]) - int(line[0]) for line in lines if len(line) == 2)
    return counts


def _final_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_told_to_stop_it_stops_and_keeps_what_it_has(seed: int, tmp_path: Path) -> None:
    hub = Hub(checkpoint(seed, shards=1, shard_bytes=8 * MIB))
    try:
        model = tmp_path / "model"
        hub.cdn.limit = 7 * MIB
        process = program(hub, model).start()
        until(lambda: sum(_recorded(model).values()) >= 6 * MIB, "6 MiB recorded")
        process.send_signal(signal.SIGTERM)
        ended = program(hub, model).end(process, timeout=30)
        assert ended.code == 128 + signal.SIGTERM
        assert ended.words == "told to stop: what was fetched is kept"
        first, hub.cdn.limit = hub.body_bytes, -1
        assert program(hub, model).run().code == 0
        assert hub.body_bytes - first <= 3 * MIB
    finally:
        hub.close()


@pytest.mark.parametrize("large", [True, False], ids=["lfs", "git"])
def test_corrupt_bytes_are_fetched_again(hub: Hub, tmp_path: Path, large: bool) -> None:
    path = "model-00002-of-00002.safetensors" if large else "tokenizer_config.json"
    (hub.cdn if large else hub.main).faults.append(Fault(path, times=1, corrupt=True))
    ended = program(hub, tmp_path / "model").run()
    assert ended.code == 0
    assert f"{path} is corrupt: its {'sha256' if large else 'git-sha1'} is " in ended.out
    assert found(tmp_path / "model") == needed(hub)


def test_bytes_that_stay_corrupt_are_an_error(hub: Hub, tmp_path: Path) -> None:
    path = "model-00002-of-00002.safetensors"
    hub.cdn.faults.append(Fault(path, times=-1, corrupt=True))
    ended = program(hub, tmp_path / "model").run()
    assert ended.code == 1
    assert ended.words.startswith(f"{SOURCE}: {path} is corrupt, also when fetched again: its sha256 is ")
    assert path not in found(tmp_path / "model")
    assert hub.cdn.count(path) == 2


def test_broken_connections_and_busy_servers_are_sat_out(hub: Hub, tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    hub.cdn.faults += [
        Fault(shard, times=1, cut_after=700_000),
        Fault(shard, times=1, status=503),
        Fault("model-00002", times=1, ignore_range=True, cut_after=1_500_000),
        Fault("model-00002", times=1, ignore_range=True),
    ]
    hub.main.faults += [
        Fault("/api/models", times=1, status=502),
        Fault("tokenizer.json", times=1, status=429, headers={"Retry-After": "1"}),
    ]
    ended = program(hub, tmp_path / "model").run()
    assert ended.code == 0
    assert found(tmp_path / "model") == needed(hub)
    assert "the server answered 502; again in" in ended.out
    assert "tokenizer.json: the server answered 429; again in 1.0 s" in ended.out
    assert f"{shard}: the connection ended " in ended.out
    ranges = [r.headers["range"] for r in hub.cdn.requests if shard in r.path]
    assert ranges[0].startswith("bytes=0-")
    assert 0 < int(ranges[-1].removeprefix("bytes=").partition("-")[0]) <= 700_000, "what came before the cut is kept"


def test_patience_ends(hub: Hub, tmp_path: Path) -> None:
    hub.cdn.faults.append(Fault("model-00002", times=-1, status=503))
    ended = program(hub, tmp_path / "model", "--patience", "1").run()
    assert ended.code == 1
    host = hub.cdn.url.removeprefix("http://")
    assert ended.words == f"model-00002-of-00002.safetensors: {host} answered 503 (for 1 s nothing arrived)"
    assert ended.seconds < 30


def test_storage_that_is_closed_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.cdn.faults.append(Fault("model-00002", times=-1, status=403))
    ended = program(hub, tmp_path / "model").run()
    host = hub.cdn.url.removeprefix("http://")
    assert (ended.code, ended.words) == (3, f"{SOURCE}: {host} answered 403 for model-00002-of-00002.safetensors")


def test_nobody_at_the_endpoint(hub: Hub, tmp_path: Path) -> None:
    closed = Hub({})
    closed.close()
    ended = program(closed, tmp_path / "model", "--patience", "0.5").run()
    assert ended.code == 1
    assert ended.words.startswith(f"{SOURCE}: the server cannot be reached (")


@pytest.mark.parametrize(
    ("state", "given", "source", "words"),
    [
        ({"token": "right"}, "wrong", SOURCE, f"{SOURCE}: the token given is not valid (401)"),
        (
            {"token": "right"},
            "",
            SOURCE,
            f"{SOURCE}: there is no such repository, or it is private, and no token is given (401)",
        ),
        (
            {},
            "",
            "hf://nobody/nothing@main",
            "hf://nobody/nothing@main: there is no such repository, or it is private, and no token is given (404)",
        ),
        (
            {},
            "some",
            "hf://nobody/nothing@main",
            "hf://nobody/nothing@main: there is no such repository, or it is closed to the token given (404)",
        ),
        (
            {"gated": True, "token": "right"},
            "",
            SOURCE,
            f"{SOURCE} is gated, and no token is given: one of a user who may read it is needed",
        ),
        (
            {"gated": True, "token": "right"},
            "other",
            SOURCE,
            f"{SOURCE} is gated, and the token given does not open it: "
            "its owner must accept the repository's terms on the hub",
        ),
        (
            {},
            "",
            "hf://meta-llama/tiny@v9",
            "hf://meta-llama/tiny@v9: the repository has no revision 'v9'",
        ),
    ],
    ids=["wrong token", "private", "unknown", "unknown to the token", "gated", "gated for the token", "revision"],
)
def test_what_no_retry_helps_is_refused(
    hub: Hub, state: dict[str, object], given: str, source: str, words: str
) -> None:
    for name, value in state.items():
        setattr(hub, name, value)
    with pytest.raises(RefusedError) as refused:
        HubSource(parse_address(source), given, "0", endpoint=hub.main.url).listing()
    assert str(refused.value) == words


def test_a_refusal_ends_the_program_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.token = "right"
    words = f"{SOURCE}: the token given is not valid (401)"
    ended = program(hub, tmp_path / "model", HF_TOKEN="wrong").run()
    assert (ended.code, ended.words) == (3, words)
    assert len(hub.main.requests) == 1
    assert f"arriero-download: {words}\n" in ended.out


def test_a_token_opens_the_repository_and_goes_nowhere_else(hub: Hub, tmp_path: Path) -> None:
    hub.token, hub.gated = "right", True
    assert program(hub, tmp_path / "model", HF_TOKEN="right\n").run().code == 0
    assert found(tmp_path / "model") == needed(hub)
    assert all("authorization" not in request.headers for request in hub.cdn.requests)


def test_weights_of_another_format_are_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", **UNNEEDED}
    ended = program(hub, tmp_path / "model").run()
    assert ended.code == 3
    assert ended.words == (
        f"{SOURCE} holds neither model.safetensors nor model.safetensors.index.json; "
        "pytorch_model.bin is of a format that is not read"
    )


def test_a_shard_that_the_index_names_must_be_there(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model-00002-of-00002.safetensors"]
    ended = program(hub, tmp_path / "model").run()
    assert ended.code == 3
    assert ended.words == (
        f"{SOURCE}: model.safetensors.index.json names model-00002-of-00002.safetensors, which is not there"
    )


def test_a_mirror_that_lists_bare_names_is_asked_about_each_file(hub: Hub, tmp_path: Path) -> None:
    hub.lists_sizes = False
    assert program(hub, tmp_path / "model").run().code == 0
    assert found(tmp_path / "model") == needed(hub)
    marker = json.loads((tmp_path / "model" / ".arriero" / "complete").read_text())
    assert {entry["digest"].partition(":")[0] for entry in marker["files"]} == {"sha256", "git-sha1"}


def test_a_branch_that_moved_is_fetched_where_it_differs(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert program(hub, model).run().code == 0
    (model / ".arriero" / "complete").unlink()  # as where the pod was lost before the last file
    hub.commit = "decade" + "0" * 34
    hub.files["tokenizer_config.json"] = b'{"changed": true}'
    hub.files["model-00001-of-00002.safetensors"] = os.urandom(2 * MIB)
    before = hub.body_bytes
    assert program(hub, model).run().code == 0
    assert found(model) == needed(hub)
    assert hub.body_bytes - before == 2 * MIB


def test_files_that_are_there_are_verified_and_kept(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    right, wrong = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (model / right).write_bytes(hub.files[right])
    (model / wrong).write_bytes(bytes(len(hub.files[wrong])))
    assert program(hub, model).run().code == 0
    assert found(model) == needed(hub)
    assert hub.cdn.count(right) == 0
    assert hub.cdn.count(wrong) > 0


def test_two_downloads_of_one_directory_are_one(hub: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    hub.cdn.limit = MIB
    first = program(hub, model).start()
    until(lambda: hub.body_bytes >= MIB, "the first is at it")
    second = program(hub, model).start()
    assert second.stdout is not None
    assert "another download fills" in second.stdout.readline()
    hub.cdn.limit = -1
    assert program(hub, model).end(first).code == 0
    ended = program(hub, model).end(second)
    assert ended.code == 0
    assert "is in" in ended.out
    assert hub.body_bytes == sum(len(content) for content in needed(hub).values() if len(content) >= 100_000)


@pytest.mark.parametrize("source", ["hf://tiny", "hf://a/b c@main", "ftp://x/y", "/models/x", "s3://", "hf:a/b"])
def test_a_source_that_is_none(source: str) -> None:
    with pytest.raises(ValueError, match=f"^--source is {source!r}: expected hf://owner/name@revision"):
        parse_address(source)


def test_wrong_usage_has_its_own_exit_code(hub: Hub, tmp_path: Path) -> None:
    ended = program(hub, tmp_path / "model", source="hf://tiny").run()
    assert (ended.code, ended.words) == (2, "--source is 'hf://tiny': expected hf://owner/name@revision")


def test_a_directory_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = program(hub, tmp_path / "file" / "model").run()
    assert ended.code == 1
    assert ended.words == f"{tmp_path}/file/model cannot be written: Not a directory"
