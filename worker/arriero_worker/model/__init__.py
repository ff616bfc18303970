"""Llama on one rank: the weights it reads, the layers it runs, and the backend seam below them."""
