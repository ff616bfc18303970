"""`arriero bench`: load on a server of OpenAI's API, and how it bears it."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from arriero_cli.bench_load import Sample, Target, Work, closed_loop, open_loop
from arriero_cli.bench_report import Level, as_json, draw, environment, failure_lines, summarize, table
from arriero_cli.endpoint import DEFAULT_URL, base_url, only_model, timeouts
from arriero_cli.errors import EXIT_FAILED, EXIT_USAGE, CommandError

_WIDE = 140
_PICTURES = (".png", ".svg", ".pdf")
_SAMPLE_TEXT = (
    "The pack train left the village before sunrise: eleven llamas, three dogs and a driver who knew every stone of "
    'the pass. By noon they had crossed two rivers, counted 48 bales of wool, and lost one bell. "Where does this '
    'road end?" asked the boy. "It does not," said the driver; "roads only change their names." They rested, ate '
    "maize and cheese, and went on towards the salt lakes, where traders from five valleys meet each year in August."
)

Lengths = tuple[int, int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure a server under load",
        description="Send streamed completions to a server of OpenAI's API and report time to first token, time "
        "between tokens, whole latency and throughput. Prompts are random token ids of ordinary words, so no prompt's "
        "beginning is in a prefix cache. With --rate requests are sent at random (Poisson) moments whatever the server "
        "does, and times count from the moment a request was due.",
        epilog="exit status: 0 measured, 1 no request succeeded or the server cannot be reached, 2 wrong usage",
    )
    parser.add_argument("--url", type=base_url, default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    parser.add_argument("--model", help="default: the server's first")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=_counts, default=[1, 4, 16], metavar="C,C,...", help="requests at once; default: 1,4,16"
    )
    load.add_argument("--rate", type=_rates, metavar="R,R,...", help="requests per second instead")
    parser.add_argument(
        "--requests", type=_count, metavar="N", help="per level; default: 8 for each one at once, or 64 with --rate"
    )
    parser.add_argument("--warmup", type=_count_or_none, metavar="N", default=4, help="unmeasured first; default: 4")
    parser.add_argument("--input-tokens", type=_lengths, default=(128, 128), metavar="A[-B]", help="default: 128")
    parser.add_argument("--output-tokens", type=_lengths, default=(64, 64), metavar="A[-B]", help="default: 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="of one request; default: 600")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts, lengths and moments; default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs the extra: arriero[plot])")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure every level. Raises CommandError."""
    _check_outputs(args)
    _allow_many_connections()
    with httpx.Client(timeout=timeouts(30), trust_env=False) as client:
        model = args.model or only_model(client, args.url)
        vocabulary = _ordinary_tokens(client, args.url, model)
    console = Console()
    if vocabulary is None:
        console.print(f"{args.url} has no /tokenize: prompts are words, as many as tokens were wanted", style="yellow")
    request = {"model": model, "temperature": args.temperature}
    if args.ignore_eos:
        request["ignore_eos"] = True
    started = time.time()
    levels = asyncio.run(_measure(args, request, vocabulary))
    (console if console.is_terminal else Console(width=_WIDE)).print(table(levels))
    for line in failure_lines(levels):
        console.print(line, style="red", highlight=False)
    _write(args, model, started, levels)
    if not any(level.requests > sum(level.failures.values()) for level in levels):
        raise CommandError("no request succeeded")
    return 0


async def _measure(args: argparse.Namespace, request: dict[str, Any], vocabulary: list[int] | None) -> list[Level]:
    target = Target(args.url, request, args.timeout)
    levels = []
    mode, values = ("concurrency", args.concurrency) if args.rate is None else ("rate", args.rate)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        try:
            if args.warmup:
                works = _works(args, vocabulary, args.warmup, random.Random(f"{args.seed} warm-up"))
                tell = _counter(bar, "warm-up", len(works))
                await closed_loop(target, works, args.warmup, tell)
            for value in values:
                rng = random.Random(f"{args.seed} {mode} {value}")
                count = args.requests or (max(16, 8 * value) if mode == "concurrency" else 64)
                works = _works(args, vocabulary, count, rng)
                tell = _counter(bar, f"{mode} {value:g}", count)
                if mode == "concurrency":
                    samples = await closed_loop(target, works, value, tell)
                else:
                    samples = await open_loop(target, works, value, rng, tell)
                levels.append(summarize(mode, value, samples))
        finally:
            await target.close()
    return levels


def _counter(bar: Progress, name: str, total: int) -> Callable[[Sample], None]:
    task = bar.add_task(name, total=total)
    return lambda sample: bar.advance(task)


def _works(args: argparse.Namespace, vocabulary: list[int] | None, count: int, rng: random.Random) -> list[Work]:
    works = []
    for _ in range(count):
        length = rng.randint(*args.input_tokens)
        if vocabulary is not None:
            prompt: str | list[int] = rng.choices(vocabulary, k=length)
        else:
            prompt = " ".join(rng.choices(_SAMPLE_TEXT.split(), k=length))
        works.append(Work(prompt, rng.randint(*args.output_tokens)))
    return works


def _ordinary_tokens(client: httpx.Client, url: str, model: str) -> list[int] | None:
    """Ids of tokens that stand for text, in the model's own tokenizer; None where the server does not tokenize."""
    try:
        response = client.post(
            f"{url}/tokenize", json={"model": model, "prompt": _SAMPLE_TEXT, "add_special_tokens": False}
        )
        tokens = response.json()["tokens"] if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
        return sorted(set(tokens))
    return None


def _write(args: argparse.Namespace, model: str, started: float, levels: Sequence[Level]) -> None:
    try:
        if args.json is not None:
            _write_json(args, model, started, levels)
        if args.plot is not None:
            draw(levels, f"{model}: {_words(args.input_tokens)} tokens in, {_words(args.output_tokens)} out", args.plot)
    except OSError as error:
        raise CommandError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from error


def _write_json(args: argparse.Namespace, model: str, started: float, levels: Sequence[Level]) -> None:
    report = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "url": args.url,
        "model": model,
        "seed": args.seed,
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "temperature": args.temperature,
        "ignore_eos": args.ignore_eos,
        "client": environment(),
        "levels": [as_json(level) for level in levels],
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out before the load what would fail after it."""
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"{path}: the directory does not exist", EXIT_USAGE)
    if args.plot is not None and args.plot.suffix.lower() not in _PICTURES:
        raise CommandError(f"{args.plot}: expected a name that ends in {', '.join(_PICTURES)}", EXIT_USAGE)
    if args.plot is not None and util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: install the extra arriero[plot]", EXIT_FAILED)


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _words(lengths: Lengths) -> str:
    return str(lengths[0]) if lengths[0] == lengths[1] else f"{lengths[0]}-{lengths[1]}"


# How options are read


def _count(text: str) -> int:
    if not 1 <= (value := int(text)) <= 10**7:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 to 10,000,000")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _positive(text: str) -> float:
    if not (0 < (value := float(text)) < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def _rates(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _lengths(text: str) -> Lengths:
    low, dash, high = text.partition("-")
    lengths = _count(low), _count(high if dash else low)
    if lengths[0] > lengths[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected A-B with A no larger than B")
    return lengths
