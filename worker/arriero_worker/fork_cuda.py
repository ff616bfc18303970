"""Imported once by the server process that ranks on GPUs are forked from: code, and nothing that touches the driver,
which a forked process could not use any more. It ends with the supervisor (`tied`).
"""

from __future__ import annotations

import arriero_worker.cuda_stage
import arriero_worker.rank  # noqa: F401
from arriero_faces.process import set_process_name

set_process_name("arriero-fork")
