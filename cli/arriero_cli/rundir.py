"""The private directory of one `arriero up`: the launch file, sockets and logs of its pods."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arriero_cli.errors import CommandError

_PREFIX = "arriero-up-"
_LOCK = "lock"


@contextmanager
def run_directory(wanted: Path | None) -> Iterator[Path]:
    """A directory that nobody else uses or reads: `wanted`, which is kept, or a temporary one, removed at the end.

    Raises CommandError.
    """
    if wanted is None:
        _remove_abandoned()
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    else:
        path = wanted.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    try:
        if not _take(lock):
            raise CommandError(f"{path} is in use by another arriero up")
        yield path
    finally:
        if wanted is None:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned() -> None:
    """Remove the temporary directories of earlier runs that were killed: those whose lock nobody holds."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid() and _take(lock):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
