"""microsoft/SimMIM: its ViT and its loss, with its AdamW.

As it is, with absolute positions: the same maths as selfsight's. The variant "rpb" is its released recipe: relative
position biases shared by the blocks, and layer scale.
"""

import sys
import warnings
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import nn
from works import Training

from peers.common import images, shape_of, spared, training


def build(spec: dict[str, Any], variant: str) -> Training:
    """Its training step; its loop takes the gradient's norm."""
    shape = shape_of(spec)
    sys.path.insert(0, spec["paths"]["simmim"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm.models.layers, an old name
        from models.simmim import SimMIM, VisionTransformerForSimMIM
    sys.path.remove(spec["paths"]["simmim"])
    released = variant == "rpb"
    encoder = VisionTransformerForSimMIM(
        img_size=shape.image, patch_size=shape.patch, num_classes=0, embed_dim=shape.width, depth=shape.depth,
        num_heads=shape.heads, mlp_ratio=4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        init_values=0.1 if released else None, use_abs_pos_emb=not released, use_shared_rel_pos_bias=released,
        use_mean_pooling=False,
    )  # fmt: skip
    model = SimMIM(encoder, encoder_stride=shape.patch).to(spec["device"])
    skip = tuple(f"encoder.{name}" for name in ("cls_token", "pos_embed", "mask_token"))
    optimizer = torch.optim.AdamW(spared(model, skip), lr=1e-4, weight_decay=0.05)
    batch, side = images(spec, shape.image), shape.image // 32
    chosen = torch.rand(spec["batch"], side * side, device=spec["device"]).argsort(1) < ceil(
        0.6 * side * side
    )  # as its MaskGenerator
    times = 32 // shape.patch
    mask = chosen.view(-1, side, side).repeat_interleave(times, 1).repeat_interleave(times, 2).long()
    note = "its released recipe's positions and layer scale, without drop path" if released else "absolute positions"
    return training(spec, model, lambda: model(batch, mask), optimizer, norm=True, note=note)
