"""The examples of docs/router.md can be used as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from arriero_router.config import parse_config
from arriero_router.front.auth import read_keys

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "router.md"


def example(containing):
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if containing in block]
    return text


def test_the_example_configuration_is_valid():
    assert parse_config(example("models:\n"), "docs/router.md").models[0].name == "llama-70b"


def test_the_example_keys_are_valid(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(example("sha256:"))
    assert [entry.name for entry in read_keys(str(path))] == ["chat-frontend", "batch"]
