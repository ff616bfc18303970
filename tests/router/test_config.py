"""What the router's configuration may say, the sentence for what it may not, and what a running router takes over."""

from __future__ import annotations

import pydantic
import pytest
import yaml

from arriero_faces.http.server import HttpLimits
from arriero_router.config import AT_START, Config, ConfigError, changes, load_config, parse_config
from arriero_router.core.replica import Endpoint

MINIMAL = """models:
- name: llama
  endpoints:
    static:
    - {host: 10.0.0.5}
"""
FULL = """
models:
- name: meta-llama/Llama-3.1-70B-Instruct
  aliases: [llama-70b, big]
  policy: least-load
  endpoints:
    static:
    - {name: a, host: 10.0.0.5, httpPort: 8001, grpcPort: 0, controlPort: 0}
    - {host: '::1'}
  maxInFlightPerReplica: 64
  prefix: {maxMarks: 100000, maxExpected: 4096, expectedSeconds: 2.5}
  sessionHeader: x-user
- name: small
  endpoints:
    kubernetes:
      namespace: serving
      labelSelector: serving.arriero.dev/deployment=small
      ports: {http: 8000, grpc: grpc}
      addressFamily: IPv6
- name: other
  endpoints: {file: others.yaml, healthPath: /health}
listen: {address: 127.0.0.1, httpPort: 80, grpcPort: 0}
workers: 4
hold: {maxQueue: 10, timeoutSeconds: 20, afterSeconds: 0.5, keepAliveSeconds: 5}
replay: {attempts: 2, stallSeconds: 30}
slowStartSeconds: 5
ejection: {failures: 5, baseSeconds: 2, maxSeconds: 60}
health: {intervalSeconds: 2, timeoutSeconds: 4}
auth: {keysFile: keys.yaml}
tls: {certFile: tls/crt, keyFile: /etc/key, clientCaFile: ca}
upstreamTls: {caFile: ca, certFile: crt, keyFile: key, serverName: replicas}
accessLog: {path: access.log}
tracing: {otlpEndpoint: 'http://collector:4318/v1/traces', sampleRatio: 0.5, serviceName: edge}
drainSeconds: 30
answerTokens: 100
limits: {maxBodyBytes: 2000000, maxConnections: 10, takeSeconds: 3}
"""


def config(text=MINIMAL, **fields):
    return parse_config(yaml.safe_dump(yaml.safe_load(text) | fields), "router.yaml")


def problems_of(text):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "router.yaml")
    return caught.value.problems


# -- what it says


def test_five_lines_are_enough():
    assert len(MINIMAL.splitlines()) == 5
    parsed = parse_config(MINIMAL, "router.yaml")
    (model,) = parsed.models
    assert (model.name, model.policy, model.max_in_flight_per_replica) == ("llama", "prefix", 256)
    assert (parsed.listen.http_port, parsed.listen.grpc_port, parsed.workers) == (8000, 9000, 1)
    assert (parsed.auth, parsed.tls, parsed.upstream_tls, parsed.tracing) == (None, None, None, None)
    assert model.endpoints.static[0].endpoint() == Endpoint("10.0.0.5:8000", "10.0.0.5", 8000, 9000, 9100)


def test_everything_can_be_said():
    parsed = parse_config(FULL, "router.yaml")
    first, second, third = parsed.models
    assert (first.aliases, first.policy, first.prefix.expected_seconds) == (("llama-70b", "big"), "least-load", 2.5)
    assert [entry.endpoint() for entry in first.endpoints.static] == [
        Endpoint("a", "10.0.0.5", 8001),
        Endpoint("[::1]:8000", "::1", 8000, 9000, 9100),
    ]
    place = second.endpoints.kubernetes
    assert (place.ports.http, place.ports.grpc, place.ports.control) == ("8000", "grpc", "control")
    assert third.endpoints.health_path == "/health"
    assert (parsed.hold.max_queue, parsed.replay.attempts, parsed.ejection.max_seconds) == (10, 2, 60)
    assert parsed.tracing.sample_ratio == 0.5
    again = parsed.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert parse_config(yaml.safe_dump(again), "again") == parsed


def test_a_configuration_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config().workers = 2


def test_relative_paths_begin_at_the_files_directory(tmp_path):
    path = tmp_path / "router.yaml"
    path.write_text(FULL)
    parsed = load_config(str(path))
    assert parsed.auth.keys_file == str(tmp_path / "keys.yaml")
    assert (parsed.tls.cert_file, parsed.tls.key_file) == (str(tmp_path / "tls/crt"), "/etc/key")
    assert parsed.upstream_tls.ca_file == str(tmp_path / "ca")
    assert parsed.models[2].endpoints.file == str(tmp_path / "others.yaml")
    assert parsed.access_log.path == str(tmp_path / "access.log")


@pytest.mark.parametrize("word", ["stdout", "off"])
def test_words_for_the_access_log_are_no_paths(tmp_path, word):
    path = tmp_path / "router.yaml"
    path.write_text(f"{MINIMAL}accessLog: {{path: {word}}}\n")
    assert load_config(str(path)).access_log.path == word


def test_limits_reach_the_http_server():
    assert config().limits.http() == HttpLimits()
    http = config(limits={"maxBodyBytes": 2000, "takeSeconds": 3, "maxHeldBytes": 4000}).limits.http()
    assert (http.max_body, http.stall_seconds, http.max_unanswered) == (2000, 3, 4000)


# -- what it may not say

STATIC = "- {host: 10.0.0.5}"
INVALID = [
    ("name: llama", "nam: llama", "models[0].nam: unknown field; did you mean name?"),
    ("name: llama", "name: llama\n  polcy: hash", "models[0].polcy: unknown field; did you mean policy?"),
    ("host: 10.0.0.5", "host: a, Port: 1", "models[0].endpoints.static[0].Port: unknown field; did you mean"),
    (
        "models:",
        "hold: {timeout_seconds: 3}\nmodels:",
        "hold.timeout_seconds: unknown field; did you mean timeoutSeconds?",
    ),
    ("models:", "xyzzy: 1\nmodels:", "xyzzy: unknown field; known here: models, listen, workers, hold, replay"),
    ("name: llama", "name: two words", "models[0].name: 'two words' is not valid; expected letters, digits"),
    ("name: llama", "name: llama\n  policy: best", "models[0].policy: 'best' is not one of prefix, least-load, power"),
    ("name: llama", "name: llama\n  aliases: llm", "models[0].aliases: expected a list, found 'llm'"),
    ("name: llama", "name: llama\n  aliases: [a, a]", "models: the name a is given twice"),
    ("name: llama", "name: llama\n  aliases: [llama]", "models: the name llama is given twice"),
    (
        "name: llama",
        "name: llama\n  sessionHeader: X-A",
        "models[0].sessionHeader: 'X-A' is not valid; expected the name",
    ),
    (STATIC, "- 10.0.0.5", "models[0].endpoints.static[0]: expected a mapping, found '10.0.0.5'"),
    (
        STATIC,
        "- {host: 'http://a'}",
        "models[0].endpoints.static[0].host: 'http://a' is not valid; expected a host name",
    ),
    (STATIC, "- {host: 'a:80'}", "models[0].endpoints.static[0].host: 'a:80' is no IPv6 address; a port has its own"),
    (STATIC, "- {host: a, httpPort: 0}", "static[0].httpPort: 0 is out of bounds; expected at least 1"),
    (STATIC, "- {host: a, grpcPort: 70000}", "static[0].grpcPort: 70000 is out of bounds; expected at most 65535"),
    (STATIC, "- {host: a}\n    - {host: a}", "models[0].endpoints: the replica a:8000 is named twice"),
    (STATIC, "- {host: a, name: x}\n    - {host: b, name: x}", "models[0].endpoints: the replica x is named twice"),
    (
        STATIC,
        "- {host: a, name: x}\n    - {host: a}",
        "models[0].endpoints: two replicas have the address a, port 8000",
    ),
    (
        "    static:\n    - {host: 10.0.0.5}",
        "    {}",
        "models[0].endpoints: expected exactly one of static, file, kube",
    ),
    (
        STATIC,
        f"{STATIC}\n    file: x",
        "models[0].endpoints: expected exactly one of static, file, kubernetes, found static and",
    ),
    (
        "static:\n    - {host: 10.0.0.5}",
        "kubernetes: {}",
        "kubernetes: expected exactly one of service and labelSelector",
    ),
    (
        "static:\n    - {host: 10.0.0.5}",
        "kubernetes: {service: A}",
        "kubernetes.service: 'A' is not valid; expected lower",
    ),
    (
        "static:\n    - {host: 10.0.0.5}",
        "kubernetes: {service: a, ports: {http: http port}}",
        "kubernetes.ports.http: 'http port' is not valid; expected a port's name or number",
    ),
    ("models:", "workers: 0\nmodels:", "workers: 0 is out of bounds; expected at least 1"),
    ("models:", "workers: true\nmodels:", "workers: expected a whole number, found true"),
    ("models:", "drainSeconds: .inf\nmodels:", "drainSeconds: expected a finite number, found inf"),
    ("models:", "slowStartSeconds: -1\nmodels:", "slowStartSeconds: -1 is out of bounds; expected at least 0"),
    (
        "models:",
        "health: {intervalSeconds: 0}\nmodels:",
        "health.intervalSeconds: 0 is out of bounds; expected above 0",
    ),
    (
        "models:",
        "ejection: {baseSeconds: 9, maxSeconds: 5}\nmodels:",
        "ejection: baseSeconds is 9, above maxSeconds (5)",
    ),
    ("models:", "tls: {certFile: a}\nmodels:", "tls.keyFile: missing"),
    ("models:", "upstreamTls: {certFile: a}\nmodels:", "upstreamTls: certFile and keyFile belong together"),
    (
        "models:",
        "tracing: {otlpEndpoint: 'collector:4318'}\nmodels:",
        "tracing.otlpEndpoint: 'collector:4318' is not valid",
    ),
    (
        "models:",
        "tracing: {otlpEndpoint: 'http://a', sampleRatio: 2}\nmodels:",
        "tracing.sampleRatio: 2 is out of bounds",
    ),
    (
        "models:",
        "limits: {maxBodyBytes: 1}\nmodels:",
        "limits.maxBodyBytes: 1 is out of bounds; expected at least 1024",
    ),
    ("models:", "listen: {address: ''}\nmodels:", "listen.address: 0 characters; expected at least 1"),
    ("models:", "auth: 3\nmodels:", "auth: expected a mapping, found 3"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), INVALID, ids=range(len(INVALID)))
def test_each_problem_gets_one_sentence_with_its_path(old, new, sentence):
    assert MINIMAL.count(old) == 1, old
    assert any(sentence in problem for problem in problems_of(MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ("empty: expected a router configuration",)),
        ("a list", ("expected a mapping with models, found 'a list'",)),
        ("models: []", ("models: 0 entries; expected at least 1",)),
        ("models: 3", ("models: expected a list, found 3",)),
        ("hold: {}", ("models: missing",)),
        ("models: [{name: a}]", ("models[0].endpoints: missing",)),
        (MINIMAL + "workers: 1\nworkers: 2\n", ("line 7, column 1: the key 'workers' appears twice",)),
        (MINIMAL + "---" + MINIMAL, ("line 6, column 4: mapping values are not allowed here",)),
    ],
    ids=range(8),
)
def test_texts_that_are_no_configuration(text, problems):
    found = problems_of(text)
    assert len(found) == len(problems)
    assert found == problems or text.count("---")


def test_the_file_is_named_and_every_problem_has_its_line(tmp_path):
    path = tmp_path / "router.yaml"
    path.write_text("models: []\nworkers: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).splitlines() == [
        f"{path}: models: 0 entries; expected at least 1",
        f"{path}: workers: expected a whole number, found 'x'",
    ]
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory"):
        load_config(str(tmp_path / "none.yaml"))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        load_config(str(path))


# -- what a running router takes over


def test_nothing_changed_changes_nothing():
    change = changes(config(FULL), config(FULL))
    assert change.config == config(FULL)
    assert (change.applied, change.refused) == ((), ())


def test_what_can_change_is_taken_over_and_named():
    old = config(FULL)
    data = yaml.safe_load(FULL)
    data["hold"]["maxQueue"] = 99
    data["models"][0]["policy"] = "hash"
    data["models"][0]["endpoints"]["static"].pop()
    data["models"][2]["name"] = "another"
    data["limits"] = {}
    new = config(**data)
    change = changes(old, new)
    assert change.config == new
    assert change.refused == ()
    assert set(change.applied) == {
        "models[meta-llama/Llama-3.1-70B-Instruct].policy",
        "models[meta-llama/Llama-3.1-70B-Instruct].endpoints.static",
        "models[other]",
        "models[another]",
        "hold.maxQueue",
        "limits.maxBodyBytes",
        "limits.maxConnections",
        "limits.takeSeconds",
    }


def test_the_order_of_models_counts():
    """A request that names none gets the first."""
    data = yaml.safe_load(FULL)
    data["models"].reverse()
    change = changes(config(FULL), config(**data))
    assert change.applied == ("models",)
    assert change.config.models[0].name == "other"


def test_what_takes_a_restart_is_refused_and_the_rest_is_taken_over():
    old = config()
    new = config(
        listen={"httpPort": 81},
        workers=3,
        tls={"certFile": "a", "keyFile": "b"},
        answerTokens=7,
    )
    change = changes(old, new)
    assert change.refused == (
        "listen.httpPort changed from 8000 to 81: that takes a restart",
        "workers changed from 1 to 3: that takes a restart",
        "tls changed from nothing to a mapping: that takes a restart",
    )
    assert change.applied == ("answerTokens",)
    assert change.config == config(answerTokens=7)


def test_every_field_is_either_taken_over_or_named_as_fixed():
    fixed = set(AT_START)
    assert fixed < set(Config.model_fields)
    everything = config(FULL)
    change = changes(config(), everything)
    assert {sentence.split(" ")[0].split(".")[0] for sentence in change.refused} == {
        Config.model_fields[name].alias for name in fixed
    }
    for name in set(Config.model_fields) - fixed:
        assert getattr(change.config, name) == getattr(everything, name)


# -- the schema


def test_every_field_is_described_and_bounded():
    schema = Config.model_json_schema(by_alias=True)
    for name, definition in [("Config", schema), *schema["$defs"].items()]:
        assert definition.get("description"), name
        for key, given in definition["properties"].items():
            assert given.get("description"), f"{name}.{key} has no description"
            for choice in given.get("anyOf", [given]):
                if choice.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & choice.keys(), f"{name}.{key} has no lower bound"
                    assert "maximum" in choice, f"{name}.{key} has no upper bound"
                if choice.get("type") == "string":
                    assert {"maxLength", "enum"} & choice.keys(), f"{name}.{key} has no longest length"
                if choice.get("type") == "array":
                    assert "maxItems" in choice, f"{name}.{key} has no bound"
