"""runc, with the machine's own folders in the containers of thin images. It runs in runc's place, by itself:

    python -IS thin_runtime.py MOUNTS RUNC ARGUMENT...

MOUNTS is a JSON file with mounts as the OCI runtime specification has them. They come after those that Kubernetes asked
for, so that an emptyDir at /tmp does not hide a checkout below it. Whatever else is in the container is left as it was.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MARK = "ARRIERO_THIN=1"  # in the environment that a thin image gives its containers


def main(mounts: str, runc: str, *arguments: str) -> None:
    if "create" in arguments and "--bundle" in arguments:
        config = Path(arguments[arguments.index("--bundle") + 1], "config.json")
        spec = json.loads(config.read_text())
        if MARK in spec["process"].get("env", []):
            taken = {mount["destination"] for mount in spec["mounts"]}
            added = json.loads(Path(mounts).read_text())
            spec["mounts"] += [mount for mount in added if mount["destination"] not in taken]
            config.write_text(json.dumps(spec))
    os.execv(runc, [runc, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
