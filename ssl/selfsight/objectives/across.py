"""Statistics of the global batch: what a paper means by "the batch", whatever the number of ranks.

Every rank computes the same loss of the gathered batch. DDP takes the mean of the ranks' gradients, so the gradient that
comes back through `gather` and `total` is summed over ranks: together that is the gradient of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> int:
    """Processes that share the batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(ranks())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(ranks())[dist.get_rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Total.forward(ctx, gradients[0])


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank, in the order of the ranks: (ranks x B, ...), with gradient."""
    return _Gather.apply(x.contiguous()) if ranks() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum over ranks, with gradient."""
    return _Total.apply(x) if ranks() > 1 else x


def largest(x: Tensor) -> Tensor:
    """The maximum over ranks, without gradient."""
    if ranks() > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class GlobalBatchNorm(nn.Module):
    """Batch normalisation by the statistics of the global batch, on any device. For heads that are thrown away after
    training: it keeps no running statistics."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        x = x.float()
        count = total(x.new_full((), float(len(x)))).clamp(min=1)
        centred = x - total(x.sum(0)) / count
        variance = total(centred.square().sum(0)) / count
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias
