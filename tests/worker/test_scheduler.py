"""What the scheduler promises, one sentence a test. Random traces of everything together: test_scheduler_traces.py."""

from __future__ import annotations

import sys
from array import array

import pytest
from tests.worker.scheduler_model import VOCABULARY, Harness, expected_output

from arriero_worker.engine.messages import EngineRequest, SamplingParams
from arriero_worker.engine.step import StepPlan, StepResult


def slots(plan: StepPlan | None) -> list[int]:
    """The slots a step decodes."""
    assert plan is not None
    return array("i", plan.decodes).tolist()


def chunks(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(slot, start, length) of a step's chunks."""
    assert plan is not None
    return [(chunk.slot, chunk.start, chunk.length) for chunk in plan.chunks]


def admitted(plan: StepPlan | None) -> list[int]:
    """The ids of the requests a step admits (their seeds)."""
    assert plan is not None
    return [admit.sampling.seed for admit in plan.admits]


def request(id_: int = 0, **fields: object) -> EngineRequest:
    values: dict[str, object] = {"prompt": [1, 2, 3], "sampling": SamplingParams(max_tokens=4), **fields}
    return EngineRequest(id=id_, **values)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens that no other seed's prompt begins with."""
    return [(seed >> (4 * i)) % VOCABULARY if i < 4 else (i * 7 + seed) % VOCABULARY for i in range(length)]


def never_stopping(harness: Harness, *, length: int = 4, max_tokens: int = 40, **fields: object) -> int:
    return harness.submit(prompt(length, harness._ids + 1), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "code", "message"),
        [
            ({"prompt": []}, "invalid", "the prompt is empty"),
            ({"prompt": [1, 11]}, "invalid", "prompt has token 11; this model's tokens are 0 to 10"),
            ({"prompt": [-1]}, "invalid", "prompt has token -1; this model's tokens are 0 to 10"),
            ({"output": [99]}, "invalid", "output has token 99; this model's tokens are 0 to 10"),
            ({"sampling": SamplingParams(max_tokens=0)}, "invalid", "max_tokens must be at least 1, not 0"),
            (
                {"sampling": SamplingParams(max_tokens=1, stop_token_ids=(3, 12))},
                "invalid",
                "stop_token_ids has token 12; this model's tokens are 0 to 10",
            ),
            (
                {"sampling": SamplingParams(max_tokens=1, logit_bias={50: 1.0})},
                "invalid",
                "logit_bias has token 50; this model's tokens are 0 to 10",
            ),
            (
                {"prompt": [1] * 64},
                "too_long",
                "the prompt has 64 tokens; with one output token that is over the context of 64",
            ),
        ],
    )
    def test_each_names_what_is_wrong(self, fields: dict[str, object], code: str, message: str) -> None:
        refusal = Harness().scheduler.submit(request(7, **fields))
        assert refusal is not None
        assert (refusal.id, refusal.code, refusal.message) == (7, code, message)

    def test_a_prompt_that_the_kv_can_never_hold_is_refused_with_the_arithmetic(self) -> None:
        scheduler = Harness(kv_blocks=5, block_size=4).scheduler
        refusal = scheduler.submit(request(prompt=[1] * 21))
        assert refusal is not None
        assert refusal.code == "too_long"
        assert refusal.message == (
            "the prompt has 21 tokens and needs 6 KV blocks of 4; this replica has 5 (20 tokens)"
        )
        assert scheduler.submit(request(prompt=[1] * 20)) is None

    def test_the_longest_prompt_gets_its_one_token(self) -> None:
        harness = Harness(max_context=16)
        id_ = harness.submit(prompt(15))
        harness.finish()
        assert len(harness.received[id_]) == 1
        assert harness.ended[id_] == "length"

    def test_an_id_in_use(self) -> None:
        scheduler = Harness().scheduler
        assert scheduler.submit(request(3)) is None
        refusal = scheduler.submit(request(3))
        assert refusal is not None
        assert (refusal.code, refusal.message) == ("invalid", "request id 3 is in use")

    def test_a_full_queue(self) -> None:
        scheduler = Harness(max_waiting=2).scheduler
        assert scheduler.submit(request(0)) is None
        assert scheduler.submit(request(1)) is None
        refusal = scheduler.submit(request(2))
        assert refusal is not None
        assert (refusal.code, refusal.retry_after) == ("queue_full", 1.0)  # nothing is known of the pace yet

    def test_when_to_try_again_follows_the_pace_of_starts(self) -> None:
        harness = Harness(max_waiting=20, max_running=1, max_batch_tokens=4, prefix_cache=False)
        for _ in range(3):  # one starts every 10 seconds
            never_stopping(harness, max_tokens=1)
        while harness.scheduler.has_work:
            harness.step()
            harness.wait(10)
        for _ in range(20):
            never_stopping(harness)
        refusal = harness.scheduler.submit(request(99))
        assert refusal is not None
        # Three starts, the first 30 s ago: 15 s each, so 75 s for a quarter of 20; but no more than 60.
        assert refusal.retry_after == 60.0

    def test_a_draining_scheduler_takes_nothing_and_finishes_what_it_has(self) -> None:
        harness = Harness(max_running=1)
        ids = [never_stopping(harness) for _ in range(2)]
        harness.step()
        harness.scheduler.drain()
        refusal = harness.scheduler.submit(request(9))
        assert refusal is not None
        assert refusal.code == "draining"
        harness.finish()
        assert [harness.ended[id_] for id_ in ids] == ["length", "length"]


class TestEnds:
    def test_a_stop_token_is_the_last_of_the_output(self) -> None:
        harness = Harness()
        whole, _reason = expected_output(request(prompt=prompt(5), sampling=SamplingParams(max_tokens=20)), 64)
        stop = whole[3]
        id_ = harness.submit(prompt(5), max_tokens=20, stops=(stop,))
        harness.finish()
        assert harness.received[id_] == whole[: whole.index(stop) + 1]
        finish = next(finish for outputs in harness.outputs for finish in outputs.finished)
        assert (finish.reason, finish.stop_token) == ("stop", stop)

    def test_another_requests_stop_token_stops_nothing(self) -> None:
        harness = Harness()
        id_ = harness.submit(prompt(5), max_tokens=30)
        harness.submit([1], stops=tuple(range(VOCABULARY)))
        harness.finish()
        assert len(harness.received[id_]) == 30

    @pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 9])
    @pytest.mark.parametrize("pipeline", [1, 2, 3])
    def test_exactly_max_tokens(self, max_tokens: int, pipeline: int) -> None:
        harness = Harness(pipeline=pipeline)
        id_ = harness.submit(prompt(7), max_tokens=max_tokens)
        harness.finish()
        assert (len(harness.received[id_]), harness.ended[id_]) == (max_tokens, "length")

    def test_max_tokens_is_cut_to_the_context(self) -> None:
        harness = Harness(max_context=20)
        id_ = harness.submit(prompt(7), max_tokens=1000)
        harness.finish()
        assert (len(harness.received[id_]), harness.ended[id_]) == (13, "length")

    def test_a_sequence_alone_may_fill_all_kv(self) -> None:
        harness = Harness(kv_blocks=4, block_size=4)
        id_ = harness.submit(prompt(7), max_tokens=1000)
        harness.finish()
        assert len(harness.received[id_]) == 10  # the 17th token needs no KV: it is never fed
        assert harness.scheduler.stats.preemptions == 0

    def test_a_resumed_output_counts(self) -> None:
        harness = Harness()
        whole, _reason = expected_output(request(prompt=prompt(5), sampling=SamplingParams(max_tokens=9)), 64)
        id_ = harness.submit(prompt(5), max_tokens=9, output=whole[:4])
        harness.finish()
        assert harness.received[id_] == whole[4:]

    @pytest.mark.parametrize(("output", "reason"), [([4, 5, 6], "length"), ([4, 9], "stop")])
    def test_an_output_that_was_complete_ends_without_a_step(self, output: list[int], reason: str) -> None:
        harness = Harness()
        id_ = harness.submit(prompt(5), max_tokens=3, stops=(9,), output=output)
        assert harness.schedule() is None
        harness.take_events()
        assert harness.ended[id_] == reason
        assert harness.scheduler.idle

    def test_what_a_later_step_still_samples_for_an_ended_sequence_is_dropped(self) -> None:
        harness = Harness()
        id_ = harness.submit(prompt(4), max_tokens=20, stops=tuple(range(VOCABULARY)))
        harness.schedule()
        later = harness.schedule()
        assert len(slots(later)) == 1
        assert harness.commit().ids == [id_]
        assert harness.scheduler.stats.kv_blocks_used == 0
        assert harness.commit().ids == []
        harness.finish()

    def test_abort_while_waiting_running_and_in_flight(self) -> None:
        harness = Harness(max_running=2)
        running, in_flight, waiting = (never_stopping(harness) for _ in range(3))
        for _ in range(4):
            harness.step()
        harness.abort(running, waiting)
        harness.schedule()
        harness.abort(in_flight, 12345)
        harness.finish()
        assert set(harness.ended.values()) == {"abort"}

    def test_a_queue_time_out_is_a_refusal(self) -> None:
        harness = Harness(max_running=1)
        first = never_stopping(harness, queue_timeout=5.0)
        second = never_stopping(harness, queue_timeout=5.0)
        harness.step()
        assert harness.scheduler.next_deadline == 1005.0
        harness.wait(5.0)
        harness.take_events()
        assert harness.ended == {second: "refused: timeout"}
        refusal = harness.outputs[-1].refused[0]
        assert refusal.message == "not started within its queue_timeout of 5 s"
        harness.finish()
        assert harness.ended[first] == "length"

    def test_a_run_time_out_ends_a_running_sequence_and_refuses_a_waiting_one(self) -> None:
        harness = Harness(max_running=1)
        first = never_stopping(harness, run_timeout=5.0)
        second = never_stopping(harness, run_timeout=5.0)
        harness.step()
        harness.wait(4.9)
        harness.step()
        assert not harness.ended
        harness.wait(0.2)
        harness.step()
        assert harness.ended == {first: "timeout", second: "refused: timeout"}
        harness.finish()

    def test_an_id_that_is_used_again_has_not_its_predecessors_deadline(self) -> None:
        harness = Harness(max_running=1)
        never_stopping(harness)
        harness.step()
        scheduler = harness.scheduler
        scheduler.submit(request(7, queue_timeout=5.0))
        scheduler.abort([7])
        scheduler.submit(request(7, queue_timeout=50.0))
        scheduler.take_events()
        harness.wait(6.0)
        assert scheduler.take_events() is None
        assert scheduler.stats.waiting == 1

    def test_commit_wants_the_oldest_step_and_a_token_for_each_of_its_rows(self) -> None:
        harness = Harness()
        with pytest.raises(ValueError, match="the result of step 0 was committed, but none is in flight"):
            harness.scheduler.commit(StepResult(0, []))
        never_stopping(harness)
        harness.schedule()
        harness.schedule()
        with pytest.raises(ValueError, match="the result of step 1 was committed, but step 0 is next"):
            harness.scheduler.commit(StepResult(1, [1]))
        with pytest.raises(ValueError, match="step 0 sampled 1 sequences, its result has 2 tokens"):
            harness.scheduler.commit(StepResult(0, [1, 2]))
        harness.finish()


class TestSteps:
    def test_one_budget_serves_decodes_first_then_chunks_in_order(self) -> None:
        harness = Harness(max_batch_tokens=10, prefix_cache=False)
        never_stopping(harness, length=4)
        assert chunks(harness.schedule()) == [(0, 0, 4)]
        never_stopping(harness, length=12)
        never_stopping(harness, length=5)
        plan = harness.schedule()
        assert (slots(plan), chunks(plan)) == ([0], [(1, 0, 9)])
        harness.commit()
        plan = harness.schedule()
        assert (slots(plan), chunks(plan)) == ([0], [(1, 9, 3), (2, 0, 5)])
        harness.finish()

    def test_max_chunk_tokens_leaves_budget_for_others(self) -> None:
        harness = Harness(max_batch_tokens=10, max_chunk_tokens=4, prefix_cache=False)
        for _ in range(3):
            never_stopping(harness, length=6)
        assert chunks(harness.schedule()) == [(0, 0, 4), (1, 0, 4), (2, 0, 2)]
        harness.finish()

    def test_only_the_last_chunk_samples(self) -> None:
        harness = Harness(max_chunk_tokens=3)
        never_stopping(harness, length=7)
        flags = []
        while (plan := harness.schedule()) is not None and plan.chunks:
            flags += [chunk.sample for chunk in plan.chunks]
            harness.commit()
        assert flags == [False, False, True]
        harness.finish()

    def test_chunks_of_one_prompt_fill_the_pipeline(self) -> None:
        harness = Harness(pipeline=3, max_batch_tokens=4)
        never_stopping(harness, length=16)
        plans = [harness.schedule() for _ in range(4)]
        assert [chunks(plan) for plan in plans] == [[(0, start, 4)] for start in (0, 4, 8, 12)]
        assert harness.schedule() is None
        harness.finish()

    @pytest.mark.parametrize("pipeline", [1, 2, 3])
    def test_a_sequence_alone_is_fed_as_soon_as_its_token_is_back(self, pipeline: int) -> None:
        harness = Harness(pipeline=pipeline)
        never_stopping(harness)
        for _ in range(20):
            harness.step()
        assert [plan.step for plan in harness.plans] == [pipeline * i for i in range(len(harness.plans))]
        assert len(harness.in_flight) == 1
        harness.finish()

    @pytest.mark.parametrize("pipeline", [1, 2, 3])
    def test_no_more_than_one_step_beyond_the_pipeline_is_in_flight(self, pipeline: int) -> None:
        harness = Harness(pipeline=pipeline)
        for _ in range(4):
            never_stopping(harness)
        for _ in range(2 * pipeline):
            harness.step()
        for _ in range(5):
            while harness.schedule() is not None:
                pass
            assert len(harness.in_flight) == pipeline + 1
            harness.commit()
        harness.finish()

    @pytest.mark.parametrize("pipeline", [2, 3, 4])
    @pytest.mark.parametrize("count", [1, 3, 7, 13])
    def test_decodes_are_spread_evenly_over_the_lanes_and_stay_so(self, pipeline: int, count: int) -> None:
        harness = Harness(pipeline=pipeline, max_running=16, max_batch_tokens=64, kv_blocks=300)
        for _ in range(count):
            never_stopping(harness, max_tokens=60)

        def sizes() -> list[int]:
            """Rows of the next `pipeline` steps, those left out included."""
            start = harness.scheduler._next_step
            while harness.scheduler._next_step < start + pipeline:
                harness.step()
            rows = {plan.step: len(slots(plan)) for plan in harness.plans}
            return [rows.get(step, 0) for step in range(start, start + pipeline)]

        def settle() -> None:
            for _ in range(4 * pipeline):
                harness.step()

        settle()
        for _ in range(3):
            assert sum(sizes()) == count
            assert max(sizes()) - min(sizes()) <= 1
        gone = list(harness.scheduler._lanes.at(0).ids)  # one lane is left empty
        harness.abort(*gone)
        settle()
        if count > len(gone):
            assert sum(sizes()) == count - len(gone)
            assert max(sizes()) - min(sizes()) <= 1
        harness.finish()

    def test_nothing_to_do_is_no_step(self) -> None:
        harness = Harness()
        assert harness.schedule() is None
        assert harness.scheduler.take_events() is None
        assert harness.scheduler.idle


class TestPriority:
    def test_lower_goes_first_and_equals_go_in_order_of_arrival(self) -> None:
        harness = Harness(max_running=1, prefix_cache=False)
        low, first, second = (never_stopping(harness, priority=p, max_tokens=1) for p in (1, 0, 0))
        order = []
        while harness.scheduler.has_work:
            plan = harness.schedule()
            order += admitted(plan) if plan else []
            if harness.in_flight:
                harness.commit()
        assert order == [first, second, low]

    def test_a_better_one_preempts_for_a_slot_an_equal_one_waits(self) -> None:
        harness = Harness(max_running=2)
        first, second = (never_stopping(harness, priority=1) for _ in range(2))
        for _ in range(3):
            harness.step()
        equal = never_stopping(harness, priority=1)
        harness.step()
        assert harness.scheduler.stats.preemptions == 0
        better = never_stopping(harness, priority=0)
        plan = harness.schedule()
        assert admitted(plan) == [better]
        assert [s.id for s in harness.scheduler._running] == [better, first]
        assert [s.id for s in harness.scheduler._waiting] == [second, equal]
        harness.finish()

    def test_a_better_one_preempts_nobody_where_there_is_room(self) -> None:
        harness = Harness(max_running=3)
        worse = never_stopping(harness, priority=1)
        harness.step()
        better = never_stopping(harness, priority=0)
        harness.step()
        assert [s.id for s in harness.scheduler._running] == [better, worse]
        assert harness.scheduler.stats.preemptions == 0
        harness.finish()

    def test_a_better_one_preempts_for_blocks_only_if_that_can_be_enough(self) -> None:
        harness = Harness(kv_blocks=12, max_context=48, prefix_cache=False, max_running=2)
        keeper = never_stopping(harness, length=16, priority=0, max_tokens=30)
        loser = never_stopping(harness, length=12, priority=5)
        for _ in range(3):
            harness.step()
        never_stopping(harness, length=44, priority=1)  # cannot fit beside the keeper
        harness.step()
        assert harness.scheduler.stats.preemptions == 0
        harness.abort(2)
        fitting = never_stopping(harness, length=20, priority=1)
        assert admitted(harness.schedule()) == [fitting]
        assert [s.id for s in harness.scheduler._running] == [keeper, fitting]
        assert [s.id for s in harness.scheduler._waiting] == [loser]
        harness.finish()

    def test_a_better_prompt_is_computed_before_a_worse_one_that_has_begun(self) -> None:
        harness = Harness(max_batch_tokens=8)
        never_stopping(harness, length=30, priority=1)
        harness.schedule()
        never_stopping(harness, length=6, priority=0)
        assert chunks(harness.schedule()) == [(1, 0, 6), (0, 8, 2)]
        harness.finish()


class TestPreemption:
    def test_the_last_come_makes_room_and_comes_back_before_later_ones(self) -> None:
        harness = Harness(kv_blocks=8, max_running=3, max_context=32, prefix_cache=False)
        first, second = (never_stopping(harness, length=8, max_tokens=20) for _ in range(2))
        while not harness.scheduler.stats.preemptions:
            harness.step()
        third = never_stopping(harness, length=8)
        assert [s.id for s in harness.scheduler._running] == [first]
        assert [s.id for s in harness.scheduler._waiting] == [second, third]
        before = list(harness.received[second])
        harness.finish()
        assert len(before) > 1
        assert harness.received[second][: len(before)] == before

    def test_one_that_is_preempted_needs_no_block_any_more(self) -> None:
        """Three need a block at once, none is left: the last come alone gives way, its two serve the others."""
        harness = Harness(kv_blocks=6, block_size=4, max_running=3, max_context=20, prefix_cache=False)
        for _ in range(3):
            never_stopping(harness, length=4, max_tokens=16)
        while not harness.scheduler.stats.preemptions:
            harness.step()
        assert harness.scheduler.stats.preemptions == 1
        assert len(harness.scheduler._running) == 2
        harness.finish()

    def test_a_new_one_waits_until_the_running_ones_keep_room_for_their_next_block(self) -> None:
        harness = Harness(kv_blocks=4, max_running=3, max_context=17, prefix_cache=False)
        never_stopping(harness, length=8, max_tokens=2)
        second = never_stopping(harness, length=8, max_tokens=2)
        assert admitted(harness.schedule()) == [0]  # two blocks are free, but one of them is for the first
        harness.finish()
        assert harness.ended[second] == "length"
        assert harness.scheduler.stats.preemptions == 0

    def test_everybody_ends_however_little_room_there_is(self) -> None:
        harness = Harness(kv_blocks=6, block_size=2, max_running=6, max_context=13, pipeline=2)
        ids = [never_stopping(harness, length=3, max_tokens=10, priority=i % 3) for i in range(30)]
        harness.finish()
        assert {harness.ended[id_] for id_ in ids} == {"length"}
        assert harness.scheduler.stats.preemptions > 0


class TestPrefixCache:
    def test_whole_blocks_are_found_never_the_whole_prompt(self) -> None:
        harness = Harness()
        for length, found in ((8, 0), (8, 4), (9, 8), (11, 8), (13, 8), (13, 12)):
            id_ = harness.submit((prompt(8) + [3] * 8)[:length], max_tokens=1)
            harness.finish()
            assert harness.cached[id_] == found, length
        assert harness.scheduler.stats.cached_tokens == 4 + 8 + 8 + 8 + 12
        assert harness.scheduler.stats.prompt_tokens == 8 + 8 + 9 + 11 + 13 + 13

    def test_the_next_turn_finds_the_last_answer(self) -> None:
        harness = Harness()
        first = harness.submit(prompt(6), max_tokens=11)
        harness.finish()
        second = harness.submit(prompt(6) + harness.received[first] + [1, 2, 3])
        harness.finish()
        assert harness.cached[second] == 16  # of 17; the KV of the 17th was never computed

    def test_salts_do_not_share(self) -> None:
        harness = Harness()
        ids = []
        for salt in ("", "one", "two", "one"):
            ids.append(harness.submit(prompt(9), cache_salt=salt))
            harness.finish()
        assert [harness.cached[id_] for id_ in ids] == [0, 0, 0, 8]

    def test_prompt_logprobs_take_no_hit_and_are_reported_once(self) -> None:
        harness = Harness(max_chunk_tokens=3, kv_blocks=8, max_context=30)
        harness.submit(prompt(9))
        harness.finish()
        id_ = harness.submit(prompt(9), prompt_logprobs=1)
        never_stopping(harness, length=9, priority=-1)
        harness.step()
        never_stopping(harness, length=20, priority=-1)  # preempts it half way
        harness.finish()
        assert harness.cached[id_] == 0
        assert [entry.token for entry in harness.prompt_logprobs[id_]] == prompt(9)[1:]

    def test_copies_of_a_prompt_are_computed_once(self) -> None:
        harness = Harness(max_batch_tokens=64)
        ids = [harness.submit(prompt(17), max_tokens=3) for _ in range(4)]
        assert admitted(harness.schedule()) == ids[:1]
        assert chunks(harness.schedule()) == [(1, 16, 1), (2, 16, 1), (3, 16, 1)]
        harness.finish()
        assert [harness.cached[id_] for id_ in ids] == [0, 16, 16, 16]

    def test_a_small_common_part_is_not_waited_for(self) -> None:
        harness = Harness(max_batch_tokens=64)
        ids = [harness.submit(prompt(4) + [i] * 12) for i in range(2)]
        assert admitted(harness.schedule()) == ids
        harness.finish()

    def test_nobody_waits_for_a_worse_one(self) -> None:
        harness = Harness(max_batch_tokens=8)
        harness.submit(prompt(30), priority=1)
        harness.schedule()
        better = harness.submit(prompt(30), priority=0)
        assert admitted(harness.schedule()) == [better]
        harness.finish()

    def test_switched_off_it_finds_nothing(self) -> None:
        harness = Harness(prefix_cache=False)
        for _ in range(2):
            harness.submit(prompt(9))
            harness.finish()
        assert set(harness.cached.values()) == {0}

    def test_a_preempted_sequence_finds_its_own_blocks_and_reports_only_once(self) -> None:
        harness = Harness(max_running=1, max_context=60)
        id_ = never_stopping(harness, length=9, priority=1)
        for _ in range(5):
            harness.step()
        never_stopping(harness, priority=0, max_tokens=1)
        while id_ not in harness.ended:
            harness.step()
        starts = [plan.chunks[0].start for plan in harness.plans if admitted(plan) == [id_]]
        assert starts == [0, 12]
        assert harness.cached[id_] == 0
        harness.finish()


class TestLostRank:
    def test_running_sequences_are_recomputed_in_their_order_and_go_on(self) -> None:
        harness = Harness(max_running=3)
        ids = [never_stopping(harness, length=9) for _ in range(5)]
        for _ in range(6):
            harness.step()
        received = {id_: list(tokens) for id_, tokens in harness.received.items()}
        harness.reset()
        assert harness.scheduler.stats.running == 0
        assert harness.scheduler.stats.kv_blocks_used == 0
        plan = harness.schedule()
        assert admitted(plan) == ids[:3]
        assert plan is not None
        assert [admit.tokens for admit in plan.admits] == [harness.taken[id_].prompt + received[id_] for id_ in ids[:3]]
        assert all(chunk.start == 0 for chunk in plan.chunks)  # the cache is gone with the KV
        harness.finish()
        assert {harness.ended[id_] for id_ in ids} == {"length"}

    def test_no_event_is_lost(self) -> None:
        harness = Harness()
        ids = [never_stopping(harness) for _ in range(2)]
        harness.schedule()
        harness.abort(ids[0])
        harness.reset()
        harness.take_events()
        assert harness.ended == {ids[0]: "abort"}
        assert set(harness.cached) == set(ids)
        harness.finish()

    def test_a_request_under_which_every_epoch_ends_is_ended_with_an_error(self) -> None:
        harness = Harness()
        poison = never_stopping(harness)
        for _ in range(5):
            assert not harness.ended
            assert harness.schedule() is not None
            harness.reset()
            harness.take_events()
        assert harness.ended == {poison: "error"}
        assert harness.scheduler.idle

    def test_a_request_that_gains_a_token_in_each_epoch_goes_on(self) -> None:
        harness = Harness()
        unlucky = never_stopping(harness, max_tokens=20)
        for _ in range(12):
            harness.step()
            harness.reset()
        harness.finish()
        assert harness.ended == {unlucky: "length"}

    def test_ranks_that_turn_out_to_have_fewer_blocks(self) -> None:
        harness = Harness(kv_blocks=64)
        ids = [never_stopping(harness, length=9, max_tokens=30) for _ in range(3)]
        for _ in range(6):
            harness.step()
        harness.reset()
        harness.scheduler.resize(5)
        harness.settings = harness.scheduler.settings
        assert harness.scheduler.stats.kv_blocks == 5
        assert harness.scheduler.settings.max_length == 21
        harness.finish()
        assert {len(harness.received[id_]) for id_ in ids} == {12}
        assert {harness.ended[id_] for id_ in ids} == {"length"}

    def test_what_has_become_too_long_for_the_ranks_ends(self) -> None:
        harness = Harness(kv_blocks=64)
        long = never_stopping(harness, length=30, max_tokens=30)
        harness.step()
        harness.reset()
        harness.scheduler.resize(5)
        harness.take_events()
        assert harness.ended == {long: "length"}
        assert harness.scheduler.idle

    def test_steps_go_on_counting(self) -> None:
        harness = Harness()
        never_stopping(harness)
        last = [harness.schedule() for _ in range(2)][-1]
        harness.reset()
        following = harness.schedule()
        assert last is not None
        assert following is not None
        assert following.step > last.step
        harness.finish()


def calls_of_a_decode_step(running: int) -> int:
    """Python and C calls of `schedule` and `commit` where all decode and none needs a block."""
    harness = Harness(
        max_running=running,
        max_waiting=running,
        max_batch_tokens=4096,
        block_size=32,
        kv_blocks=4 * running,
        max_context=100,
    )
    for i in range(running):
        harness.scheduler.submit(request(i, sampling=SamplingParams(max_tokens=90, stop_token_ids=(9,))))
    scheduler, calls, plans = harness.scheduler, 0, []

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        plans.append(plan)
        if len(plans) > 1:
            scheduler.commit(results[len(plans)])

    results = {number: StepResult(number - 2, [0] * running) for number in range(2, 8)}

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(6):
        step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert len(plans[-1].decodes) == 4 * running
    assert not plans[-1].grows
    return calls


def test_a_decode_step_costs_no_python_per_sequence() -> None:
    assert calls_of_a_decode_step(8) == calls_of_a_decode_step(512) < 100


class TestFigures:
    def test_stats(self) -> None:
        harness = Harness(max_running=2)
        for _ in range(3):
            never_stopping(harness, length=8, max_tokens=3)
        harness.schedule()
        stats = harness.scheduler.stats
        assert (stats.running, stats.waiting, stats.kv_blocks, stats.kv_blocks_used) == (2, 1, 64, 4)
        assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (16, 0, 1)
        harness.finish()
        stats = harness.scheduler.stats
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert (stats.prompt_tokens, stats.generated_tokens) == (24, 9)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("kv_blocks", 0, "kv_blocks must be at least 1, not 0"),
            ("max_context", 1, r"max_context must be at least 2 \(a prompt and an output token\), not 1"),
            ("max_chunk_tokens", -1, r"max_chunk_tokens must be 0 \(no limit\) or more, not -1"),
            ("max_batch_tokens", 3, r"max_batch_tokens \(3\) must be at least max_running \(4\)"),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, field: str, value: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Harness(**{field: value})

    def test_deadlines_of_the_ended_do_not_pile_up(self) -> None:
        harness = Harness()
        for _ in range(500):
            harness.abort(never_stopping(harness, run_timeout=3600.0))
        harness.take_events()
        assert len(harness.scheduler._deadlines._heap) < 100
        harness.finish()

    def test_settings_know_the_longest_sequence(self) -> None:
        assert Harness(block_size=4, kv_blocks=5, max_context=100).settings.max_length == 21
        assert Harness(block_size=4, kv_blocks=50, max_context=100).settings.max_length == 100
