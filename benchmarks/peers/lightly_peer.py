"""lightly's modules, put together as its own examples do: MAE, VICReg and DINO on a timm ViT.

The variant "explicit" has timm's explicit attention in place of the fused one.
"""

import copy
import warnings
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss, VICRegLoss
from lightly.models import utils
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
from torch import Tensor, nn
from works import WORKS, Training, embeddings, forget, recipe_of

from peers.common import explicit_attention, images, shape_of, training


def build(spec: dict[str, Any], variant: str) -> Training:
    """The step of a work."""
    if "loss" in spec["work"]:
        return vicreg_loss(spec)
    make = {"mae": mae, "vicreg": vicreg, "dino": dino}[WORKS[spec["work"]].objective["name"]]
    return make(spec, variant == "explicit")


class MAE(nn.Module):
    """Its example for MAE: only masked patches are predicted; the target is not normalised."""

    def __init__(self, vit: nn.Module, decoder: nn.Module, patch: int) -> None:
        super().__init__()
        self.backbone, self.decoder, self.patch = MaskedVisionTransformerTIMM(vit=vit), decoder, patch

    def forward(self, x: Tensor) -> Tensor:
        """The loss of images (B, 3, S, S)."""
        size = len(x), self.backbone.sequence_length
        keep, hidden = utils.random_token_mask(size=size, mask_ratio=0.75, device=x.device)
        seen = self.decoder.embed(self.backbone.encode(images=x, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, seen.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(x, self.patch), hidden - 1)
        return nn.functional.mse_loss(predicted, target)


def vit_of(spec: dict[str, Any], **options: Any) -> nn.Module:
    """The timm model of the work, with a class token's worth of features and no classifier."""
    recipe = recipe_of(spec | {"compile": False})
    return timm.create_model(recipe.encoder.name, num_classes=0, **options)


def mae(spec: dict[str, Any], explicit: bool) -> Training:
    """Forward, backward and AdamW."""
    shape = shape_of(spec)
    vit = vit_of(spec, img_size=shape.image, patch_size=shape.patch)
    width, depth, heads = shape.decoder["width"], shape.decoder["depth"], shape.decoder["heads"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it goes in lightly 1.7; the extra stays below
        decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, patch_size=shape.patch, embed_dim=shape.width,
            decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads,
        )  # fmt: skip
    model = MAE(vit, decoder, shape.patch).to(spec["device"]).train()
    if explicit:
        explicit_attention(model)
    batch = images(spec, shape.image)
    return training(spec, model, lambda: model(batch), torch.optim.AdamW(model.parameters(), lr=1.5e-4))


def vicreg_loss(spec: dict[str, Any]) -> Training:
    """Forward and backward of the loss, from embeddings on."""
    pair, loss = embeddings(spec), VICRegLoss()

    def step() -> None:
        loss(*pair).backward()
        forget(pair)

    return Training(step, 0)


def vicreg(spec: dict[str, Any], explicit: bool) -> Training:
    """Two views, one after the other, with an expander as wide as selfsight's."""
    vit, expander = vit_of(spec), recipe_of(spec | {"compile": False}).objective
    head = VICRegProjectionHead(
        vit.num_features, expander.expander_width, expander.expander_width, num_layers=expander.expander_layers
    )
    model, loss = nn.Sequential(vit, head).to(spec["device"]).train(), VICRegLoss()
    if explicit:
        explicit_attention(model)
    first, second = (images(spec, shape_of(spec).image) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return training(spec, model, lambda: loss(model(first), model(second)), optimizer)


class DINO(nn.Module):
    """Its example for DINO: student and teacher see the views one after the other."""

    def __init__(self, vit: nn.Module, config: Any) -> None:
        super().__init__()
        sizes = vit.num_features, config.head_width, config.bottleneck, config.outputs
        self.student_backbone, self.student_head = vit, DINOProjectionHead(*sizes, freeze_last_layer=1)
        self.teacher_backbone, self.teacher_head = copy.deepcopy(vit), DINOProjectionHead(*sizes)
        utils.deactivate_requires_grad(self.teacher_backbone)
        utils.deactivate_requires_grad(self.teacher_head)
        self.loss = DINOLoss(output_dim=config.outputs, warmup_teacher_temp_epochs=5)

    def forward(self, views: list[Tensor]) -> Tensor:
        """The loss of views (B, 3, S, S), the first two of which the teacher sees."""
        with torch.no_grad():
            taught = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        said = [self.student_head(self.student_backbone(view)) for view in views]
        return self.loss(taught, said, epoch=10)

    def move_teacher(self) -> None:
        """As its example does before each step."""
        utils.update_momentum(self.student_backbone, self.teacher_backbone, m=0.996)
        utils.update_momentum(self.student_head, self.teacher_head, m=0.996)


def dino(spec: dict[str, Any], explicit: bool) -> Training:
    """Multi-crop, with a head as wide as selfsight's."""
    config = recipe_of(spec | {"compile": False}).objective
    model = DINO(vit_of(spec, dynamic_img_size=True), config).to(spec["device"]).train()
    if explicit:
        explicit_attention(model)
    side = shape_of(spec).image
    sides = [side, side, *[config.local_view.size or side] * config.local_views]
    views = [images(spec, side) for side in sides]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def compiled() -> None:
        for part in (model.student_backbone, model.teacher_backbone):
            part.compile()

    return training(spec, model, lambda: model(views), optimizer, before=model.move_teacher, compiled=compiled)
