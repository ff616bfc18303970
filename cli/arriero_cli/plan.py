"""`arriero plan FILE`: how a LlamaDeployment would be cut and whether it fits, without starting anything."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from arriero_plan.group import check_servable
from arriero_plan.known import known_config
from arriero_plan.model import ModelError, ModelShape
from arriero_plan.plan import Plan, PlanError, make_plan
from arriero_plan.spec import LlamaDeployment, SpecError, parse_deployment
from arriero_plan.table import STAGE_COLUMNS, stage_rows, summary_rows

EXIT_CANNOT_FIT = 1
EXIT_INVALID = 2
_WIDE = 120


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="show how a deployment would be cut over devices",
        description="Show the layout, layers and memory that a LlamaDeployment would get, or why it cannot fit.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a LlamaDeployment in YAML")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the model's config.json, where it is not found by itself"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 with the plan on stdout; 1 where it cannot fit and 2 where the input is invalid, said on stderr."""
    try:
        deployment = load_deployment(args.file)
        plan = make_plan(deployment, load_shape(deployment, args.file.parent, args.config))
    except PlanError as error:
        print(f"{args.file}: {error}", file=sys.stderr)
        return EXIT_CANNOT_FIT
    except (SpecError, ModelError) as error:
        print(error, file=sys.stderr)
        return EXIT_INVALID
    if args.output == "json":
        print(plan.model_dump_json(indent=2))
    else:
        console = Console()
        print_table(plan, console if console.is_terminal else Console(width=_WIDE))
    return 0


def load_deployment(path: Path) -> LlamaDeployment:
    """Read a file. Raises SpecError, also where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [_reason(error)]) from error
    return parse_deployment(text, str(path))


def model_directory(deployment: LlamaDeployment, base: Path) -> Path | None:
    """The checkpoint's directory on this machine, for a hostPath source; a relative path begins at `base`."""
    host_path = deployment.spec.model.source.host_path
    return None if host_path is None else base / host_path.path


def load_shape(deployment: LlamaDeployment, base: Path, config: Path | None = None) -> ModelShape:
    """The model's shape, from `config`, else the checkpoint on this machine, else the table of public Llama models.

    base: the directory of the deployment's file. Raises ModelError.
    """
    directory = model_directory(deployment, base)
    path = config if config is not None or directory is None else directory / "config.json"
    if path is not None:
        return ModelShape.from_config(_read_json(path), str(path))
    model = deployment.spec.model
    hub = model.source.hugging_face
    name = model.name if hub is None else hub.repo
    known = known_config(name)
    if known is None:
        raise ModelError(f"{name} is no public Llama 3 model: name its config.json with --config FILE")
    return ModelShape.from_config(known, name)


def print_table(plan: Plan, console: Console) -> None:
    """Print a plan for people; 80 columns are enough for its stages."""
    summary = Table(box=None, show_header=False, pad_edge=False)
    summary.add_column(style="bold", no_wrap=True)
    summary.add_column()
    for name, value in summary_rows(plan):
        summary.add_row(name, value)
    try:
        check_servable(plan)
    except PlanError as error:
        summary.add_row("note", str(error))
    stages = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="one device of each stage",
        title_justify="left",
    )
    for number, column in enumerate(STAGE_COLUMNS):
        stages.add_column(column, justify="left" if number < 3 else "right", no_wrap=True)
    for row in stage_rows(plan):
        stages.add_row(*row)
    console.print(summary, highlight=False)
    console.print()
    console.print(stages, highlight=False)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
