"""The Dockerfiles fit the project: extras, programs, ports and users are those of the rest."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from tools import locked

from arriero_operator.inspector import inspector_pod
from arriero_operator.settings import Settings
from arriero_plan.resource import LlamaDeployment

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = ("operator", "router", "worker")
PORTS = {"operator": {8080}, "router": {8000, 9000}, "worker": {8000, 9000, 9100, 29500}}
# Spelled in pieces: this is a tracked file, too.
REGISTRIES = re.compile(r"gh" + r"cr\.|qu" + r"ay\.|docker" + r"\.io|nv" + r"cr\.|\.gc" + r"r\.|/lib" + "rary/")


@dataclass(frozen=True)
class Dockerfile:
    """Instructions by stage; the last stage is the image."""

    text: str
    stages: tuple[tuple[tuple[str, str], ...], ...]

    @classmethod
    def read(cls, program: str) -> Dockerfile:
        text = (ROOT / "images" / f"{program}.Dockerfile").read_text()
        lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        stages: list[list[tuple[str, str]]] = [[]]
        for line in lines.replace("\\\n", " ").splitlines():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                stages.append([])
            if word:
                stages[-1].append((word, " ".join(rest.split())))
        return cls(text, tuple(tuple(stage) for stage in stages))

    def last(self, word: str) -> str:
        return [rest for name, rest in self.stages[-1] if name == word][-1]

    def all(self, word: str, stage: int = -1) -> list[str]:
        return [rest for name, rest in self.stages[stage] if name == word]


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def dockerfile(program: str) -> Dockerfile:
    return Dockerfile.read(program)


def test_it_installs_the_programs_extra_and_starts_the_program(dockerfile: Dockerfile, program: str) -> None:
    assert re.findall(r"locked\.py extra (\S+)", dockerfile.text) == [program]
    assert program in PROJECT["project"]["optional-dependencies"]
    (entry,) = json.loads(dockerfile.last("ENTRYPOINT"))
    assert entry == f"arriero-{program}"
    assert entry in PROJECT["project"]["scripts"]


def test_it_takes_nothing_that_the_lock_does_not_hash(dockerfile: Dockerfile) -> None:
    installs = re.findall(
        r"pip(?: --python \S+)? install[^&\n]*", " ".join(dockerfile.text.replace("\\\n", " ").split("\n"))
    )
    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "--no-index" in install
    assert "--no-build-isolation" in dockerfile.text


def test_the_image_has_no_root_and_no_shell_around_its_program(dockerfile: Dockerfile) -> None:
    assert dockerfile.last("USER") == "65532:65532"
    order = [word for word, _ in dockerfile.stages[-1]]
    assert "RUN" not in order[order.index("USER") :]
    assert dockerfile.last("STOPSIGNAL") == "SIGTERM"
    assert isinstance(json.loads(dockerfile.last("CMD")), list)
    assert any("--uid 65532" in run for run in dockerfile.all("RUN"))


def test_both_stages_begin_with_the_same_plain_base(dockerfile: Dockerfile) -> None:
    bases = [stage[0][1].split()[0] for stage in dockerfile.stages[1:]]
    assert bases == ["${PYTHON_IMAGE}"] * 2
    (base,) = dockerfile.all("ARG", 0)
    assert re.fullmatch(r"PYTHON_IMAGE=python:\d\.\d+-slim", base)
    lowest = tuple(map(int, re.findall(r"\d+", PROJECT["project"]["requires-python"])))
    assert tuple(map(int, re.findall(r"\d+", base))) >= lowest
    assert not REGISTRIES.search(dockerfile.text)


def test_the_label_names_the_projects_version(dockerfile: Dockerfile, program: str) -> None:
    assert dockerfile.all("ARG") == [f"VERSION={PROJECT['project']['version']}"]
    label = dockerfile.last("LABEL")
    for part in ("title", "description", "version", "licenses"):
        assert f"org.opencontainers.image.{part}=" in label
    assert f'licenses="{PROJECT["project"]["license"]}"' in label
    assert f'title="arriero-{program}"' in label


def test_ports_are_those_of_the_program(dockerfile: Dockerfile, program: str) -> None:
    assert {int(port) for port in dockerfile.last("EXPOSE").split()} == PORTS[program]


def test_the_three_differ_only_where_they_must() -> None:
    builds = {json.dumps(Dockerfile.read(program).stages[1]).replace(program, "PROGRAM") for program in PROGRAMS}
    assert len(builds) == 1


def test_what_the_operator_starts_in_the_worker_image_is_there() -> None:
    deployment = LlamaDeployment.model_validate(
        {
            "apiVersion": "serving.arriero.dev/v1alpha1",
            "kind": "LlamaDeployment",
            "metadata": {"name": "x"},
            "spec": {
                "model": {"name": "x", "source": {"huggingFace": {"repo": "some/model"}}},
                "accelerator": {"type": "cpu"},
            },
        }
    )
    pod = inspector_pod(deployment, "llamas", "uid", Settings(worker_image="w", router_image="r"))
    # `cp` is of the base (coreutils); everything else is a program of the project.
    (copy,) = [container["command"][0] for container in pod["spec"]["containers"]]
    assert copy == "cp"
    (download,) = [container["command"][0] for container in pod["spec"]["initContainers"]]
    assert download in PROJECT["project"]["scripts"]
    assert "gcc" in Dockerfile.read("worker").text, "Triton compiles its launcher"


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that matches decides, for folders above it, too."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern, keep = line.removeprefix("!"), line.startswith("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[: index + 1]) for index in range(len(parts))]
        plain = pattern.removeprefix("**/")
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, plain) for name in names):
            kept = keep
    return kept


def test_the_context_holds_what_is_built_and_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = [name for name in listed.stdout.split("\0") if name]
    going = {name for name in tracked if sent(name)}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    code = {name for name in tracked if any(name.startswith(f"{package}/") for package in packages)}
    files = {"LICENSE", "README.md", "pyproject.toml", "requirements.lock", "tools/locked.py"}
    assert code | files <= going
    rooms = {package.split("/")[0] for package in packages} | {"kernels"}
    assert {name for name in going - files if name.split("/")[0] not in rooms} == set()
    assert not sent(".venv/bin/python")
    assert not sent("worker/arriero_worker/__pycache__/pod.pyc")
    assert not sent(".git/config")


def test_the_lock_names_the_backend_that_builds() -> None:
    (backend,) = PROJECT["build-system"]["requires"]
    assert re.findall(r"locked\.py package (\S+)", Dockerfile.read("operator").text) == [locked.normal(backend)]
    assert locked.closure((ROOT / "requirements.lock").read_text(), [backend]).startswith("hatchling==")
