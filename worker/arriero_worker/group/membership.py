"""Who is in the group, and under which epoch: a state machine without sockets, clocks or threads.

A rank says hello, loads, says ready. When all are ready the next epoch is formed, higher than any that a member has
seen. When one is lost, or says that the epoch is of no use any more, the epoch ends for all: they keep their weights
and say ready again, and only the lost one has anything to load.

Every method returns the commands to send; the caller carries them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Refused(Exception):
    """The message is of an epoch that is over, or of another launch: its stream is ended with ABORTED."""


@dataclass(frozen=True, slots=True)
class Form:
    rank: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Abort:
    rank: int
    epoch: int
    reason: str
    expected: bool = False
    """It ended because a rank left that had been released."""


@dataclass(frozen=True, slots=True)
class Release:
    rank: int


Command = Form | Abort | Release


@dataclass(slots=True)
class _Member:
    heard: float
    ready: bool = False
    formed: bool = False
    weights: str = ""
    leave_by: float | None = None
    released: bool = False


@dataclass(slots=True)
class Membership:
    world: int
    launch_digest: str
    silence_seconds: float
    """A member not heard for so long is lost."""
    epoch: int = 0
    """The highest epoch seen: formed here, or told by a member."""
    active: bool = False
    """Epoch `epoch` is formed or being formed."""
    recoveries: int = 0
    """Epochs that ended by a loss."""
    _members: dict[int, _Member] = field(default_factory=dict)

    def hello(self, rank: int, epoch: int, launch_digest: str, now: float) -> list[Command]:
        """A rank dialled. One that was here already is replaced: its old stream has not been seen to break yet."""
        if not 0 <= rank < self.world:
            raise Refused(f"rank {rank} does not exist in a group of {self.world}")
        if launch_digest != self.launch_digest:
            raise Refused(
                f"rank {rank} was started with launch file {launch_digest}, the group runs {self.launch_digest}"
            )
        commands = self.lost(rank, f"rank {rank} started again") if rank in self._members else []
        self.epoch = max(self.epoch, epoch)
        self._members[rank] = _Member(heard=now)
        return commands

    def ready(self, rank: int, weights_digest: str, now: float) -> list[Command]:
        member = self._member(rank)
        member.heard = now
        other = next((m.weights for m in self._members.values() if m.weights and m is not member), weights_digest)
        if other != weights_digest:
            raise Refused(
                f"rank {rank} loaded model {weights_digest}, the others {other}: the checkpoint changed under the group"
            )
        commands = self._end(f"rank {rank} left the epoch")
        member.ready, member.weights = True, weights_digest
        return commands + self._form()

    def formed(self, rank: int, epoch: int, now: float) -> list[Command]:
        self._check(rank, epoch)
        self._member(rank).heard = now
        if epoch == self.epoch and self.active:
            self._member(rank).formed = True
        return []

    def broken(self, rank: int, epoch: int, reason: str, now: float) -> list[Command]:
        """A member cannot go on in `epoch`. About an epoch that just ended this is no news."""
        self._check(rank, epoch)
        self._member(rank).heard = now
        return self._end(f"rank {rank}: {reason}") if self.active and epoch == self.epoch else []

    def heard(self, rank: int, now: float) -> None:
        if rank in self._members:
            self._members[rank].heard = now

    def lost(self, rank: int, reason: str) -> list[Command]:
        """The rank's stream broke."""
        member = self._members.pop(rank, None)
        if member is None:
            return []
        return self._end(f"rank {rank} left", expected=True) if member.released else self._end(reason)

    def leave(self, rank: int, grace_seconds: float, now: float) -> list[Command]:
        self._member(rank).leave_by = now + grace_seconds
        return []

    def tick(self, now: float, idle: bool) -> list[Command]:
        """Find the silent, and let those go who asked to leave once no request runs (`idle`) or their grace is over."""
        commands: list[Command] = []
        for rank, member in list(self._members.items()):
            if now - member.heard > self.silence_seconds:
                commands += self.lost(rank, f"rank {rank} was silent for {self.silence_seconds:g} s")
            elif member.leave_by is not None and not member.released and (idle or now >= member.leave_by):
                member.released = True
                commands.append(Release(rank))
        return commands

    @property
    def leaving(self) -> bool:
        return any(member.leave_by is not None for member in self._members.values())

    @property
    def present(self) -> set[int]:
        return set(self._members)

    @property
    def serving(self) -> bool:
        return self.active and len(self._members) == self.world and all(m.formed for m in self._members.values())

    def _member(self, rank: int) -> _Member:
        if rank not in self._members:
            raise Refused(f"rank {rank} is no member: it must say hello first")
        return self._members[rank]

    def _check(self, rank: int, epoch: int) -> None:
        """Word of the epoch before the present one crosses its Abort on the way; anything older, or never formed, is
        refused.
        """
        if not self.epoch - 1 <= epoch <= self.epoch:
            raise Refused(f"rank {rank} speaks of epoch {epoch}, the group is at {self.epoch}")

    def _form(self) -> list[Command]:
        if self.active or len(self._members) < self.world or not all(m.ready for m in self._members.values()):
            return []
        self.epoch += 1
        self.active = True
        for member in self._members.values():
            member.ready = member.formed = False
        return [Form(rank, self.epoch) for rank in sorted(self._members)]

    def _end(self, reason: str, *, expected: bool = False) -> list[Command]:
        if not self.active:
            return []
        self.active = False
        self.recoveries += 1
        for member in self._members.values():
            member.ready = member.formed = False
        return [Abort(rank, self.epoch, reason, expected) for rank in sorted(self._members)]
