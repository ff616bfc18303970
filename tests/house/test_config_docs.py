"""The pages of each program say of its configuration what the models say that check it."""

from __future__ import annotations

import re

import pytest
from prometheus_client import Counter, Gauge, Histogram
from tools import config_docs

from arriero_operator.runtime import metrics


@pytest.mark.parametrize("name", config_docs.PAGES)
def test_the_tables_are_those_of_the_models(name):
    text = (config_docs.DOCS / name).read_text()
    assert text == config_docs.page(name, text), "run: python tools/config_docs.py"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(SystemExit, match="are not there"):
        config_docs.page("router.md", "# The router\n")


def test_a_changed_field_would_be_noticed():
    text = (config_docs.DOCS / "router.md").read_text()
    changed = text.replace("| `workers` | whole number, 1 to 256 |", "| `workers` | any |")
    assert changed != text
    assert config_docs.page("router.md", changed) == text


def test_the_operators_metrics_are_all_explained():
    shown = set(re.findall(r"`(arriero_[a-z_]+)`", (config_docs.DOCS / "operator.md").read_text()))
    kept = [metric for metric in vars(metrics).values() if isinstance(metric, Counter | Gauge | Histogram)]
    families = [family for metric in kept for family in metric.describe()]
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert names
    assert names <= shown
