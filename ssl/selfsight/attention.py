"""Attention maps, for who looks at them; training never needs them.

Beside encoder.py, backbone.py and merging.py the only file that names what is inside a timm block.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from selfsight.encoder import Encoder, evaluating
from selfsight.errors import UsageError


@torch.no_grad()
def attention_maps(
    encoder: Encoder, images: Tensor, reduce: Callable[[Tensor], Tensor] = lambda attention: attention
) -> list[Tensor]:
    """The attention of every block, (B, heads, T, T) each: what each of T tokens takes (rows, summing to 1) from the others.

    T counts the prefix tokens first. Taken where timm would drop attention out, from its unfused form, with rotary positions
    and normalised queries as the model has them.

    Args:
        images: normalised, as for `Encoder.forward`.
        reduce: what is kept of a block's attention, so that not all of them lie in memory.

    Raises:
        UsageError: a backbone that is not a plain ViT.
    """
    if not encoder.plain:
        raise UsageError(f"{encoder.config.name}: attention maps are those of a plain ViT")
    maps: list[Tensor] = []
    with ExitStack() as undo:
        undo.enter_context(evaluating(encoder))
        for block in encoder.blocks:
            inner: Any = block.attn
            undo.callback(setattr, inner, "fused_attn", inner.fused_attn)
            inner.fused_attn = False
            taken = inner.attn_drop.register_forward_hook(lambda module, given, out: maps.append(reduce(given[0])))
            undo.callback(taken.remove)
        encoder(images)
    return maps


def attention_distance(encoder: Encoder, images: Tensor) -> Tensor:
    """How far each head looks, in pixels: (layers, heads).

    The distance between the centres of two patches, weighted by the attention between them, mean over the patches that look
    and over images (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7 and appendix D.7; Raghu et al. 2021, arXiv
    2108.08810, figure 3). What goes to class and register tokens is left out and rows are scaled to sum to 1 again. Of
    volumes and channel tokens, the distance is that within the plane.

    Args:
        images: normalised (B, C, S, S), as for `Encoder.forward`.

    Raises:
        UsageError: a backbone that is not a plain ViT.
    """
    if not encoder.plain:
        raise UsageError(f"{encoder.config.name}: attention is that of a plain ViT")
    rows, columns = encoder.plane_grid
    distance = patch_distances(rows, columns, encoder.patch).to(images.device)
    planes = encoder.patches // (rows * columns)
    distance = distance.repeat(planes, planes)
    return torch.stack(attention_maps(encoder, images, lambda maps: mean_distance(maps, distance)))


def mean_distance(maps: Tensor, distance: Tensor) -> Tensor:
    """Attention (B, heads, T, T) as the mean distance of each head (heads,), T - N tokens in front left out.

    Args:
        distance: (N, N) between patches.
    """
    prefix = maps.shape[-1] - len(distance)
    between = maps[..., prefix:, prefix:].float()
    far = (between * distance).sum(-1) / between.sum(-1).clamp(min=1e-12)
    return far.mean((0, 2))


def patch_distances(rows: int, columns: int, patch: int) -> Tensor:
    """Pixels between the centres of any two patches of a grid, in row-major order: (N, N)."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).float() * patch
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
