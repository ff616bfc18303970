"""docs/router.md says what the models say, and its examples can be used as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from arriero_router.config import parse_config
from arriero_router.front.auth import read_keys

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "router.md"


@pytest.fixture(scope="module")
def router_docs():
    spec = importlib.util.spec_from_file_location("router_docs", ROOT / "tools" / "router_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(containing):
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if containing in block]
    return text


def test_the_tables_are_those_of_the_models(router_docs):
    assert PAGE.read_text() == router_docs.page(PAGE.read_text()), "run: python tools/router_docs.py"


def test_a_page_without_its_marks_is_refused(router_docs):
    with pytest.raises(SystemExit, match="are not there"):
        router_docs.page("# The router\n")


def test_a_changed_field_would_be_noticed(router_docs):
    text = PAGE.read_text()
    assert router_docs.page(text.replace("| `workers` | whole number, 1 to 256 |", "| `workers` | any |")) == text


def test_the_example_configuration_is_valid():
    assert parse_config(example("models:\n"), "docs/router.md").models[0].name == "llama-70b"


def test_the_example_keys_are_valid(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(example("sha256:"))
    assert [entry.name for entry in read_keys(str(path))] == ["chat-frontend", "batch"]
