"""`arriero chat`: a conversation with a served model."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from arriero_cli.endpoint import (
    DEFAULT_URL,
    DONE,
    base_url,
    error_sentence,
    only_model,
    parse_event,
    timeouts,
    unreachable,
)
from arriero_cli.errors import EXIT_FAILED, CommandError

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C interrupts an answer"
# A model's words may not steer the terminal: control characters but line feed and tab are dropped.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a served model",
        description=f"Hold a conversation with a model. {_HELP}. Where standard input is no terminal, each of its "
        "lines is one question, and the answers are printed and nothing else.",
        epilog="exit status: 0 left, 1 failed, 2 wrong usage",
    )
    parser.add_argument("--url", type=base_url, default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0: always the likeliest token; default: the model's"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="default: the model's")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most; default: the context")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converse until the questions end. Raises CommandError."""
    # Whom we talk to is what --url says, whatever proxies the environment names.
    with httpx.Client(timeout=timeouts(), trust_env=False) as client:
        model = args.model or only_model(client, args.url)
        asked = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_tokens": args.max_tokens,
            "seed": args.seed,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        conversation = Conversation(client, args.url, {"model": model, **options}, args.system)
        if sys.stdin.isatty():
            return _interactive(conversation, model)
        return _piped(conversation)


class Conversation:
    """The turns so far; `request` holds the fields of every request."""

    def __init__(self, client: httpx.Client, url: str, request: dict[str, Any], system: str | None) -> None:
        self._client, self._url, self._request = client, url, request
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.cut_off = False
        """Whether the last answer reached its length limit."""
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._messages: list[dict[str, str]] = list(self._system)

    def ask(self, question: str) -> Iterator[str]:
        """Stream the answer. Leaving early closes the connection, by which the server stops; what had come stays in the
        conversation. A question without any answer does not. Raises CommandError.
        """
        self._messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()

    def _stream(self) -> Iterator[str]:
        body = {**self._request, "messages": self._messages, "stream": True}
        ended = False
        try:
            with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise CommandError(error_sentence(response.status_code, response.read()))
                for line in response.iter_lines():
                    ended = ended or line.removeprefix("data:").strip() == DONE
                    for choice in (parse_event(line) or {}).get("choices", ()):
                        self.cut_off = choice.get("finish_reason") == "length"
                        if piece := (choice.get("delta") or {}).get("content"):
                            yield piece
        except httpx.HTTPError as error:
            raise unreachable(self._url, error) from error
        if not ended:
            raise CommandError("the answer broke off: the server closed the connection")


def _interactive(conversation: Conversation, model: str) -> int:
    import readline  # noqa: F401  # gives input() a history and line editing

    print(f"{model}. {_HELP}.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if question.startswith("/"):
            if _command(conversation, question):
                return 0
        elif question:
            try:
                _print_answer(conversation, question)
            except KeyboardInterrupt:
                print("\n(interrupted)")
            except CommandError as error:
                print(f"arriero: {error}", file=sys.stderr)


def _piped(conversation: Conversation) -> int:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in sys.stdin:
        question = line.strip()
        if question.startswith("/"):
            if _command(conversation, question):
                return 0
        elif question:
            try:
                _print_answer(conversation, question)
            except CommandError as error:
                print(f"arriero: {error}", file=sys.stderr)
                return EXIT_FAILED
    return 0


def _command(conversation: Conversation, command: str) -> bool:
    """Carry out a line that begins with a slash. True to leave."""
    if command == "/reset":
        conversation.reset()
    elif command != "/exit":
        print(f"{command} is unknown: {_HELP}", file=sys.stderr)
    return command == "/exit"


def _print_answer(conversation: Conversation, question: str) -> None:
    terminal = sys.stdout.isatty()
    answer = conversation.ask(question)
    try:
        for piece in answer:
            print(piece.translate(_CONTROL) if terminal else piece, end="", flush=True)
    finally:
        answer.close()  # type: ignore[attr-defined]  # a generator
    print()
    if conversation.cut_off:
        print("(cut off at its length limit)", file=sys.stderr)
