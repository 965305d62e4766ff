"""Which patches are hidden, from one random number for each."""

from math import ceil

import torch
from torch import Tensor

from selfsight.encoder import Encoder
from selfsight.errors import UsageError


def random_masking(draws: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Patches sorted by a random number each (B, N): the first `visible` are kept (B, K), the others hidden (B, N - K)."""
    order = draws.argsort(dim=1)
    return order[:, :visible], order[:, visible:]


def mask_lowest(draws: Tensor, count: Tensor | int) -> Tensor:
    """(B, N) bool: the `count` patches (a number, or (B, 1)) of each image with the lowest numbers (B, N) are masked."""
    return draws.argsort(dim=1).argsort(dim=1) < count


def mask_squares(draws: Tensor, side: int, masked: int) -> Tensor:
    """(B, side, side) bool: the `masked` squares of each image with the lowest numbers (B, side^2)."""
    return mask_lowest(draws, masked).view(-1, side, side)


def enlarge(mask: Tensor, factor: int) -> Tensor:
    """(B, H, W) -> (B, factor H, factor W): every cell becomes a square."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def in_every_plane(index: Tensor, planes: int, patches: int) -> Tensor:
    """Of the `patches` of a plane these (B, K), in every plane: (B, planes K), plane after plane."""
    starts = patches * torch.arange(planes, device=index.device)
    return (starts[:, None] + index[:, None]).flatten(1)


def mask_patches(cells: Tensor, encoder: Encoder, size: int) -> Tensor:
    """Masked squares of `size` pixels (B, side, side) as masked patches (B, N), the same in every plane."""
    return enlarge(cells, size // encoder.patch).flatten(1).repeat(1, encoder.planes)


def masked_tokens(cells: Tensor, encoder: Encoder, size: int, masked: int) -> Tensor:
    """The tokens that come out of the `masked` squares of `size` pixels of each image (B, side, side): (B, M), in order.

    `size` is a multiple of the encoder's stride. Their number is given, for to count them would be to wait for the device.
    """
    factor = size // encoder.stride
    mask = enlarge(cells, factor).flatten(1).repeat(1, encoder.planes)
    return mask.byte().argsort(dim=1, descending=True, stable=True)[:, : masked * factor**2 * encoder.planes]


def split_patches(encoder: Encoder, ratio: float, planes: int = 1) -> tuple[int, int]:
    """How many patches stay visible and how many are hidden, of all or of those of one plane among so many.

    Raises:
        UsageError: a backbone that cannot drop patches, or a ratio that leaves none visible or none hidden.
    """
    if not encoder.plain:
        raise UsageError(f"encoder.name: {encoder.config.name} cannot drop patches; choose a vit_* model")
    patches = encoder.patches // planes
    visible = round(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise UsageError(
            f"objective.mask_ratio: {ratio} of {patches} patches leaves {visible} visible; "
            "at least one must be visible and one hidden"
        )
    return visible, patches - visible


def cells_of(encoder: Encoder, size: int, ratio: float) -> tuple[int, int]:
    """Squares of `size` pixels along a side of the image, and how many of all are masked (rounded up, as in SimMIM's code).

    Raises:
        UsageError: squares that do not fit patch or image, or a ratio that leaves nothing masked or nothing visible.
    """
    image = encoder.preprocessing.image_size
    if size % encoder.patch or image % size:
        raise UsageError(
            f"objective.mask_size: {size} must be a multiple of the patch of {encoder.patch} pixels and a divisor of the "
            f"image's {image}"
        )
    side = image // size
    masked = ceil(side * side * ratio)
    if not 0 < masked < side * side:
        raise UsageError(
            f"objective.mask_ratio: {ratio} of {side * side} squares of {size} pixels masks {masked}; "
            "at least one must be masked and one visible"
        )
    return side, masked
