"""The house keeps its own rules: what lies where, what may stand in a tracked file, and that its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LOCKED_EXTRAS = ("worker", "router", "dev", "plot")
# Spelled in pieces: this file is a tracked file, too.
REGISTRY_HOSTS = re.compile(
    "files.python" + r"hosted\.|py" + r"pi\.(?:org|io)|/sim" + "ple/[a-z]|arti" + r"factory|nexus3?\.|dev" + "pi"
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}/-])/(?:" + "work|farm|home|Users|root" + r")/[\w.-]+")


@cache
def tracked_files() -> tuple[Path, ...]:
    """Tracked files that exist in the working tree."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return tuple(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def offences(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for match in pattern.finditer(text):
            found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return found


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def locked_versions() -> dict[str, set[str]]:
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def test_operator_directory_is_no_package() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists(), "it would shadow the standard library's operator module"


def test_imports_point_down_only() -> None:
    outcome = subprocess.run([BIN / "lint-imports", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_every_source_root_is_packaged_and_typed() -> None:
    build = project()["tool"]["hatch"]["build"]
    packages = build["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} == set(build["dev-mode-dirs"])
    for package in packages:
        assert (ROOT / package).is_dir()
        if package != "proto/arriero":  # generated code, typed by its .pyi files
            assert (ROOT / package / "py.typed").exists(), package


def test_no_package_registry_is_named() -> None:
    assert offences(REGISTRY_HOSTS) == []


def test_no_path_of_one_machine_is_named() -> None:
    assert offences(MACHINE_PATHS) == []


@pytest.mark.parametrize(
    "sample", ["https://py" + "pi.org/x", "https://files.pythonhosted" + ".org/y", "h/simple" + "/torch"]
)
def test_the_search_for_registries_finds_them(sample: str) -> None:
    assert REGISTRY_HOSTS.search(sample)


@pytest.mark.parametrize("sample", [" /home" + "/ana/x", '"/work' + '/main"', "=/root" + "/.cache"])
def test_the_search_for_paths_finds_them(sample: str) -> None:
    assert MACHINE_PATHS.search(sample)


def test_lock_names_every_requirement_with_hashes() -> None:
    metadata = project()["project"]
    wanted = list(metadata["dependencies"])
    for extra in LOCKED_EXTRAS:
        wanted += metadata["optional-dependencies"][extra]
    missing = {normal(requirement) for requirement in wanted} - set(locked_versions())
    assert not missing, f"run `make lock`: requirements.lock does not name {sorted(missing)}"
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)


def test_lock_satisfies_the_lower_bounds() -> None:
    def number(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    metadata = project()["project"]
    locked = locked_versions()
    for requirement in metadata["dependencies"] + [
        r for e in LOCKED_EXTRAS for r in metadata["optional-dependencies"][e]
    ]:
        if bound := re.search(r">=\s*([\d.]+)", requirement):
            for version in locked[normal(requirement)]:
                assert number(version) >= number(bound[1]), f"run `make lock`: {requirement} against {version}"


def test_lock_is_the_only_lock() -> None:
    others = [
        p.name for p in tracked_files() if p.name in {"uv.lock", "poetry.lock", "Pipfile.lock", "package-lock.json"}
    ]
    assert others == [], "such files carry the addresses of an index"


def test_pre_commit_runs_local_hooks_only() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [entry["repo"] for entry in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        program = Path(hook["entry"].split()[0])
        assert (BIN / program.name if program.parts[0] == ".venv" else ROOT / program).exists(), hook["entry"]


def test_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z]+)", "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL))))
    assert {"serve", "test"} <= used
    assert used <= targets
    listed = subprocess.run([BIN / "arriero", "--help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"\barriero (up|plan|chat|bench|[a-z]+) ", readme)):
        assert re.search(rf"^\s+{command}\b", listed, re.MULTILINE), command


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert re.search(r"^make test$", script, re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
