"""Talking to a server of OpenAI's API: its address, its errors as one sentence, its model's name."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any
from urllib.parse import urlsplit

import httpx

from arriero_cli.errors import CommandError

DEFAULT_URL = "http://127.0.0.1:8000"
DONE = "[DONE]"


def base_url(text: str) -> str:
    """An address as people give it, without a trailing slash or /v1. Raises ArgumentTypeError."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// or https:// address")
    return text.rstrip("/").removesuffix("/v1")


def timeouts(read: float = 300) -> httpx.Timeout:
    """Seconds; a server that was reached may think for long."""
    return httpx.Timeout(read, connect=5)


def error_sentence(status: int, body: bytes) -> str:
    """What a refusal says, in OpenAI's shape or any other."""
    message = ""
    try:
        data = json.loads(body)
        error = data.get("error", data) if isinstance(data, dict) else data
        message = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        message = body[:200].decode("utf-8", "replace").strip().split("\n")[0]
    return f"the server answered {status}" + (f": {message}" if message else "")


def unreachable(url: str, error: Exception) -> CommandError:
    """The sentence for a server that cannot be talked to."""
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return CommandError(f"{url}: {reason[0].lower()}{reason[1:]}")


def only_model(client: httpx.Client, url: str) -> str:
    """The name of the server's first model. Raises CommandError."""
    try:
        response = client.get(f"{url}/v1/models")
    except (httpx.HTTPError, OSError) as error:
        raise unreachable(url, error) from error
    if response.status_code != 200:
        raise CommandError(f"{url}: {error_sentence(response.status_code, response.content)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CommandError(f"{url}/v1/models names no model: is this a server of OpenAI's API?") from error


def parse_event(line: str) -> dict[str, Any] | None:
    """One line of a server-sent event stream; None for what holds no data, and for the end.

    Raises CommandError for an error that the server sent inside the stream, and for what is no JSON object.
    """
    if not line.startswith("data:"):
        return None
    data = line[5:].strip()
    if data == DONE:
        return None
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise CommandError(f"the server sent an event that is no JSON object: {data[:100]}")
    if "error" in event:
        error = event["error"]
        raise CommandError(f"the answer broke off: {error.get('message', error) if isinstance(error, dict) else error}")
    return event
