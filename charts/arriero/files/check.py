"""`helm test`: the operator answers that it is ready, and the API server serves LlamaDeployments."""

import json
import os
import ssl
import sys
import time
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
RESOURCES = "/apis/serving.arriero.dev/v1alpha1"


def read(url: str, headers: dict[str, str] | None = None, authority: str | None = None) -> bytes:
    context = ssl.create_default_context(cafile=authority) if authority else None
    request = urllib.request.Request(url, headers=headers or {})
    # A proxy that the environment names is for other hosts.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=5) as answer:
        text: bytes = answer.read()
    return text


def wait_until_ready(operator: str, seconds: float) -> None:
    """Raises OSError with the last answer once the time is over."""
    end = time.monotonic() + seconds
    while True:
        try:
            read(f"{operator}/health/ready")
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def main(operator: str, server: str, account: str = ACCOUNT, seconds: float = 60.0) -> int:
    try:
        wait_until_ready(operator, seconds)
        print("the operator is ready")
        with open(f"{account}/token") as file:
            headers = {"Authorization": f"Bearer {file.read().strip()}"}
        served = json.loads(read(server + RESOURCES, headers, f"{account}/ca.crt"))["resources"]
    except OSError as error:
        print(f"{getattr(error, 'url', '')} {error}".strip(), file=sys.stderr)
        return 1
    if not any(resource["name"] == "llamadeployments" for resource in served):
        print(f"{RESOURCES} has no llamadeployments", file=sys.stderr)
        return 1
    print("llamadeployments are served")
    return 0


if __name__ == "__main__":
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    sys.exit(main(sys.argv[1], f"https://{f'[{host}]' if ':' in host else host}:{port}"))
