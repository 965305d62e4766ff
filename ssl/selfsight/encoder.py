"""One contract over any timm backbone. This is the only file that knows timm's attributes.

tokens = encoder(images, keep=keep)      # only these patches are embedded and encoded
features = encoder.embed(images)         # the one function that turns images into features
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selfsight.backbone import build_backbone, is_plain
from selfsight.blocks import quicken
from selfsight.compiled import eager
from selfsight.drop_path import Draw, draw_drop_paths, key_drop_paths, with_its_draws
from selfsight.errors import UsageError
from selfsight.positions import sincos_line
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.stem import patchify, unpatchify

LAST4 = "last4"  # the pool of the last four blocks
PLANE_TABLES = ("depth_embed", "channel_embed")  # an encoder's own, beside its backbone's tensors
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tokens(NamedTuple):
    """What an encoder returns, normalised by its last norm."""

    prefix: Tensor
    """(B, P, D): class token, then registers; P may be 0."""
    patches: Tensor
    """(B, N, D), plane after plane where there are several, or (B, K, D) in the order of `keep`."""


class Encoder(nn.Module):
    """A timm backbone that can drop or mask patches, and pools the same way everywhere.

    A volume is encoded as planes of patches (tubes) by the backbone of one plane; so is an image whose channels are
    tokens (ChannelViT, Bao, Sivanandan, Karaletsos 2024, arXiv 2309.16108), its channels as the planes. What is added to
    the patches of a plane, for its depth or its channel, is the encoder's own: `plane_embed`.

    Args:
        backbone: a timm model without classifier.
        preprocessing: how its inputs are made.
        config: what it was built from; its `pool` is "cls", "mean", "cls+mean", or "head" for the backbone's own.

    Raises:
        UsageError: a pool that the backbone does not have, or planes with a backbone that cannot take them.
    """

    backbone: Any
    depth_embed: nn.Parameter | None
    channel_embed: nn.Parameter | None

    def __init__(self, backbone: nn.Module, preprocessing: Preprocessing, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocessing = preprocessing
        self.config = config
        self.pool: str = config.pool
        self.checkpoint_blocks = 0  # the first so many are recomputed in the backward pass
        # Two families have the plain sequence of steps that `forward` spells out; others run as timm wrote them.
        self.plain = is_plain(backbone)
        self.hierarchical = type(backbone) in (SwinTransformer, SwinTransformerV2)
        self.width: int = self.backbone.num_features
        self._drop_paths = key_drop_paths(backbone)
        quicken(backbone)
        if "cls" in self.pool and not self.has_class_token:
            raise UsageError(f"encoder.pool: {self.pool}: this model has no class token; use mean or head")
        if self.pool != "head":
            self.freeze_head()
        self.planes: int = config.channels if config.channel_tokens else config.frames // config.tube
        self._add_plane_embed()

    def _add_plane_embed(self) -> None:
        """Tables over depth, fixed or learned as `encoder.positions` says, or over channels, always learned."""
        config = self.config
        for name in PLANE_TABLES:
            self.register_parameter(name, None)
        if not self.volumetric:
            return
        if not self.resizable or self.backbone.pos_embed is None:
            field = "channel_tokens" if config.channel_tokens else "frames"
            raise UsageError(f"encoder.{field}: {config.name} takes plain images only; choose a vit_* without rope")
        learned = nn.init.trunc_normal_(torch.zeros(1, self.planes, self.stem_width), std=0.02)
        if config.channel_tokens:
            self.channel_embed = nn.Parameter(learned)
        elif self.planes > 1 and config.positions == "learned":
            self.depth_embed = nn.Parameter(learned)
        elif self.planes > 1:
            self.depth_embed = nn.Parameter(sincos_line(self.stem_width, self.planes)[None], requires_grad=False)

    @property
    def plane_embed(self) -> nn.Parameter | None:
        """(1, planes, D), added to all patches of a plane; None where there is but one."""
        return self.channel_embed if self.channel_embed is not None else self.depth_embed

    @property
    def volumetric(self) -> bool:
        """Whether its patches lie in planes: of a volume, or one for each channel."""
        return self.config.frames > 1 or self.config.channel_tokens

    @property
    def resizable(self) -> bool:
        """Whether it takes images of other sizes, with `any_size`."""
        return self.plain and getattr(self.backbone, "rope", None) is None

    @property
    def absolute(self) -> bool:
        """Whether tokens carry where they are, and not rotary embeddings alone, which are relative."""
        return getattr(self.backbone, "pos_embed", None) is not None

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return getattr(self.backbone, "cls_token", None) is not None

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return getattr(self.backbone, "num_prefix_tokens", 0)

    @property
    def plane_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a plane."""
        return self.backbone.patch_embed.grid_size

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches that go in; before them planes, if it is volumetric."""
        return (self.planes, *self.plane_grid) if self.volumetric else self.plane_grid

    @property
    def patches(self) -> int:
        """Patches that go in."""
        return prod(self.grid)

    @property
    def patch_values(self) -> int:
        """Pixels' values in a patch of `patchify`."""
        channels = 1 if self.config.channel_tokens else self.config.channels
        return channels * self.config.tube * self.stride**2

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
        return self.width_of(self.pool)

    def width_of(self, pool: str) -> int:
        """Width of the features of a pool."""
        if pool == "head":
            return getattr(self.backbone, "head_hidden_size", self.width)
        parts = 4 + self.has_class_token if pool == LAST4 else len(pool.split("+"))
        return self.width * parts

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, or the stages of a hierarchical backbone; none of one that is built otherwise (ResNet)."""
        names = ("blocks", "layers", "stages")
        return next((getattr(self.backbone, name) for name in names if hasattr(self.backbone, name)), nn.ModuleList())

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        draw: Draw | None = None,
        any_size: bool = False,
        channels: Sequence[int] | None = None,
    ) -> Tokens:
        """Encode normalised images (B, C, H, W), or volumes (B, C, D, H, W) where `encoder.frames` says so.

        Args:
            keep: (B, K) long; only these patches are embedded and encoded.
            mask: (B, N) bool, with `mask_token` (D,): these patches' embeddings are replaced, before positions are added.
            draw: where stochastic depth takes its randomness, such as `Batch.uniform`; torch's generator if not given.
            any_size: take images of another size than the encoder's, in whole patches, and resample the position
                embeddings for them (bicubic, antialiased), as for the local views of multi-crop.
            channels: which of its channels the images have, if not all; for channel tokens.

        Raises:
            UsageError: `keep`, `mask`, `any_size` or `channels` with a backbone that is not made for it, or images of
                another shape.
        """
        self._draw_drop_paths(images, draw)
        shown = self._shown(channels)
        if not self.plain:
            if keep is not None or (mask is not None and not self.hierarchical):
                raise UsageError(self._cannot_drop())
            return self._as_tokens(self._dense(images, mask, mask_token))
        first, rope = self.begin(images, keep, mask, mask_token, any_size, shown)
        last = first
        for _, x in self._steps(first, rope):
            last = x
        return self.normed(last)

    def begin(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        any_size: bool = False,
        shown: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What enters the first block, and the rotary positions, if there are any."""
        grid = self._grid_of(images, any_size, shown)
        x = self._embed_patches(images, keep)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x, rope = self._add_positions(x, keep, grid, shown)
        return self.backbone.norm_pre(x), rope

    def _cannot_drop(self) -> str:
        return f"{type(self.backbone).__name__} cannot drop or mask patches; choose a vit_* model"

    def _steps(self, x: Tensor, rope: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """The number of each block, and the tokens after it."""
        for depth, block in enumerate(self.blocks):
            extra: dict[str, Any] = {} if rope is None else {"rope": rope[depth] if self.backbone.rope_mixed else rope}
            if depth < self.checkpoint_blocks and self.training:
                x = checkpoint(with_its_draws(block), x, use_reentrant=False, **extra)
            else:
                x = block(x, **extra)
            yield depth, x

    def between_blocks(self, images: Tensor, keep: Tensor, draw: Draw | None = None) -> list[Tensor]:
        """Tokens (B, P + K, D) before the first block and after each, of the patches `keep` (B, K) alone; the last ones through
        the last norm.

        Raises:
            UsageError: a backbone that cannot leave patches out.
        """
        if not self.plain:
            raise UsageError(self._cannot_drop())
        self._draw_drop_paths(images, draw)
        first, rope = self.begin(images, keep)
        *others, (_, last) = self._steps(first, rope)
        return [first, *(x for _, x in others), self.backbone.norm(last)]

    def normed(self, x: Tensor) -> Tokens:
        """What comes out of a block (B, T, D), through the last norm."""
        x = self.backbone.norm(x)
        return Tokens(x[:, : self.prefix_tokens], x[:, self.prefix_tokens :])

    def layers(self, images: Tensor, last: int, channels: Sequence[int] | None = None) -> list[Tokens]:
        """Tokens after each of the last so many blocks, each normalised by the last norm, as DINOv2's probes take them.

        Raises:
            UsageError: a backbone that is not a plain ViT, or has fewer blocks.
        """
        if not self.plain or not 1 <= last <= len(self.blocks):
            raise UsageError(f"{self.config.name}: the last {last} blocks can be had of a plain ViT that has as many")
        start = self.begin(images, shown=self._shown(channels))
        return [self.normed(x) for depth, x in self._steps(*start) if depth >= len(self.blocks) - last]

    def embed(
        self,
        images: Tensor,
        pool: str | None = None,
        draw: Draw | None = None,
        channels: Sequence[int] | None = None,
    ) -> Tensor:
        """Features of normalised images (B, C, H, W) or (B, C, D, H, W): (B, D), or (B, 2 D) for "cls+mean".

        The online probe, kNN, linear probe, export check and report all come through here, and no other way.
        With channel tokens any of the channels will do: `embed(images[:, [0, 2]], channels=(0, 2))`.
        Pools are "cls", "mean", "cls+mean", "gem", "last4" and "head"; see `pool_tokens`, `pool_layers` and `pools`.
        """
        pool = pool or self.pool
        return self.embed_pools(images, (pool,), draw, channels)[pool]

    def embed_pools(
        self, images: Tensor, pools: Sequence[str], draw: Draw | None = None, channels: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`embed` for several pools from one forward pass."""
        return self.encode(images, pools, draw, channels)[1]

    def encode(
        self, images: Tensor, pools: Sequence[str], draw: Draw | None = None, channels: Sequence[int] | None = None
    ) -> tuple[Tokens, dict[str, Tensor]]:
        """Tokens, and features by pool, from one forward pass."""
        layers: list[Tokens] = []
        if LAST4 in pools:
            self._draw_drop_paths(images, draw)
            layers = self.layers(images, 4, channels)
            tokens = layers[-1]
            raw = torch.cat(tokens, dim=1)
        elif self.plain:
            tokens = self(images, draw=draw, channels=channels)
            raw = torch.cat(tokens, dim=1)
        else:
            self._shown(channels)
            self._draw_drop_paths(images, draw)
            raw = self._dense(images)
            tokens = self._as_tokens(raw)
        head = self.backbone.forward_head
        own = {"head": lambda: head(raw, pre_logits=True), LAST4: lambda: pool_layers(layers, self.has_class_token)}
        return tokens, {pool: own[pool]() if pool in own else pool_tokens(tokens, pool) for pool in pools}

    @property
    def pools(self) -> tuple[str, ...]:
        """What `embed` can pool, the encoder's own first."""
        plain = ["cls", "mean", "cls+mean"] if self.has_class_token else ["mean"]
        known = [*plain, "gem", *([LAST4] if len(self.blocks) >= 4 else [])] if self.plain else []
        return (self.pool, *[pool for pool in known if pool != self.pool])

    def freeze_head(self) -> None:
        """Train nothing that comes after the tokens: for who does not use it, and DDP waits for every gradient."""
        for name in ("attn_pool", "fc_norm", "head"):
            if isinstance(module := getattr(self.backbone, name, None), nn.Module):
                module.requires_grad_(False)

    def patchify(self, images: Tensor) -> Tensor:
        """The pixels of the patches that come out as tokens: (B, N, `patch_values`)."""
        return patchify(self._planar(images), self.stride, self.config.tube)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`: images of the encoder's own shape."""
        side = self.preprocessing.image_size // self.stride
        grid = (self.planes, side, side) if self.volumetric else (side, side)
        images = unpatchify(patches, self.stride, grid, self.config.tube)
        return images[:, 0] if self.config.channel_tokens else images

    def _planar(self, images: Tensor) -> Tensor:
        """Channels that are tokens, as the planes of a volume of one channel."""
        return images[:, None] if self.config.channel_tokens else images

    def _shown(self, channels: Sequence[int] | None) -> Sequence[int] | None:
        """The channels that the images have, if they are a choice that can be made."""
        if channels is None:
            return None
        if not self.config.channel_tokens:
            raise UsageError("channels: only an encoder with encoder.channel_tokens takes some of its channels")
        if not channels or len({*channels} & {*range(self.planes)}) != len(channels):
            raise UsageError(f"channels: {tuple(channels)} are not different channels of 0..{self.planes - 1}")
        return channels

    def _grid_of(self, images: Tensor, any_size: bool, channels: Sequence[int] | None) -> tuple[int, int]:
        """Rows and columns of patches of these images."""
        wanted = self.preprocessing.shape if channels is None else (len(channels), *self.preprocessing.shape[1:])
        shape, (height, width) = tuple(images.shape[1:]), images.shape[-2:]
        fits = not (height % self.patch or width % self.patch) if any_size else shape[-2:] == wanted[-2:]
        if not fits or shape[:-2] != wanted[:-2]:
            also = f" or other whole patches of {self.patch} pixels" if any_size else ""
            raise UsageError(f"images of shape {shape}; the encoder takes {wanted}{also}")
        grid = (height // self.patch, width // self.patch)
        if grid != self.plane_grid and not self.resizable:
            raise UsageError(
                f"{self.config.name} has rotary positions: images of {height} x {width} need a vit_* without"
            )
        return grid

    def _embed_patches(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """The stem's convolution as a product over patches, so that hidden patches are dropped before it: (B, K, D)."""
        stem = self.backbone.patch_embed
        patches = self.patchify(images)
        if keep is not None:
            patches = take(patches, keep)
        return stem.norm(F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias))

    def _add_positions(
        self, x: Tensor, keep: Tensor | None, grid: tuple[int, int], channels: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Position embeddings on patches and, where the model has them there, on prefix tokens; then the rotary ones."""
        model, table = self.backbone, self.backbone.pos_embed
        tokens = [token for token in (model.cls_token, model.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else x.new_zeros(1, 0, x.shape[-1])
        if table is not None:
            split = 0 if model.no_embed_class else self.prefix_tokens
            if grid != self.plane_grid:
                table = resample_abs_pos_embed(table, list(grid), list(self.plane_grid), num_prefix_tokens=split)
            prefix = prefix + table[:, :split] if split else prefix
            places = self._in_planes(table[:, split:], channels).expand(x.shape[0], -1, -1)
            x = x + (places if keep is None else take(places, keep))
        x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        rope = getattr(model, "rope", None)
        if rope is None:
            return x, None
        cached = getattr(rope, "feat_shape", None) is not None
        angles = rope.get_embed() if cached else rope.get_embed(shape=grid)
        if keep is not None:  # (..., N, d) -> each image's own: (..., B, 1, K, d)
            angles = angles[..., keep, :] if model.rope_mixed else angles[keep][:, None]
            angles = angles.transpose(1, 2) if model.rope_mixed else angles
        return x, angles

    def _in_planes(self, places: Tensor, channels: Sequence[int] | None) -> Tensor:
        """Positions of a plane's patches (1, N, D), each plane's with what is its own added: (1, planes N, D)."""
        own: Tensor | None = self.plane_embed
        if own is None:
            return places
        if channels is not None:
            planes = own.unbind(1)  # an index made here would wait for the device
            own = torch.stack([planes[channel] for channel in channels], dim=1)
        return (own[:, :, None] + places[:, None]).flatten(1, 2)

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
    """The feature of an image from its tokens: "cls" (B, D), "mean" of the patches (B, D), both (B, 2 D), or "gem".

    "gem" is the generalised mean of the patches (Radenovic, Tolias, Chum 2018, arXiv 1711.02512, equation 3) with p = 3.
    """
    parts = {
        "cls": lambda: tokens.prefix[:, 0],
        "mean": lambda: tokens.patches.mean(1),
        "gem": lambda: tokens.patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
    }
    return torch.cat([parts[part]() for part in pool.split("+")], dim=-1)


def pool_layers(layers: Sequence[Tokens], class_token: bool) -> Tensor:
    """DINOv2's feature of several blocks (B, (L + 1) D): their class tokens, and the mean of the last one's patches.

    Without a class token the means of the patches (B, L D).
    """
    if not class_token:
        return torch.cat([tokens.patches.mean(1) for tokens in layers], dim=-1)
    return torch.cat([*(tokens.prefix[:, 0] for tokens in layers), layers[-1].patches.mean(1)], dim=-1)


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
            raise UsageError(
                f"data.{name}: has {len(values)} values for {channels} channels; give as many, or take the default with "
                f"--data.mean null --data.std null"
            )
    if min(std) <= 0:
        raise UsageError("data.std: must be above 0")
    shown = data.interpolation, data.crop_pct, data.depth, data.range
    return Preprocessing(encoder.image_size, channels, mean, std, *shown, encoder.frames, data.frame_step)


def build_encoder(config: EncoderConfig, preprocessing: Preprocessing, seed: int) -> Encoder:
    """The encoder of a recipe with fresh weights, a function of the seed alone. `config.weights` is not loaded here.

    Raises:
        UsageError: a name that timm does not know, or dimensions that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(build_backbone(config), preprocessing, config)


def resample_positions(encoder: Encoder, table: Tensor, old_grid: tuple[int, int]) -> Tensor:
    """A position table (1, prefix + N, D) of another plane's grid, resampled bicubically (antialiased) to this encoder's."""
    prefix = 0 if encoder.backbone.no_embed_class else encoder.prefix_tokens
    return resample_abs_pos_embed(table, list(encoder.plane_grid), list(old_grid), num_prefix_tokens=prefix)


logging.getLogger("timm").setLevel(logging.ERROR)  # timm reports each resampling; ours names every tensor itself


@contextmanager
def evaluating(encoder: Encoder, device: torch.device | None = None) -> Iterator[None]:
    """In evaluation mode, and on a device if one is given; then as it was and where it was, whatever happens meanwhile."""
    live, training = next(encoder.parameters()).device, encoder.training
    try:
        encoder.eval().to(device or live)
        with eager(encoder):
            yield
    finally:
        encoder.to(live).train(training)
