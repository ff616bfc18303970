"""The part of the lock that an image installs is whole, and not more than it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from tools import locked

LOCK = (locked.ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((locked.ROOT / "pyproject.toml").read_text())
EXTRAS = ("operator", "router", "worker")

SMALL = """\
# made by a tool
a-b==1 \\
    --hash=sha256:00 \\
    --hash=sha256:01
    # via project (pyproject.toml)
c==1 ; python_version < '3.12' \\
    --hash=sha256:02
    # via
    #   a-b
    #   e
c==2 ; python_version >= '3.12' \\
    --hash=sha256:03
    # via a-b
d==1 \\
    --hash=sha256:04
    # via c
e==1 \\
    --hash=sha256:05
    # via project (pyproject.toml)
"""


def packages(text: str) -> list[str]:
    return re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)


def test_what_is_needed_is_followed_to_its_end() -> None:
    assert packages(locked.closure(SMALL, ["A_b>=1"])) == ["a-b", "c", "c", "d"]
    assert packages(locked.closure(SMALL, ["c"])) == ["c", "c", "d"]
    assert packages(locked.closure(SMALL, ["d", "e"])) == ["c", "c", "d", "e"]


def test_entries_keep_their_markers_and_hashes() -> None:
    text = locked.closure(SMALL, ["a-b"])
    assert text.splitlines()[:3] == ["a-b==1 \\", "    --hash=sha256:00 \\", "    --hash=sha256:01"]
    assert "c==1 ; python_version < '3.12' \\\n    --hash=sha256:02\n" in text
    assert "#" not in text


def test_what_the_lock_lacks_is_said() -> None:
    with pytest.raises(locked.LockError, match="does not name f: run `make lock`"):
        locked.closure(SMALL, ["f"])
    with pytest.raises(locked.LockError, match="no extra nothing; it has"):
        locked.requirements(PROJECT, "nothing")


def installed_closure(extra: str) -> set[str]:
    """What an extra needs here, by what the installed packages say of themselves."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in locked.requirements(PROJECT, extra)]
    while waiting:
        requirement, _ = waiting.pop()
        name = locked.normal(requirement.name)
        for option in ("", *requirement.extras):
            if (mark := f"{name}[{option}]") in found:
                continue
            found.add(mark)
            for text in metadata.requires(name) or ():
                deeper = Requirement(text)
                if deeper.marker is None or deeper.marker.evaluate({"extra": option}):
                    waiting.append((deeper, option))
    return {mark.partition("[")[0] for mark in found}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_gets_all_that_it_needs(extra: str) -> None:
    chosen = set(packages(locked.closure(LOCK, locked.requirements(PROJECT, extra))))
    assert installed_closure(extra) <= chosen


@pytest.mark.parametrize("extra", ["operator", "router"])
def test_only_workers_bring_torch(extra: str) -> None:
    chosen = set(packages(locked.closure(LOCK, locked.requirements(PROJECT, extra))))
    assert not {"torch", "triton", "numpy", "numba", "pytest", "ruff"} & chosen


def test_workers_bring_the_cuda_libraries_in_wheels() -> None:
    chosen = set(packages(locked.closure(LOCK, locked.requirements(PROJECT, "worker"))))
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= chosen
    assert not {"pytest", "ruff", "matplotlib"} & chosen


def test_the_command_needs_nothing_installed() -> None:
    command = [sys.executable, "-S", "-I", str(locked.ROOT / "tools" / "locked.py")]
    outcome = subprocess.run([*command, "package", "hatchling"], capture_output=True, text=True, check=True)
    assert "hatchling" in packages(outcome.stdout)
    refused = subprocess.run([*command, "package", "no-such-thing"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr == "locked.py: requirements.lock does not name no-such-thing: run `make lock`\n"
