"""The command as a whole: its subcommands, exit statuses and one-sentence errors."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from arriero_cli.main import COMMANDS, main


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"arriero {metadata.version('arriero')}\n"


def test_help_lists_every_command_and_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in printed
    assert "130 interrupted" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["serve"], "argument COMMAND: invalid choice: 'serve'"),
        (["up"], "the following arguments are required: FILE"),
        (["up", "f", "--http-port", "65536"], "argument --http-port: 65536 is no port (0 to 65535)"),
        (["up", "f", "--grpc-port", "http"], "argument --grpc-port: http is no port (0 to 65535)"),
        (
            ["chat", "--url", "file:///etc/passwd"],
            "argument --url: 'file:///etc/passwd' is no http:// or https:// address",
        ),
        (["bench", "--url", "127.0.0.1:8000"], "argument --url: '127.0.0.1:8000' is no http:// or https:// address"),
        (["bench", "--url", "http://h:port"], "argument --url: 'http://h:port': "),
        (["bench", "--concurrency", "1", "--rate", "2"], "not allowed with argument"),
        (["bench", "--concurrency", "1,,2"], "argument --concurrency: "),
        (["bench", "--rate", "0"], "argument --rate: 0: expected a number above 0"),
        (["bench", "--rate", "nan"], "argument --rate: nan: expected a number above 0"),
        (["bench", "--input-tokens", "9-3"], "argument --input-tokens: 9-3: expected A-B with A no larger than B"),
        (
            ["bench", "--output-tokens", "0"],
            "argument --output-tokens: 0: expected a whole number from 1 to 10,000,000",
        ),
    ],
)
def test_wrong_usage_is_status_2_with_a_sentence(capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_command_line_starts_without_the_engine_and_without_what_other_commands_need():
    code = (
        "import sys; from arriero_cli.main import build_parser; build_parser(['up']); "
        "print([name for name in ('torch', 'numba', 'httpx', 'matplotlib') if name in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"


def test_a_reader_that_leaves_early_is_no_traceback(deployment_file):
    command = f"{sys.executable} -m arriero_cli.main plan {deployment_file()} -o json | head -c 1"
    outcome = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert outcome.stdout == "{"
    assert outcome.stderr == ""
