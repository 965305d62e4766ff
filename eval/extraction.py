"""Features beyond the plain forward pass: of an image in several scales (S2), with tokens merged on the way (ToMe)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.merging import check_merging, embed_merged

if TYPE_CHECKING:  # features.py asks here
    from selfsight.eval.features import Extraction


def check_extraction(encoder: Encoder, pools: Sequence[str], extraction: "Extraction") -> None:
    """Say no before any image is read.

    Raises:
        UsageError: scales that are not different whole numbers from 1 on, or as `check_merging`.
    """
    scales = extraction.scales
    if not scales or len({*scales}) < len(scales) or any(type(scale) is not int or scale < 1 for scale in scales):
        told = ", ".join(map(str, scales)) or "none"
        raise UsageError(f"scales: {told}; give different whole numbers from 1 on, such as 1,2")
    check_merging(encoder, extraction.merge, pools)


def reading_size(encoder: Encoder, extraction: "Extraction") -> int:
    """The side in which images are to be read for `embed`, pixels: the largest scale's."""
    return encoder.preprocessing.image_size * max(extraction.scales)


def embed(encoder: Encoder, images: Tensor, pools: Sequence[str], extraction: "Extraction") -> dict[str, Tensor]:
    """Features by pool (B, len(scales) * D), in several scales (S2: Shi et al. 2024, arXiv 2403.13043, section 3.1).

    For scale s the image at s times the encoder's size is cut into s x s tiles of that size, each encoded by itself, pooled,
    and the tiles' features averaged; scales stand side by side in the order given. A smaller scale is made from the same
    larger image, resized with antialiasing. Planes of a volume are scaled and cut all alike.

    Args:
        images: normalised, (B, C, H, H) or (B, C, D, H, H) with H = `reading_size`.

    Raises:
        UsageError: as `check_extraction`, or images of another size.
    """
    check_extraction(encoder, pools, extraction)
    size = reading_size(encoder, extraction)
    if tuple(images.shape[-2:]) != (size, size):
        raise UsageError(f"images of {images.shape[-2]} x {images.shape[-1]}; scales {extraction.scales} take {size}")
    parts = [_at_scale(encoder, images, pools, scale, extraction.merge) for scale in extraction.scales]
    return {pool: torch.cat([part[pool] for part in parts], dim=1) for pool in pools}


def _at_scale(encoder: Encoder, images: Tensor, pools: Sequence[str], scale: int, merge: int) -> dict[str, Tensor]:
    """Tiles encoded one position after another, so that no more lies in memory than for one scale."""
    tiles = tiled(resized(images, scale * encoder.preprocessing.image_size), scale)
    found = [embed_merged(encoder, tile, pools, merge) for tile in tiles]
    return {pool: torch.stack([one[pool] for one in found]).mean(0) if scale > 1 else found[0][pool] for pool in pools}


def resized(images: Tensor, size: int) -> Tensor:
    """Images (..., H, W) in another size, bicubic with antialiasing."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    flat = images.flatten(1, -3)
    return F.interpolate(flat, (size, size), mode="bicubic", antialias=True).view(*images.shape[:-2], size, size)


def tiled(images: Tensor, scale: int) -> Tensor:
    """Images (B, ..., s H, s W) as s * s tiles in row-major order: (s * s, B, ..., H, W)."""
    return rearrange(images, "b ... (r h) (c w) -> (r c) b ... h w", r=scale, c=scale)
