"""Sleep on a 32-bit word in shared memory until another process changes it (Linux futex(2))."""

from __future__ import annotations

import ctypes
import os
import platform

_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _number() -> int:
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise OSError(f"no futex number is known for {machine}; Arriero's workers run on {' and '.join(_NUMBERS)}")
    return _NUMBERS[machine]


_FUTEX = _number()


def wait(word: ctypes.c_uint32, expected: int, seconds: float) -> None:
    """Sleep while the word holds `expected`, at most `seconds`. May also return early: callers look again. Releases
    the GIL.
    """
    whole = int(seconds)
    limit = _Timespec(whole, int((seconds - whole) * 1e9))
    _syscall(_FUTEX, ctypes.byref(word), _WAIT, ctypes.c_uint32(expected), ctypes.byref(limit), None, 0)


def wake(word: ctypes.c_uint32) -> None:
    """Wake all who sleep on the word."""
    if _syscall(_FUTEX, ctypes.byref(word), _WAKE, 0x7FFFFFFF, None, None, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
