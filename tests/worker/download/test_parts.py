"""The pure parts of a download, and what it keeps on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero_worker.download.extents import Extents, segments
from arriero_worker.download.progress import Progress, in_bytes, in_time
from arriero_worker.download.selection import INDEX, only_files, small_files, weight_files, with_sums
from arriero_worker.download.source import RefusedError, RemoteFile, parse_address
from arriero_worker.download.state import State


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))), st.integers(0, 70))
def test_extents_are_the_set_of_their_bytes(added: list[tuple[int, int]], size: int) -> None:
    extents, there = Extents(), set()
    for start, stop in added:
        extents.add(start, stop)
        there |= set(range(start, stop))
    assert {n for start, stop in extents.ranges() for n in range(start, stop)} == there
    assert extents.covered == len(there)
    edges = [edge for pair in extents.ranges() for edge in pair]
    assert edges == sorted(set(edges)), "merged, apart and in order"
    missing = [n for start, stop in extents.missing(size) for n in range(start, stop)]
    assert missing == [n for n in range(size) if n not in there]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50))), st.integers(1, 9))
def test_segments_are_the_same_bytes_in_pieces(gaps: list[tuple[int, int]], longest: int) -> None:
    cut = segments(gaps, longest)
    assert [n for a, b in cut for n in range(a, b)] == [n for a, b in gaps for n in range(a, b)]
    assert all(0 < b - a <= longest for a, b in cut)


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1) for path in paths]


def paths(listed: list[RemoteFile]) -> list[str]:
    return [file.path for file in listed]


def test_small_files_are_those_of_the_root_and_of_templates() -> None:
    needed = ["config.json", "tokenizer.model", "chat_template.jinja", "chat_templates/tool.jinja"]
    others = ["original/params.json", "x/chat_template.jinja", "README.md", "a.safetensors", "tokenizer.model.bak"]
    assert paths(small_files(files(*needed, *others))) == needed


def test_weights_are_what_the_index_names() -> None:
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}})
    listed = files("m-2.safetensors", "m-1.safetensors", "m-3.safetensors", INDEX, "model.safetensors")
    assert paths(weight_files("u", listed, index)) == ["m-1.safetensors", "m-2.safetensors"]
    assert paths(weight_files("u", listed, None)) == ["model.safetensors"]


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_is_none(index: str) -> None:
    with pytest.raises(RefusedError, match=f"u: {INDEX} has no weight_map of file names"):
        weight_files("u", files(INDEX), index)


def test_only_what_is_asked_for() -> None:
    assert paths(only_files("u", files("a", "b"), ["b", "b"])) == ["b"]
    with pytest.raises(RefusedError, match="u has no c"):
        only_files("u", files("a"), ["c"])
    with pytest.raises(RefusedError, match="u holds no file"):
        only_files("u", [], ["c"])


def test_sums_are_read_as_sha256sum_writes_them() -> None:
    digest = "AB" * 32
    sums = f"{digest}  a\n{digest.lower()} *./b.json\n\n"
    stated = with_sums("u", [RemoteFile("a", 1, "md5:x"), RemoteFile("c", 1, "md5:y")], sums)
    assert [file.digest for file in stated] == [f"sha256:{digest.lower()}", "md5:y"]
    with pytest.raises(RefusedError, match="u: line 1 of SHA256SUMS is not as sha256sum writes it"):
        with_sums("u", [], "a  b\n")


def test_the_example_is_fetched_whole() -> None:
    directory = Path(__file__).parents[3] / "examples" / "tiny_llama" / "checkpoint"
    listed = [RemoteFile(path.name, path.stat().st_size) for path in sorted(directory.iterdir())]
    index = (directory / INDEX).read_text()
    chosen = [*small_files(listed), *weight_files("u", listed, index)]
    assert sorted(paths(chosen)) == sorted(path.name for path in directory.iterdir() if path.suffix != ".md")


def test_addresses() -> None:
    hub = parse_address("hf://meta-llama/Llama-3.1-8B@refs/pr/1")
    assert (hub.scheme, hub.root, hub.rest) == ("hf", "meta-llama/Llama-3.1-8B", "refs/pr/1")
    assert parse_address("hf://a/b").rest == "main"
    store = parse_address("gs://bucket//a/b/")
    assert (store.scheme, store.root, store.rest) == ("gs", "bucket", "a/b")
    assert parse_address("s3://bucket").rest == ""


def test_the_rate_is_that_of_late_and_not_of_what_was_there() -> None:
    now = 100.0
    progress = Progress(clock=lambda: now)
    progress.add(5)
    progress.begin(total=10_000, done=2_000, files=3, files_done=1)
    assert progress.snapshot().seconds_left is None
    for _ in range(60):
        now += 1.0
        progress.add(10)
    seen = progress.snapshot()
    assert (seen.bytes_done, seen.bytes_per_second, seen.phase_seconds) == (2_600, 10.0, 60.0)
    assert seen.seconds_left == 740.0
    for _ in range(32):
        now += 1.0
        progress.add(100)
    assert progress.snapshot().bytes_per_second == 100.0, "half a minute later the slow minute is forgotten"
    assert str(progress.snapshot()) == "5.7 KiB of 9.8 KiB (58%), 100 B/s, 42 s left, 1 of 3 files"
    now += 300.0
    assert progress.snapshot().bytes_per_second < 1.0
    assert progress.silent_seconds == 300.0


def test_numbers_for_people() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1536, 2**20, 17_287_000_000)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "16.1 GiB",
    ]
    assert [in_time(n) for n in (0.4, 99, 100, 720, 9000)] == ["0 s", "99 s", "2 min", "12 min", "2.5 h"]


SHARD = RemoteFile("m.safetensors", 1000, "sha256:0")


def part_of(state: State, file: RemoteFile = SHARD) -> list[tuple[int, int]]:
    return state.part(file).present.ranges()


def test_a_part_is_taken_up_where_it_was_left(tmp_path: Path) -> None:
    part = State(tmp_path).part(SHARD)
    part.open()
    part.write(100, b"x" * 200)
    assert not part.record(100, 300)
    part.close()
    ranges = tmp_path / ".arriero" / "parts" / "m.safetensors.ranges"
    with ranges.open("a") as file:
        file.write("400 50")  # cut short
    assert part_of(State(tmp_path)) == [(100, 300)]
    again = State(tmp_path).part(SHARD)
    again.open()
    assert not again.record(500, 600)
    assert again.record(0, 1000)
    assert not again.record(0, 10), "it became whole once"
    again.close()
    assert part_of(State(tmp_path)) == [(0, 1000)]


def test_a_part_of_other_content_is_none(tmp_path: Path) -> None:
    part = State(tmp_path).part(SHARD)
    part.open()
    part.record(0, 1000)
    part.close()
    assert part_of(State(tmp_path), RemoteFile("m.safetensors", 1000, "sha256:1")) == []
    assert not list((tmp_path / ".arriero" / "parts").iterdir()), "its bytes are in nobody's way"


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../x", ".arriero/complete", "a//b", ""])
def test_no_file_leaves_the_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(RefusedError, match="cannot be stored"):
        State(tmp_path).target(RemoteFile(path, 1))


def test_the_marker_holds_while_its_files_are_there(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert state.complete("u", []) is None
    (tmp_path / "a").write_bytes(b"12345")
    state.record_complete("u", [], [RemoteFile("a", 5)])
    assert State(tmp_path).complete("u", []) == 5
    assert State(tmp_path).complete("v", []) is None
    assert State(tmp_path).complete("u", ["a"]) is None
    (tmp_path / "a").write_bytes(b"1234")
    assert State(tmp_path).complete("u", []) is None
    (tmp_path / ".arriero" / "complete").write_text("{")
    assert State(tmp_path).complete("u", []) is None


def test_parts_of_nothing_wanted_are_swept(tmp_path: Path) -> None:
    for name in ("a.ranges", "b/c"):
        part = State(tmp_path).part(RemoteFile(name, 10))
        part.open()
        part.close()
    State(tmp_path).sweep([RemoteFile("a.ranges", 10)])
    left = {path.name for path in (tmp_path / ".arriero" / "parts").iterdir()}
    assert left == {"a.ranges", "a.ranges.ranges"}
