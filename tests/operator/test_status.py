"""What a deployment says about itself: valid by its own schema, true, and turning only when something turns."""

from __future__ import annotations

import dataclasses
from json import dumps
from typing import Any

import pytest
from tests.operator.fake_cluster import SETTINGS, FakeCluster
from tests.operator.schema_check import problems

from arriero_operator import names
from arriero_operator.crd import custom_resource_definition
from arriero_operator.desired import desired
from arriero_operator.observe import RankReport, Report, timestamp
from arriero_operator.writes import Emit, SetStatus
from arriero_plan.known import known_config

NAME = "llama-70b"
STATUS_SCHEMA = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]


def cluster(nodes: int = 4, **spec: Any) -> FakeCluster:
    made = FakeCluster()
    made.add_nodes(nodes)
    made.create(NAME, **spec)
    return made


def status_with(made: FakeCluster, **report: Any) -> dict[str, Any]:
    """The status of a pass that hears this of the first group's leader."""
    observed = made.observe(NAME)
    observed = dataclasses.replace(observed, reports={f"{NAME}-0-0": Report(**report)} if report else {})
    (write,) = [w for w in desired(observed, SETTINGS).writes if isinstance(w, SetStatus)]
    return dict(write.status)


def loading(loaded: int, seconds: float) -> dict[str, Any]:
    gib = 2**30
    ranks = tuple(RankReport(i, i // 8, "Loading", 0, loaded * gib, 10 * gib, seconds) for i in range(16))
    return {"phase": "Loading", "ranks": ranks}


def test_the_status_of_every_moment_fits_its_schema() -> None:
    made = cluster(replicas=2)
    phases = []
    for second in range(100):
        made.pass_over(NAME)
        status = made.status(NAME)
        assert problems(status, STATUS_SCHEMA) == []
        if not phases or phases[-1] != status["phase"]:
            phases.append(status["phase"])
        if second == 15:
            made.edit(NAME, engine={"maxRunning": 128}, rollout={"maxSurge": 0, "maxUnavailable": 1})
        if second == 60:
            made.lose(made.pods()[0]["spec"]["nodeName"])
        made.tick()
    assert phases == ["Waiting", "Loading", "Ready", "Updating", "Progressing", "Ready", "Degraded"]


def test_transitions_keep_their_time() -> None:
    made = cluster()
    made.converge(NAME)
    ready = made.condition(NAME, "Available")
    planned = made.condition(NAME, "Planned")
    made.tick(1000)
    made.edit(NAME, replicas=2)
    made.pass_over(NAME)
    assert made.condition(NAME, "Planned")["lastTransitionTime"] == planned["lastTransitionTime"]
    assert made.condition(NAME, "Planned")["observedGeneration"] == 2
    turned = made.condition(NAME, "Available")
    assert turned["status"] == "False"
    assert turned["lastTransitionTime"] == timestamp(made.now) != ready["lastTransitionTime"]
    assert made.status(NAME)["observedGeneration"] == 2


def test_loading_tells_progress_and_when_it_will_be_done() -> None:
    made = cluster()
    made.run(3, NAME)
    status = status_with(made, **loading(5, 10.0))
    assert status["phase"] == "Loading"
    assert status["message"] == f"{NAME}-0: 50% of 160.0 GiB, about 10 s left"
    rank = status["groups"][0]["ranks"][9]
    assert (rank["rank"], rank["pod"], rank["phase"], rank["etaSeconds"]) == (9, f"{NAME}-0-1", "Loading", 10)
    assert rank["bytesTotal"] == 10 * 2**30
    (loaded,) = [c for c in status["conditions"] if c["type"] == "ModelLoaded"]
    assert (loaded["status"], loaded["message"]) == ("False", f"{NAME}-0: 50% of 160.0 GiB, about 10 s left")


def downloading(fetched: float, speed: int = 0, seconds: float = 0.0) -> Report:
    """What a pod says whose init step has so many of 16 GiB."""
    rank = RankReport(0, 0, "Downloading", 0, int(fetched * 2**30), 16 * 2**30, seconds, bytes_per_second=speed)
    return Report("Downloading", ranks=(rank,))


def status_of_pods(made: FakeCluster, **reports: Report) -> dict[str, Any]:
    """The status of a pass that hears this of the first group's pods: of pod 1 as p1."""
    observed = made.observe(NAME)
    told = {f"{NAME}-0-{name.removeprefix('p')}": report for name, report in reports.items()}
    observed = dataclasses.replace(observed, reports=told)
    (write,) = [w for w in desired(observed, SETTINGS).writes if isinstance(w, SetStatus)]
    assert problems(dict(write.status), STATUS_SCHEMA) == []
    return dict(write.status)


def test_downloading_tells_progress_and_when_it_will_be_done() -> None:
    made = cluster()
    made.run(3, NAME)
    status = status_of_pods(made, p0=downloading(3.9, speed=100 * 2**20))
    group = status["groups"][0]
    assert (status["phase"], group["phase"]) == ("Loading", "Downloading")
    assert status["message"] == f"{NAME}-0: downloading 3.2 of 16.0 GiB, 3 min left"
    assert group["download"] == {
        "pods": 1,
        "bytesFetched": 16 * 2**30 // 20 * 4,
        "bytesTotal": 16 * 2**30,
        "etaSeconds": 180,
    }
    assert group["ranks"] == [], "there is none yet"
    (loaded,) = [c for c in status["conditions"] if c["type"] == "ModelLoaded"]
    assert (loaded["status"], loaded["reason"]) == ("False", "Downloading")
    assert loaded["message"] == f"{NAME}-0: downloading 3.2 of 16.0 GiB, 3 min left"


def test_a_group_downloads_as_long_as_one_of_its_pods_does() -> None:
    made = cluster()
    made.run(3, NAME)
    both = status_of_pods(made, p0=downloading(8, seconds=80), p1=downloading(4, seconds=80))
    assert both["message"] == f"{NAME}-0: downloading 12.0 of 32.0 GiB in 2 pods, 4 min left"
    loads = Report("Loading", ranks=(RankReport(0, 0, "Loading", 0, 2**30, 10 * 2**30, 5.0),))
    one = status_of_pods(made, p0=loads, p1=downloading(12, seconds=80))
    assert one["groups"][0]["phase"] == "Downloading"
    assert one["message"] == f"{NAME}-0: downloading 12.0 of 16.0 GiB, 30 s left"
    assert [rank["phase"] for rank in one["groups"][0]["ranks"]] == ["Loading"]


def test_a_download_that_nobody_hears_shows_in_the_pod() -> None:
    made = cluster()
    made.run(3, NAME)
    running = {"name": "download", "state": {"running": {"startedAt": timestamp(made.now)}}}
    made.pods()[1]["status"]["initContainerStatuses"] = [running]
    status = status_of_pods(made)
    assert status["groups"][0]["phase"] == "Downloading"
    (loaded,) = [c for c in status["conditions"] if c["type"] == "ModelLoaded"]
    assert loaded["message"] == f"{NAME}-0: is downloading"


@pytest.mark.parametrize(
    "entry",
    [
        {"state": {"terminated": {"exitCode": 3, "message": "WORDS\n"}}},
        {
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s restarting failed container"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "WORDS"}},
        },
    ],
    ids=["ended", "waits for its next start"],
)
def test_a_download_that_failed_is_told_in_its_own_words(entry: dict[str, Any]) -> None:
    made = cluster()
    made.run(3, NAME)
    made.pods()[1]["status"]["initContainerStatuses"] = [{"name": "download", **entry}]
    made.pods()[1]["status"]["containerStatuses"] = [
        {"name": "worker", "state": {"waiting": {"reason": "PodInitializing"}}}
    ]
    status = status_of_pods(made)
    words = f"{NAME}-0: pod {NAME}-0-1: the model cannot be fetched: WORDS"
    assert (status["phase"], status["message"]) == ("Degraded", words)
    assert status["groups"][0]["phase"] == "Failed"
    (loaded,) = [c for c in status["conditions"] if c["type"] == "ModelLoaded"]
    assert (loaded["reason"], loaded["message"]) == ("Failed", words)


def test_a_download_that_is_tried_again_is_one_that_runs() -> None:
    made = cluster()
    made.run(3, NAME)
    running = {"state": {"running": {"startedAt": timestamp(made.now)}}, "lastState": {"terminated": {"exitCode": 1}}}
    made.pods()[1]["status"]["initContainerStatuses"] = [{"name": "download", **running}]
    status = status_of_pods(made, p1=downloading(4, speed=100 * 2**20))
    assert status["groups"][0]["phase"] == "Downloading"


def test_progress_is_told_in_steps_and_not_byte_by_byte() -> None:
    made = cluster()
    made.run(3, NAME)
    first = status_with(made, **loading(5, 10.0))
    made.objects["LlamaDeployment", NAME]["status"] = first
    observed = made.observe(NAME)
    ranks = tuple(
        dataclasses.replace(rank, bytes_loaded=rank.bytes_loaded + 2**20) for rank in loading(5, 10.0)["ranks"]
    )
    observed = dataclasses.replace(observed, reports={f"{NAME}-0-0": Report("Loading", ranks=ranks)})
    assert desired(observed, SETTINGS).writes == ()


def test_a_group_that_served_and_is_not_heard_any_more_recovers_and_does_not_start() -> None:
    made = cluster()
    made.converge(NAME)
    began = timestamp(made.now)
    made.now += 60
    running = [{"name": "worker", "state": {"running": {"startedAt": began}}}]
    for since, phase in ((timestamp(made.now), "Recovering"), (timestamp(made.now - 120), "Starting")):
        unready = [{"type": "Ready", "status": "False", "lastTransitionTime": since}]
        made.objects["Pod", f"{NAME}-0-0"]["status"] |= {"conditions": unready, "containerStatuses": running}
        assert status_with(made)["groups"][0]["phase"] == phase


def test_a_failed_rank_is_named_with_its_reason() -> None:
    made = cluster()
    made.converge(NAME)
    ranks = (RankReport(0, 0, "Serving", 1), RankReport(9, 1, "Failed", 1, reason="CUDA error: out of memory"))
    status = status_with(made, phase="Failed", epoch=1, ranks=ranks)
    assert status["groups"][0]["phase"] == "Failed"
    assert status["phase"] == "Degraded"
    assert status["message"] == f"{NAME}-0: rank 9: CUDA error: out of memory"


def test_a_lost_pod_is_recovery_with_the_same_group() -> None:
    made = cluster()
    made.converge(NAME)
    made.lose(made.pods()[1]["spec"]["nodeName"])
    made.tick(25)
    made.pass_over(NAME)
    status = made.status(NAME)
    assert status["groups"][0]["phase"] == "Recovering"
    assert "is lost with 1 pod of it" in status["groups"][0]["message"]
    assert made.condition(NAME, "Degraded")["reason"] == "GroupRecovering"
    assert made.condition(NAME, "Available")["status"] == "False"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
            "worker: ImagePullBackOff: Back-off",
        ),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, "worker: CrashLoopBackOff"),
        (
            {"terminated": {"exitCode": 3, "message": "config.json: no Llama"}},
            "the model cannot be run: config.json: no Llama",
        ),
    ],
    ids=["image", "crash", "model"],
)
def test_a_container_that_cannot_run_is_told(state: dict[str, Any], told: str) -> None:
    made = cluster()
    made.run(2, NAME)
    made.tick()
    made.pods()[1]["status"]["containerStatuses"] = [{"name": "worker", "state": state}]
    status = status_with(made)
    assert status["groups"][0]["phase"] == "Failed"
    assert status["groups"][0]["message"].startswith(f"pod {NAME}-0-1: ")
    assert told in status["message"]
    (degraded,) = [c for c in status["conditions"] if c["type"] == "Degraded"]
    assert (degraded["status"], degraded["reason"]) == ("True", "GroupFailed")


def test_a_successor_without_a_node_shows_the_schedulers_own_words() -> None:
    made = cluster(nodes=2)
    made.converge(NAME)
    made.lose(made.pods()[1]["spec"]["nodeName"])
    made.run(30, NAME)
    pod = made.pods()[1]
    words = "0/2 nodes are available: 1 node had untolerated taint"
    pod["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    ]
    made.pass_over(NAME)
    assert made.status(NAME)["message"] == f"{NAME}-0: pod {NAME}-0-1 finds no node: {words}"


def test_replicas_that_nobody_can_reach_are_not_available() -> None:
    made = cluster()
    made.routers_down = True
    made.converge(NAME)
    conditions = {entry["type"]: entry for entry in made.status(NAME)["conditions"]}
    assert (made.status(NAME)["ready"], made.status(NAME)["phase"]) == ("1/1", "Progressing")
    assert made.status(NAME)["message"] == "no router pod is available"
    assert (conditions["Available"]["status"], conditions["Available"]["reason"]) == ("False", "RouterUnavailable")

    made.routers_down = False
    made.converge(NAME)
    assert made.status(NAME)["phase"] == "Ready"


def test_what_the_api_server_refuses_is_told_in_its_words() -> None:
    made = cluster()
    made.converge(NAME)
    observed = dataclasses.replace(made.observe(NAME), refused={f"StatefulSet {NAME}-0": "spec.foo: Invalid value"})
    (write,) = [w for w in desired(observed, SETTINGS).writes if isinstance(w, SetStatus)]
    assert write.status["phase"] == "Degraded"
    assert write.status["message"] == f"StatefulSet {NAME}-0 is refused by the API server: spec.foo: Invalid value"


def test_tokens_per_second_are_told_to_two_digits() -> None:
    made = cluster()
    made.converge(NAME)
    assert status_with(made, phase="Serving", epoch=1, tokens_per_second=12345.6)["tokensPerSecond"] == 12000
    assert status_with(made, phase="Serving", epoch=1, tokens_per_second=7.4)["tokensPerSecond"] == 7


def test_the_model_is_looked_at_by_a_pod_where_nobody_knows_it() -> None:
    made = cluster(model={"name": "m", "source": {"persistentVolumeClaim": {"claimName": "weights", "path": "x"}}})
    made.pass_over(NAME)
    assert made.status(NAME)["phase"] == "Planning"
    pod = made.objects["Pod", f"{NAME}-inspector"]
    assert pod["spec"]["containers"][0]["command"] == ["cp", "/model/x/config.json", "/dev/termination-log"]
    assert made.groups() == []

    def ended(message: str, code: int = 0) -> None:
        pod["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"state": {"terminated": {"exitCode": code, "message": message}}}],
        }
        made.pass_over(NAME)

    ended("cp: cannot stat '/model/x/config.json': No such file or directory", 1)
    assert made.status(NAME)["phase"] == "Invalid"
    assert "No such file" in made.status(NAME)["message"]
    ended("{" + " " * 5000)
    assert "larger than 4096 bytes" in made.status(NAME)["message"]
    ended('["no object"]')
    assert "not a JSON object" in made.status(NAME)["message"]
    ended('{"architectures": ["MistralForCausalLM"]}')
    assert made.condition(NAME, "Planned")["reason"] == "ModelUnsupported"
    ended(dumps(known_config("meta-llama/Llama-3.1-70B")))
    assert made.status(NAME)["plan"]["layout"] == "TP8xPP2"
    assert made.groups() == [f"{NAME}-0"]
    made.edit(NAME, model={"source": {"persistentVolumeClaim": {"claimName": "weights", "path": "y"}}})
    made.pass_over(NAME)
    assert ("Pod", f"{NAME}-inspector") not in made.objects
    made.pass_over(NAME)
    assert made.objects["Pod", f"{NAME}-inspector"]["spec"]["containers"][0]["command"][1] == "/model/y/config.json"
    assert made.groups() == [f"{NAME}-0"], "what serves is kept until the new model is known"


def test_an_inspectors_download_speaks_for_it() -> None:
    hub = {"repo": "somebody/llama", "tokenSecretRef": {"name": "hub"}}
    made = cluster(
        model={"name": "m", "source": {"huggingFace": hub}},
        podTemplate={
            "spec": {
                "serviceAccountName": "reader",
                "volumes": [{"name": "ca", "configMap": {"name": "ca"}}, {"name": "other", "emptyDir": {}}],
                "initContainers": [
                    {
                        "name": "download",
                        "env": [{"name": "HF_ENDPOINT", "value": "https://mirror.example"}],
                        "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
                    }
                ],
            }
        },
    )
    made.pass_over(NAME)
    pod = made.objects["Pod", f"{NAME}-inspector"]
    (download,) = pod["spec"]["initContainers"]
    assert download["args"][-2:] == ["--only", "config.json"]
    assert [entry["name"] for entry in download["env"]] == ["HF_TOKEN", "HOME", "HF_ENDPOINT"]
    assert [mount["mountPath"] for mount in download["volumeMounts"]] == ["/model", "/tmp", "/ca"]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["model", "tmp", "ca"]
    assert pod["spec"]["serviceAccountName"] == "reader"
    waits = {"name": "inspector", "state": {"waiting": {"reason": "PodInitializing"}}}
    pod["status"] = {
        "phase": "Pending",
        "containerStatuses": [waits],
        "initContainerStatuses": [{"name": "download", "state": {"running": {"startedAt": timestamp(made.now)}}}],
    }
    made.pass_over(NAME)
    assert made.status(NAME)["message"] == f"pod {NAME}-inspector reads the checkpoint's config.json"
    words = "hf://somebody/llama@main: the token given is not valid (401)"
    pod["status"] = {
        "phase": "Failed",
        "containerStatuses": [waits],
        "initContainerStatuses": [{"name": "download", "state": {"terminated": {"exitCode": 3, "message": words}}}],
    }
    made.pass_over(NAME)
    assert made.status(NAME)["phase"] == "Invalid"
    assert words in made.status(NAME)["message"]


def test_an_inspector_that_failed_is_tried_again() -> None:
    made = cluster(model={"name": "m", "source": {"hostPath": {"path": "/models/x"}}})
    made.pass_over(NAME)
    uid = made.objects["Pod", f"{NAME}-inspector"]["metadata"]["uid"]
    made.objects["Pod", f"{NAME}-inspector"]["status"] = {
        "phase": "Failed",
        "containerStatuses": [{"state": {"terminated": {"exitCode": 1, "reason": "Error"}}}],
    }
    made.run(3, NAME)
    assert made.objects["Pod", f"{NAME}-inspector"]["metadata"]["uid"] == uid
    made.tick(60)
    made.run(3, NAME)
    assert made.objects["Pod", f"{NAME}-inspector"]["metadata"]["uid"] != uid


def test_every_turn_is_an_event_once() -> None:
    made = cluster()
    made.converge(NAME)
    made.lose(made.pods()[1]["spec"]["nodeName"])
    made.tick(25)
    made.run(30, NAME)
    told = [(event.type, event.reason) for event in made.events.values()]
    assert told == [
        ("Normal", "Waiting"),
        ("Normal", "Loading"),
        ("Normal", "Ready"),
        ("Normal", "GroupServing"),
        ("Warning", "Degraded"),
        ("Warning", "GroupRecovering"),
        ("Normal", "Ready"),
        ("Normal", "GroupServing"),
    ]
    assert all(isinstance(event, Emit) and event.name.startswith(f"{NAME}.") for event in made.events.values())


def test_the_selector_of_the_scale_subresource_selects_worker_pods() -> None:
    made = cluster()
    made.converge(NAME)
    wanted = dict(part.split("=") for part in made.status(NAME)["selector"].split(","))
    assert all(wanted.items() <= pod["metadata"]["labels"].items() for pod in made.pods())
    assert wanted[names.COMPONENT] == names.WORKER
