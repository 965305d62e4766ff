"""facebookresearch/mae: models_mae.py as released, on the installed timm, with the optimizer of main_pretrain.py.

Its blocks are timm's. It was written for timm 0.3.2, whose attention is explicit; the installed timm's is fused: the
variant "explicit" has it as it was. Two names that timm and numpy have dropped since are given to it while it is imported.
"""

import sys
from functools import partial
from typing import Any

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn
from works import Training

from peers.common import explicit_attention, images, shape_of, spared, training


def model_class(path: str) -> type[nn.Module]:
    """MaskedAutoencoderViT."""

    class Block(timm_vit.Block):  # type: ignore[misc]
        def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    now = timm_vit.Block
    sys.path.insert(0, path)
    timm_vit.Block = Block  # type: ignore[misc]
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]
    try:
        import models_mae
    finally:
        timm_vit.Block = now  # type: ignore[misc]
        sys.path.remove(path)
    return models_mae.MaskedAutoencoderViT


def build(spec: dict[str, Any], variant: str) -> Training:
    """Its training step; its engine takes the gradient's norm."""
    shape = shape_of(spec)
    decoder = {
        f"decoder_{key}": shape.decoder[ours]
        for key, ours in (("embed_dim", "width"), ("depth", "depth"), ("num_heads", "heads"))
    }
    model = model_class(spec["paths"]["mae"])(
        img_size=shape.image, patch_size=shape.patch, embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads,
        mlp_ratio=4, norm_layer=partial(nn.LayerNorm, eps=1e-6), norm_pix_loss=True, **decoder,
    ).to(spec["device"])  # fmt: skip
    if variant == "explicit":
        explicit_attention(model)
    optimizer = torch.optim.AdamW(spared(model), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    batch = images(spec, shape.image)
    note = "as released, on the installed timm" + (", attention explicit as timm 0.3.2 had it" if variant else "")
    return training(spec, model, lambda: model(batch, mask_ratio=0.75)[0], optimizer, norm=True, note=note)
