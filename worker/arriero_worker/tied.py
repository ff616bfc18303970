"""Imported by the fork server before anything else: it ends with its supervisor, also while it still imports torch."""

from __future__ import annotations

import os

from arriero_faces.process import die_with_parent

SUPERVISOR = "ARRIERO_SUPERVISOR"
"""The environment variable with the supervisor's process id."""

die_with_parent(int(os.environ[SUPERVISOR]) if SUPERVISOR in os.environ else None)
