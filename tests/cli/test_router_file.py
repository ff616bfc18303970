"""The router's configuration that `arriero up` writes, as the router reads it."""

from __future__ import annotations

import pytest

from arriero_cli.launches import load_local, local_launches
from arriero_cli.router_file import as_yaml, router_config
from arriero_router.config import Config, parse_config


@pytest.fixture
def written(deployment_file, tmp_path):
    """written(**changes) -> (the launches, the router's configuration) of a deployment with fields changed."""

    def make(access_log: str = "off", **changes: object) -> tuple[list, Config]:
        file = deployment_file(**changes)
        deployment = load_local(file)
        launches = local_launches(deployment, file, (8000, 9000), tmp_path / "run", cores=2)
        text = as_yaml(router_config(deployment, launches, 8000, 9000, access_log))
        return launches, parse_config(text, "router.yaml", str(tmp_path))

    return make


def test_every_replica_is_an_endpoint_with_its_leaders_ports(written):
    launches, config = written(spec__replicas=3)
    (model,) = config.models
    assert (model.name, model.aliases) == ("org/small", ())
    assert model.endpoints.static is not None
    assert [entry.name for entry in model.endpoints.static] == ["small-0", "small-1", "small-2"]
    for launch, entry in zip(launches, model.endpoints.static, strict=True):
        leader = launch.pods[0]
        assert entry.host == leader.host == "127.0.0.1"
        assert (entry.http_port, entry.grpc_port, entry.control_port) == (
            leader.http_port,
            leader.grpc_port,
            leader.control_port,
        )


def test_the_router_alone_is_reached_at_the_public_ports(written):
    launches, config = written(spec__replicas=2)
    listen = config.listen
    assert (listen.address, listen.http_port, listen.grpc_port) == ("127.0.0.1", 8000, 9000)
    pods = [pod for launch in launches for pod in launch.pods]
    private = [port for pod in pods for port in (pod.control_port, pod.store_port, pod.http_port, pod.grpc_port)]
    assert not {8000, 9000} & set(private)
    assert [pod.http_port for launch in launches for pod in launch.pods[1:]] == [0, 0]


@pytest.mark.parametrize("policy", ["prefix", "least-load", "power-of-two", "round-robin", "hash"])
def test_policy_and_drain_are_those_of_the_deployment(written, policy):
    _, config = written(spec__router={"policy": policy}, spec__rollout={"drainSeconds": 7})
    assert (config.models[0].policy, config.drain_seconds, config.access_log.path) == (policy, 7, "off")


def test_access_log_lies_beside_the_configuration(written, tmp_path):
    _, config = written("access.log")
    assert config.access_log.path == str(tmp_path / "access.log")


def test_ranks_of_all_replicas_share_the_cores(deployment_file, tmp_path):
    for replicas, threads in ((1, 6), (2, 3), (5, 1), (24, 1)):
        file = deployment_file(spec__replicas=replicas)
        launches = local_launches(load_local(file), file, (0, 0), tmp_path, cores=24)
        assert {launch.engine.threads for launch in launches} == {threads}


def test_on_gpus_every_rank_of_this_machine_has_a_device_of_its_own(deployment_file, tmp_path):
    file = deployment_file(spec__replicas=2, spec__accelerator__type="H100-80GB")
    launches = local_launches(load_local(file), file, (0, 0), tmp_path, cores=2)
    assert [launch.backend for launch in launches] == ["cuda", "cuda"]
    assert [pod.first_device for launch in launches for pod in launch.pods] == [0, 2, 4, 6]
    assert all(len(pod.ranks) == 2 for launch in launches for pod in launch.pods)
