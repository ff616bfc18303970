"""`arriero-download --source s3://...` against a store on loopback."""

from __future__ import annotations

import hashlib
import json
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from .program import MIB, UNNEEDED, Program, checkpoint, found, until
from .servers import Fault, ObjectStore

SOURCE = "s3://models/llamas/tiny/"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def store(seed: int) -> Iterator[ObjectStore]:
    objects = {f"llamas/tiny/{path}": content for path, content in (checkpoint(seed) | UNNEEDED).items()}
    made = ObjectStore(objects | {"llamas/tiny-2/config.json": b"{}"})
    yield made
    made.close()


def program(store: ObjectStore, directory: Path, *arguments: str, source: str = SOURCE, **environment: str) -> Program:
    given = {"AWS_ENDPOINT_URL": store.main.url, "AWS_ACCESS_KEY_ID": store.key, "AWS_SECRET_ACCESS_KEY": "s"}
    return Program(source, directory, {**given, "AWS_REGION": "eu-west-1", **environment}, *arguments)


def needed(store: ObjectStore) -> dict[str, bytes]:
    there = {key.removeprefix("llamas/tiny/"): content for key, content in store.objects.items()}
    return {path: there[path] for path in there if path not in UNNEEDED and "tiny-2" not in path}


def test_a_prefix_is_fetched_once(store: ObjectStore, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert program(store, model).run().code == 0
    assert found(model) == needed(store)
    assert "/eu-west-1/s3/" in store.main.requests[0].headers["authorization"]
    store.main.requests.clear()
    assert program(store, model).run().code == 0
    assert store.main.requests == []


def test_google_cloud_storage_is_asked_in_its_own_way(store: ObjectStore, tmp_path: Path) -> None:
    store.key = ""
    environment = {"GOOGLE_BASE_URL": store.main.url, "GOOGLE_SKIP_SIGNATURE": "true"}
    ended = Program("gs://models/llamas/tiny", tmp_path / "model", environment).run()
    assert ended.code == 0
    assert found(tmp_path / "model") == needed(store)


def test_killed_midway_it_fetches_the_rest_only(seed: int, tmp_path: Path) -> None:
    store = ObjectStore({f"x/{path}": content for path, content in checkpoint(seed, 3, 16 * MIB).items()})
    try:
        model = tmp_path / "model"
        store.main.limit = 30 * MIB
        process = program(store, model, "--connections", "2", source="s3://models/x").start()
        recorded = model / ".arriero" / "parts"
        until(lambda: _there(recorded) + sum(p.stat().st_size for p in model.glob("*.safe*")) > 24 * MIB, "24 MiB")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        first, store.main.limit = store.body_bytes, -1
        assert program(store, model, source="s3://models/x").run().code == 0
        whole = sum(map(len, store.objects.values()))
        assert {f"x/{path}": content for path, content in found(model).items()} == store.objects
        assert store.body_bytes - first <= whole - 24 * MIB + MIB  # listings count, and a sample for ETags
        print(f"{first} bytes before the kill, {store.body_bytes - first} after it, of {whole}")
    finally:
        store.close()


def _there(recorded: Path) -> int:
    total = 0
    for path in recorded.glob("*.ranges"):
        try:
            lines = [line.split() for line in path.read_text().splitlines()[1:]]
        except FileNotFoundError:
            continue
        total += sum(int(line[1]) - int(line[0]) for line in lines if len(line) == 2)
    return total


def test_an_md5_etag_is_verified(store: ObjectStore, tmp_path: Path) -> None:
    store.main.faults.append(Fault(SHARD, times=1, corrupt=True))
    ended = program(store, tmp_path / "model").run()
    assert ended.code == 0
    assert f"{SHARD} is corrupt: its md5 is " in ended.out
    assert found(tmp_path / "model") == needed(store)


@pytest.mark.parametrize(
    ("etag", "kind"),
    [
        (lambda content: f"{hashlib.md5(content).hexdigest()}-2", "multipart"),
        (lambda content: hashlib.sha256(content).hexdigest()[:32], "key service"),
    ],
    ids=["multipart", "key service"],
)
def test_an_etag_that_is_no_digest_only_names_the_object(
    store: ObjectStore, tmp_path: Path, etag: object, kind: str
) -> None:
    store.etag = etag  # type: ignore[assignment]
    assert program(store, tmp_path / "model").run().code == 0
    assert found(tmp_path / "model") == needed(store)
    marker = json.loads((tmp_path / "model" / ".arriero" / "complete").read_text())
    assert all(entry["digest"].startswith("etag:") for entry in marker["files"])


def test_sha256sums_verify_where_etags_cannot(store: ObjectStore, tmp_path: Path) -> None:
    store.etag = lambda content: f"{hashlib.md5(content).hexdigest()}-2"
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in needed(store).items())
    store.objects["llamas/tiny/SHA256SUMS"] = sums.encode()
    store.main.faults.append(Fault(SHARD, times=-1, corrupt=True))
    ended = program(store, tmp_path / "model").run()
    assert ended.code == 1
    assert ended.words.startswith(f"{SOURCE}: {SHARD} is corrupt, also when fetched again: its sha256 is ")
    store.main.faults.clear()
    assert program(store, tmp_path / "model").run().code == 0


def test_an_object_that_is_replaced_meanwhile_is_noticed(store: ObjectStore, tmp_path: Path) -> None:
    store.main.faults.append(Fault(SHARD, times=-1, status=412))
    ended = program(store, tmp_path / "model").run()
    assert (ended.code, ended.words) == (1, f"{SOURCE}: {SHARD} was replaced while it was fetched")
    store.main.faults.clear()
    store.objects[f"llamas/tiny/{SHARD}"] = b"another" * 100_000
    assert program(store, tmp_path / "model").run().code == 0
    assert found(tmp_path / "model") == needed(store)


def test_broken_connections_and_busy_servers_are_sat_out(store: ObjectStore, tmp_path: Path) -> None:
    store.main.faults += [
        Fault(SHARD, times=1, cut_after=MIB + 5000),
        Fault(SHARD, times=1, status=503),
        Fault("tokenizer.json", times=1, status=429),
    ]
    ended = program(store, tmp_path / "model").run()
    assert ended.code == 0
    assert found(tmp_path / "model") == needed(store)
    assert "tokenizer.json: the store answered 429; again in" in ended.out


@pytest.mark.parametrize(
    ("source", "environment", "words"),
    [
        ("s3://nothing/x", {}, "s3://nothing/x: there is no bucket nothing (404 NoSuchBucket)"),
        ("s3://models/nothing", {}, "s3://models/nothing: no object has this prefix"),
        (
            SOURCE,
            {"AWS_ACCESS_KEY_ID": "AKIAOTHER"},
            f"{SOURCE}: the store does not accept the credentials given, or any (403 InvalidAccessKeyId)",
        ),
    ],
    ids=["bucket", "prefix", "credentials"],
)
def test_what_no_retry_helps_is_refused_at_once(
    store: ObjectStore, tmp_path: Path, source: str, environment: dict[str, str], words: str
) -> None:
    ended = program(store, tmp_path / "model", source=source, **environment).run()
    assert (ended.code, ended.words) == (3, words)
    assert len(store.main.requests) == 1


def test_nobody_at_the_endpoint(store: ObjectStore, tmp_path: Path) -> None:
    endpoint = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    ended = program(store, tmp_path / "model", "--patience", "0.3", **endpoint).run()
    assert ended.code == 1
    assert ended.words == f"{SOURCE}: the store cannot be reached (Connection refused) (for 0.3 s nothing arrived)"


@pytest.mark.parametrize("scheme", ["hf", "s3"])
def test_a_certificate_must_be_trusted(store: ObjectStore, tmp_path: Path, scheme: str) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    store.main.encrypt(context)
    url = store.main.url.replace("127.0.0.1", "localhost")
    source, environment = SOURCE, {"AWS_ENDPOINT_URL": url}
    if scheme == "hf":
        source, environment = "hf://a/b@main", {"HF_ENDPOINT": url}
    ended = program(store, tmp_path / "model", source=source, **environment).run()
    who = "server" if scheme == "hf" else "store"
    words = f"{source}: the {who}'s certificate is not trusted: set SSL_CERT_FILE to its issuer's"
    assert (ended.code, ended.words) == (3, words)
    trusting = environment | {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    ended = program(store, tmp_path / "model", source=source, **trusting).run()
    assert ended.code == (3 if scheme == "hf" else 0)
    assert "certificate" not in ended.words


def test_a_key_that_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    del store.objects["llamas/tiny/config.json"]
    ended = program(store, tmp_path / "model", "--only", "config.json").run()
    assert (ended.code, ended.words) == (3, f"{SOURCE} has no config.json")
