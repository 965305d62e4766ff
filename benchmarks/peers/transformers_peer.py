"""transformers' ViTMAEForPreTraining with torch's AdamW; the variant "explicit" has its eager attention in place of the fused one."""

from typing import Any

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from works import Training

from peers.common import images, shape_of, training


def build(spec: dict[str, Any], variant: str) -> Training:
    """Its training step."""
    shape = shape_of(spec)
    decoder = shape.decoder
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=shape.image, patch_size=shape.patch, hidden_size=shape.width, num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads, intermediate_size=4 * shape.width, decoder_hidden_size=decoder["width"],
            decoder_num_hidden_layers=decoder["depth"], decoder_num_attention_heads=decoder["heads"],
            decoder_intermediate_size=4 * decoder["width"], mask_ratio=0.75, norm_pix_loss=True,
            attn_implementation="eager" if variant == "explicit" else None,
        )
    )  # fmt: skip
    model.to(spec["device"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = images(spec, shape.image)
    return training(spec, model, lambda: model(pixel_values=batch).loss, optimizer)
