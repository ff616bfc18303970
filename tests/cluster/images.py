"""Images without a registry and without Docker: a tar of one layer, as `docker save` writes it."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True)
class Link:
    """A symbolic link in an image."""

    target: str


# What lies at a path in an image: a program or file with its mode, a link, or an empty folder with its mode.
Entry = tuple[bytes, int] | Link | int


@dataclass(frozen=True)
class Image:
    """An image of one layer: its name, what lies at which path, its configuration (Entrypoint, Cmd, Env, User, ...)."""

    name: str
    entries: Mapping[str, Entry]
    config: Mapping[str, object]


def write_images(archive: Path, *images: Image) -> Path:
    """Write the images as one docker-archive. The same input makes the same bytes."""
    files: dict[str, Entry] = {}
    manifest = []
    for image in images:
        layer = tar_of({path: image.entries[path] for path in sorted(image.entries)})
        digest = hashlib.sha256(layer).hexdigest()
        described = {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": dict(image.config),
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created_by": "arriero"}],
        }
        config = json.dumps(described, sort_keys=True).encode()
        config_name = f"{hashlib.sha256(config).hexdigest()}.json"
        files |= {f"{digest}.tar": (layer, 0o644), config_name: (config, 0o644)}
        manifest.append({"Config": config_name, "RepoTags": [image.name], "Layers": [f"{digest}.tar"]})
    files["manifest.json"] = (json.dumps(manifest).encode(), 0o644)
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


def pause_image(name: str, program: Path) -> Image:
    """The image of a pod's sandbox: one static program."""
    return Image(name, {"pause": (program.read_bytes(), 0o755)}, {"Entrypoint": ["/pause"], "User": "65535:65535"})
