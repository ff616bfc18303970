"""A hundred wrong specs, as `kubectl apply` would send them: refused at once or told in the status; none in the way."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest
from tests.cluster.processes import wait_until
from tests.operator.live.process import Operator
from tests.operator.live.proxy import ApiProxy
from tests.operator.live.world import World, path_of, said
from tests.operator.test_invalid import INVALID, invalid

pytestmark = pytest.mark.cluster


def test_each_is_refused_or_told_and_none_is_in_the_way(
    world: World, proxy: ApiProxy, operators: Callable[..., Operator], space: str
) -> None:
    operator = operators()
    refused: dict[str, str] = {}
    told: dict[str, str] = {}
    for number, (change, words) in enumerate(INVALID):
        resource = invalid(change)
        resource["metadata"] = {"name": f"wrong-{number}", "namespace": space}
        try:
            # As kubectl asks: fields that the schema does not know are an error, not left out in silence.
            world.api.create(f"{path_of('llamadeployments', space)}?fieldValidation=Strict", resource)
            told[f"wrong-{number}"] = words
        except httpx.HTTPStatusError as error:
            refused[f"wrong-{number}"] = f"{error.response.status_code}: {said(error)}"
    for name, message in refused.items():
        assert message.startswith(("400", "422")), message
        number = int(name.rpartition("-")[2])
        fields = [*INVALID[number][0]]
        assert any(field in message for field in fields), f"{INVALID[number]}: {message}"
        assert len(message) > len(fields[0]) + 20, message

    def silent() -> list[str]:
        found = {o["metadata"]["name"]: o.get("status") or {} for o in world.list("llamadeployments", space)}
        return [name for name in told if found[name].get("phase") != "Invalid"]

    wait_until(lambda: not silent(), "word of every wrong spec", 30.0)
    for o in world.list("llamadeployments", space):
        words = told[o["metadata"]["name"]]
        assert words in o["status"]["message"], (words, o["status"]["message"])
    assert not [key for key in world.children(space) if key[0] != "pods"]
    assert operator.poll() is None, operator.words()
    assert operator.metric("arriero_operator_passes_total") > 0
    assert "Traceback" not in operator.words()

    began = time.monotonic()
    world.deploy(space, "right")
    world.wait_ready(space, name="right", timeout=30.0)
    print(
        f"{len(refused)} refused by the API server, {len(told)} told in the status; "
        f"a valid deployment among them is ready in {time.monotonic() - began:.1f} s"
    )
    before = len(proxy.calls)
    world.api.patch(path_of("llamadeployments", space, "wrong-0"), {"metadata": {"annotations": {"a": "b"}}}) if (
        "wrong-0" in told
    ) else None
    world.wait_quiet(proxy)
    assert not proxy.writes(space, before), "what is wrong stays as it is"
