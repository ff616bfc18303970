"""One rank's part in a step: lay out the micro-batch, run this stage's layers, pass on, sample.

    apply plan -> (recv hidden) -> model -> (send hidden | sample -> send results to stage 0)

Stage 0 of several feeds tokens that the last stage sampled. Before it runs step n it stores the results of every
step up to n - pipeline. On the leader, a thread of its own may wait in `collect` meanwhile, so that the scheduler
hears of each result at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from arriero_worker.engine.step import StepPlan, StepResult
from arriero_worker.group.comm import Communicator, GroupAborted
from arriero_worker.runner.batch import BatchState, Step
from arriero_worker.runner.results import ResultChannel, ResultLayout, blank, decode, encode, tokens_of
from arriero_worker.runner.sampler import Sampler
from arriero_worker.runner.stage_model import StageModel


class Runner:
    """Runs the steps of one epoch on one rank; make a new one, with a new `BatchState`, for the next.

    `execute` is called from one thread. `collect` and `close` may be called from another.
    """

    def __init__(
        self,
        model: StageModel,
        kv: Any,
        state: BatchState,
        comm: Communicator,
        results: ResultChannel | None,
        *,
        stage: int,
        pipeline: int,
        leader: bool,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """`results`: None with one stage, where nothing is passed on. `leader`: this rank reports to the scheduler.
        `hidden_size` and `dtype` are those of the hidden states between stages.
        """
        self._model, self._kv, self._state, self._comm = model, kv, state, comm
        self._stage, self._pipeline, self._leader = stage, pipeline, leader
        self._vocab, self._hidden_size, self._dtype = vocab_size, hidden_size, dtype
        self._sampler = Sampler(state, vocab_size) if stage == pipeline - 1 else None
        assert results is not None or pipeline == 1, "results of several stages need a channel"
        self._results = results
        self._changed = threading.Condition()
        self._awaited: deque[ResultLayout] = deque()
        """Steps this stage has run whose results are not stored yet, oldest first. Stage 0 of several."""
        self._collected: deque[StepResult] = deque()
        """Results stored but not told yet. The leader."""
        self._taking = False
        """A thread is receiving the oldest awaited step's results."""
        self._closed = ""

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step. Returns its result on the leader of a single stage, otherwise None (see `collect`).

        Raises GroupAborted where the epoch ends meanwhile.
        """
        first, last = self._stage == 0, self._stage == self._pipeline - 1
        if first and not last:
            self._catch_up(plan.step - self._pipeline)
        with self._changed:
            step = self._state.apply(plan)
        layout = ResultLayout.of(step, self._state, self._vocab)
        if self._sampler is not None:
            self._sampler.admit(plan.admits)
        with torch.no_grad():
            hidden = None
            if not first:
                tokens = len(step.forward.tokens_T)
                hidden = self._comm.recv(torch.empty(tokens, self._hidden_size, dtype=self._dtype))
            output = self._model.forward(step.forward, self._kv, hidden)
            if not last:
                self._comm.send(output)
            elif self._sampler is not None:
                return self._finish(step, layout, output)
        if first:
            with self._changed:
                self._awaited.append(layout)
                self._changed.notify_all()
        return None

    def collect(self) -> StepResult:
        """The next result, on the leader of several stages: each step's once, in order. Blocks until it is there.

        Raises GroupAborted when the epoch ends or after `close`.
        """
        assert self._leader
        with self._changed:
            while not self._collected:
                self._check_open()
                if self._awaited and not self._taking:
                    self._take()
                else:
                    self._changed.wait()
            return self._collected.popleft()

    def close(self, reason: str = "the runner was closed") -> None:
        """End of the epoch: whoever waits here, or comes later, gets GroupAborted. A call that waits in the channel
        ends when the channel does.
        """
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def _finish(self, step: Step, layout: ResultLayout, logits_RV: torch.Tensor) -> StepResult | None:
        """On the last stage: sample, keep the tokens, and tell whom they concern."""
        assert self._sampler is not None
        tokens_N, logprobs = self._sampler.sample(step, layout, logits_RV)
        self._state.store(step.number, step.slots_N, tokens_N)
        if self._pipeline == 1 and not self._leader:
            return None
        tensors = encode(layout, tokens_N, logprobs)
        if self._pipeline == 1:
            return decode(layout, tensors)
        assert self._results is not None
        self._results.send_results(tensors)
        return None

    def _catch_up(self, step: int) -> None:
        """On stage 0: return when the results of all steps up to `step` are stored."""
        with self._changed:
            self._check_open()
            while self._awaited and self._awaited[0].step <= step:
                if self._taking:
                    self._changed.wait()
                else:
                    self._take()
                self._check_open()

    def _take(self) -> None:
        """Receive and store the oldest awaited step's results. Called with the lock, which it lends meanwhile."""
        assert self._results is not None
        layout = self._awaited[0]
        tensors = blank(layout)
        self._taking = True
        try:
            with self._lent():
                self._results.recv_results(tensors)
        except BaseException as error:
            self._closed = self._closed or str(error) or type(error).__name__
            raise
        finally:
            self._taking = False
            self._changed.notify_all()
        self._awaited.popleft()
        self._state.store(layout.step, layout.slots_N, tokens_of(layout, tensors))
        if self._leader:
            self._collected.append(decode(layout, tensors))

    def _check_open(self) -> None:
        if self._closed:
            raise GroupAborted(self._closed)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()
