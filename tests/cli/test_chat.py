"""`arriero chat`: pipes and a terminal, against a server without a model."""

from __future__ import annotations

import io
import socket
import threading

import pytest

from arriero_cli.main import main

CHAT = "arriero_cli.main"


@pytest.fixture
def pipe(monkeypatch):
    """pipe("line", ...): what stands on standard input."""

    def put(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode())))

    return put


def contents(body):
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_lines_of_a_pipe_are_one_conversation(server, pipe, capsys):
    server.pieces = lambda body: ["You said ", body["messages"][-1]["content"], "."]
    pipe("one", "", "  two ", "three")
    assert main(["chat", "--url", server.url + "/v1/"]) == 0
    assert capsys.readouterr().out == "You said one.\nYou said two.\nYou said three.\n"
    assert contents(server.requests[1]) == [("user", "one"), ("assistant", "You said one."), ("user", "two")]
    assert server.requests[0]["model"] == "org/small"
    assert server.requests[0]["stream"] is True


def test_options_and_the_system_message_are_sent(server, pipe, capsys):
    pipe("hi")
    words = ["--model", "m", "--system", "Be brief.", "--temperature", "0", "--top-p", "0.5", "--max-tokens", "7"]
    assert main(["chat", "--url", server.url, *words, "--seed", "3"]) == 0
    (body,) = server.requests
    assert contents(body) == [("system", "Be brief."), ("user", "hi")]
    del body["messages"], body["stream"]
    assert body == {"model": "m", "temperature": 0, "top_p": 0.5, "max_tokens": 7, "seed": 3}


def test_reset_forgets_all_but_the_system_message_and_exit_leaves(server, pipe, capsys):
    pipe("one", "/reset", "two", "/unknown", "/exit", "three")
    assert main(["chat", "--url", server.url, "--system", "S"]) == 0
    assert [contents(body) for body in server.requests] == [
        [("system", "S"), ("user", "one")],
        [("system", "S"), ("user", "two")],
    ]
    assert capsys.readouterr().err.startswith("/unknown is unknown: /reset forgets")


@pytest.mark.parametrize(
    ("breaks", "printed", "sentence"),
    [
        (lambda s: setattr(s, "status", lambda n: 404), "", "the server answered 404: refused with 404"),
        (lambda s: setattr(s, "last_event", ""), "Hello there", "closed connection"),
        (
            lambda s: setattr(s, "last_event", 'data: {"error": {"message": "the replica was lost"}}\n\n'),
            "Hello there",
            "the answer broke off: the replica was lost",
        ),
        (
            lambda s: setattr(s, "last_event", "data: nonsense\n\n"),
            "Hello there",
            "the server sent an event that is no JSON object: nonsense",
        ),
        (
            lambda s: setattr(s, "last_event", "\n"),
            "Hello there",
            "the answer broke off: the server closed the connection",
        ),
    ],
)
def test_failures_are_one_sentence_and_status_1(server, pipe, capsys, breaks, printed, sentence):
    breaks(server)
    pipe("one", "two")
    assert main(["chat", "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == printed
    assert sentence in err
    assert err.count("\n") == 1
    assert len(server.requests) == 1


def test_an_unreachable_server_is_said(pipe, capsys):
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    pipe("one")
    assert main(["chat", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert capsys.readouterr().err == f"arriero: http://127.0.0.1:{port}: connection refused\n"


def test_proxies_of_the_environment_are_not_used(server, pipe, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    pipe("one")
    assert main(["chat", "--url", server.url]) == 0
    assert capsys.readouterr().out == "Hello there\n"


def test_ctrl_c_interrupts_the_answer_and_ctrl_d_leaves(server, start):
    interrupted = threading.Event()

    def slowly(number: int, piece: int) -> None:
        if number == 0 and piece == 2:
            interrupted.wait(30)

    server.pieces = lambda body: ["Once ", "upon ", *(["a time "] * 20_000)] if len(body["messages"]) == 1 else ["Done"]
    server.before_piece = slowly
    chat = start(CHAT, "chat", "--url", server.url, terminal=True)
    chat.wait_for("> ")
    chat.type("tell me\n")
    chat.wait_for("Once upon ")
    chat.type("\x03")
    seen = chat.wait_for(r"\(interrupted\)").end()
    interrupted.set()
    assert server.gone.wait(30), "the server was not told that nobody listens any more"
    chat.wait_for("> ", seen)
    chat.type("go on\n")
    seen = chat.wait_for("Done", seen).end()
    assert contents(server.requests[1]) == [("user", "tell me"), ("assistant", "Once upon "), ("user", "go on")]
    chat.wait_for("> ", seen)
    chat.type_until("\x03", r"\(Ctrl-D leaves\)", seen)
    chat.type("\x04")
    assert chat.end() == 0


def test_a_failed_question_is_forgotten_and_the_conversation_goes_on(server, start):
    server.status = lambda number: 503 if number == 0 else 200
    chat = start(CHAT, "chat", "--url", server.url, terminal=True)
    chat.wait_for("> ")
    chat.type("one\n")
    seen = chat.wait_for("arriero: the server answered 503: refused with 503").end()
    chat.wait_for("> ", seen)
    chat.type("two\n")
    seen = chat.wait_for("Hello there", seen).end()
    assert contents(server.requests[1]) == [("user", "two")]
    chat.wait_for("> ", seen)
    chat.type("/exit\n")
    assert chat.end() == 0


def test_an_answer_cannot_steer_the_terminal(server, start):
    server.pieces = lambda body: ["a\x1b]0;owned\x07b\x9bc\td\n", "e"]
    chat = start(CHAT, "chat", "--url", server.url, terminal=True)
    chat.wait_for("> ")
    chat.type("one\n")
    seen = chat.wait_for(r"a\]0;ownedbc\s+d\ne").end()
    chat.wait_for("> ", seen)
    chat.type("\x04")
    assert chat.end() == 0
    assert "\x1b]0;" not in chat.output
