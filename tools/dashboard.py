"""Generate the chart's Grafana dashboard: `python tools/dashboard.py` writes it, a test catches drift."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "charts" / "arriero" / "files" / "dashboard.json"

_RATE = "[$__rate_interval]"
_MODEL = '{namespace=~"$namespace", model=~"$model"}'
_ALL = ""
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True)
class Panel:
    """A graph. `queries`: legend -> PromQL."""

    title: str
    unit: str
    what: str
    queries: dict[str, str]


def _rate(metric: str, by: str = "", select: str = _MODEL) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{select}{_RATE}))"


def _highest(metric: str) -> str:
    """Of each deployment: an operator that no longer leads may still show what it saw last."""
    return f'max by (namespace, deployment) ({metric}{{namespace=~"$namespace"}})'


def _quantiles(metric: str, select: str = _MODEL) -> dict[str, str]:
    buckets = f"sum by (le) (rate({metric}_bucket{select}{_RATE}))"
    return {f"p{quantile * 100:g}": f"histogram_quantile({quantile}, {buckets})" for quantile in (0.5, 0.9, 0.99)}


ROWS: dict[str, tuple[Panel, ...]] = {
    "What clients see": (
        Panel(
            "Requests by status",
            "reqps",
            "answered by the routers",
            {"{{status}}": _rate("arriero_router_requests_total", "status")},
        ),
        Panel(
            "Time to first token",
            "s",
            "at the routers, holding included",
            _quantiles("arriero_router_time_to_first_token_seconds"),
        ),
        Panel("Between two tokens", "s", "of one answer, at the replicas", _quantiles("arriero_inter_token_seconds")),
        Panel(
            "Duration of requests",
            "s",
            "from arrival to the last token, at the replicas",
            _quantiles("arriero_request_duration_seconds"),
        ),
        Panel(
            "Held requests",
            "short",
            "waiting for a replica: the signal to scale from zero",
            {"{{model}}": f"sum by (model) (arriero_router_held{_MODEL})"},
        ),
        Panel(
            "Replays and broken attempts",
            "reqps",
            "requests taken over by another replica; attempts without a whole answer",
            {
                "replays": _rate("arriero_router_replays_total"),
                "{{reason}}": _rate("arriero_router_broken_attempts_total", "reason"),
            },
        ),
    ),
    "Replicas": (
        Panel(
            "Tokens",
            "short",
            "per second: generated, of prompts, and of prompts found in a cache",
            {
                "generated": _rate("arriero_generated_tokens_total"),
                "prompt": _rate("arriero_prompt_tokens_total"),
                "cached": _rate("arriero_cached_tokens_total"),
            },
        ),
        Panel(
            "Running and waiting",
            "short",
            "sequences of each group",
            {
                "{{group}} running": f"sum by (group) (arriero_requests_running{_MODEL})",
                "{{group}} waiting": f"sum by (group) (arriero_requests_waiting{_MODEL})",
            },
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            "by running sequences",
            {"{{group}}": f"max by (group) (arriero_kv_usage_ratio{_MODEL})"},
        ),
        Panel(
            "Prefix hits",
            "percentunit",
            "share of prompts' chunks that the routers' index found in the picked replica's cache",
            {
                "{{model}}": f"{_rate('arriero_router_prompt_chunks_matched_total', 'model')} / "
                f"{_rate('arriero_router_prompt_chunks_total', 'model')}"
            },
        ),
        Panel(
            "Picks by reason",
            "reqps",
            "what decided which replica a request went to",
            {"{{reason}}": _rate("arriero_router_picks_total", "reason")},
        ),
        Panel(
            "Requests in flight",
            "short",
            "of the routers on each replica",
            {"{{replica}}": f"sum by (replica) (arriero_router_replica_in_flight{_MODEL})"},
        ),
        Panel(
            "Ready",
            "short",
            "groups that take new requests",
            {"{{deployment}}": f"sum by (deployment) (arriero_ready{_MODEL})"},
        ),
        Panel(
            "Recoveries and preemptions",
            "short",
            "groups formed anew after losing a rank; sequences put back to waiting for want of KV blocks",
            {
                "{{group}} recoveries": f"sum by (group) (increase(arriero_recoveries_total{_MODEL}{_RATE}))",
                "{{group}} preemptions": f"sum by (group) (increase(arriero_preemptions_total{_MODEL}{_RATE}))",
            },
        ),
        Panel(
            "Memory of ranks",
            "bytes",
            "the largest of each group",
            {"{{group}}": f"max by (group) (arriero_rank_memory_bytes{_MODEL})"},
        ),
    ),
    "Operator": (
        Panel("Leaders", "short", "one, unless it is changing", {"leaders": "sum(arriero_operator_leader)"}),
        Panel(
            "Groups wanted and ready",
            "short",
            "of each LlamaDeployment, as its status says",
            {
                "{{namespace}}/{{deployment}} wanted": _highest("arriero_deployment_replicas"),
                "{{namespace}}/{{deployment}} ready": _highest("arriero_deployment_ready_replicas"),
            },
        ),
        Panel(
            "Passes",
            "ops",
            "over LlamaDeployments, by how they ended",
            {"{{result}}": _rate("arriero_operator_passes_total", "result", _ALL)},
        ),
        Panel("Time of a pass", "s", "", _quantiles("arriero_operator_pass_seconds", _ALL)),
        Panel(
            "API calls",
            "reqps",
            "by verb and status",
            {"{{verb}} {{code}}": _rate("arriero_operator_api_calls_total", "verb, code", _ALL)},
        ),
        Panel("Queue", "short", "LlamaDeployments that wait for a pass", {"queue": "max(arriero_operator_queue)"}),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard's model, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for name, row in ROWS.items():
        panels.append(
            {"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": _at(0, y, _COLUMNS, 1)}
        )
        y += 1
        for index, panel in enumerate(row):
            x = index * _WIDTH % _COLUMNS
            panels.append(
                {**_graph(panel), "gridPos": _at(x, y + index * _WIDTH // _COLUMNS * _HEIGHT, _WIDTH, _HEIGHT)}
            )
        y += -(-len(row) * _WIDTH // _COLUMNS) * _HEIGHT
    return {
        "title": "Arriero",
        "uid": "arriero",
        "tags": ["arriero", "llama"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("namespace", "Namespace", "label_values(arriero_router_held, namespace)"),
                _variable("model", "Model", 'label_values(arriero_router_held{namespace=~"$namespace"}, model)'),
            ]
        },
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _graph(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": _source(),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _source(), "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _source(),
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "refresh": 2,
        "sort": 1,
        # Of no label at all, too: where nothing relabels, series have no namespace.
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
