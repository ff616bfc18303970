"""How fast a counter grows: over the last ten seconds, no further back, and not at all while nothing comes."""

from __future__ import annotations

import pytest

from arriero_worker.engine.rate import WINDOW, Rate


def test_the_first_word_says_nothing() -> None:
    rate = Rate()
    assert rate.per_second == 0.0
    rate.tell(5.0, 100)
    assert rate.per_second == 0.0
    rate.tell(5.0, 200)
    assert rate.per_second == 0.0, "no time has passed"


def test_a_young_counter_counts_since_its_first_word() -> None:
    rate = Rate()
    rate.tell(1.0, 0)
    rate.tell(3.0, 50)
    assert rate.per_second == 25.0


def test_what_lies_further_back_is_forgotten() -> None:
    rate = Rate()
    now, total = 0.0, 0
    while now < 60.0:
        now += 0.25
        total += 100 if now <= 30.0 else 5
        rate.tell(now, total)
    assert rate.per_second == pytest.approx(20.0)
    while now < 60.0 + WINDOW + 0.25:
        now += 0.25
        rate.tell(now, total)
    assert rate.per_second == 0.0


def test_few_words_are_enough() -> None:
    rate = Rate()
    rate.tell(0.0, 0)
    rate.tell(100.0, 1000)
    assert rate.per_second == 10.0
    rate.tell(105.0, 1000)
    assert rate.per_second == pytest.approx(1000 / 105)
    rate.tell(110.0, 1000)
    assert rate.per_second == 0.0
