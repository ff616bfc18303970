"""Membership: when epochs form and end, who is told what. No sockets, no clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero_worker.group.membership import Abort, Form, Membership, Refused, Release

DIGEST = "launch"


def group(world: int) -> Membership:
    return Membership(world, DIGEST, silence_seconds=5)


def joined(world: int) -> Membership:
    members = group(world)
    for rank in range(world):
        members.hello(rank, 0, DIGEST, now=0)
    return members


def formed(world: int) -> Membership:
    members = joined(world)
    for rank in range(world):
        members.ready(rank, "weights", now=0)
    for rank in range(world):
        members.formed(rank, 1, now=0)
    return members


def test_the_epoch_forms_when_the_last_rank_is_ready() -> None:
    members = joined(3)
    assert members.ready(2, "w", 0) == []
    assert members.ready(0, "w", 0) == []
    assert members.ready(1, "w", 0) == [Form(0, 1), Form(1, 1), Form(2, 1)]
    assert not members.serving
    for rank in range(3):
        members.formed(rank, 1, 0)
    assert members.serving


def test_a_lost_rank_ends_the_epoch_for_the_survivors_and_its_successor_forms_the_next() -> None:
    members = formed(3)
    assert members.lost(2, "gone") == [Abort(0, 1, "gone"), Abort(1, 1, "gone")]
    assert not members.serving
    assert members.ready(0, "weights", 1) == []
    assert members.ready(1, "weights", 1) == []
    members.hello(2, 0, DIGEST, 2)
    assert members.ready(2, "weights", 3) == [Form(0, 2), Form(1, 2), Form(2, 2)]
    assert members.recoveries == 1


def test_the_next_epoch_is_above_any_that_a_member_has_seen() -> None:
    members = group(2)
    members.hello(0, 0, DIGEST, 0)
    members.hello(1, 41, DIGEST, 0)
    members.ready(0, "w", 0)
    assert members.ready(1, "w", 0) == [Form(0, 42), Form(1, 42)]


def test_a_rank_that_starts_again_before_its_loss_was_seen_replaces_itself() -> None:
    members = formed(2)
    assert members.hello(1, 0, DIGEST, 1) == [Abort(0, 1, "rank 1 started again")]
    assert members.present == {0, 1}


def test_silence_is_a_loss() -> None:
    members = formed(2)
    members.heard(0, 10)
    assert members.tick(10, idle=False) == [Abort(0, 1, "rank 1 was silent for 5 s")]


def test_a_broken_epoch_ends_for_all_and_late_word_of_it_is_no_news() -> None:
    members = formed(2)
    assert [type(c) for c in members.broken(1, 1, "a step failed", 0)] == [Abort, Abort]
    assert members.broken(0, 1, "me too", 0) == []
    members.ready(0, "weights", 0)
    assert members.ready(1, "weights", 0) == [Form(0, 2), Form(1, 2)]
    assert members.broken(0, 1, "late", 0) == []
    assert members.epoch == 2


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_word_of_an_epoch_long_over_or_never_formed_is_refused(epoch: int) -> None:
    members = formed(1)
    for turn in (2, 3):
        members.broken(0, turn - 1, "again", 0)
        members.ready(0, "weights", 0)
    assert members.epoch == 3
    with pytest.raises(Refused, match=f"epoch {epoch}"):
        members.formed(0, epoch, 0)


def test_another_launch_file_is_refused() -> None:
    with pytest.raises(Refused, match="launch file"):
        group(1).hello(0, 0, "other", 0)


def test_a_changed_checkpoint_is_refused() -> None:
    members = joined(2)
    members.ready(0, "old", 0)
    with pytest.raises(Refused, match="checkpoint changed"):
        members.ready(1, "new", 0)


def test_who_asks_to_leave_goes_when_nothing_runs_or_its_grace_is_over() -> None:
    members = formed(2)
    members.leave(1, grace_seconds=3, now=0)
    members.leave(0, grace_seconds=4, now=0)
    assert members.leaving
    assert members.tick(1, idle=False) == []
    assert members.tick(3, idle=False) == [Release(1)]
    assert members.tick(3, idle=True) == [Release(0)]
    assert members.tick(4, idle=True) == []
    members.lost(1, "left")
    members.lost(0, "left")
    assert not members.leaving


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["hello", "ready", "lost", "broken"]), st.integers(0, 2)), max_size=60))
def test_every_form_goes_to_all_ranks_under_a_new_epoch_and_every_end_to_all_survivors(
    events: list[tuple[str, int]],
) -> None:
    members = group(3)
    last_epoch = 0
    for kind, rank in events:
        before = set(members.present)
        if kind == "hello":
            commands = members.hello(rank, 0, DIGEST, 0)
        elif kind == "lost":
            commands = members.lost(rank, "lost")
        elif rank not in before:
            continue
        elif kind == "ready":
            commands = members.ready(rank, "w", 0)
        elif members.epoch == 0:
            continue
        else:
            commands = members.broken(rank, members.epoch, "broken", 0)
        forms = [c for c in commands if isinstance(c, Form)]
        aborts = [c for c in commands if isinstance(c, Abort)]
        if forms:
            assert {c.rank for c in forms} == {0, 1, 2}
            assert {c.epoch for c in forms} == {members.epoch}
            assert members.epoch > last_epoch
            last_epoch = members.epoch
        if aborts:
            assert {c.rank for c in aborts} == (before - {rank} if kind in ("lost", "hello") else before)
    assert members.active is False or members.present == {0, 1, 2}
