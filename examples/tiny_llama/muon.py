"""Muon for the matrices of the layers: momentum, made nearly orthogonal by five Newton-Schulz steps.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Float32 throughout,
because a CPU without bfloat16 units is many times slower in it; matrices of one shape are stacked, so each shape costs
one chain of products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalize(stack: Tensor) -> Tensor:
    """Each matrix of ``stack`` (n, rows, columns) with its singular values moved near 1."""
    tall = stack.size(1) > stack.size(2)
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalize_together(stack: Tensor) -> Tensor:
    """`orthogonalize`, with the matrices dealt out over the processes of the group, if there is one."""
    if not dist.is_initialized():
        return orthogonalize(stack)
    parts = list(stack.chunk(dist.get_world_size()))
    mine = orthogonalize(parts[dist.get_rank()]).contiguous()
    gathered = [torch.empty_like(mine) for _ in parts]
    dist.all_gather(gathered, mine)
    return torch.cat(gathered)


class Muon(torch.optim.Optimizer):
    """``lr`` is the size of an update in spectral norm, times sqrt(rows / columns) for tall matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                shapes[param.shape].append(param)
            for shape, params in shapes.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5 * group["lr"]
                for param, update in zip(params, orthogonalize_together(torch.stack(updates)), strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
