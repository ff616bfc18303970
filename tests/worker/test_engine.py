"""The engine's loop over a real Unix socket, with a session whose model is a hash: requests in, tokens out, through
the end of an epoch.
"""

import queue
import socket
import threading
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from arriero_worker.engine.engine import Engine
from arriero_worker.engine.frames import FrameReader, decode_from_engine, encode_frame
from arriero_worker.engine.messages import (
    Abort,
    Drain,
    EngineRequest,
    EngineStatus,
    FromEngine,
    Model,
    Outputs,
    SamplingParams,
    Submit,
    ToEngine,
)
from arriero_worker.engine.scheduler import Scheduler, SchedulerSettings
from arriero_worker.engine.server import EngineServer
from arriero_worker.engine.step import StepPlan, StepResult

VOCABULARY = 1000


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(array("i", tokens).tobytes()) % VOCABULARY


def continued(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class HashSession:
    """Runs plans in a thread as a rank would; `hold` makes it wait before each step."""

    def __init__(self, put: Callable[[StepResult], None], hold: threading.Semaphore | None = None) -> None:
        self._put, self._hold = put, hold
        self._slots: dict[int, list[int]] = {}
        self._plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def dispatch(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def _run(self) -> None:
        while True:
            plan = self._plans.get()
            if self._hold is not None:
                self._hold.acquire()
            for admit in plan.admits:
                self._slots[admit.slot] = list(admit.tokens)
            slots = [chunk.slot for chunk in plan.chunks if chunk.sample] + list(array("i", plan.decodes))
            tokens = [next_token(self._slots[slot]) for slot in slots]
            for slot, token in zip(slots, tokens, strict=True):
                self._slots[slot].append(token)
            self._put(StepResult(plan.step, tokens))


class Faces:
    """A client of the socket that collects what the engine says."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(30)
        self._socket.connect(path)
        self._reader = FrameReader()
        self._messages: list[FromEngine] = []
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.refused: dict[int, str] = {}

    def send(self, message: ToEngine) -> None:
        self._socket.sendall(encode_frame(message))

    def submit(self, ids: Iterable[int], prompt: Callable[[int], list[int]], max_tokens: int) -> None:
        """In one message, so that the engine sees them together."""
        sampling = SamplingParams(max_tokens=max_tokens)
        self.send(Submit([EngineRequest(id=id_, prompt=prompt(id_), sampling=sampling) for id_ in ids]))

    def hear(self) -> FromEngine:
        while not self._messages:
            data = self._socket.recv(1 << 16)
            assert data, "the engine closed the connection"
            self._messages += [decode_from_engine(body) for body in self._reader.feed(data)]
        message = self._messages.pop(0)
        if isinstance(message, Outputs):
            for id_, token in zip(message.ids, message.tokens, strict=True):
                self.tokens.setdefault(id_, []).append(token)
            self.ended.update({finish.id: finish.reason for finish in message.finished})
            self.refused.update({refusal.id: refusal.code for refusal in message.refused})
        return message

    def until(self, condition: Callable[[FromEngine], bool]) -> FromEngine:
        while not condition(message := self.hear()):
            pass
        return message

    def close(self) -> None:
        self._socket.close()


def is_status(**fields: object) -> Callable[[FromEngine], bool]:
    return lambda m: isinstance(m, EngineStatus) and all(getattr(m, name) == value for name, value in fields.items())


@pytest.fixture
def engine() -> Engine:
    settings = SchedulerSettings(
        block_size=4,
        kv_blocks=64,
        max_context=128,
        max_running=4,
        max_waiting=8,
        max_batch_tokens=16,
        vocab_size=VOCABULARY,
    )
    return Engine(Scheduler(settings, lambda: 0.0), Model(128, VOCABULARY), lambda status: None)


@pytest.fixture
def faces(engine: Engine, tmp_path: Path) -> Iterator[Faces]:
    path = str(tmp_path / "engine.sock")
    engine.start(EngineServer(path, engine.receive, engine.faces_came, engine.faces_gone).send)
    client = Faces(path)
    yield client
    client.close()


def attach(engine: Engine, epoch: int, hold: threading.Semaphore | None = None) -> None:
    engine.attach(HashSession(lambda result: engine.put(epoch, result), hold), epoch)


def test_requests_wait_for_the_first_epoch_and_are_answered(engine: Engine, faces: Faces) -> None:
    faces.until(is_status(phase="Joining"))
    faces.submit(range(6), lambda id_: [id_ + 1, 2, 3], 20)
    faces.until(is_status(waiting=6))
    attach(engine, 1)
    faces.until(lambda m: len(faces.ended) == 6)
    assert set(faces.ended.values()) == {"length"}
    assert faces.tokens == {id_: continued([id_ + 1, 2, 3], 20) for id_ in range(6)}


def test_running_requests_go_on_in_the_next_epoch_where_they_were(engine: Engine, faces: Faces) -> None:
    hold = threading.Semaphore(0)
    attach(engine, 1, hold)
    faces.submit(range(3), lambda id_: [7, id_], 30)
    for _ in range(5):
        hold.release()
    faces.until(lambda m: sum(map(len, faces.tokens.values())) >= 6)
    engine.detach()
    hold.release()  # the old epoch's session finishes a step that nobody wants any more
    faces.until(is_status(phase="Joining", recoveries=1))
    assert not faces.ended
    attach(engine, 2)
    faces.until(lambda m: len(faces.ended) == 3)
    assert faces.tokens == {id_: continued([7, id_], 30) for id_ in range(3)}


def test_a_draining_engine_finishes_what_it_has_and_refuses_the_rest(engine: Engine, faces: Faces) -> None:
    hold = threading.Semaphore(0)
    attach(engine, 1, hold)
    faces.submit([1], lambda id_: [5], 3)
    faces.until(is_status(running=1))
    faces.send(Drain())
    faces.submit([2], lambda id_: [5], 3)
    faces.until(lambda m: 2 in faces.refused)
    assert faces.refused == {2: "draining"}
    for _ in range(4):
        hold.release()
    faces.until(lambda m: 1 in faces.ended)
    assert faces.tokens[1] == continued([5], 3)
    engine.set_draining(False)
    faces.until(is_status(phase="Serving"))


def test_an_aborted_request_ends_and_frees_its_blocks(engine: Engine, faces: Faces) -> None:
    hold = threading.Semaphore(0)
    attach(engine, 1, hold)
    faces.submit([1], lambda id_: [5] * 10, 100)
    faces.until(is_status(running=1))
    faces.send(Abort([1]))
    hold.release()
    hold.release()
    faces.until(is_status(running=0, waiting=0, kv_blocks_used=0))
    assert faces.ended == {1: "abort"}


def test_requests_of_faces_that_went_away_are_aborted(engine: Engine, faces: Faces, tmp_path: Path) -> None:
    hold = threading.Semaphore(0)
    attach(engine, 1, hold)
    faces.submit(range(8), lambda id_: [5], 100)
    faces.until(is_status(running=4, waiting=4))
    faces.close()
    successor = Faces(str(tmp_path / "engine.sock"))
    successor.until(is_status(running=0, waiting=0))
    hold.release()
    hold.release()
    successor.until(is_status(kv_blocks_used=0))
    successor.close()


def test_a_full_queue_is_refused_with_a_reason(engine: Engine, faces: Faces) -> None:
    faces.submit(range(9), lambda id_: [5], 2)
    faces.until(lambda m: bool(faces.refused))
    assert faces.refused == {8: "queue_full"}
