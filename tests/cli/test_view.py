"""What is shown of a group, from what its pods told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from arriero.inference.v1 import worker_pb2 as pb
from arriero_cli.board import Board
from arriero_cli.view import DeploymentView, GroupView
from arriero_plan.launch import EngineSettings, Launch, Layout, Pod, Stage


@pytest.fixture
def launch() -> Launch:
    return Launch(
        deployment="small",
        group="small-0",
        model_path="checkpoint",
        served_names=("small",),
        layout=Layout(
            tensor=1, pipeline=2, stages=(Stage(first_layer=0, end_layer=1), Stage(first_layer=1, end_layer=2))
        ),
        pods=(Pod(host="127.0.0.1", ranks=(0,)), Pod(host="127.0.0.1", ranks=(1,))),
        engine=EngineSettings(dtype="float32", max_context=64, kv_blocks=8),
        run_directory="run",
    )


def told(*phases: int, reason: str = "", running: int = 0, loaded: int = 0) -> pb.StatusResponse:
    """What a pod says of the ranks from 0 on, the group's phase the least of theirs."""
    ranks = [
        pb.RankStatus(rank=rank, phase=phase, reason=reason, epoch=1, bytes_loaded=loaded, bytes_total=100 << 20)
        for rank, phase in enumerate(phases)
        if phase
    ]
    return pb.StatusResponse(phase=min(rank.phase for rank in ranks), ranks=ranks, running=running)


def phases(view: GroupView) -> list[str]:
    return [line.phase for line in view.ranks()]


SERVING, LOADING, FAILED = pb.PHASE_SERVING, pb.PHASE_LOADING, pb.PHASE_FAILED


def test_a_rank_is_believed_through_its_own_pod(launch):
    view = GroupView(launch)
    assert phases(view) == ["starting", "starting"]
    view.pods[0].started(10)
    view.pods[1].started(11)
    view.told(0, told(SERVING, SERVING))
    assert phases(view) == ["serving", "starting"]
    assert not view.serving
    view.told(1, told(0, SERVING))
    assert view.serving


def test_nothing_is_believed_of_a_pod_that_ended(launch):
    view = GroupView(launch)
    for pod in (0, 1):
        view.pods[pod].started(10 + pod)
    view.told(0, told(SERVING, SERVING, running=3))
    view.told(1, told(0, SERVING))
    assert view.requests == 3
    view.pods[1].ended()
    view.told(1, told(0, SERVING))  # was on its way
    assert phases(view) == ["serving", "gone"]
    assert not view.serving
    view.pods[0].ended()
    assert view.requests == 0


def test_the_reason_of_a_failure_outlives_the_pod(launch):
    view = GroupView(launch)
    view.pods[1].started(11)
    view.told(1, told(0, FAILED, reason="model.safetensors is truncated"))
    view.pods[1].ended()
    assert view.reason == "model.safetensors is truncated"


def lines(launch: Launch, *statuses: pb.StatusResponse) -> list[str]:
    """What a board without a terminal prints for pod 0's successive statuses, behind the first two lines."""
    view, out = DeploymentView([launch]), io.StringIO()
    board = Board(view, Console(file=out, width=40))
    board.open()
    board.row("pod 0", view.replicas[0].pods[0]).started(10)
    board.refresh()
    for status in statuses:
        view.replicas[0].told(0, status)
        board.refresh()
    return out.getvalue().splitlines()[2:]


def test_lines_are_printed_at_changes_and_at_each_quarter_of_the_weights(launch):
    loading = [told(LOADING, loaded=mib << 20) for mib in range(101)]
    printed = lines(launch, *loading, told(SERVING), told(SERVING))
    assert printed == [
        "rank 0 (stage 0, tensor 0): loading, 0.0 of 100.0 MiB",
        "rank 0 (stage 0, tensor 0): loading, 25.0 of 100.0 MiB",
        "rank 0 (stage 0, tensor 0): loading, 50.0 of 100.0 MiB",
        "rank 0 (stage 0, tensor 0): loading, 75.0 of 100.0 MiB",
        "rank 0 (stage 0, tensor 0): loading, 100.0 of 100.0 MiB",
        "rank 0 (stage 0, tensor 0): serving, epoch 1",
    ]


def test_what_pods_write_is_no_markup_and_information_stays_in_the_log(launch):
    out = io.StringIO()
    view = DeploymentView([launch])
    row = Board(view, Console(file=out, width=40)).row("pod 1", view.replicas[0].pods[1])
    row.said("12:00:00 I arriero.rank all is well")
    row.said("2026-01-01T00:00:00.123 D arriero.front all is well")
    row.said("12:00:00 W arriero.rank [bold]slow[/bold] " + "x" * 60)
    row.said("Traceback (most recent call last):")
    assert out.getvalue().splitlines() == [
        "pod 1 | 12:00:00 W arriero.rank [bold]slow[/bold] " + "x" * 60,
        "pod 1 | Traceback (most recent call last):",
    ]


def test_ranks_of_several_replicas_are_told_apart(launch):
    view, out = DeploymentView([launch, launch]), io.StringIO()
    board = Board(view, Console(file=out, width=40))
    board.refresh()
    view.replicas[1].pods[0].started(10)
    view.replicas[1].told(0, told(LOADING))
    board.refresh()
    assert out.getvalue().splitlines() == [
        "replica 0 rank 0 (stage 0, tensor 0): starting",
        "replica 0 rank 1 (stage 1, tensor 0): starting",
        "replica 1 rank 0 (stage 0, tensor 0): starting",
        "replica 1 rank 1 (stage 1, tensor 0): starting",
        "replica 1 rank 0 (stage 0, tensor 0): loading, 0.0 of 100.0 MiB",
    ]


def serve(view: DeploymentView, replica: int, running: int = 0) -> None:
    for pod in (0, 1):
        view.replicas[replica].pods[pod].started(10 + pod)
        view.replicas[replica].told(pod, told(SERVING, SERVING, running=running))


def test_a_lost_replica_is_one_of_several(launch):
    view = DeploymentView([launch, launch, launch])
    for replica in range(3):
        serve(view, replica, running=2)
    assert (view.serving, view.requests) == (3, 6)
    view.replicas[1].pods[1].ended()
    assert (view.serving, view.requests) == (2, 6)
    assert view.lost(1) == "replica 1 is not serving: 2 of 3 serve"
    view.replicas[0].pods[0].ended()
    view.replicas[2].pods[0].ended()
    assert view.lost(2) == "replica 2 is not serving: none serves, requests wait"
    serve(view, 2)
    assert view.found(2, 1.26) == "replica 2 is serving again after 1.3 s: 1 of 3 serve"


def test_a_single_replica_goes_without_a_number(launch):
    view = DeploymentView([launch])
    assert view.name(0, "pod", 1) == "pod 1"
    assert view.lost(0) == "not serving: requests wait"
    assert view.found(0, 0.5) == "serving again after 0.5 s"
