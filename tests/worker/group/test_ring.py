"""The plan ring: every message once and in order to each reader, whatever its size; a slow reader holds the writer,
a stopped one does not.
"""

import os
import random
import threading
from collections.abc import Iterator

import pytest

from arriero_worker.group.memory import RING_BYTES, PodMemory
from arriero_worker.group.ring import Ring, pack_plan, unpack_plan


@pytest.fixture
def memory() -> Iterator[PodMemory]:
    fd = PodMemory.create("test")
    yield PodMemory(PodMemory.path_of(fd), 2)
    os.close(fd)


def never() -> bool:
    return False


def test_every_reader_gets_every_message_in_order(memory: PodMemory) -> None:
    rng = random.Random(7)
    messages = [rng.randbytes(rng.choice([0, 1, 100, 5000, RING_BYTES // 4, RING_BYTES // 4 + 1])) for _ in range(200)]
    messages.append(rng.randbytes(3 * RING_BYTES + 17))
    ring = Ring(memory)
    readers = [ring.reader(i) for i in range(3)]
    got: list[list[bytes]] = [[], [], []]

    def read(index: int) -> None:
        for _ in messages:
            message = readers[index].read(never)
            assert message is not None
            got[index].append(message)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    writer = Ring(memory).writer(3)
    for message in messages:
        assert writer.write(message, never)
    for thread in threads:
        thread.join(30)
    assert got == [messages] * 3


def test_a_reader_sees_nothing_from_before_it_subscribed(memory: PodMemory) -> None:
    ring = Ring(memory)
    writer = ring.writer(1)
    writer.write(b"old", never)
    reader = ring.reader(0)
    writer.write(b"new", never)
    assert reader.read(never) == b"new"


def test_a_waiting_reader_stops_when_told(memory: PodMemory) -> None:
    reader = Ring(memory).reader(0)
    memory.abort_epoch(3)
    assert reader.read(lambda: memory.aborted_epoch >= 3) is None


def test_a_full_ring_holds_the_writer_until_told_to_stop_and_a_closed_reader_frees_it(memory: PodMemory) -> None:
    ring = Ring(memory)
    reader = ring.reader(0)
    writer = ring.writer(1)
    assert not writer.write(bytes(2 * RING_BYTES), lambda: True)
    reader.close()
    assert writer.write(bytes(2 * RING_BYTES), never)


def test_plans_carry_their_epoch() -> None:
    assert unpack_plan(pack_plan(3, 9, b"plan")) == (3, 9, b"plan")
