"""Imported once by the server process that ranks are forked from: it has their code compiled. It ends with
the supervisor (`tied`).

Every rank inherits the kernels, so none compiles them, at the first start or after a loss. Of several pods on one
machine with a cold cache one compiles, under a lock, and the others load what it wrote.
(By itself a fork server lives on while any of its children does, and they end only when it does.)
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import torch

import arriero_worker.rank  # noqa: F401
from arriero_faces.process import set_process_name
from arriero_worker.group import reduce
from arriero_worker.model.cpu.backend import CpuBackend
from arriero_worker.runner.batch import BatchState
from arriero_worker.runner.sampler import Sampler


def compile_all() -> None:
    """Every kernel of the cpu backend, single-threaded: no thread may exist before the ranks are forked."""
    torch.set_num_threads(1)
    lock = Path(os.environ.get("NUMBA_CACHE_DIR", tempfile.gettempdir()), f"arriero-compile-{os.getuid()}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        CpuBackend(torch.float32, 1).warm()
        reduce.warm()
        Sampler(BatchState(1, 1, 1), 8)


set_process_name("arriero-fork")
compile_all()
