"""What the chart's tests share: helm, the variants of values, and a cluster for those that need one."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.variants import NAMESPACE
from tests.cluster import machine
from tests.cluster.cluster import Cluster, start_cluster
from tests.cluster.conftest import (  # noqa: F401 - hooks of this room too
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    unavailable,
)
from tools import manifests

Object = dict[str, Any]


class Refused(Exception):
    """helm's own words."""


class Chart:
    """charts/arriero, rendered by helm."""

    def __init__(self, helm: Path) -> None:
        self.helm = helm
        self._rendered: dict[str, list[Object]] = {}

    def render(self, values: Mapping[str, Any] | None = None, *arguments: str) -> list[Object]:
        """The objects, hooks included. Raises Refused."""
        key = json.dumps([values, arguments])
        if key not in self._rendered:
            command = [
                "template",
                "arriero",
                str(manifests.CHART),
                f"--namespace={NAMESPACE}",
                "--values=-",
                *arguments,
            ]
            text = self.run(command, values or {})
            self._rendered[key] = [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]
        return copy.deepcopy(self._rendered[key])

    def notes(self, values: Mapping[str, Any] | None = None) -> str:
        """What a person reads after the installation."""
        command = ["install", "arriero", str(manifests.CHART), f"--namespace={NAMESPACE}", "--dry-run=client"]
        return self.run([*command, "--values=-"], values or {}).partition("\nNOTES:\n")[2]

    def lint(self, values: Mapping[str, Any]) -> str:
        return self.run(["lint", "--strict", str(manifests.CHART), "--values=-"], values)

    def run(self, arguments: list[str], values: Mapping[str, Any]) -> str:
        outcome = subprocess.run(
            [str(self.helm), *arguments],
            input=yaml.safe_dump(dict(values)),
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode != 0:
            raise Refused(outcome.stderr.strip() or outcome.stdout.strip())
        return outcome.stdout


@pytest.fixture(scope="session")
def chart() -> Chart:
    """The chart; skipped where helm is missing, failed in CI."""
    helm = manifests.find_helm()
    if helm is None:
        unavailable("helm: not built yet (python tools/cluster/build.py helm)")
    return Chart(helm)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """One for the chart alone: it is installed, upgraded and removed here, and claims names that others use, too."""
    if lack := machine.why_no_control_plane():
        unavailable(lack)
    made = start_cluster(0 if machine.why_no_nodes() else 2)
    try:
        yield made
    finally:
        made.close()


def find(objects: list[Object], kind: str, name: str = "") -> Object:
    """The one object of a kind, and of a name where one is given."""
    (found,) = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


def kinds(objects: list[Object]) -> set[str]:
    return {o["kind"] for o in objects}
