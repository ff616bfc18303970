"""What the replicas of a deployment are started with on this machine: a launch for each, private ports, the cores."""

from __future__ import annotations

from pathlib import Path

from arriero_cli.errors import EXIT_USAGE, CommandError
from arriero_cli.plan import load_deployment, load_shape, model_directory
from arriero_cli.ports import LOOPBACK, free_ports, is_free
from arriero_plan.group import PodAddress, launch_for
from arriero_plan.launch import Launch
from arriero_plan.model import ModelError
from arriero_plan.plan import PlanError, make_plan
from arriero_plan.spec import LlamaDeployment, SpecError


def load_local(path: Path) -> LlamaDeployment:
    """The deployment of a file, if one machine can run it. Raises CommandError."""
    try:
        deployment = load_deployment(path)
    except SpecError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    spec = deployment.spec
    problem = ""
    if spec.replicas == 0:
        problem = "spec.replicas is 0: there is nothing to start"
    elif spec.model.source.host_path is None:
        problem = "spec.model.source: on one machine the model must be a directory (hostPath)"
    if problem:
        raise CommandError(f"{path}: {problem}", EXIT_USAGE)
    return deployment


def public_ports(http: int, grpc: int) -> tuple[int, int]:
    """The router's ports; 0 becomes a free one. Raises CommandError for one that is taken."""
    if http and http == grpc:
        raise CommandError(f"--http-port and --grpc-port are both {http}", EXIT_USAGE)
    for port, option in ((http, "--http-port"), (grpc, "--grpc-port")):
        if port and not is_free(port):
            raise CommandError(f"port {port} is in use: choose another one with {option}, or 0 for any free one")
    spare = _free_ports(2, (http, grpc))
    return http or spare[0], grpc or spare[1]


def local_launches(
    deployment: LlamaDeployment, file: Path, taken: tuple[int, int], directory: Path, cores: int
) -> list[Launch]:
    """One launch for each replica: every pod on the loopback address, on ports and, if on GPUs, on devices of its own.

    taken: ports that are not free any more
    cores: of this machine, shared out among all ranks
    directory: each replica gets a directory in it, which does not have to be there yet
    Raises CommandError.
    """
    base = file.parent
    replicas = deployment.spec.replicas
    try:
        plan = make_plan(deployment, load_shape(deployment, base))
        model = model_directory(deployment, base)
        assert model is not None
        ports = iter(_free_ports(replicas * (2 * plan.pods_per_group + 2), taken))
        return [
            launch_for(
                deployment,
                plan,
                f"{deployment.metadata.name}-{replica}",
                [
                    PodAddress(
                        LOOPBACK,
                        next(ports),
                        next(ports),
                        *((next(ports), next(ports)) if not pod else (0, 0)),
                        first_device=replica * plan.world + pod * plan.ranks_per_pod,
                    )
                    for pod in range(plan.pods_per_group)
                ],
                model_path=str(model.resolve()),
                run_directory=str(directory / f"replica-{replica}"),
                threads=max(1, cores // (plan.world * replicas)),
                bind_address=LOOPBACK,
            )
            for replica in range(replicas)
        ]
    except ModelError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    except PlanError as error:
        raise CommandError(f"{file}: {error}") from error


def _free_ports(count: int, taken: tuple[int, int]) -> list[int]:
    try:
        return free_ports(count, taken)
    except OSError as error:
        raise CommandError(str(error)) from error
