"""One rank's part in a step, launched without waiting for its end.

    apply plan -> copy inputs -> (recv hidden) -> model -> (send hidden | sample -> keep tokens -> copy results)

`Runner` of the cpu backend says what the stages owe each other; it is the same here, but for who waits: results are
copied to the host beside the next step, and the leader's `collect` waits for the copy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from arriero_kernels.tuning import Tuning
from arriero_worker.engine.step import StepPlan, StepResult
from arriero_worker.group.comm import Communicator, GroupAborted
from arriero_worker.runner.batch import BatchState, Step
from arriero_worker.runner.device.inputs import Placed, StepInputs
from arriero_worker.runner.device.sampler import DeviceSampler
from arriero_worker.runner.device.streams import Arrived, Download, Streams
from arriero_worker.runner.results import ResultLayout, blank, decode
from arriero_worker.runner.stage_model import StageModel


class DeviceResults(Protocol):
    """Carries the results of tensor rank i of the last stage to tensor rank i of stage 0, device to device, in the
    order of the steps. Either call may raise `GroupAborted`.
    """

    def send_results(self, tensors: Sequence[torch.Tensor]) -> None:
        """On the last stage, after whatever has been launched. The tensors must not be written to any more."""
        ...

    def expect_results(self, tensors: Sequence[torch.Tensor]) -> Arrived:
        """On stage 0: have the tensors, of the shapes and dtypes sent, filled."""
        ...


class _Awaited(NamedTuple):
    step: int
    gains_N: torch.Tensor
    head: torch.Tensor
    arrived: Arrived


class DeviceRunner:
    """Runs the steps of one epoch on one rank; make a new one, with a new `BatchState`, for the next.

    `execute` is called from one thread, whose stream computes. `collect` and `close` may be called from another.
    """

    def __init__(
        self,
        model: StageModel,
        kv: Any,
        state: BatchState,
        comm: Communicator,
        results: DeviceResults | None,
        *,
        inputs: StepInputs,
        streams: Streams,
        device: torch.device,
        stage: int,
        pipeline: int,
        leader: bool,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        alive: Callable[[], bool] = lambda: True,
        tuning: Tuning | None = None,
    ) -> None:
        """The arguments are those of `Runner`.

        alive: whether the epoch still goes on; communication that was ended with it has left numbers behind that nobody
            must see.
        tuning: the kernels' launch parameters; None: those of the device.
        """
        self._model, self._kv, self._state, self._comm = model, kv, state, comm
        self._inputs, self._streams, self._device = inputs, streams, device
        self._stage, self._pipeline, self._leader = stage, pipeline, leader
        self._vocab, self._hidden_size, self._dtype = vocab_size, hidden_size, dtype
        self._last_S = torch.zeros(len(state.seeds_S), dtype=torch.int32, device=device)
        last = stage == pipeline - 1
        self._sampler = DeviceSampler(state, vocab_size, device, streams, tuning) if last else None
        assert results is not None or pipeline == 1, "results of several stages need a channel"
        self._results, self._alive = results, alive
        self._changed = threading.Condition()
        self._awaited: deque[_Awaited] = deque()
        """Steps this stage has run whose tokens are not stored yet, oldest first. Stage 0 of several."""
        self._collected: deque[tuple[ResultLayout, Download]] = deque()
        """Results that are, or will be, on the host but have not been told yet. The leader."""
        self._closed = ""

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Launch one step. Returns None: see `collect`. Raises GroupAborted where the epoch ends meanwhile."""
        first, last = self._stage == 0, self._stage == self._pipeline - 1
        with torch.no_grad():
            if first and not last:
                self._catch_up(plan.step - self._pipeline)
            self._check_open()
            step = self._state.apply(plan)
            layout = ResultLayout.of(step, self._state, self._vocab)
            placed = self._inputs.place(step, self._last_S if first else None)
            hidden = None
            if not first:
                tokens = len(placed.forward.positions_T)
                hidden = torch.empty(tokens, self._hidden_size, dtype=self._dtype, device=self._device)
                own = len(step.forward.positions_T)
                self._comm.recv(hidden[:own])
            output = self._model.forward(placed.forward, self._kv, hidden)
            if not last:
                self._comm.send(output[: len(step.forward.positions_T)])
            else:
                self._finish(plan, step, layout, placed, output)
            if first and not last:
                self._expect(layout, placed)
        return None

    def collect(self) -> StepResult:
        """The next result, on the leader: each step's once, in order. Blocks until it is there.

        Raises GroupAborted when the epoch ends or after `close`.
        """
        assert self._leader
        with self._changed:
            while not self._collected:
                self._check_open()
                self._changed.wait()
            layout, download = self._collected.popleft()
        tensors = download.wait()
        self._check_open()
        if not self._alive():
            raise GroupAborted("the epoch ended under the step")
        return decode(layout, tensors)

    def close(self, reason: str = "the runner was closed") -> None:
        """End of the epoch: whoever waits here, or comes later, gets GroupAborted."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def _finish(
        self, plan: StepPlan, step: Step, layout: ResultLayout, placed: Placed, logits_RV: torch.Tensor
    ) -> None:
        """On the last stage: sample, keep the tokens where they are fed, and tell whom they concern."""
        assert self._sampler is not None
        self._sampler.admit(plan.admits)
        tokens_N, logprobs = self._sampler.sample(step, layout, logits_RV, placed.gains_N, placed.positions_N)
        head = torch.empty(1 + len(tokens_N), dtype=torch.int64, device=self._device)
        head[0] = step.number
        head[1:] = tokens_N
        tensors = [head] if logprobs is None else [head, logprobs.ids, logprobs.values]
        if self._pipeline == 1:
            self._store(placed.gains_N, head)
            self._tell(layout, tensors)
        else:
            assert self._results is not None
            self._results.send_results(tensors)

    def _expect(self, layout: ResultLayout, placed: Placed) -> None:
        """On stage 0: have the step's results sent here; on the leader, from here to the host."""
        assert self._results is not None
        tensors = blank(layout, self._device)
        arrived = self._results.expect_results(tensors)
        self._awaited.append(_Awaited(layout.step, placed.gains_N, tensors[0], arrived))
        self._tell(layout, tensors, arrived)

    def _catch_up(self, step: int) -> None:
        """On stage 0: store the results of all steps up to `step`, before whatever is launched next."""
        while self._awaited and self._awaited[0].step <= step:
            awaited = self._awaited.popleft()
            awaited.arrived()
            self._store(awaited.gains_N, awaited.head)

    def _store(self, gains_N: torch.Tensor, head: torch.Tensor) -> None:
        self._last_S.index_copy_(0, gains_N, head[1:].to(torch.int32))

    def _tell(self, layout: ResultLayout, tensors: Sequence[torch.Tensor], arrived: Arrived | None = None) -> None:
        if self._leader:
            download = self._streams.download(tensors, arrived)
            with self._changed:
                self._collected.append((layout, download))
                self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise GroupAborted(self._closed)
