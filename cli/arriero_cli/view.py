"""What is known of a running deployment, from its processes and the Worker.Status streams of its pods. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from arriero.inference.v1 import worker_pb2 as pb
from arriero_plan.launch import Launch

PHASE_WORDS = {
    pb.PHASE_UNSPECIFIED: "starting",
    pb.PHASE_STARTING: "starting",
    pb.PHASE_LOADING: "loading",
    pb.PHASE_WARMING: "warming",
    pb.PHASE_JOINING: "joining",
    pb.PHASE_SERVING: "serving",
    pb.PHASE_DRAINING: "draining",
    pb.PHASE_FAILED: "failed",
    pb.PHASE_DOWNLOADING: "downloading",
}

_STEPS = 4  # a line for each quarter of the weights where lines cannot be rewritten


@dataclass(frozen=True, slots=True)
class RankLine:
    """One rank's state, for people."""

    rank: int
    pod: int
    place: str
    phase: str
    """One of PHASE_WORDS, or "gone" while its pod's process is not there."""
    loaded: int
    total: int
    """Bytes of weights read, and to read; total is 0 where unknown."""
    detail: str

    @property
    def key(self) -> tuple[object, ...]:
        """Changes when a new line is worth printing."""
        quarter = self.loaded * _STEPS // self.total if self.phase == "loading" and self.total else 0
        return self.phase, quarter, self.detail if self.phase != "loading" else ""


@dataclass
class ProcessView:
    """One kept process."""

    pid: int = 0
    """0: not there."""
    starts: int = 0

    def started(self, pid: int) -> None:
        self.pid = pid
        self.starts += 1

    def ended(self) -> None:
        self.pid = 0


@dataclass
class PodView(ProcessView):
    """One pod's process, and what it says on its control port."""

    status: pb.StatusResponse | None = None

    def ended(self) -> None:
        super().ended()
        self.status = None


@dataclass
class GroupView:
    """Follows one group. A rank's truth comes from its own pod, the group's from the leader's."""

    launch: Launch
    pods: list[PodView] = field(init=False)
    reason: str = ""
    """The last reason a rank gave for not going on."""

    def __post_init__(self) -> None:
        self.pods = [PodView() for _ in self.launch.pods]

    def told(self, pod: int, status: pb.StatusResponse) -> None:
        """A pod answered on its control port; of a pod that ended meanwhile nothing is believed any more."""
        if self.pods[pod].pid:
            self.pods[pod].status = status
            self.reason = next((rank.reason for rank in status.ranks if rank.reason), self.reason)

    @property
    def leader(self) -> pb.StatusResponse | None:
        return self.pods[0].status

    @property
    def serving(self) -> bool:
        """Whether every rank is part of one epoch, as the leader and each rank's own pod say."""
        told = self.leader is not None and self.leader.phase == pb.PHASE_SERVING
        return told and all(line.phase == "serving" for line in self.ranks())

    @property
    def requests(self) -> int:
        """Requests running or waiting."""
        return 0 if self.leader is None else self.leader.running + self.leader.waiting

    def ranks(self) -> list[RankLine]:
        return [self._line(rank) for rank in range(self.launch.layout.world)]

    def _line(self, rank: int) -> RankLine:
        index = self.launch.pod_of(rank)
        pod = self.pods[index]
        stage, tensor = divmod(rank, self.launch.layout.tensor)
        told = next((r for r in pod.status.ranks if r.rank == rank), None) if pod.status is not None else None
        phase, detail, loaded, total = ("gone" if pod.starts and not pod.pid else "starting"), "", 0, 0
        if told is not None:
            phase, loaded, total = PHASE_WORDS.get(told.phase, "starting"), told.bytes_loaded, told.bytes_total
            detail = _detail(told)
        return RankLine(rank, index, f"stage {stage}, tensor {tensor}", phase, loaded, total, detail)


class DeploymentView:
    """Follows the replicas of a deployment and the router in front of them."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.replicas = [GroupView(launch) for launch in launches]
        self.router = ProcessView()

    def name(self, replica: int, what: str, index: int) -> str:
        """How sentences call a pod or rank; a single replica goes without saying."""
        return f"{what} {index}" if len(self.replicas) == 1 else f"replica {replica} {what} {index}"

    @property
    def serving(self) -> int:
        """Replicas that serve."""
        return sum(replica.serving for replica in self.replicas)

    @property
    def requests(self) -> int:
        """Requests running or waiting at the replicas."""
        return sum(replica.requests for replica in self.replicas)

    def lost(self, replica: int) -> str:
        """The sentence for a replica that has stopped serving."""
        count = len(self.replicas)
        if count == 1:
            return "not serving: requests wait"
        rest = f"{self.serving} of {count} serve" if self.serving else "none serves, requests wait"
        return f"replica {replica} is not serving: {rest}"

    def found(self, replica: int, seconds: float) -> str:
        """The sentence for a replica that serves again after so long."""
        count = len(self.replicas)
        if count == 1:
            return f"serving again after {seconds:.1f} s"
        return f"replica {replica} is serving again after {seconds:.1f} s: {self.serving} of {count} serve"


def _detail(told: pb.RankStatus) -> str:
    if told.phase == pb.PHASE_LOADING and told.bytes_total:
        return f"{_mib(told.bytes_loaded)} of {_mib(told.bytes_total)} MiB"
    if told.phase in (pb.PHASE_SERVING, pb.PHASE_DRAINING):
        return f"epoch {told.epoch}"
    return told.reason


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
