"""The worker's CPU kernels, compiled once per machine and checkout: at each pod's start it would take a minute."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.cluster.processes import ClusterError
from tests.cluster.thin import PROJECT, USER
from tools.cluster import build

# Imported on the way, so that their bytecode is there: containers cannot keep it, and import far more slowly without.
PROGRAMS = ("arriero_worker.pod", "arriero_worker.front.main", "arriero_router.main", "arriero_operator.main")
COMPILE = "import arriero_worker.fork_server"


def compiled() -> Path:
    """The folder with the compiled kernels, for NUMBA_CACHE_DIR. Compiles what is new. Raises ClusterError."""
    folder = build.cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{stamp()}.compiled"
    if not note.exists():
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        for statement in (*(f"import {name}" for name in PROGRAMS), COMPILE):
            command = [sys.executable, "-c", statement]
            answer = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise ClusterError(f"the worker's kernels cannot be compiled: {answer.stderr.strip()[-2000:]}")
        for old in folder.glob("*.compiled"):
            old.unlink()
        note.touch()
    return folder


def stamp() -> str:
    """Names the checkout, the state of the sources that numba compiles, and what compiles them."""
    digest = hashlib.sha256(f"{PROJECT} {sys.version} {version('numba')} {version('torch')}".encode())
    worker = PROJECT / "worker" / "arriero_worker"
    for source in sorted((*worker.glob("model/cpu/*.py"), *worker.glob("runner/*.py"), worker / "group" / "reduce.py")):
        status = source.stat()
        digest.update(f"{source} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def copy(folder: Path) -> Path:
    """The compiled kernels in a folder of the cluster's own, which the containers' user may write to."""
    shutil.copytree(compiled(), folder)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    return folder
