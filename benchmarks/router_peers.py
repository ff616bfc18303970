"""The routers that benchmarks/router.py and benchmarks/router_chaos.py compare ours with, each in a virtual environment
of its own under ~/.cache/arriero/peers:

    python benchmarks/router_peers.py --install            # from PyPI, needs the network once
    python benchmarks/router_peers.py                      # what is there, and how it is started
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOME = Path.home() / ".cache" / "arriero" / "peers"


@dataclass(frozen=True)
class Peer:
    """A router in Rust with a Python launcher."""

    name: str
    program: tuple[str, ...]
    """Behind the environment's bin directory."""
    quiet: str
    """Its word for the log level that leaves out a line per request."""

    @property
    def home(self) -> Path:
        return HOME / self.name

    @property
    def installed(self) -> bool:
        return self.version() is not None

    def version(self) -> str | None:
        """Of the distribution; None: not installed."""
        found = sorted(self.home.glob(f"lib/python*/site-packages/{self.name.replace('-', '_')}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else None

    def command(self, port: int, metrics_port: int, urls: Sequence[str]) -> list[str]:
        program = [str(self.home / "bin" / self.program[0]), *self.program[1:]]
        return [
            *program,
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", *urls),
            *("--policy", "cache_aware"),
            *("--prometheus-port", str(metrics_port), "--prometheus-host", "127.0.0.1"),
            *("--log-level", self.quiet),
        ]

    def install(self) -> None:
        """Raises CalledProcessError."""
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        HOME.mkdir(parents=True, exist_ok=True)
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", str(self.home)], check=True)
        python = str(self.home / "bin" / "python")
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, self.name], check=True)


PEERS = (
    Peer("sglang-router", ("python", "-m", "sglang_router.launch_router"), "warn"),
    Peer("vllm-router", ("vllm-router",), "warning"),
    Peer("smg", ("smg", "launch"), "warn"),
)


def install_all() -> None:
    for peer in PEERS:
        if not peer.installed:
            print(f"installing {peer.name} into {peer.home}", flush=True)
            peer.install()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    if parser.parse_args().install:
        install_all()
    for peer in PEERS:
        command = peer.command(8000, 8001, ["http://127.0.0.1:8100", "http://127.0.0.1:8200"])
        print(json.dumps({"name": peer.name, "version": peer.version(), "command": command}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
