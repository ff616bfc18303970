"""What a namespace tells about a failed test: its pods, its events, the last lines of its containers."""

from __future__ import annotations

from typing import Any

import httpx
from tests.cluster.api import Api


def traces_of(api: Api, namespace: str) -> dict[str, str]:
    """File name -> text. What cannot be read any more is told as such."""
    place = f"/api/v1/namespaces/{namespace}"
    pods = api.get(f"{place}/pods")["items"]
    events = sorted(api.get(f"{place}/events")["items"], key=lambda event: event["metadata"]["creationTimestamp"])
    traces = {"pods.txt": "\n".join(pod_line(pod) for pod in pods), "events.txt": "\n".join(map(event_line, events))}
    for pod in pods:
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            name = f"{pod['metadata']['name']}-{container['name']}.log"
            parameters = {"container": container["name"], "tailLines": "200"}
            try:
                text = api.text(f"{place}/pods/{pod['metadata']['name']}/log", **parameters)
            except httpx.HTTPError as error:
                text = f"no log: {error}"
            traces[name] = f"--- {name}\n{text}"
    return traces


def pod_line(pod: dict[str, Any]) -> str:
    """One line: name, node, phase, and what each container waits for."""
    status = pod["status"]
    states = [
        f"{entry['name']}: {entry['state']}, {entry['restartCount']} restarts"
        for entry in status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
    ]
    conditions = [
        f"{entry['type']}: {entry.get('message') or entry.get('reason')}"
        for entry in status.get("conditions", [])
        if entry["status"] != "True"
    ]
    words = [pod["metadata"]["name"], pod["spec"].get("nodeName", "(no node)"), status.get("phase", "?")]
    return " ".join([*words, *states, *conditions])


def event_line(event: dict[str, Any]) -> str:
    involved = event["involvedObject"]
    when = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    return f"{when} {event['type']} {event['reason']} {involved['kind']}/{involved.get('name')}: {event['message']}"
