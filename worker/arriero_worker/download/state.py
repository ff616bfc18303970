"""What a download leaves on the disk for its next start: parts of files, what is verified, and that all is there.

    DIRECTORY/.arriero/lock          held while a download runs
    DIRECTORY/.arriero/parts/NAME    a file on its way, sparse; NAME.ranges: its identity, then a line per range
    DIRECTORY/.arriero/verified      a JSON line per file that stands under its final name
    DIRECTORY/.arriero/complete      JSON: the source, and every file of it

A process may be killed at any byte. Bytes are written before the line that tells of them, and a file gets its final
name only when its digest is right and its bytes are on the disk; a line cut short is no line.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from arriero_worker.download.extents import Extents
from arriero_worker.download.source import RefusedError, RemoteFile

HIDDEN = ".arriero"


class Part:
    """A file on its way. Threads may write different ranges of it. Nothing is opened before the first byte."""

    def __init__(self, file: RemoteFile, path: Path) -> None:
        self.file = file
        self.path = path
        self.present = Extents()
        self._ranges_path = path.with_name(path.name + ".ranges")
        self._lock = threading.Lock()
        self._data = -1
        self._ranges: IO[str] | None = None
        self._resumes = self._read_ranges()
        if not self._resumes:
            self._ranges_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @property
    def whole(self) -> bool:
        return self.present.covered >= self.file.size

    @property
    def allocated(self) -> int:
        """Bytes of disk that it takes."""
        try:
            return self.path.stat().st_blocks * 512 if self._resumes else 0
        except OSError:
            return 0

    def open(self) -> None:
        """Before `write` and `record`; again is nothing. Raises OSError."""
        with self._lock:
            if self._data >= 0:
                return
            self._data = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._ranges = self._ranges_path.open("a", encoding="ascii")
            if self._resumes:
                self._ranges.write("\n")  # after a line that may have been cut short
            else:
                self._begin(self._ranges)

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Raises OSError (ENOSPC)."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._data, view, at)
            view, at = view[written:], at + written

    def record(self, start: int, stop: int) -> bool:
        """These bytes are written. Whether they made the file whole."""
        with self._lock:
            assert self._ranges is not None, "open comes first"
            was_whole = self.whole
            self.present.add(start, stop)
            self._ranges.write(f"{start} {stop}\n")
            self._ranges.flush()
            return self.whole and not was_whole

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            assert self._ranges is not None, "open comes first"
            self.present = Extents()
            self._begin(self._ranges)

    def settle(self, target: Path) -> None:
        """Give it its final name, once its bytes are on the disk."""
        os.fsync(self._data)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        self._ranges_path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._data >= 0 and self._ranges is not None:
                os.close(self._data)
                self._ranges.close()
                self._data, self._ranges = -1, None

    def _begin(self, ranges: IO[str]) -> None:
        ranges.seek(0)
        ranges.truncate()
        ranges.write(f"{self.file.identity}\n")
        ranges.flush()
        os.ftruncate(self._data, 0)
        os.ftruncate(self._data, self.file.size)

    def _read_ranges(self) -> bool:
        """Whether what is there is a part of this very content."""
        try:
            head, *lines = self._ranges_path.read_text(encoding="ascii").split("\n")
            size = self.path.stat().st_size
        except (OSError, UnicodeDecodeError):
            return False
        if head != self.file.identity or size != self.file.size:
            return False
        for line in lines[:-1]:  # what follows the last newline was cut short
            start, _, stop = line.partition(" ")
            if start.isdecimal() and stop.isdecimal() and int(stop) <= size:
                self.present.add(int(start), int(stop))
        return True


class State:
    """Of one directory."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError where the directory cannot be written."""
        self._directory = directory
        self._hidden = directory / HIDDEN
        self._parts = self._hidden / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._held: IO[str] | None = None
        self._verified = self._read_verified()

    def acquire(self, waiting: Callable[[], bool]) -> None:
        """Be the only download of this directory. While another one runs, `waiting` is called, which waits a while and
        says whether to go on.
        """
        held = (self._hidden / "lock").open("w")
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting():
                    held.close()
                    return
        self._held = held
        self._verified = self._read_verified()

    def target(self, file: RemoteFile) -> Path:
        """Its final path. Raises RefusedError for one that leaves the directory."""
        parts = file.path.split("/")
        if parts[0] == HIDDEN or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise RefusedError(f"the source names a file {file.path!r}, which cannot be stored")
        return self._directory.joinpath(*parts)

    def part(self, file: RemoteFile) -> Part:
        return Part(file, self._parts / quote(file.path, safe=""))

    def verified(self, file: RemoteFile) -> bool:
        """Whether it stands under its final name, verified, as far as can be told without reading it."""
        return self._verified.get(file.path) == file.identity and _size(self.target(file)) == file.size

    def record_verified(self, file: RemoteFile) -> None:
        with self._lock, (self._hidden / "verified").open("a", encoding="utf-8") as log:
            self._verified[file.path] = file.identity
            log.write(json.dumps({"path": file.path, "identity": file.identity}) + "\n")

    def sweep(self, files: Iterable[RemoteFile]) -> None:
        """Remove parts that belong to none of these."""
        kept = {quote(file.path, safe="") for file in files}
        for path in self._parts.iterdir():
            if path.name.removesuffix(".ranges") not in kept and path.name not in kept:
                path.unlink(missing_ok=True)

    def complete(self, uri: str, only: Sequence[str]) -> int | None:
        """How many bytes there are, if a download of the same ended and its files are still there."""
        try:
            marker = json.loads((self._hidden / "complete").read_text(encoding="utf-8"))
            files = [RemoteFile(entry["path"], entry["size"]) for entry in marker["files"]]
            if marker["source"] != uri or marker["only"] != [*only]:
                return None
            if any(_size(self.target(file)) != file.size for file in files):
                return None
        except (OSError, ValueError, KeyError, TypeError, RefusedError):
            return None
        return sum(file.size for file in files)

    def record_complete(self, uri: str, only: Sequence[str], files: Iterable[RemoteFile]) -> None:
        listed = [{"path": file.path, "size": file.size, "digest": file.digest} for file in files]
        marker = {"source": uri, "only": [*only], "files": listed}
        beside = self._hidden / "complete.new"
        with beside.open("w", encoding="utf-8") as file:
            json.dump(marker, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._hidden / "complete")

    def forget_complete(self) -> None:
        """Before anything changes."""
        (self._hidden / "complete").unlink(missing_ok=True)

    def _read_verified(self) -> dict[str, str]:
        found: dict[str, str] = {}
        try:
            lines = (self._hidden / "verified").read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return found
        for line in lines:
            try:
                entry: Any = json.loads(line)
                found[str(entry["path"])] = str(entry["identity"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short, or the empty end
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
