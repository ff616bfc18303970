"""When a broken attempt is followed by another."""

from __future__ import annotations

import random

import pytest

from arriero_router.core.replay import Attempts, Break, ReplaySettings

TRIED = [Break.CUT, Break.FAILED]
UNTRIED = [Break.UNREACHED, Break.REFUSED]


def broke(attempts: Attempts, kind: Break, gained: bool = False, resumable: bool = True) -> bool:
    attempts.begin()
    return attempts.broke(kind, gained=gained, resumable=resumable)


@pytest.mark.parametrize("kind", TRIED)
@pytest.mark.parametrize("again", [1, 3, 7])
def test_attempts_in_vain_are_bounded(kind: Break, again: int) -> None:
    attempts = Attempts(ReplaySettings(again=again))
    assert [broke(attempts, kind) for _ in range(again + 1)] == [True] * again + [False]
    assert attempts.made == again + 1
    assert attempts.replays == again


def test_gained_tokens_start_the_count_anew() -> None:
    attempts = Attempts(ReplaySettings(again=1))
    for _ in range(10):
        assert broke(attempts, Break.CUT, gained=True)
        assert broke(attempts, Break.CUT)
    assert not broke(attempts, Break.CUT)


def test_there_are_no_more_than_so_many_attempts_at_all() -> None:
    attempts = Attempts(ReplaySettings(again=3, total=5))
    assert [broke(attempts, Break.CUT, gained=True) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("kind", list(Break))
def test_with_no_attempt_again_there_is_none(kind: Break) -> None:
    assert not broke(Attempts(ReplaySettings(again=0)), kind)


def test_a_clients_fault_is_never_sent_again() -> None:
    assert not broke(Attempts(ReplaySettings()), Break.CLIENT)
    assert not broke(Attempts(ReplaySettings()), Break.CLIENT, gained=True)


@pytest.mark.parametrize("kind", list(Break))
def test_what_cannot_be_continued_is_not(kind: Break) -> None:
    assert not broke(Attempts(ReplaySettings()), kind, gained=True, resumable=False)


@pytest.mark.parametrize("kind", UNTRIED)
def test_what_no_replica_took_does_not_count(kind: Break) -> None:
    attempts = Attempts(ReplaySettings(again=1))
    assert all(broke(attempts, kind) for _ in range(100))
    assert (attempts.made, attempts.vain, attempts.replays) == (0, 0, 0)


def test_only_faults_speak_against_a_replica() -> None:
    assert {kind for kind in Break if kind.is_fault} == {Break.UNREACHED, Break.CUT, Break.FAILED}


def test_random_histories(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        settings = ReplaySettings(again=rng.randrange(1, 5), total=rng.randrange(1, 12))
        attempts = Attempts(settings)
        vain = tried = 0
        while True:
            kind, gained = rng.choice([*TRIED, *UNTRIED]), rng.random() < 0.3
            if not broke(attempts, kind, gained):
                break
            if kind in TRIED:
                tried += 1
                vain = 0 if gained else vain + 1
            assert vain <= settings.again
            assert attempts.made == tried < settings.total
