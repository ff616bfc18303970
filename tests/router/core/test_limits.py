"""Token buckets, and what they add up to for one key."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero_router.core.limits import Allowance, Denied, KeyLimit, RateLimit

amounts = st.floats(0.1, 500)
steps = st.lists(st.tuples(st.floats(0, 30), amounts), max_size=60)


def test_a_full_bucket_gives_its_burst_at_once_and_then_its_rate():
    limit = RateLimit(rate=2.0, burst=10.0, now=0.0)
    assert limit.take(10, 0.0) == 0.0
    assert limit.take(1, 0.0) == 0.5
    assert limit.take(1, 0.25) == 0.25
    assert limit.take(1, 0.5) == 0.0
    assert limit.level(0.5) == 0.0


def test_what_is_not_taken_is_not_counted():
    limit = RateLimit(1.0, 10.0, 0.0)
    limit.take(8, 0.0)
    for _ in range(5):
        assert limit.take(5, 0.0) == 3.0
    assert limit.level(0.0) == 2.0


def test_a_bucket_never_holds_more_than_its_burst():
    limit = RateLimit(1.0, 10.0, 0.0)
    assert limit.level(10_000.0) == 10.0


def test_more_than_a_burst_is_let_through_when_the_bucket_is_full_and_owed():
    limit = RateLimit(1.0, 10.0, 0.0)
    assert limit.take(25, 0.0) == 0.0
    assert limit.level(0.0) == -15.0
    assert limit.take(1, 0.0) == 16.0
    assert limit.take(25, 0.0) == 25.0


def test_a_correction_may_put_the_bucket_into_debt_or_give_back():
    limit = RateLimit(1.0, 10.0, 0.0)
    limit.take(5, 0.0)
    limit.settle(5, 30, 0.0)
    assert limit.level(0.0) == -20.0
    limit.settle(30, 0, 0.0)
    assert limit.level(0.0) == 10.0
    limit.settle(100, 0, 0.0)
    assert limit.level(0.0) == 10.0


def test_a_clock_that_goes_back_gives_nothing_twice():
    limit = RateLimit(1.0, 10.0, 0.0)
    limit.take(10, 0.0)
    assert limit.level(5.0) == 5.0
    assert limit.level(1.0) == 5.0
    assert limit.level(6.0) == 6.0


def test_other_numbers_keep_what_is_used():
    limit = RateLimit(1.0, 10.0, 0.0)
    limit.take(4, 0.0)
    limit.resize(5.0, 100.0, 0.0)
    assert limit.level(0.0) == 96.0
    limit.resize(1.0, 2.0, 0.0)
    assert limit.level(0.0) == -2.0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 1), (math.inf, 1), (1, math.nan)])
def test_a_rate_that_nothing_can_keep_is_refused(rate, burst):
    with pytest.raises(ValueError, match="both must be above 0 and finite"):
        RateLimit(rate, burst, 0.0)


@given(rate=st.floats(0.01, 100), burst=st.floats(1, 1000), steps=steps)
def test_never_more_than_rate_times_time_and_a_burst(rate, burst, steps):
    """Over every stretch of time, no matter who asks when, but for what one request has beyond a burst."""
    limit = RateLimit(rate, burst, 0.0)
    now, taken = 0.0, []
    for gap, amount in steps:
        now += gap
        if limit.take(amount, now) == 0.0:
            taken.append((now, amount))
    for first in range(len(taken)):
        total = 0.0
        for last in range(first, len(taken)):
            total += taken[last][1]
            over = max(0.0, taken[last][1] - burst)
            assert total - over <= (burst + rate * (taken[last][0] - taken[first][0])) * (1 + 1e-6)


@given(rate=st.floats(0.001, 1000), burst=st.floats(0.1, 1000), steps=steps)
def test_who_waits_as_long_as_told_is_let_in(rate, burst, steps):
    limit = RateLimit(rate, burst, 0.0)
    now = 0.0
    for gap, amount in steps:
        now += gap
        wait = limit.take(amount, now)
        if wait > 0:
            now += wait
            assert limit.take(amount, now) == 0.0


# -- a key


def test_a_key_without_limits_is_never_denied():
    limit = KeyLimit(Allowance(), 4, 0.0)
    assert all(limit.admit(10**9, 0.0) is None for _ in range(1000))
    assert limit.running == 1000


def test_requests_at_once():
    limit = KeyLimit(Allowance(max_concurrent=2), 1, 0.0)
    assert limit.admit(1, 0.0) is None
    assert limit.admit(1, 0.0) is None
    assert limit.admit(1, 0.0) == Denied("concurrent", 1.0)
    limit.release()
    assert limit.admit(1, 0.0) is None


def test_requests_per_minute():
    limit = KeyLimit(Allowance(requests_per_minute=60), 1, 0.0)
    assert all(limit.admit(10**6, 0.0) is None for _ in range(60))
    assert limit.admit(1, 0.0) == Denied("requests", 1.0)
    assert limit.admit(1, 1.0) is None


def test_tokens_per_minute_and_what_was_really_used():
    limit = KeyLimit(Allowance(tokens_per_minute=600), 1, 0.0)
    assert limit.admit(600, 0.0) is None
    assert limit.admit(100, 0.0) == Denied("tokens", 10.0)
    limit.settle(600, 300, 0.0)
    assert limit.admit(100, 0.0) is None


def test_a_request_that_is_denied_counts_against_no_limit():
    limit = KeyLimit(Allowance(tokens_per_minute=60, requests_per_minute=2), 1, 0.0)
    assert limit.admit(60, 0.0) is None
    for _ in range(10):
        assert limit.admit(30, 0.0).limit == "tokens"
    assert limit.running == 1
    assert limit.admit(30, 30.0) is None


def test_the_longest_wait_is_told():
    limit = KeyLimit(Allowance(tokens_per_minute=60, requests_per_minute=1), 1, 0.0)
    limit.admit(10, 0.0)
    assert limit.admit(30, 0.0) == Denied("requests", 60.0)


def test_the_burst_can_be_less_than_a_minutes():
    limit = KeyLimit(Allowance(requests_per_minute=60, burst_seconds=5), 1, 0.0)
    assert [limit.admit(1, 0.0) is None for _ in range(6)] == [True] * 5 + [False]


@given(st.integers(1, 16), st.integers(1, 200))
def test_processes_together_give_what_the_key_may_have(processes, per_minute):
    """To clients that come again as soon as they are told: a burst of a minute's, then the rate."""
    admitted = 0
    for _ in range(processes):
        limit = KeyLimit(Allowance(requests_per_minute=per_minute), processes, 0.0)
        now = 0.0
        while now <= 300.0:
            if (denied := limit.admit(1, now)) is None:
                limit.release()
                admitted += 1
            else:
                now += denied.wait
    assert abs(admitted - 6 * per_minute) <= 2 * processes


@given(st.integers(1, 16), st.integers(1, 64))
def test_requests_at_once_are_shared_among_processes_and_none_is_shut_out(processes, most):
    limits = [KeyLimit(Allowance(max_concurrent=most), processes, 0.0) for _ in range(processes)]
    admitted = 0
    for limit in limits:
        while limit.admit(1, 0.0) is None:
            admitted += 1
        assert limit.running >= 1
    assert most <= admitted < most + processes


def test_another_allowance_keeps_what_is_used():
    limit = KeyLimit(Allowance(tokens_per_minute=600, max_concurrent=1), 1, 0.0)
    limit.admit(600, 0.0)
    limit.resize(Allowance(tokens_per_minute=1200, requests_per_minute=1, max_concurrent=2), 0.0)
    assert limit.admit(600, 0.0) is None
    assert limit.admit(1, 0.0) == Denied("concurrent", 1.0)
    limit.resize(Allowance(), 0.0)
    assert limit.admit(10**9, 0.0) is None
    assert limit.running == 3


def test_releasing_what_was_never_admitted_is_a_mistake():
    with pytest.raises(AssertionError, match="was admitted"):
        KeyLimit(Allowance(), 1, 0.0).release()
