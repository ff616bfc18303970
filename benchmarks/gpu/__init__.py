"""Everything that is measured on a GPU. It runs from the sources alone: rooms not installed are found here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

for room, package in (("kernels", "arriero_kernels"), ("plan", "arriero_plan"), ("worker", "arriero_worker")):
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(ROOT / room))
