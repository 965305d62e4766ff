"""Stochastic depth (Huang et al. 2016) whose draws are given, so that a run can be repeated sample by sample."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

Draw = Callable[[str, int], Tensor]
"""(purpose, count) -> uniform numbers (B, count), such as `Batch.uniform`."""


class KeyedDropPath(nn.Module):
    """One residual branch that some samples skip."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # A tensor: a number would be part of a compiled block's code, and each block has a rate of its own.
        self.register_buffer("share", torch.tensor(1 - rate), persistent=False)
        self.share: Tensor
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero the residual branch of the dropped samples; scale the others to keep the mean."""
        if not self.training or self.kept is None:
            return x
        scale = (self.kept.float() / self.share).to(x.dtype)
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def key_drop_paths(backbone: nn.Module) -> list[KeyedDropPath]:
    """Replace timm's stochastic depth modules in place."""
    made = []
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath) and child.drop_prob:
                made.append(KeyedDropPath(float(child.drop_prob)))
                setattr(parent, name, made[-1])
    return made


def draw_drop_paths(modules: Sequence[KeyedDropPath], images: Tensor, draw: Draw | None) -> None:
    """Decide which of the images (B, ...) skip which branch; by torch's generator if there is no `draw`."""
    draws = draw("drop path", len(modules)) if draw else torch.rand(len(images), len(modules), device=images.device)
    for module, column in zip(modules, draws.unbind(1), strict=True):
        module.kept = column >= module.rate


def with_its_draws(block: nn.Module) -> Callable[..., Tensor]:
    """A block that can be run again in the backward pass, when another view may have drawn anew for its drop paths."""
    drawn = [(module, module.kept) for module in block.modules() if isinstance(module, KeyedDropPath)]

    def run(x: Tensor, **extra: Any) -> Tensor:
        for module, kept in drawn:
            module.kept = kept
        return block(x, **extra)

    return run
