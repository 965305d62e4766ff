"""A timm model from the fields of a recipe: its options, its initial weights, its fixed positions."""

import inspect
from difflib import get_close_matches
from functools import cache
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from selfsight.errors import UsageError
from selfsight.positions import sincos
from selfsight.recipe import EncoderConfig

# Our name -> what the model classes of timm call it.
OPTIONS = {
    "image_size": ("img_size",),
    "patch": ("patch_size",),
    "width": ("embed_dim",),
    "depth": ("depth",),
    "heads": ("num_heads",),
    "class_token": ("class_token",),
    "registers": ("reg_tokens", "num_reg_tokens"),
    "drop_path": ("drop_path_rate",),
}


def build_backbone(config: EncoderConfig) -> nn.Module:
    """A timm model without classifier, its weights drawn from torch's generator.

    Raises:
        UsageError: a name that timm does not know, or dimensions that do not fit.
    """
    backbone: Any = timm.create_model(config.name, num_classes=0, **_model_options(config))
    if isinstance(backbone, VisionTransformer | Eva):
        if config.init == "xavier":
            _init_xavier(backbone)
        if backbone.pos_embed is not None and config.positions == "sincos":
            _fix_positions(backbone)
    return backbone


def is_plain(backbone: Any) -> bool:
    """Whether it is of the families whose sequence of steps is the plain one: patches, positions, blocks, norm."""
    return type(backbone) in (VisionTransformer, Eva) and _plain_stem(backbone.patch_embed)


def _model_options(config: EncoderConfig) -> dict[str, Any]:
    """timm's keyword arguments for the fields that are set."""
    with torch.device("meta"):  # only to see which class it is and what it has by itself
        skeleton = _skeleton(config.name)
    if isinstance(skeleton, VisionTransformer | Eva):
        _check_dimensions(skeleton, config)
    accepted = inspect.signature(type(skeleton).__init__).parameters
    options: dict[str, Any] = {"in_chans": 1 if config.channel_tokens else config.channels * config.tube}
    for field, spellings in OPTIONS.items():
        value = getattr(config, field)
        spelling = next((name for name in spellings if name in accepted), None)
        if value is not None and spelling:
            options[spelling] = value
        elif value not in (None, 0.0) and field != "image_size":
            raise UsageError(f"encoder.{field}: {config.name} has no such option")
    if "dynamic_img_size" in accepted:
        options["dynamic_img_size"] = False
    norm = next((name for name in ("fc_norm", "use_fc_norm") if name in accepted), None)
    if (
        config.pool != "head" and norm
    ):  # the last norm stands before the pool, so that timm's own output is exactly ours
        options |= {"global_pool": "avg" if config.pool == "mean" else "token", norm: False}
    return options


def _check_dimensions(skeleton: Any, config: EncoderConfig) -> None:
    """Raise UsageError for dimensions that do not fit each other, whether given or the model's own."""
    patch = config.patch or skeleton.patch_embed.patch_size[0]
    width = config.width or skeleton.embed_dim
    heads: int = config.heads or getattr(getattr(skeleton.blocks[0], "attn", None), "num_heads", None) or 1
    has_class_token = skeleton.cls_token is not None if config.class_token is None else config.class_token
    if config.image_size % patch:
        raise UsageError(f"encoder.image_size: {config.image_size} is not a multiple of the patch of {patch} pixels")
    if width % heads:
        raise UsageError(f"encoder.width: {width} is not a multiple of the {heads} heads")
    if width % 4 and config.positions == "sincos":
        raise UsageError(f"encoder.width: {width} is not a multiple of 4, as encoder.positions sincos needs")
    if "cls" in config.pool and not has_class_token:
        raise UsageError(f"encoder.pool: {config.pool}: this model has no class token; use mean or head")


@cache
def _skeleton(name: str) -> nn.Module:
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3, 0.5) or timm.list_models("vit_*_patch16_224")[:3]
        raise UsageError(f"encoder.name: timm has no model {name!r}; did you mean {', '.join(near)}?")
    return timm.create_model(name)


def _init_xavier(model: Any) -> None:
    """MAE's initial weights (appendix A.1): Xavier uniform for every linear layer, the stem seen as one; tokens 0.02."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    stem = model.patch_embed.proj if _plain_stem(model.patch_embed) else None
    if stem is not None:
        nn.init.xavier_uniform_(stem.weight.data.view(stem.weight.shape[0], -1))
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)


def _fix_positions(backbone: Any) -> None:
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    table = sincos(backbone.embed_dim, backbone.patch_embed.grid_size, prefix)
    backbone.pos_embed.data.copy_(table[None])
    backbone.pos_embed.requires_grad_(False)


def _plain_stem(stem: Any) -> bool:
    return type(stem) is PatchEmbed and isinstance(stem.proj, nn.Conv2d) and stem.proj.groups == 1
