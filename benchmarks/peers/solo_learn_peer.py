"""solo-learn's MAE: its backbone, decoder and loss. Its Lightning module, which also trains a classifier, is left out."""

import importlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from works import Training

from peers.common import images, shape_of, standing_in, training


def load(path: str) -> tuple[Any, Any, Any]:
    """MaskedAutoencoderViT, MAEDecoder and mae_loss_func, of the four files that they need."""
    # Its packages import Lightning, DALI and every method; the same folders without their __init__ import what is asked for.
    names = ("backbones", "backbones__vit", "methods", "losses", "utils")
    folders = {f"solo__{name}": {"__path__": [str(Path(path, "solo", *name.split("__")))]} for name in names}
    unused = {"solo__methods__base": {"BaseMethod": nn.Module}, "solo__data__h5_dataset": {"H5Dataset": None}}
    with warnings.catch_warnings(), standing_in(solo={}, solo__data={}, **folders, **unused):
        warnings.simplefilter("ignore", FutureWarning)  # old names of timm's
        found = [
            importlib.import_module(f"solo.{name}") for name in ("backbones.vit.vit_mae", "methods.mae", "losses.mae")
        ]
    return found[0].MaskedAutoencoderViT, found[1].MAEDecoder, found[2].mae_loss_func


class Model(nn.Module):
    """Backbone, decoder and loss as its `forward` and `training_step` put them together."""

    def __init__(self, backbone: nn.Module, decoder: nn.Module, loss: Any, patch: int) -> None:
        super().__init__()
        self.backbone, self.decoder, self.loss, self.patch = backbone, decoder, loss, patch

    def forward(self, x: Tensor) -> Tensor:
        """The loss of images (B, 3, S, S)."""
        _, tokens, mask, restore = self.backbone(x, 0.75)
        return self.loss(x, self.decoder(tokens, restore), mask, self.patch, norm_pix_loss=True)


def build(spec: dict[str, Any], variant: str) -> Training:
    """Its training step."""
    shape, (vit, decoder, loss) = shape_of(spec), load(spec["paths"]["solo-learn"])
    backbone = vit(
        img_size=shape.image, patch_size=shape.patch, embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    places = backbone.patch_embed.num_patches
    sizes = shape.decoder["width"], shape.decoder["depth"], shape.decoder["heads"], places, shape.patch
    model = Model(backbone, decoder(shape.width, *sizes), loss, shape.patch).to(spec["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    batch = images(spec, shape.image).to(memory_format=torch.channels_last)  # as its BaseMethod does
    return training(spec, model, lambda: model(batch), optimizer)
