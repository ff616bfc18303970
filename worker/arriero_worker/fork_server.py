"""Imported once by the server process that ranks are forked from: it has their code ready, and ends with the supervisor.

(By itself a fork server lives on while any of its children does, and they end only when it does.)
"""

from __future__ import annotations

import arriero_worker.rank  # noqa: F401
from arriero_worker.process import die_with_parent, set_process_name

set_process_name("arriero-fork")
die_with_parent()
