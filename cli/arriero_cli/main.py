"""The `arriero` command: each subcommand is a module that offers `add_parser(subparsers)`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from arriero_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, CommandError

COMMANDS = ("up", "plan", "chat", "bench")

_EPILOG = "exit status: 0 done, 1 failed, 2 wrong usage or an invalid file, 130 interrupted"


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands; only their modules are imported."""
    parser = argparse.ArgumentParser(
        prog="arriero", description="Serve Llama models, and talk to what serves them.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"arriero {metadata.version('arriero')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        import_module(f"arriero_cli.{command}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0 done, 1 failed, 2 wrong usage or an invalid file, 130 interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    commands = words[:1] if words and words[0] in COMMANDS else COMMANDS
    return execute(build_parser(commands).parse_args(words))


def execute(args: argparse.Namespace) -> int:
    """Run what was parsed; its failure becomes one sentence on standard error."""
    try:
        return int(args.run(args))
    except CommandError as error:
        print(f"arriero: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter's last flush must not complain about it.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
