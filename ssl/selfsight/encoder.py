"""One contract over any timm backbone. This is the only file that knows timm's attributes.

tokens = encoder(images, keep=keep)      # only these patches are embedded and encoded
features = encoder.embed(images)         # the one function that turns images into features
"""

import inspect
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from einops import rearrange
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selfsight.data.decode import Form, value_range
from selfsight.drop_path import Draw, draw_drop_paths, key_drop_paths, with_its_draws
from selfsight.errors import UsageError
from selfsight.positions import sincos
from selfsight.recipe import DataConfig, EncoderConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


class Tokens(NamedTuple):
    """What an encoder returns, normalised by its last norm."""

    prefix: Tensor
    """(B, P, D): class token, then registers; P may be 0."""
    patches: Tensor
    """(B, N, D), or (B, K, D) in the order of `keep`."""


class Preprocessing(NamedTuple):
    """How an image becomes an input: belongs to the weights, and travels with them."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    depth: int = 8
    """Bits of a stored value: 8, 16, or 32 for floating point."""
    range: tuple[float, float] | None = None
    """Stored values that become 0 and 1, before mean and std; None: those of the depth."""
    frames: int = 1
    """Planes of a volume or frames of a clip; 1: an image."""
    step: int = 1
    """Planes from one plane of the input to the next."""

    @property
    def form(self) -> Form:
        """What images are decoded to."""
        return Form(self.channels, self.depth, self.range, self.frames)

    @property
    def values(self) -> tuple[float, float]:
        """Decoded values that become 0 and 1."""
        return value_range(self.form)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as (C, 1, 1), or (C, 1, 1, 1) for planes."""
        axes = 3 if self.frames > 1 else 2
        return _on_device(self.mean, device, axes), _on_device(self.std, device, axes)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images (..., C, H, W), or with planes, back in 0..1."""
        mean, std = self.statistics(images.device)
        return images * std + mean


@cache
def _on_device(values: tuple[float, ...], device: torch.device, axes: int) -> Tensor:
    """Channel values before so many axes of length 1; sent once, for each sending waits for the device."""
    return torch.tensor(values, device=device).view(-1, *[1] * axes)


class Encoder(nn.Module):
    """A timm backbone that can drop or mask patches, and pools the same way everywhere.

    Args:
        backbone: a timm model without classifier.
        preprocessing: how its inputs are made.
        config: what it was built from; its `pool` is "cls", "mean", "cls+mean", or "head" for the backbone's own.

    Raises:
        UsageError: a pool that the backbone does not have.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module, preprocessing: Preprocessing, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocessing = preprocessing
        self.config = config
        self.pool: str = config.pool
        self.checkpoint_blocks = False
        # Two families have the plain sequence of steps that `forward` spells out; others run as timm wrote them.
        self.plain = type(backbone) in (VisionTransformer, Eva) and _plain_stem(self.backbone.patch_embed)
        self.hierarchical = type(backbone) in (SwinTransformer, SwinTransformerV2)
        self.width: int = self.backbone.num_features
        self._drop_paths = key_drop_paths(backbone)
        if "cls" in self.pool and not self.has_class_token:
            raise UsageError(f"encoder.pool: {self.pool}: this model has no class token; use mean or head")
        if self.pool != "head":
            self.freeze_head()

    @property
    def resizable(self) -> bool:
        """Whether it takes images of other sizes, with `any_size`."""
        return self.plain and getattr(self.backbone, "rope", None) is None

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return getattr(self.backbone, "cls_token", None) is not None

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return getattr(self.backbone, "num_prefix_tokens", 0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that go in."""
        return self.backbone.patch_embed.grid_size

    @property
    def patch(self) -> int:
        """Side of a patch, pixels."""
        return self.backbone.patch_embed.patch_size[0]

    @property
    def stride(self) -> int:
        """Pixels between the patch tokens that come out: the patch, or what a hierarchical backbone has made of it."""
        return self.patch if self.plain else self.backbone.feature_info[-1]["reduction"]

    @property
    def stem_width(self) -> int:
        """Width of a patch's embedding, which a mask token replaces."""
        return self.backbone.embed_dim

    @property
    def feature_width(self) -> int:
        """Width of `embed`'s features."""
        if self.pool == "head":
            return getattr(self.backbone, "head_hidden_size", self.width)
        return self.width * len(self.pool.split("+"))

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, or the stages of a hierarchical backbone."""
        names = ("blocks", "layers", "stages")
        return next(getattr(self.backbone, name) for name in names if hasattr(self.backbone, name))

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
        any_size: bool = False,
    ) -> Tokens:
        """Encode normalised images (B, C, H, W).

        Args:
            keep: (B, K) long; only these patches are embedded and encoded.
            mask: (B, N) bool, with `mask_token` (D,): these patches' embeddings are replaced, before positions are added.
            draw: where stochastic depth takes its randomness, such as `Batch.uniform`; torch's generator if not given.
            any_size: take images of another size than the encoder's, in whole patches, and resample the position
                embeddings for them (bicubic, antialiased), as for the local views of multi-crop.

        Raises:
            UsageError: `keep`, `mask` or `any_size` with a backbone that is not made for it, or images of another size.
        """
        self._draw_drop_paths(images, draw)
        if not self.plain:
            if keep is not None or (mask is not None and not self.hierarchical):
                raise UsageError(f"{type(self.backbone).__name__} cannot drop or mask patches; choose a vit_* model")
            return self._as_tokens(self._dense(images, mask, mask_token))
        grid = self._grid_of(images, any_size)
        x = self._embed_patches(images, keep)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x, rope = self._add_positions(x, keep, grid)
        x = self.backbone.norm_pre(x)
        for depth, block in enumerate(self.blocks):
            extra: dict[str, Any] = {} if rope is None else {"rope": rope[depth] if self.backbone.rope_mixed else rope}
            if self.checkpoint_blocks and self.training:
                x = checkpoint(with_its_draws(block), x, use_reentrant=False, **extra)
            else:
                x = block(x, **extra)
        x = self.backbone.norm(x)
        return Tokens(x[:, : self.prefix_tokens], x[:, self.prefix_tokens :])

    def embed(self, images: Tensor, pool: str | None = None, draw: Draw | None = None) -> Tensor:
        """Features of normalised images (B, C, H, W): (B, D), or (B, 2 D) for "cls+mean".

        The online probe, kNN, linear probe, export check and report all come through here, and no other way.
        """
        pool = pool or self.pool
        return self.embed_pools(images, (pool,), draw)[pool]

    def embed_pools(self, images: Tensor, pools: Sequence[str], draw: Draw | None = None) -> dict[str, Tensor]:
        """`embed` for several pools from one forward pass."""
        return self.encode(images, pools, draw)[1]

    def encode(
        self, images: Tensor, pools: Sequence[str], draw: Draw | None = None
    ) -> tuple[Tokens, dict[str, Tensor]]:
        """Tokens, and features by pool, from one forward pass."""
        if self.plain:
            tokens = self(images, draw=draw)
            raw = torch.cat(tokens, dim=1)
        else:
            self._draw_drop_paths(images, draw)
            raw = self._dense(images)
            tokens = self._as_tokens(raw)
        head = self.backbone.forward_head
        return tokens, {
            pool: head(raw, pre_logits=True) if pool == "head" else pool_tokens(tokens, pool) for pool in pools
        }

    def freeze_head(self) -> None:
        """Train nothing that comes after the tokens: for who does not use it, and DDP waits for every gradient."""
        for name in ("attn_pool", "fc_norm", "head"):
            if isinstance(module := getattr(self.backbone, name, None), nn.Module):
                module.requires_grad_(False)

    def _grid_of(self, images: Tensor, any_size: bool) -> tuple[int, int]:
        """Rows and columns of patches of these images."""
        stem, (height, width) = self.backbone.patch_embed, images.shape[-2:]
        fits = not (height % self.patch or width % self.patch) if any_size else (height, width) == stem.img_size
        if not fits or images.shape[1] != stem.proj.in_channels:
            wanted = (stem.proj.in_channels, *stem.img_size)
            also = f" or other whole patches of {self.patch} pixels" if any_size else ""
            raise UsageError(f"images of shape {tuple(images.shape[1:])}; the encoder takes {wanted}{also}")
        grid = (height // self.patch, width // self.patch)
        if grid != self.grid and not self.resizable:
            raise UsageError(
                f"{self.config.name} has rotary positions: images of {height} x {width} need a vit_* without"
            )
        return grid

    def _embed_patches(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """The stem's convolution as a product over patches, so that hidden patches are dropped before it: (B, K, D)."""
        stem = self.backbone.patch_embed
        patches = patchify(images, self.patch)
        if keep is not None:
            patches = take(patches, keep)
        return stem.norm(F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias))

    def _add_positions(self, x: Tensor, keep: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Position embeddings on patches and, where the model has them there, on prefix tokens; then the rotary ones."""
        model, table = self.backbone, self.backbone.pos_embed
        tokens = [token for token in (model.cls_token, model.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else x.new_zeros(1, 0, x.shape[-1])
        if table is not None:
            split = 0 if model.no_embed_class else self.prefix_tokens
            if grid != self.grid:
                table = resample_abs_pos_embed(table, list(grid), list(self.grid), num_prefix_tokens=split)
            prefix = prefix + table[:, :split] if split else prefix
            places = table[:, split:].expand(len(x), -1, -1)
            x = x + (places if keep is None else take(places, keep))
        x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        rope = getattr(model, "rope", None)
        if rope is None:
            return x, None
        cached = getattr(rope, "feat_shape", None) is not None
        angles = rope.get_embed() if cached else rope.get_embed(shape=grid)
        if keep is not None:  # (..., N, d) -> each image's own: (..., B, 1, K, d)
            angles = angles[..., keep, :] if model.rope_mixed else angles[keep][:, None]
            angles = angles.transpose(1, 2) if model.rope_mixed else angles
        return x, angles

    def _dense(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """The last features of a backbone with its own way, in its own layout."""
        if mask is None:
            return self.backbone.forward_features(images)
        assert mask_token is not None  # the Swin family's own steps, with masked patches replaced after its stem
        x = self.backbone.patch_embed(images)
        x = torch.where(mask.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
        return self.backbone.norm(self.backbone.layers(x))

    def _as_tokens(self, x: Tensor) -> Tokens:
        """The last features as prefix and patch tokens, whatever the layout."""
        if x.ndim == 4:
            channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            x = rearrange(x, "b h w d -> b (h w) d" if channels_last else "b d h w -> b (h w) d")
        return Tokens(x[:, : self.prefix_tokens], x[:, self.prefix_tokens :])

    def _draw_drop_paths(self, images: Tensor, draw: Draw | None) -> None:
        if self.training and self._drop_paths:
            draw_drop_paths(self._drop_paths, images, draw)


def pool_tokens(tokens: Tokens, pool: str) -> Tensor:
    """The feature of an image from its tokens: "cls" (B, D), "mean" of the patches (B, D), or both (B, 2 D)."""
    parts = {"cls": lambda: tokens.prefix[:, 0], "mean": lambda: tokens.patches.mean(1)}
    return torch.cat([parts[part]() for part in pool.split("+")], dim=-1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * patch * patch), patches in row-major order."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", p=patch, q=patch, h=grid[0], w=grid[1])


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, D) at index (B, K): (B, K, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def preprocessing_of(data: DataConfig, encoder: EncoderConfig) -> Preprocessing:
    """How a recipe's images become inputs.

    Raises:
        UsageError: mean or std for another number of channels.
    """
    channels = encoder.channels
    mean = data.mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels)
    std = data.std or (IMAGENET_STD if channels == 3 else (0.5,) * channels)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UsageError(f"data.{name}: has {len(values)} values for {channels} channels")
    if min(std) <= 0:
        raise UsageError("data.std: must be above 0")
    shown = data.interpolation, data.crop_pct, data.depth, data.range
    return Preprocessing(encoder.image_size, channels, mean, std, *shown, step=data.frame_step)


def build_encoder(config: EncoderConfig, preprocessing: Preprocessing, seed: int) -> Encoder:
    """The encoder of a recipe with fresh weights, a function of the seed alone. `config.weights` is not loaded here.

    Raises:
        UsageError: a name that timm does not know, or dimensions that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = timm.create_model(config.name, num_classes=0, **_model_options(config))
        if isinstance(backbone, VisionTransformer | Eva):
            if config.init == "xavier":
                _init_xavier(backbone)
            if backbone.pos_embed is not None and config.positions == "sincos":
                _fix_positions(backbone)
    return Encoder(backbone, preprocessing, config)


def _model_options(config: EncoderConfig) -> dict[str, Any]:
    """timm's keyword arguments for the fields that are set."""
    with torch.device("meta"):  # only to see which class it is and what it has by itself
        skeleton = _skeleton(config.name)
    if isinstance(skeleton, VisionTransformer | Eva):
        _check_dimensions(skeleton, config)
    accepted = inspect.signature(type(skeleton).__init__).parameters
    options: dict[str, Any] = {"in_chans": config.channels}
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


def resample_positions(encoder: Encoder, table: Tensor, old_grid: tuple[int, int]) -> Tensor:
    """A position table (1, prefix + N, D) of another grid, resampled bicubically (antialiased) to this encoder's."""
    prefix = 0 if encoder.backbone.no_embed_class else encoder.prefix_tokens
    return resample_abs_pos_embed(table, list(encoder.grid), list(old_grid), num_prefix_tokens=prefix)


logging.getLogger("timm").setLevel(logging.ERROR)  # timm reports each resampling; ours names every tensor itself
