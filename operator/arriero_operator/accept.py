"""From a resource to an accepted deployment with its plan, or to what is wrong with it, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

from arriero_operator.autoscale import scale_of
from arriero_operator.inspector import inspect
from arriero_operator.model_volume import source_problem
from arriero_operator.observe import Observed
from arriero_operator.overlay import overlay_problems
from arriero_operator.settings import Settings
from arriero_operator.wanted import Wanted
from arriero_plan.group import check_servable
from arriero_plan.model import ModelError, ModelShape
from arriero_plan.plan import Plan, PlanError, make_plan
from arriero_plan.spec import LlamaDeployment, SpecError, parse_deployment


@dataclass(frozen=True, slots=True)
class Accepted:
    """How far a resource got."""

    deployment: LlamaDeployment | None = None
    """The spec, if it is valid."""
    problems: tuple[str, ...] = ()
    """What is wrong with the spec, and what to change."""
    waiting: str = ""
    """What the plan waits for."""
    unplanned: str = ""
    """Why there can be no plan, and what to change."""
    reason: str = ""
    """One word for why it is not planned."""
    wanted: Wanted | None = None

    @property
    def must_inspect(self) -> bool:
        """The checkpoint's shape is not known, and somebody must look."""
        return bool(self.waiting)

    @property
    def plan(self) -> Plan | None:
        return self.wanted.plan if self.wanted else None


_REMEMBERED = 4096
"""Resources of which it is known how far they get: most passes are over one whose spec has not changed."""
_OF_THE_MOMENT = ("resourceVersion", "generation", "managedFields")


def accept(observed: Observed, settings: Settings) -> Accepted:
    """Validate, find out the model's shape, plan."""
    text = _text(observed.resource)
    deployment, problems = _read(text, observed.name)
    if deployment is None:
        return Accepted(problems=problems)
    inspection = inspect(deployment, observed.config, observed.pods)
    if inspection.problem:
        return Accepted(deployment, unplanned=inspection.problem, reason="ModelUnreadable")
    if inspection.config is None:
        return Accepted(deployment, waiting=inspection.waiting, reason="ReadingModel")
    planned = _plan(text, observed.name, msgspec.json.encode(inspection.config), inspection.origin, settings)
    if planned.plan is None:
        return Accepted(deployment, unplanned=planned.problem, reason=planned.reason)
    created = str(observed.resource["metadata"].get("creationTimestamp") or "")
    scale = scale_of(deployment.spec, observed)
    wanted = Wanted(deployment, planned.plan, observed.namespace, observed.uid, created, settings, scale, planned.known)
    return Accepted(deployment, wanted=wanted)


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: Plan | None = None
    problem: str = ""
    reason: str = ""
    known: dict[Any, Any] = field(default_factory=dict)


def _text(resource: Mapping[str, Any]) -> bytes:
    """All of the resource that a person has a say in."""
    metadata = {key: value for key, value in resource["metadata"].items() if key not in _OF_THE_MOMENT}
    return msgspec.json.encode({**resource, "metadata": metadata, "status": None})


@lru_cache(_REMEMBERED)
def _read(text: bytes, name: str) -> tuple[LlamaDeployment | None, tuple[str, ...]]:
    """The resource, or what is wrong with it."""
    try:
        deployment = parse_deployment(msgspec.json.decode(text), name)
    except SpecError as error:
        return None, error.problems
    problems = overlay_problems(deployment.spec.pod_template)
    if problem := source_problem(deployment.spec.model.source):
        problems.append(problem)
    return (None, tuple(problems)) if problems else (deployment, ())


@lru_cache(_REMEMBERED)
def _plan(text: bytes, name: str, config: bytes, origin: str, settings: Settings) -> _Planned:
    """settings: part of what is known of the objects that are made from the plan."""
    deployment, _ = _read(text, name)
    assert deployment is not None, "only valid resources are planned"
    try:
        plan = make_plan(deployment, ModelShape.from_config(msgspec.json.decode(config), origin))
        check_servable(plan)
    except ModelError as error:
        return _Planned(problem=str(error), reason="ModelUnsupported")
    except PlanError as error:
        return _Planned(problem=str(error), reason="CannotFit")
    return _Planned(plan)
