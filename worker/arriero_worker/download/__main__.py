"""`arriero-download --source URI --directory DIR [--only NAME]`: the init step of a pod whose model is elsewhere."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from arriero_faces.process import EXIT_UNUSABLE
from arriero_worker.download.progress import Progress
from arriero_worker.download.source import Address, DownloadError, RefusedError, Source, StoppedError, parse_address

if TYPE_CHECKING:
    from arriero_worker.download.serve import StatusServer

_EXIT_STOPPED = 128 + signal.SIGTERM
_WORDS_LIMIT = 4096  # bytes of a termination message that the kubelet keeps


def main(arguments: list[str] | None = None) -> int:
    """Run it. Exit codes: 0 all is there, 1 failed but may go well next time, 2 wrong usage, 3 cannot go well before
    somebody changes the source, the token or what is stored, 143 told to stop.
    """
    options = _parser().parse_args(arguments)
    try:
        address = parse_address(options.source)
        if options.connections < 1:
            raise ValueError(f"--connections is {options.connections}: at least 1 is needed")
    except ValueError as error:
        return _end(2, str(error), options.termination_log)
    stopped = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopped.set())
    progress = Progress()
    status = _serve(options.control_port, progress)
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(progress, over, options.interval), daemon=True)
    teller.start()
    try:
        code, words = _download(options, address, progress, stopped)
    finally:
        over.set()
        teller.join()
        if status is not None:
            status.stop()
    return _end(code, words, options.termination_log)


def _download(
    options: argparse.Namespace, address: Address, progress: Progress, stopped: threading.Event
) -> tuple[int, str]:
    from arriero_worker.download.run import download

    try:
        download(
            _source(address),
            Path(options.directory),
            options.only,
            progress,
            stopped,
            connections=options.connections,
            patience=options.patience,
            say=_say,
        )
    except StoppedError as error:
        return _EXIT_STOPPED, str(error)
    except DownloadError as error:
        progress.fail(str(error))
        return (EXIT_UNUSABLE if isinstance(error, RefusedError) else 1), str(error)
    seen = progress.snapshot()
    _say(f"complete: {seen.bytes_total} bytes in {seen.phase_seconds:.1f} s")
    return 0, ""


def _source(address: Address) -> Source:
    """Libraries are imported here: each is large, and a process needs one of them."""
    if address.scheme == "hf":
        # Nothing but the model is to be asked for: no look-ups for a user agent.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from importlib.metadata import version

        from arriero_worker.download.hub import HubSource

        return HubSource(address, os.environ.get("HF_TOKEN", "").strip(), version("arriero"))
    from arriero_worker.download.objects import ObjectSource

    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL")
    endpoint = next((os.environ[name] for name in endpoints if os.environ.get(name)), "")
    return ObjectSource(address, insecure=endpoint.startswith("http://"))


def _serve(port: int, progress: Progress) -> StatusServer | None:
    """Progress is no reason to fail: without the port it shows in the log only."""
    if not port:
        return None
    from arriero_worker.download.serve import StatusServer

    try:
        return StatusServer(port, progress.snapshot)
    except OSError as error:
        _say(f"{error}: progress is told here only")
        return None


def _tell(progress: Progress, over: threading.Event, interval: float) -> None:
    while not over.wait(interval):
        seen = progress.snapshot()
        if seen.phase == "Downloading":
            _say(str(seen))


def _say(line: str) -> None:
    print(line, flush=True)


def _end(code: int, words: str, termination_log: str) -> int:
    """Last words, for the log and for whoever looks at the pod."""
    if not words:
        return code
    print(f"arriero-download: {words}", file=sys.stderr, flush=True)
    # The kubelet makes the file; elsewhere there is none, and none is to be made.
    if os.path.isfile(termination_log):
        try:
            with open(termination_log, "wb") as file:
                file.write(words.encode()[:_WORDS_LIMIT])
        except OSError:
            pass
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="arriero-download", description="Fetch a model into a directory.")
    parser.add_argument(
        "--source", required=True, metavar="URI", help="hf://owner/name@revision, s3://bucket/prefix or gs://..."
    )
    parser.add_argument("--directory", required=True, metavar="DIR", help="where to; what is there is made use of")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="fetch this file only (may be repeated)"
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=os.environ.get("ARRIERO_DOWNLOAD_CONNECTIONS", "8"),
        metavar="N",
        help="requests at once (default: $ARRIERO_DOWNLOAD_CONNECTIONS or 8)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=os.environ.get("ARRIERO_DOWNLOAD_PATIENCE", "300"),
        metavar="S",
        help="give up after so long without a byte (default: $ARRIERO_DOWNLOAD_PATIENCE or 300)",
    )
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="between two lines of progress (default: 5)"
    )
    parser.add_argument(
        "--control-port", type=int, default=9100, metavar="PORT", help="serves Status (default: 9100; 0: none)"
    )
    parser.add_argument(
        "--termination-log", default="/dev/termination-log", metavar="FILE", help="takes the last words"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
