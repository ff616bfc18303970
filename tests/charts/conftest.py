"""What the chart's tests share: helm, the variants of values, and a cluster for those that need one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.charts.variants import NAMESPACE

# The cluster's own fixtures, for tests that are marked so.
from tests.cluster.conftest import (  # noqa: F401
    cluster,
    own_cluster,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
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
    """The chart; skipped where helm is missing, failed in CI, where nobody reads skips."""
    helm = manifests.find_helm()
    if helm is None:
        reason = "helm: not built yet (python tools/cluster/build.py helm)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must render the chart: {reason}", pytrace=False)
        pytest.skip(reason)
    return Chart(helm)


def find(objects: list[Object], kind: str, name: str = "") -> Object:
    """The one object of a kind, and of a name where one is given."""
    (found,) = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


def kinds(objects: list[Object]) -> set[str]:
    return {o["kind"] for o in objects}
