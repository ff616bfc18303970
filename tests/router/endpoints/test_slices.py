"""What EndpointSlices mean."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.router.endpoints.api_server import entry, piece

from arriero_router.core.replica import Endpoint
from arriero_router.endpoints.slices import DEPLOYMENT_LABEL, Ports, endpoints_of


def names(*slices: dict[str, Any]) -> list[str]:
    return [endpoint.name + "!" * endpoint.terminating for endpoint in endpoints_of(slices, Ports())]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"ready": True, "serving": True, "terminating": False}, ["p"]),
        ({"ready": False, "serving": False, "terminating": False}, []),
        ({"ready": False, "serving": True, "terminating": True}, ["p!"]),
        ({"ready": False, "serving": False, "terminating": True}, []),
        ({}, ["p"]),
        ({"ready": None, "serving": None, "terminating": None}, ["p"]),
        ({"ready": False}, []),
        ({"ready": True, "serving": True, "terminating": True}, ["p!"]),  # publishNotReadyAddresses
        ({"ready": False, "terminating": True}, []),
    ],
)
def test_conditions(conditions: dict[str, bool | None], expected: list[str]) -> None:
    one = entry("p", "10.0.0.1")
    one["conditions"] = conditions
    assert names(piece("s", one)) == expected


def test_the_union_of_several_slices() -> None:
    assert names(piece("s1", entry("b", "10.0.0.2")), piece("s2"), piece("s3", entry("a", "10.0.0.1"))) == ["a", "b"]


def test_a_dual_stack_pod_is_one_endpoint() -> None:
    six = piece("s1", entry("a", "fd00::1"), entry("b", "fd00::2"))
    six["addressType"] = "IPv6"
    four = piece("s2", entry("a", "10.0.0.1"))
    assert [e.host for e in endpoints_of([six, four], Ports())] == ["10.0.0.1", "fd00::2"]
    assert [e.host for e in endpoints_of([six, four], Ports(), "IPv6")] == ["fd00::1", "fd00::2"]


def test_of_a_replaced_pod_the_new_address_is_taken() -> None:
    old = piece("s1", entry("a", "10.0.0.1", ready=False, terminating=True))
    new = piece("s2", entry("a", "10.0.0.2"))
    for slices in ([old, new], [new, old]):
        assert [(e.host, e.terminating) for e in endpoints_of(slices, Ports())] == [("10.0.0.2", False)]


def test_the_order_of_slices_does_not_matter(seed: int) -> None:
    rng = random.Random(seed)
    slices = [
        piece(
            f"s{i}", *(entry(f"p{rng.randrange(6)}", f"10.0.{i}.{j}", terminating=rng.random() < 0.3) for j in range(4))
        )
        for i in range(5)
    ]
    expected = endpoints_of(slices, Ports())
    for _ in range(20):
        rng.shuffle(slices)
        assert endpoints_of(slices, Ports()) == expected


def test_ports_by_name_and_by_number() -> None:
    slices = [piece("s", entry("p", "10.0.0.1"))]
    assert endpoints_of(slices, Ports()) == [Endpoint("p", "10.0.0.1", 8000, 9000, 9100)]
    slices[0]["ports"] = [{"name": "web", "port": 81}, {"name": "grpc", "port": 91}]
    assert endpoints_of(slices, Ports()) == []
    assert endpoints_of(slices, Ports(http="web")) == [Endpoint("p", "10.0.0.1", 81, 91, 0)]
    assert endpoints_of(slices, Ports(http="80", control="92")) == [Endpoint("p", "10.0.0.1", 80, 91, 92)]


@pytest.mark.parametrize("name", ["", None, "api"])
def test_the_only_port_is_for_http(name: str | None) -> None:
    one = piece("s", entry("p", "10.0.0.1"))
    one["ports"] = [{"name": name, "port": 7000}]
    assert endpoints_of([one], Ports()) == [Endpoint("p", "10.0.0.1", 7000)]


def test_of_our_groups_the_leaders_are_taken_and_named_by_group() -> None:
    pods = [entry(f"llama-0-{i}", f"10.0.0.{i}") for i in range(3)] + [entry("llama-1-0", "10.0.1.0")]
    router = entry("llama-router-5d8f-x2k4q", "10.0.2.0")
    assert names(piece("s", *pods, router, **{DEPLOYMENT_LABEL: "llama"})) == ["llama-0", "llama-1"]
    assert len(names(piece("s", *pods, router))) == 5, "a Service of others is taken as it is"


def test_an_endpoint_that_is_no_pod_is_named_by_its_address() -> None:
    one = entry("p", "fd00::1")
    del one["targetRef"]
    assert names(piece("s", one)) == ["[fd00::1]:8000"]


def test_what_the_api_may_leave_out() -> None:
    assert endpoints_of([{"endpoints": None, "ports": None}, {}, piece("s", entry("p"))], Ports()) == []
