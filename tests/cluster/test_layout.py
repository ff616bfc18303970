"""Clusters beside each other share nothing, and images are what containerd can load."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tests.cluster import images, slots, thin, thin_runtime
from tests.cluster.cgroups import hierarchies
from tests.cluster.layout import SLOTS, Layout
from tests.cluster.node import cni_config, containerd_config
from tests.cluster.processes import ClusterError, Program, wait_until


def test_no_two_clusters_share_an_address_or_a_name() -> None:
    seen: set[str] = set()
    for slot in range(SLOTS):
        layout = Layout(slot, 4, Path("/base"))
        own = {layout.local, layout.address, layout.pod_cidr, layout.service_cidr, layout.bridge, str(layout.home)}
        for node in layout.nodes:
            own |= {node.address, node.pod_cidr, node.link, node.cgroup}
            assert len(node.link) <= 15, "longer names of links are refused by the kernel"
            assert len(f"{node.home}/containerd.sock") < 108
        assert len(own) == 6 + 4 * 4
        assert not seen & own
        seen |= own


def test_the_pods_of_a_node_get_its_addresses(tmp_path: Path) -> None:
    layout = Layout(3, 2, tmp_path)
    bridge = cni_config(layout, layout.node(2))["plugins"][0]  # type: ignore[index]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.103.2.0/24"}]]
    assert f'root = "{tmp_path}/3/node-2/containerd"' in containerd_config(layout.node(2))


def test_a_control_plane_alone_listens_on_loopback() -> None:
    assert Layout(0, 0, Path("/base")).address.startswith("127.")


def test_an_image_names_its_layer_and_configuration_by_their_content(tmp_path: Path) -> None:
    entries: dict[str, images.Entry] = {"tmp": 0o1777, "bin": images.Link("usr/bin"), "run": (b"#!", 0o755)}
    image = images.Image("arriero.test/a:1", entries, {"Entrypoint": ["/run"]})
    archive = images.write_images(tmp_path / "a.tar", image)
    with tarfile.open(archive) as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    (manifest,) = json.loads(read["manifest.json"])
    layer, config = read[manifest["Layers"][0]], json.loads(read[manifest["Config"]])
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    assert config["config"] == {"Entrypoint": ["/run"]}
    assert manifest["RepoTags"] == ["arriero.test/a:1"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert tar.getmember("tmp").isdir()
        assert tar.getmember("tmp").mode == 0o1777
        assert tar.getmember("bin").linkname == "usr/bin"
    reordered = images.Image(image.name, dict(reversed(entries.items())), image.config)
    again = images.write_images(tmp_path / "b.tar", reordered)
    assert again.read_bytes() == archive.read_bytes()


def test_a_thin_image_sees_the_interpreter_and_the_project() -> None:
    mounts = thin.mounts(Path("/kernels"))
    places = [Path(mount["destination"]) for mount in mounts]
    for needed in (sys.prefix, sys.base_prefix, Path(sys.executable).resolve(), Path(__file__).resolve()):
        assert any(Path(needed).is_relative_to(place) for place in places), needed
    writable = [mount for mount in mounts if "ro" not in mount["options"]]
    assert [(mount["source"], mount["destination"]) for mount in writable] == [("/kernels", str(thin.KERNELS))]
    assert all(mount["source"] == mount["destination"] for mount in mounts if mount not in writable)


def test_of_a_folder_that_is_its_owners_alone_the_parts_are_mounted(tmp_path: Path) -> None:
    for name, mode in (("open", 0o755), ("closed", 0o700)):
        (tmp_path / name).mkdir(mode=mode)
    (tmp_path / "file").touch()
    tmp_path.chmod(0o755)
    assert thin.readable_parts(tmp_path) == [tmp_path]
    tmp_path.chmod(0o700)
    assert thin.readable_parts(tmp_path) == [tmp_path / "open"]


@pytest.mark.parametrize("marked", [True, False], ids=["thin", "other"])
def test_only_containers_of_thin_images_get_the_machines_folders(tmp_path: Path, marked: bool) -> None:
    own = {"destination": "/tmp", "type": "bind", "source": "/volume"}
    added = [{"destination": "/usr", "source": "/usr"}, {"destination": "/tmp", "source": "/tmp"}]
    spec = {"process": {"env": ["A=b", *([thin_runtime.MARK] if marked else [])]}, "mounts": [own]}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    (tmp_path / "mounts.json").write_text(json.dumps(added))
    arguments = ["create", "--bundle", str(tmp_path), "a container"]
    command = [sys.executable, "-IS", thin_runtime.__file__, str(tmp_path / "mounts.json"), "/bin/echo", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == " ".join(arguments)
    expected = [own, added[0]] if marked else [own]
    assert json.loads((tmp_path / "config.json").read_text()) == {**spec, "mounts": expected}


def test_cgroup_trees_are_found_under_both_versions(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    )
    found = [("cgroup", Path("/sys/fs/cgroup/cpu")), ("cgroup2", Path("/sys/fs/cgroup/unified"))]
    assert hierarchies(mounts) == found


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slots, "base_folder", lambda: tmp_path / "base")
    return tmp_path / "base"


def test_a_slot_has_one_owner_at_a_time(base: Path) -> None:
    first, second = slots.acquire_any(), slots.acquire_any()
    assert (first.number, second.number) == (0, 1)
    assert slots.acquire(0) is None
    assert slots.used() == [0, 1]
    first.release()
    assert not slots.is_held(0)
    assert slots.is_held(1)
    second.release()
    assert not base.exists()


def test_folders_made_outside_go_with_the_last_cluster(base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "kubelet"
    first, second = slots.acquire_any(), slots.acquire_any()
    slots.make_folders([str(outside)])
    first.release()
    assert outside.exists()
    second.release()
    assert not outside.parent.exists()
    assert tmp_path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")
def test_a_program_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal\n"
        "from tests.cluster.processes import Program\n"
        f"program = Program('sleeper', ['sleep', '1000'], pathlib.Path({str(tmp_path)!r}))\n"
        "program.start()\n"
        "print(program.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    child = int(answer.stdout)

    def is_gone() -> bool:
        stat = Path(f"/proc/{child}/stat")
        try:
            return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(is_gone, "end of the child", 20.0)


def test_waiting_for_a_program_that_ended_tells_its_last_words(tmp_path: Path) -> None:
    program = Program("broken", [sys.executable, "-c", "raise SystemExit('no such flag')"], tmp_path)
    program.start()
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ClusterError, match="broken ended while waiting for its answer:\nno such flag"):
        wait_until(lambda: False, "its answer", 20.0, [program])
