"""The backend on Triton's kernels and cuBLAS. Importing it imports Triton, so only who runs it does."""
