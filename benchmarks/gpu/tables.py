"""The tuning tables as files: read whole, merged with what tuning found, written as they are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero_kernels import tuning
from arriero_kernels.tuning import Parameters

DIRECTORY = Path(tuning.__file__).with_name("tables")

Rows = Sequence[tuple[int | None, Parameters]]


def merged(rows: Rows, found: Mapping[int, Parameters]) -> list[tuple[int | None, Parameters]]:
    """The rows, with what was found at some sizes.

    What was found at a size holds from the next smaller bound, or size, up to it; behind the last bound, what was found
    at the largest size holds for the rest as well. Everything else stays. Equal neighbours become one row.
    """
    bounds = sorted({bound for bound, _ in rows if bound is not None} | set(found))
    result: list[tuple[int | None, Parameters]] = []
    for bound in [*bounds, None]:
        if bound is not None and bound in found:
            parameters = found[bound]
        elif bound is None and bounds and bounds[-1] in found and bounds[-1] not in dict(rows):
            parameters = found[bounds[-1]]
        else:
            parameters = next(p for up_to, p in rows if up_to is None or (bound is not None and bound <= up_to))
        if result and dict(result[-1][1]) == dict(parameters):
            result.pop()
        result.append((bound, parameters))
    return result


def path_of(device: str, directory: Path = DIRECTORY) -> Path:
    """The file of the table for a device, by how the device's name begins; a new one's is made of its name."""
    for path in sorted(directory.glob("*.json")):
        if device.startswith(json.loads(path.read_text())["device"]):
            return path
    words = device.removeprefix("NVIDIA ").lower().split()
    return directory / f"{'-'.join(words)}.json"


def read(path: Path, device: str, multiprocessors: int) -> dict[str, Any]:
    """A table's content; for a file that is not there, the default table's as one of the device's, not measured."""
    if path.is_file():
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    content = json.loads((path.parent / f"{tuning.DEFAULT}.json").read_text())
    ops = {key: {"measured": None, "rows": op["rows"]} for key, op in content["ops"].items()}
    return {"device": device, "multiprocessors": multiprocessors, "ops": ops}


def rows_of(content: Mapping[str, Any], key: str) -> list[tuple[int | None, Parameters]]:
    """An operation's rows in a table's content."""
    rows = content["ops"][key]["rows"]
    return [(row["up_to"], {name: value for name, value in row.items() if name != "up_to"}) for row in rows]


def with_found(content: Mapping[str, Any], key: str, found: Mapping[int, Parameters], measured: str) -> dict[str, Any]:
    """The content with what was found for an operation, and in which run."""
    rows = merged(rows_of(content, key), found)
    sizes = ", ".join(map(str, sorted(found)))
    op = {
        "measured": f"{measured}, at {sizes}",
        "rows": [{"up_to": bound, **parameters} for bound, parameters in rows],
    }
    return {**content, "ops": {**content["ops"], key: op}}


def text_of(content: Mapping[str, Any]) -> str:
    """As tables are kept: keys sorted, one row a line."""
    ops = []
    for key, op in sorted(content["ops"].items()):
        rows = ",\n".join(f"        {json.dumps(row)}" for row in op["rows"])
        ops.append(
            f'    {json.dumps(key)}: {{\n      "measured": {json.dumps(op["measured"])},\n'
            f'      "rows": [\n{rows}\n      ]\n    }}'
        )
    head = f'  "device": {json.dumps(content["device"])},\n  "multiprocessors": {content["multiprocessors"]},\n'
    return f'{{\n{head}  "ops": {{\n' + ",\n".join(ops) + "\n  }\n}\n"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """In one step: an interrupted run leaves the old table or the new one."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text_of(content))
    unfinished.replace(path)
