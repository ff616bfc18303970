"""Compile kernels once per machine: numba's disk cache, in a directory that names the sources.

numba looks only at the file a function stands in to tell whether its cached code is stale, not at the files of what the
function calls; and files installed from a wheel may all bear the same date. So the directory's name holds a digest of
this package's sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
_config: Any = numba.config
_keep: list[Any] = []  # compiled code lives as long as its owner


@cache
def _directory() -> str:
    """Below NUMBA_CACHE_DIR where that is set, else beside the sources."""
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(here.glob("*.py")):
        digest.update(source.read_bytes())
    base = Path(_config.CACHE_DIR) if _config.CACHE_DIR else here / "__pycache__"
    return str(base / f"kernels-{digest.hexdigest()[:16]}")


@contextmanager
def _own_directory() -> Iterator[None]:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = _directory()
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def _cached(compile_with: Callable[[bool], Any]) -> Any:
    with _own_directory():
        try:
            return compile_with(True)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
    return compile_with(False)  # no directory can be written: compile at each start


def compile_function(function: Any, signature: str) -> Any:
    """A function for Python to call, which releases the GIL."""
    return _cached(lambda cached: numba.njit(signature, nogil=True, cache=cached, **_OPTIONS)(function))


def compile_kernel(function: Any) -> int:
    """The address of void(int64 arguments, int64 thread, int64 threads)."""
    signature = "void(int64, int64, int64)"
    compiled = _cached(lambda cached: numba.cfunc(signature, cache=cached, **_OPTIONS)(function))
    _keep.append(compiled)
    address = compiled.address
    assert isinstance(address, int)
    return address
