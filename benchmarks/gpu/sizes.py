"""The linear layers of Llama 3.1, as (outputs, inputs): what matrix products are measured at."""

from __future__ import annotations

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B_TP8 = {"qkv": (1280, 8192), "o": (8192, 1024), "gate_up": (7168, 8192), "down": (8192, 3584)}
"""One rank's of eight."""
