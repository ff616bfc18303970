"""From a resource to an accepted deployment with its plan, or to what is wrong with it, in sentences. Pure."""

from __future__ import annotations

from dataclasses import dataclass

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


def accept(observed: Observed, settings: Settings) -> Accepted:
    """Validate, find out the model's shape, plan."""
    try:
        deployment = parse_deployment(observed.resource, observed.name)
    except SpecError as error:
        return Accepted(problems=error.problems)
    problems = overlay_problems(deployment.spec.pod_template)
    if problem := source_problem(deployment.spec.model.source):
        problems.append(problem)
    if problems:
        return Accepted(problems=tuple(problems))
    inspection = inspect(deployment, observed.config, observed.pods)
    if inspection.problem:
        return Accepted(deployment, unplanned=inspection.problem, reason="ModelUnreadable")
    if inspection.config is None:
        return Accepted(deployment, waiting=inspection.waiting, reason="ReadingModel")
    try:
        plan = make_plan(deployment, ModelShape.from_config(inspection.config, inspection.origin))
        check_servable(plan)
    except ModelError as error:
        return Accepted(deployment, unplanned=str(error), reason="ModelUnsupported")
    except PlanError as error:
        return Accepted(deployment, unplanned=str(error), reason="CannotFit")
    metadata = observed.resource["metadata"]
    created = str(metadata.get("creationTimestamp") or "")
    scale = scale_of(deployment.spec, observed)
    wanted = Wanted(deployment, plan, observed.namespace, observed.uid, created, settings, scale)
    return Accepted(deployment, wanted=wanted)
