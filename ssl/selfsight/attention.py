"""Attention maps, for who looks at them; training never needs them.

Beside encoder.py and backbone.py the only file that names what is inside a timm block.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from selfsight.encoder import Encoder
from selfsight.errors import UsageError


@torch.no_grad()
def attention_maps(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """The attention of every block, (B, heads, T, T) each: what each of T tokens takes (rows, summing to 1) from the others.

    T counts the prefix tokens first. Taken where timm would drop attention out, from its unfused form, with rotary positions
    and normalised queries as the model has them.

    Args:
        images: normalised, as for `Encoder.forward`.

    Raises:
        UsageError: a backbone that is not a plain ViT.
    """
    if not encoder.plain:
        raise UsageError(f"{encoder.config.name}: attention maps are those of a plain ViT")
    maps: list[Tensor] = []
    training = encoder.training
    encoder.eval()
    with ExitStack() as undo:
        undo.callback(encoder.train, training)
        for block in encoder.blocks:
            inner: Any = block.attn
            undo.callback(setattr, inner, "fused_attn", inner.fused_attn)
            inner.fused_attn = False
            taken = inner.attn_drop.register_forward_hook(lambda module, given, out: maps.append(given[0]))
            undo.callback(taken.remove)
        encoder(images)
    return maps
