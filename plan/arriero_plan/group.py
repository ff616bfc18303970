"""The launch file of one group, from a deployment, its plan and the addresses of the group's pods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero_plan.launch import EngineSettings, Launch, Pod
from arriero_plan.plan import Plan, PlanError
from arriero_plan.resource import LlamaDeployment


@dataclass(frozen=True, slots=True)
class PodAddress:
    """Where one pod is dialled; the ports' defaults are those of a pod with its own address."""

    host: str
    control_port: int = 9100
    store_port: int = 29500
    http_port: int = 8000
    grpc_port: int = 9000
    first_device: int = 0


def launch_for(
    deployment: LlamaDeployment,
    plan: Plan,
    group: str,
    addresses: Sequence[PodAddress],
    *,
    model_path: str,
    run_directory: str,
    threads: int = 1,
    bind_address: str = "0.0.0.0",
) -> Launch:
    """The launch of one group.

    addresses: one for each of the plan's pods_per_group, in pod order, the leader's first.
    model_path: the directory of the checkpoint as the pods see it.
    threads: CPU threads of a rank where spec.engine.threadsPerRank is omitted.
    bind_address: where the pods' servers listen.
    Raises PlanError for a plan whose number formats the engine does not run.
    """
    check_servable(plan)
    if len(addresses) != plan.pods_per_group:
        raise ValueError(f"{len(addresses)} addresses for the {plan.pods_per_group} pods of {group}")
    engine = deployment.spec.engine
    per_pod = plan.ranks_per_pod
    return Launch(
        deployment=deployment.metadata.name,
        group=group,
        backend=plan.backend,
        model_path=model_path,
        served_names=(deployment.spec.model.name,),
        layout=plan.layout,
        pods=tuple(
            Pod(
                host=address.host,
                ranks=tuple(range(pod * per_pod, (pod + 1) * per_pod)),
                control_port=address.control_port,
                store_port=address.store_port,
                http_port=address.http_port,
                grpc_port=address.grpc_port,
                first_device=address.first_device,
            )
            for pod, address in enumerate(addresses)
        ),
        engine=EngineSettings(
            dtype=plan.dtype,
            weights=plan.weights,
            kv_dtype=plan.kv_dtype,
            max_context=plan.max_context,
            block_size=plan.block_size,
            kv_blocks=plan.kv_blocks,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            max_batch_tokens=engine.max_batch_tokens,
            max_chunk_tokens=engine.max_chunk_tokens,
            prefix_cache=engine.prefix_cache,
            queue_timeout_seconds=engine.queue_timeout_seconds,
            run_timeout_seconds=engine.run_timeout_seconds,
            threads=engine.threads_per_rank or threads,
        ),
        drain_seconds=deployment.spec.rollout.drain_seconds,
        bind_address=bind_address,
        run_directory=run_directory,
    )


def check_servable(plan: Plan) -> None:
    """Refuse a plan that is sound on paper but that the engine cannot run. Raises PlanError."""
    if plan.backend == "cpu" and plan.weights != plan.dtype:
        if plan.checkpoint_quantization is not None:
            raise PlanError(
                f"{plan.deployment}: the checkpoint is quantised ({plan.checkpoint_quantization}); "
                "on a cpu set spec.model.weights to bfloat16 or float32, which it is converted to"
            )
        raise PlanError(
            f"{plan.deployment}: spec.model.weights is {plan.weights}; on a cpu the engine runs float32 and bfloat16"
        )
    formats = {plan.dtype} if plan.backend == "cpu" else {plan.dtype, "fp8"}
    if plan.kv_dtype not in formats:
        raise PlanError(
            f"{plan.deployment}: spec.model.kvCache.dtype is {plan.kv_dtype}; with this accelerator the engine keeps "
            f"keys and values in {' or '.join(sorted(formats))}"
        )
