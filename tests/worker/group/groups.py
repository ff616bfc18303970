"""Launch files of small groups, for tests."""

import socket

from arriero_plan.launch import EngineSettings, Launch, Layout, Pod, Stage


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_of(
    *,
    tensor: int,
    pipeline: int,
    ranks_per_pod: int,
    control_ports: list[int] | None = None,
    store_port: int | None = None,
) -> Launch:
    world = tensor * pipeline
    count = -(-world // ranks_per_pod)
    control_ports = control_ports or [free_port() for _ in range(count)]
    store_port = store_port or free_port()
    pods = [
        Pod(
            host="127.0.0.1",
            ranks=tuple(range(i * ranks_per_pod, (i + 1) * ranks_per_pod)),
            control_port=control_ports[i],
            store_port=store_port,
        )
        for i in range(count)
    ]
    return Launch(
        deployment="d",
        group="g",
        model_path="/nowhere",
        served_names=("m",),
        layout=Layout(
            tensor=tensor,
            pipeline=pipeline,
            stages=tuple(Stage(first_layer=i, end_layer=i + 1) for i in range(pipeline)),
        ),
        pods=tuple(pods),
        engine=EngineSettings(dtype="float32", max_context=16, kv_blocks=1),
        run_directory="/nowhere",
    )
