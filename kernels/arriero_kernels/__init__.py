"""Triton kernels of the engine, one operation per file: the kernel and the function that launches it."""
