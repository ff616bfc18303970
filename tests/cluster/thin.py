"""Thin images: empty folders over which each node puts this machine's system, interpreter, environment and checkout.

So the product's pods run here as they are written, torch and all, without an image of five gigabytes and without a
build: what runs is the checkout.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from tests.cluster import thin_runtime
from tests.cluster.images import Entry, Image, Link

PROJECT = Path(__file__).resolve().parents[2]
USER = 65532  # whom the product's images run as
THIN_IMAGE = "arriero.test/thin:1"
PRODUCT_IMAGES = {name: f"{name}:test" for name in ("arriero-operator", "arriero-router", "arriero-worker")}
"""Program -> the image that its pods name."""
KERNELS = Path("/var/cache/arriero/kernels")
"""Where workers find the CPU kernels that were compiled before."""


def thin_images() -> list[Image]:
    """One without a program or user of its own, and one for each program, configured like that of its Dockerfile."""
    entries = thin_entries()
    path = f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = [f"PATH={path}", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1", thin_runtime.MARK]
    program = {"User": f"{USER}:{USER}", "WorkingDir": "/tmp", "Env": [*env, f"NUMBA_CACHE_DIR={KERNELS}"]}
    products = [
        Image(image, entries, {"Entrypoint": [name], **program}) for name, image in sorted(PRODUCT_IMAGES.items())
    ]
    return [Image(THIN_IMAGE, entries, {"Env": env}), *products]


def thin_entries() -> dict[str, Entry]:
    entries: dict[str, Entry] = {"tmp": 0o1777, "etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755}
    entries["etc/passwd"] = (
        f"root:x:0:0:root:/:/bin/sh\narriero:x:{USER}:{USER}:arriero:/tmp:/bin/sh\n".encode(),
        0o644,
    )
    entries["etc/group"] = (f"root:x:0:\narriero:x:{USER}:\n".encode(), 0o644)
    entries["etc/nsswitch.conf"] = (b"hosts: files dns\n", 0o644)
    for place in system_folders():
        if place.is_symlink():  # /bin -> usr/bin
            entries[str(place).strip("/")] = Link(os.readlink(place))
    return entries


def system_folders() -> list[Path]:
    # /etc/ssl: whom TLS trusts; without it some clients cannot even be made.
    return [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ssl")) if path.exists()]


def machine_folders() -> list[Path]:
    """The machine's folders that a container sees at their own places: the system's, this interpreter's, the
    environment's, the checkout's. Folders above them need not be readable to the container's user.
    """
    folders = [path for path in system_folders() if not path.is_symlink()]
    interpreter = Path(sys.executable).resolve().parents[1]
    for folder in (Path(sys.base_prefix), interpreter, PROJECT, Path(sys.prefix)):
        if not any(folder.is_relative_to(other) for other in folders):
            folders.append(folder)
    return [part for folder in folders for part in readable_parts(folder)]


def readable_parts(folder: Path) -> list[Path]:
    """The folder; or what is in it, where it is its owner's alone, as a checkout made in a temporary folder is."""
    if is_readable(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and is_readable(path)]


def is_readable(folder: Path) -> bool:
    """Whether users other than its owner and group may read the folder."""
    return not ~folder.stat().st_mode & (stat.S_IROTH | stat.S_IXOTH)


def unreadable() -> list[Path]:
    """Folders that containers need and that their user may not read."""
    needed = (Path(sys.base_prefix), Path(sys.prefix), *(PROJECT / name for name in ("proto", "plan", "worker")))
    return [folder for folder in needed if not is_readable(folder)]


def mounts(kernels: Path) -> list[dict[str, Any]]:
    """What is mounted into the containers of thin images, as the OCI runtime specification has it."""
    found = [mount(folder, folder, "ro") for folder in machine_folders()]
    # Writable: numba takes no other folder for a cache, and workers lock a file there.
    return [*found, mount(kernels, KERNELS, "rw")]


def mount(source: Path, destination: Path, mode: str) -> dict[str, Any]:
    options = ["rbind", "rprivate", mode]
    return {"destination": str(destination), "type": "bind", "source": str(source), "options": options}


def write_runtime(folder: Path, kernels: Path) -> Path:
    """Write what a node's containerd starts as runc. `kernels`: the folder for KERNELS, the same for all nodes."""
    runc = shutil.which("runc")
    assert runc is not None
    listed = folder / "mounts.json"
    listed.write_text(json.dumps(mounts(kernels), indent=1))
    program = folder / "runc"
    command = shlex.join([sys.executable, "-IS", thin_runtime.__file__ or "", str(listed), runc])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return program
