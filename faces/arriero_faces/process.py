"""What every process of a worker does first: one log format, and an end when its parent ends."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

EXIT_UNUSABLE = 3
"""A process that can never run as it was launched (a bad checkpoint, say): starting it again would not help."""

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def set_up_logging(level: str) -> None:
    """One line per record on standard error."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends (prctl(2)), so that nothing outlives a killed
    supervisor.

    parent: its process id, where who started this process could tell; without it, a parent that ended before this call
    goes unnoticed. May be called between fork and exec, whence it holds for the program executed.
    """
    if parent is None:
        parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def set_process_name(name: str) -> None:
    """The name that ps and top show (prctl(2)); the kernel keeps 15 characters."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
