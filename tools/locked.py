"""The part of requirements.lock that an extra of pyproject.toml, or a package, needs; with all hashes.

    python tools/locked.py extra operator
    python tools/locked.py package hatchling

Images install what this prints, so that one lock serves all. Needs the standard library alone: it runs before anything
is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ENTRY = re.compile(r"^(?=[A-Za-z0-9])", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VIA = re.compile(r"^ +#(?: via)? +(\S+)", re.MULTILINE)


class LockError(Exception):
    """The lock does not hold what was asked for, in one sentence."""


def normal(requirement: str) -> str:
    """The name that a requirement begins with, as indices spell it."""
    found = _NAME.match(requirement)
    if found is None:
        raise LockError(f"{requirement!r} does not begin with the name of a package")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def entries(lock: str) -> dict[str, list[str]]:
    """Entries by package: more than one where versions differ by marker."""
    found: dict[str, list[str]] = {}
    for entry in _ENTRY.split(lock)[1:]:
        found.setdefault(normal(entry), []).append(entry)
    return found


def needs(locked: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """What each package requires, from the `via` comments: they tell the same, from the other end."""
    found: dict[str, set[str]] = {}
    for package, texts in locked.items():
        for text in texts:
            for user in _VIA.findall(text):
                found.setdefault(normal(user), set()).add(package)
    return found


def closure(lock: str, roots: Iterable[str]) -> str:
    """The entries of `roots` and of all that they require, sorted. Raises LockError."""
    locked = entries(lock)
    required = needs(locked)
    reached: set[str] = set()
    waiting = [normal(root) for root in roots]
    while waiting:
        package = waiting.pop()
        if package in reached:
            continue
        if package not in locked:
            raise LockError(f"requirements.lock does not name {package}: run `make lock`")
        reached.add(package)
        waiting += required.get(package, ())
    lines = [line for package in sorted(reached) for text in locked[package] for line in text.splitlines()]
    return "".join(f"{line}\n" for line in lines if not line.lstrip().startswith("#"))


def requirements(project: Mapping[str, object], extra: str) -> list[str]:
    """The project's own requirements with an extra's. Raises LockError."""
    metadata = project["project"]
    assert isinstance(metadata, dict)
    extras = metadata["optional-dependencies"]
    if extra not in extras:
        raise LockError(f"pyproject.toml has no extra {extra}; it has {', '.join(sorted(extras))}")
    return [*metadata["dependencies"], *extras[extra]]


def main(arguments: list[str]) -> int:
    match arguments:
        case ["extra", extra]:
            roots = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")), extra)
        case ["package", package]:
            roots = [package]
        case _:
            raise LockError("usage: locked.py extra EXTRA | locked.py package PACKAGE")
    sys.stdout.write(closure((ROOT / "requirements.lock").read_text(encoding="utf-8"), roots))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LockError as error:
        sys.exit(f"locked.py: {error}")
