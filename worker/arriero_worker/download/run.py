"""One download from its listing to its marker."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from arriero_worker.download.fetch import Fetcher
from arriero_worker.download.progress import Progress, in_bytes
from arriero_worker.download.selection import INDEX, SUMS, only_files, small_files, weight_files, with_sums
from arriero_worker.download.source import DownloadError, RemoteFile, Source, StoppedError
from arriero_worker.download.state import State

_WAIT = 1.0  # seconds between attempts to be the only download of a directory


def download(
    source: Source,
    directory: Path,
    only: Sequence[str],
    progress: Progress,
    stopped: threading.Event,
    *,
    connections: int,
    patience: float,
    say: Callable[[str], None],
) -> None:
    """Fill the directory with the checkpoint, or with `only` these files of it. Raises DownloadError."""
    try:
        state = State(directory)
    except OSError as error:
        raise DownloadError(f"{directory} cannot be written: {error.strerror}") from error
    _acquire(state, directory, stopped, say)
    if (there := state.complete(source.uri, only)) is not None:
        progress.begin(there, there, 0, 0)
        say(f"{source.uri} is in {directory} already, {in_bytes(there)}")
        return
    fetcher = Fetcher(source, state, progress, stopped, connections=connections, patience=patience, say=say)
    try:
        state.forget_complete()
        listed = fetcher.patiently(source.listing, source.uri)
        files = _wanted(source, listed, only, directory, fetcher)
        state.sweep(files)
        fetcher.fetch_all(files, lambda: shutil.disk_usage(directory).free)
        state.record_complete(source.uri, only, files)
    except OSError as error:
        raise DownloadError(f"{error.filename or directory}: {error.strerror or error}") from error


def _acquire(state: State, directory: Path, stopped: threading.Event, say: Callable[[str], None]) -> None:
    told = False

    def waiting() -> bool:
        nonlocal told
        if not told:
            say(f"another download fills {directory}: waiting for it")
            told = True
        return not stopped.wait(_WAIT)

    state.acquire(waiting)
    if stopped.is_set():
        raise StoppedError("told to stop before anything was fetched")


def _wanted(
    source: Source, listed: Sequence[RemoteFile], only: Sequence[str], directory: Path, fetcher: Fetcher
) -> list[RemoteFile]:
    """What to fetch, the small files first: what is wrong with them is known before the weights come."""
    known = {file.path: file for file in listed}
    if SUMS in known and source.uri.partition("://")[0] != "hf":
        fetcher.fetch([known[SUMS]])
        listed = with_sums(source.uri, listed, (directory / SUMS).read_text(encoding="utf-8", errors="replace"))
        known = {file.path: file for file in listed}
    if only:
        return only_files(source.uri, listed, only)
    index = None
    if INDEX in known:
        fetcher.fetch([known[INDEX]])
        index = (directory / INDEX).read_text(encoding="utf-8", errors="replace")
    return [*small_files(listed), *weight_files(source.uri, listed, index)]
