"""A pod's processes at the edges of their lives: asked to leave before they began, left behind by their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from tests.router.chaos import LAYERS, MODEL
from tests.worker.replica import Replica

PATIENCE = 60.0


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def front_begins(pod: psutil.Process) -> bool:
    return any("arriero_worker.front" in command_of(child) for child in pod.children(recursive=True))


def fork_server_begins(pod: psutil.Process) -> bool:
    return bool(pod.children())


@pytest.mark.parametrize("moment", [fork_server_begins, front_begins])
@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_that_has_not_begun_to_serve_leaves_at_once(moment: Callable[[psutil.Process], bool], index: int) -> None:
    if index and moment is front_begins:
        pytest.skip("only the leader's pod has a front")
    with Replica(MODEL, layers=LAYERS, wait=False, pipeline=2, drain_seconds=3600) as replica:
        pod = replica.pods[index]
        assert pod is not None
        process = psutil.Process(pod.pid)
        replica.until(lambda: moment(process), "the moment")
        family = process.children(recursive=True)
        asked = time.monotonic()
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(PATIENCE) == 0, replica.log.read_text()
        print(f"left after {time.monotonic() - asked:.2f} s")
        _, alive = psutil.wait_procs(family, PATIENCE)
        assert not alive, "nothing is left behind"
        assert "Traceback" not in replica.log.read_text(), replica.log.read_text()


ORPHANS = {
    "front": "from arriero_worker.front.main import main; main('--launch none --engine none --parent 1'.split())",
    "fork server": "import os; os.environ['ARRIERO_SUPERVISOR'] = '1'; import arriero_worker.tied",
    "rank": "from arriero_worker import rank_entry; rank_entry._SERVER = 1; rank_entry.run_rank('none', 0, 'none')",
}


@pytest.mark.parametrize("kind", ORPHANS)
def test_a_process_whose_parent_ended_before_it_looked_ends(kind: str) -> None:
    """It finds another parent than the one that it was told of."""
    assert subprocess.run([sys.executable, "-c", ORPHANS[kind]], timeout=PATIENCE).returncode == -signal.SIGKILL
