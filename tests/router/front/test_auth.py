"""API keys: read, found, limited, and followed as they change."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time

import pytest
import yaml

from arriero_faces.http.errors import HttpError
from arriero_router.front.auth import ANYBODY, Keys, KeysError, read_keys

ANA = "ana-0123456789abcdef"
BEN = "ben-0123456789abcdef"
CAT = "cat-0123456789abcdef"
NAMES = ("llama-70b", "big")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.yaml"


def write(path, keys):
    """Whole or not at all, as a careful program does, and with a time stamp of its own."""
    beside = path.with_name("new")
    beside.write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys))
    beside.rename(path)


def old(path):
    """As if written long ago, so that time stamps are trusted."""
    then = time.time() - 1000
    os.utime(path, (then, then))


def keys_of(path, entries, **options):
    write(path, entries)
    return Keys(str(path), **options)


def bearer(keys, key):
    return keys.identify(f"Bearer {key}", None)


def refusal(call, *arguments):
    with pytest.raises(HttpError) as caught:
        call(*arguments)
    return caught.value


# -- finding


def test_a_key_is_found_by_either_header(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA}, {"name": "ben", "key": BEN}])
    assert bearer(keys, ANA).name == "ana"
    assert keys.identify(None, BEN).name == "ben"
    assert keys.identify(f"bearer   {ANA} ", None).name == "ana"
    assert keys.identify("Basic eDp5", BEN).name == "ben"
    assert keys.identify(f"Bearer {ANA}", BEN).name == "ana"


def test_a_digest_does_for_a_key(path):
    keys = keys_of(path, [{"name": "ana", "sha256": hashlib.sha256(ANA.encode()).hexdigest()}])
    assert bearer(keys, ANA).name == "ana"


def test_json_and_a_mapping_with_keys_will_do(path):
    keys = keys_of(path, json.dumps({"keys": [{"name": "ana", "key": ANA, "weight": 2}]}))
    assert bearer(keys, ANA).name == "ana"
    assert keys.weights == {"ana": 2}


@pytest.mark.parametrize("headers", [(None, None), ("Bearer ", None), ("Basic eDp5", None), (None, ""), ("Bearer", "")])
def test_without_a_key_one_is_asked_for(path, headers):
    error = refusal(keys_of(path, [{"name": "ana", "key": ANA}]).identify, *headers)
    assert (error.status, error.code, error.type) == (401, "invalid_api_key", "authentication_error")
    assert error.message.startswith("an API key is needed")
    assert ("www-authenticate", "Bearer") in error.header_lines()


@pytest.mark.parametrize(
    "given", ["wrong-0123456789abc", ANA[:-1], ANA + "x", ANA.upper(), "\u00e9\udcff", "x" * 100_000]
)
def test_a_wrong_key_is_refused_and_not_repeated(path, given):
    error = refusal(bearer, keys_of(path, [{"name": "ana", "key": ANA}]), given)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.message == "the API key is not known"


def test_the_keys_themselves_are_not_kept(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA}])
    assert ANA.encode() not in repr(keys.__dict__["_by_digest"]).encode()
    assert list(keys._by_digest) == [hashlib.sha256(ANA.encode()).digest()]


# -- models


def test_a_key_may_use_its_models_by_any_of_their_names(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA, "models": ["big"]}, {"name": "ben", "key": BEN, "models": ["x"]}])
    bearer(keys, ANA).check_model(NAMES)
    error = refusal(bearer(keys, BEN).check_model, NAMES)
    assert (error.status, error.type, error.code, error.param) == (
        403,
        "permission_error",
        "model_not_allowed",
        "model",
    )
    assert error.message == "the key 'ben' may not use the model 'llama-70b'"


def test_without_models_a_key_may_use_all_and_so_may_anybody_where_none_is_needed(path):
    assert bearer(keys_of(path, [{"name": "ana", "key": ANA}]), ANA).may_use(NAMES)
    assert ANYBODY.may_use(NAMES)
    assert ANYBODY.name == ""


# -- limits


def test_a_key_beyond_its_rate_is_told_when_to_come_again(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA, "tokensPerMinute": 600}], clock=lambda: 0.0)
    ana = bearer(keys, ANA)
    keys.admit(ana, 600, 0.0)
    error = refusal(keys.admit, ana, 95, 0.0)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert error.message == "the key 'ana' may use 600 tokens per minute"
    assert ("retry-after", "10") in error.header_lines()
    keys.settle(ana, 600, 100, 0.0)
    keys.admit(ana, 500, 0.0)


def test_requests_at_once_are_counted_until_they_are_settled(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA, "maxConcurrent": 1}])
    ana = bearer(keys, ANA)
    keys.admit(ana, 5, 0.0)
    assert refusal(keys.admit, ana, 5, 0.0).message == "the key 'ana' may use 1 requests at once"
    keys.settle(ana, 5, 5, 0.0)
    keys.admit(ana, 5, 0.0)


def test_each_process_grants_its_share(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA, "requestsPerMinute": 40}], processes=4, clock=lambda: 0.0)
    ana = bearer(keys, ANA)
    for _ in range(10):
        keys.admit(ana, 1, 0.0)
    assert refusal(keys.admit, ana, 1, 0.0).retry_after == pytest.approx(6.0)


# -- what is wrong with a file

GOOD = {"name": "ana", "key": ANA}
INVALID = [
    ([GOOD | {"nmae": "x"}], "keys[0].nmae: unknown field; did you mean name?"),
    ([{"key": ANA}], "keys[0].name: missing"),
    ([{"name": "ana"}], "keys[0]: expected exactly one of key and sha256, found neither"),
    ([GOOD | {"sha256": "0" * 64}], "keys[0]: expected exactly one of key and sha256, found both"),
    ([GOOD | {"name": "a b"}], "keys[0].name: 'a b' is not valid; expected letters, digits and -._@"),
    ([{"name": "ana", "key": "short"}], "keys[0].key: expected a string of 16 to 1024 visible ASCII characters"),
    ([{"name": "ana", "key": "0123456789 abcdef"}], "keys[0].key: expected a string of 16 to 1024 visible ASCII"),
    ([{"name": "ana", "key": 1234567890123456}], "keys[0].key: expected a string of 16 to 1024 visible ASCII"),
    ([{"name": "ana", "sha256": ANA}], "keys[0].sha256: expected a string of 64 hexadecimal digits in lower case"),
    ([GOOD | {"weight": 0}], "keys[0].weight: 0 is out of bounds; expected at least 0.001"),
    ([GOOD | {"weight": "2"}], "keys[0].weight: expected a number, found '2'"),
    ([GOOD | {"tokensPerMinute": -1}], "keys[0].tokensPerMinute: -1 is out of bounds; expected at least 0"),
    ([GOOD | {"models": "x"}], "keys[0].models: expected a list, found 'x'"),
    ([GOOD, {"name": "ana", "key": BEN}], "the name ana is given twice"),
    ([GOOD, {"name": "ben", "key": ANA}], "ana and ben have the same key"),
    ([GOOD, ANA], "keys[1]: expected a mapping with name and key"),
    ({"keys": [GOOD], "kyes": []}, "kyes: unknown field; did you mean keys?"),
    ({"ana": ANA}, "expected a list of keys"),
    (ANA, "expected a list of keys"),
    ("", "empty: expected a list of keys"),
    (f"- name: ana\n  key: {ANA}\n  key: {BEN}", "line 3, column 3: the key 'key' appears twice"),
    (f"- {{name: ana, key: {ANA}", "line 1"),
]


@pytest.mark.parametrize(("content", "sentence"), INVALID, ids=range(len(INVALID)))
def test_each_problem_gets_one_sentence_that_names_the_file_and_no_key(path, content, sentence):
    write(path, content)
    with pytest.raises(KeysError) as caught:
        read_keys(str(path))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert not any(secret in str(caught.value) for secret in (ANA, BEN, "short", "1234567890123456"))


def test_a_file_that_is_not_there_or_no_text_is_said_so(tmp_path):
    with pytest.raises(KeysError, match=r"none\.yaml: No such file or directory"):
        Keys(str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeysError, match="not a text in UTF-8"):
        Keys(str(tmp_path / "binary"))


# -- changes


def test_changes_hold_at_the_next_look_and_limits_remember_what_was_used(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA, "requestsPerMinute": 2}, {"name": "ben", "key": BEN}])
    weights = keys.weights
    ana = bearer(keys, ANA)
    keys.admit(ana, 1, 0.0)
    write(path, [{"name": "ana", "key": CAT, "requestsPerMinute": 3, "weight": 4.0}])
    assert keys.look()
    assert refusal(bearer, keys, ANA).status == 401
    assert refusal(bearer, keys, BEN).status == 401
    again = bearer(keys, CAT)
    assert again.limit is ana.limit
    assert again.limit.running == 1
    keys.settle(ana, 1, 1, 0.0)
    assert again.limit.running == 0
    assert keys.weights is weights
    assert weights == {"ana": 4.0}


def test_a_bad_file_keeps_the_last_good_keys_and_says_so_once(path, caplog):
    keys = keys_of(path, [{"name": "ana", "key": ANA}])
    write(path, [{"name": "ana", "key": "short"}])
    with caplog.at_level(logging.INFO, "arriero.auth"):
        for _ in range(3):
            assert not keys.look()
        assert bearer(keys, ANA).name == "ana"
        assert "visible ASCII" in keys.error
        path.unlink()
        assert not keys.look()
        assert bearer(keys, ANA).name == "ana"
        write(path, [{"name": "ana", "key": ANA}])
        assert not keys.look()
        assert keys.error == ""
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].endswith("visible ASCII characters; the API keys stay as they were")
    assert "No such file" in messages[1]


def test_an_old_file_is_read_again_only_when_its_stamps_changed(path):
    write(path, [{"name": "ana", "key": ANA}])
    old(path)
    stamp = os.stat(path)
    keys = Keys(str(path))
    path.write_text(path.read_text().replace(ANA, BEN))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not keys.look()
    os.utime(path)
    assert keys.look()
    assert bearer(keys, BEN).name == "ana"


def test_a_file_that_was_away_for_a_while_is_good_again(path):
    write(path, [{"name": "ana", "key": ANA}])
    old(path)
    keys = Keys(str(path))
    path.rename(path.with_name("away"))
    assert not keys.look()
    assert "No such file" in keys.error
    path.with_name("away").rename(path)
    assert not keys.look()
    assert keys.error == ""


def test_a_file_written_twice_within_a_tick_is_read_twice(path):
    write(path, [{"name": "ana", "key": ANA}])
    stamp = os.stat(path)
    keys = Keys(str(path))
    with path.open("r+") as file:
        file.write(path.read_text().replace(ANA, BEN))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert keys.look()
    assert bearer(keys, BEN).name == "ana"


def test_no_key_at_all_shuts_everybody_out(path, caplog):
    keys = keys_of(path, "[]")
    assert len(keys) == 0
    assert refusal(bearer, keys, ANA).status == 401
    assert "no API key, so nobody may ask" in caplog.text


async def test_watching_takes_over_changes(path):
    keys = keys_of(path, [{"name": "ana", "key": ANA}])
    task = asyncio.get_running_loop().create_task(keys.watch(poll_seconds=0.01))
    write(path, [{"name": "ben", "key": BEN}])
    for _ in range(1000):
        if "ben" in keys.weights:
            break
        await asyncio.sleep(0.01)
    assert bearer(keys, BEN).name == "ben"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- a mounted Secret


def swap(volume, version, content):
    """As the kubelet does: files in a new hidden directory, and a link to it that is exchanged by a rename."""
    (volume / version).mkdir(parents=True)
    for name, key in content.items():
        (volume / version / name).write_text(key)
        old(volume / version / name)
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").rename(volume / "..data")
    for link in volume.iterdir():
        if not link.name.startswith("..") and link.name not in content:
            link.unlink()


def test_a_directory_has_a_key_per_file(tmp_path):
    swap(tmp_path, "..1", {"ana": f"{ANA}\n", "ben": BEN})
    keys = Keys(str(tmp_path))
    assert (bearer(keys, ANA).name, bearer(keys, BEN).name) == ("ana", "ben")
    assert not keys.look()
    swap(tmp_path, "..2", {"ana": CAT})
    assert keys.look()
    assert bearer(keys, CAT).name == "ana"
    assert refusal(bearer, keys, BEN).status == 401


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("ana", "short", "visible ASCII characters"),
        ("ana", f"{BEN}\n{BEN}", "visible ASCII characters"),
        ("a name", BEN, "'a name' cannot be a key's name"),
        ("ben", ANA, "ana and ben have the same key"),
    ],
)
def test_a_bad_file_in_a_directory_keeps_the_last_good_keys(tmp_path, name, content, sentence):
    swap(tmp_path, "..1", {"ana": ANA})
    keys = Keys(str(tmp_path))
    swap(tmp_path, "..2", {"ana": ANA, name: content})
    assert not keys.look()
    assert sentence in keys.error
    assert "short" not in keys.error
    assert BEN not in keys.error
    assert bearer(keys, ANA).name == "ana"


def test_one_file_of_a_mounted_secret_follows_its_swaps(tmp_path):
    swap(tmp_path, "..1", {"keys.yaml": yaml.safe_dump([{"name": "ana", "key": ANA}])})
    keys = Keys(str(tmp_path / "keys.yaml"))
    assert not keys.look()
    swap(tmp_path, "..2", {"keys.yaml": yaml.safe_dump([{"name": "ben", "key": BEN}])})
    assert keys.look()
    assert bearer(keys, BEN).name == "ben"
