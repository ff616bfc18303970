"""The examples for GPUs are plans that fit, in the layout that their comments promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from arriero_plan.known import known_config
from arriero_plan.model import ModelShape
from arriero_plan.plan import make_plan
from arriero_plan.resource import LlamaDeployment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAYOUTS = {
    "llama-3.1-8b.yaml": (1, 1, 1),
    "llama-3.1-70b.yaml": (8, 1, 1),
    "llama-3.1-70b-two-nodes.yaml": (8, 2, 2),
}
"""Tensor, pipeline, pods of a group."""


def test_every_example_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("llama-*.yaml")} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_example_fits(name: str) -> None:
    deployment = LlamaDeployment.model_validate(yaml.safe_load((EXAMPLES / name).read_text()))
    config = known_config(deployment.spec.model.name)
    assert config is not None
    plan = make_plan(deployment, ModelShape.from_config(config, deployment.spec.model.name))
    assert (plan.layout.tensor, plan.layout.pipeline, plan.pods_per_group) == LAYOUTS[name]
