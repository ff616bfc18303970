"""Images without a registry and without Docker: a tar of one layer, as `docker save` writes it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True)
class Link:
    """A symbolic link in an image."""

    target: str


# What lies at a path in an image: a program or file with its mode, a link, or an empty folder with its mode.
Entry = tuple[bytes, int] | Link | int


def write_image(archive: Path, name: str, entries: Mapping[str, Entry], **config: object) -> Path:
    """Write an image of one layer as a docker-archive. `config` is its configuration: Entrypoint, Cmd, Env, User, ...

    The same input makes the same bytes.
    """
    layer = tar_of({path: entries[path] for path in sorted(entries)})
    layer_name = f"{hashlib.sha256(layer).hexdigest()}.tar"
    image = json.dumps(
        {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
            "history": [{"created_by": "arriero"}],
        },
        sort_keys=True,
    ).encode()
    image_name = f"{hashlib.sha256(image).hexdigest()}.json"
    manifest = json.dumps([{"Config": image_name, "RepoTags": [name], "Layers": [layer_name]}]).encode()
    files: dict[str, Entry] = {
        layer_name: (layer, 0o644),
        image_name: (image, 0o644),
        "manifest.json": (manifest, 0o644),
    }
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(tar_of(files))
    return archive


def tar_of(entries: Mapping[str, Entry]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, entry in entries.items():
            member = tarfile.TarInfo(path)
            content = b""
            match entry:
                case Link(target):
                    member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
                case int(mode):
                    member.type, member.mode = tarfile.DIRTYPE, mode
                case (content, mode):
                    member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def pause_image(archive: Path, name: str, program: Path) -> Path:
    """The image of a pod's sandbox: one static program."""
    return write_image(
        archive, name, {"pause": (program.read_bytes(), 0o755)}, Entrypoint=["/pause"], User="65535:65535"
    )


def thin_image(archive: Path, name: str, **config: object) -> Path:
    """An image that is the machine's own system: empty folders, over which `host_mounts` puts the machine's, read-only.

    Torch in a pod without an image of five gigabytes.
    """
    entries: dict[str, Entry] = {"tmp": 0o1777, "etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755}
    entries["etc/passwd"] = (b"root:x:0:0:root:/:/bin/sh\narriero:x:65532:65532:arriero:/tmp:/bin/sh\n", 0o644)
    entries["etc/group"] = (b"root:x:0:\narriero:x:65532:\n", 0o644)
    entries["etc/nsswitch.conf"] = (b"hosts: files dns\n", 0o644)
    for place in system_folders():
        if place.is_symlink():  # /bin -> usr/bin
            entries[str(place).strip("/")] = Link(os.readlink(place))
    for place in mounted_folders():
        for folder in (*reversed(place.parents), place):
            if folder != Path("/"):
                entries.setdefault(str(folder).strip("/"), 0o755)
    path = f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return write_image(archive, name, entries, **{"Env": [f"PATH={path}", "PYTHONDONTWRITEBYTECODE=1"], **config})


def system_folders() -> list[Path]:
    return [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64")) if path.exists()]


def mounted_folders() -> list[Path]:
    """What a pod of the thin image sees: the system's, this interpreter's, the environment's, the project's folders."""
    project = Path(__file__).resolve().parents[2]
    folders = [path for path in system_folders() if not path.is_symlink()]
    for folder in map(Path, (sys.base_prefix, sys.prefix, str(project))):
        if not any(folder.is_relative_to(other) for other in folders):
            folders.append(folder)
    return folders


def host_mounts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a pod's volumes, a container's volumeMounts) that fill the thin image."""
    folders = list(enumerate(mounted_folders()))
    volumes = [{"name": f"host-{index}", "hostPath": {"path": str(folder)}} for index, folder in folders]
    mounts = [{"name": f"host-{index}", "mountPath": str(folder), "readOnly": True} for index, folder in folders]
    return volumes, mounts


def thin_pod_spec(image: str, command: Sequence[str], **container: object) -> dict[str, Any]:
    """The spec of a pod that runs `command` in the thin image. `container`: more of its container."""
    volumes, mounts = host_mounts()
    return {
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "volumes": volumes,
        "containers": [
            {
                "name": "main",
                "image": image,
                "imagePullPolicy": "Never",
                "command": list(command),
                "volumeMounts": mounts,
                **container,
            }
        ],
    }
