"""Run a command that ends when its starter ends: `tether.py STARTER_PID COMMAND...`.

A script of its own, and before the command's interpreter starts: asking for it between fork and exec would run Python
in a child of a process with threads, and asking for it in the command itself would be too late for a starter that is
killed at once.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    starter, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != starter:
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
