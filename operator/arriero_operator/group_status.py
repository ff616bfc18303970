"""How one group is, for people: its phase, what is wrong with it, its ranks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from arriero_operator import names
from arriero_operator.groups import Group
from arriero_operator.observe import Object, Pod, RankReport, condition, seconds_of
from arriero_operator.resource_status import DownloadStatus, GroupPhase, RankStatus

_STEP = 20  # parts in which the progress of loading is told: each is a write
_ETAS = (
    *(5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1200, 1800, 2700, 3600),
    *(5400, 7200, 10800, 14400, 21600, 43200, 86400),
)
_WAITS = (
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
_BYTES = ("Downloading", "Loading")  # phases that count bytes
_STOPPED = 143  # exit code of a download that was told to stop
_UNUSABLE = 3  # arriero_faces.process.EXIT_UNUSABLE: the worker can never run as it was launched


def phase_of(group: Group, problem: str) -> GroupPhase:
    """The engine's own phase where it speaks; else what the pods tell."""
    if group.deleting:
        return "Leaving"
    if group.draining_since is not None:
        return "Draining"
    report = group.report
    if report is not None and report.phase == "Failed":
        return "Failed"
    if group.ready:
        return "Serving"
    if any(pod.gated for pod in group.pods) or (group.gated and not group.pods):
        return "Waiting"
    if report is not None and report.phase == "Serving" and group.complete and not group.lost:
        return "Joining"  # its pod's readiness, and with it its endpoint, follows in a moment
    was_whole = not group.gated
    if _served(group) or (was_whole and (group.lost or not group.placed)):
        return "Recovering"
    if problem and not group.lost:
        return "Failed"
    if group.downloads or any(_downloads(pod) for pod in group.pods):
        return "Downloading"
    match report.phase if report is not None else "":
        case "Loading":
            return "Loading"
        case "Warming":
            return "Warming"
        case "Joining" | "Serving":  # of one that serves, the pods' readiness follows in a moment
            return "Joining"
    return "Starting"


def _served(group: Group) -> bool:
    """Whether it has served in this life: its first epoch alone does not tell, it is formed before that."""
    leader = group.leader
    again = group.report is not None and group.report.epoch > 1
    return again or (leader is not None and (leader.ready or _was_ready(leader)))


def _was_ready(pod: Pod) -> bool:
    """Whether the pod has ceased to be ready since its containers started."""
    running = [
        (entry.get("state") or {}).get("running")
        for entry in (pod.raw.get("status") or {}).get("containerStatuses") or []
    ]
    begun = [seconds_of(state.get("startedAt")) for state in running if state]
    return not pod.ready and any(at is not None and pod.ready_changed > at for at in begun)


def problem_of(group: Group) -> str:
    """What keeps the group from serving, if it is more than time; empty where nothing is wrong."""
    if group.lost:
        nodes = sorted({pod.node for pod in group.pods if pod.name in group.lost})
        return f"node {' and '.join(nodes)} is lost with {_pods(len(group.lost))} of it"
    report = group.report
    if report is not None:
        for rank in report.ranks:
            if rank.phase == "Failed":
                return f"rank {rank.rank}: {rank.reason or 'failed without a reason'}"
        if report.phase == "Failed":
            return report.reason or "failed without a reason"
    return next((said for pod in group.pods for said in _pod_problems(pod)), "")


def _pod_problems(pod: Pod) -> Iterator[str]:
    status = pod.raw.get("status") or {}
    for entry in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (entry.get("state") or {}).get("waiting") or {}
        ended = _ended(entry)
        words = str(ended.get("message") or "").strip()
        if entry.get("name") == names.DOWNLOAD and ended.get("exitCode", 0) not in (0, _STOPPED):
            yield f"pod {pod.name}: the model cannot be fetched: {words or ended.get('reason') or 'see its log'}"
        elif ended.get("exitCode") == _UNUSABLE:
            yield f"pod {pod.name}: the model cannot be run: {words or 'see its log'}"
        elif waiting.get("reason") in _WAITS:
            said = words or waiting.get("message") or ""
            yield f"pod {pod.name}: {entry.get('name')}: {waiting['reason']}{f': {said}' if said else ''}"
    if not pod.gated and not pod.node:
        scheduled = condition(pod.raw, "PodScheduled")
        if scheduled.get("reason") == "Unschedulable":
            yield f"pod {pod.name} finds no node: {scheduled.get('message') or 'no more is said'}"


def _ended(entry: Mapping[str, Any]) -> Object:
    """How the container ended last, if it does not run."""
    state = entry.get("state") or {}
    if state.get("running"):
        return {}
    return state.get("terminated") or (entry.get("lastState") or {}).get("terminated") or {}


def _downloads(pod: Pod) -> bool:
    """Whether it is fetching the model, as far as the kubelet can tell."""
    statuses = (pod.raw.get("status") or {}).get("initContainerStatuses") or []
    return any(entry.get("name") == names.DOWNLOAD and (entry.get("state") or {}).get("running") for entry in statuses)


def download_of(group: Group) -> DownloadStatus | None:
    """How far the pods are that fetch the model; None where none says so."""
    if not group.downloads:
        return None
    etas = [eta_of(rank) for rank in group.downloads]
    known = [eta for eta in etas if eta is not None]
    return DownloadStatus(
        pods=len(group.downloads),
        bytes_fetched=sum(_stepped(rank) for rank in group.downloads),
        bytes_total=sum(rank.bytes_total for rank in group.downloads),
        eta_seconds=max(known) if len(known) == len(etas) else None,
    )


def _download_words(download: DownloadStatus) -> str:
    size, unit = _unit(download.bytes_total)
    done, total = download.bytes_fetched / size, download.bytes_total / size
    where = f" in {download.pods} pods" if download.pods > 1 else ""
    left = f", {_time(download.eta_seconds)} left" if download.eta_seconds is not None else ""
    return f"downloading {done:.1f} of {total:.1f} {unit}{where}{left}"


def _unit(most: int) -> tuple[int, str]:
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def _time(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def progress_of(group: Group) -> str:
    """As "34% of 131.2 GiB, about 45 s left" while weights are being read, and before that as "downloading 3.1 of 16.1
    GiB, 2 min left"; else empty.
    """
    if (download := download_of(group)) is not None:
        return _download_words(download)
    ranks = group.report.ranks if group.report else ()
    total, loaded = sum(rank.bytes_total for rank in ranks), sum(_stepped(rank) for rank in ranks)
    if not total or not any(rank.phase == "Loading" for rank in ranks):
        return ""
    etas = [eta for rank in ranks if (eta := eta_of(rank)) is not None]
    left = f", about {max(etas)} s left" if etas else ""
    size, unit = _unit(total)
    return f"{100 * loaded // total}% of {total / size:.1f} {unit}{left}"


def ranks_of(group: Group) -> list[RankStatus]:
    """What each rank says, quantised such that progress is told in few writes."""
    nodes = {pod.index: pod for pod in group.pods}
    if group.report is None:
        return []
    return [
        RankStatus(
            rank=rank.rank,
            pod=f"{group.name}-{rank.pod}",
            node=(nodes[rank.pod].node or None) if rank.pod in nodes else None,
            phase=rank.phase,  # type: ignore[arg-type]
            epoch=rank.epoch,
            bytes_loaded=_stepped(rank) if rank.phase == "Loading" else None,
            bytes_total=rank.bytes_total if rank.phase == "Loading" else None,
            eta_seconds=eta_of(rank),
            reason=rank.reason[:4096] or None,
        )
        for rank in group.report.ranks
        if rank.phase != "Downloading"
    ]


def eta_of(rank: RankReport) -> int | None:
    """Seconds until its bytes are there, at the speed of late or else so far, rounded up generously; None where
    unknown.
    """
    if rank.phase not in _BYTES or not rank.bytes_total:
        return None
    speed = rank.bytes_per_second or (rank.bytes_loaded / rank.phase_seconds if rank.phase_seconds else 0)
    if not speed:
        return None
    seconds = (rank.bytes_total - rank.bytes_loaded) / speed
    return next((eta for eta in _ETAS if seconds <= eta), _ETAS[-1])


def _stepped(rank: RankReport) -> int:
    step = max(1, rank.bytes_total // _STEP)
    return min(rank.bytes_loaded // step * step, rank.bytes_total) if rank.phase in _BYTES else rank.bytes_total


def _pods(count: int) -> str:
    return f"{count} pod{'' if count == 1 else 's'}"
