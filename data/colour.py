"""Colour of a view: jitter, greyscale, blur, solarisation, for a whole batch at once and where the batch lies.

The formulas are torchvision's, for float pixels; only the draws differ, which come from (seed, key). Jitter is applied in
one fixed order: brightness, contrast, saturation, hue (SimCLR's `color_jitter_nonrand`), so that it is a few operations
on the batch and not twenty-four.
"""

from collections.abc import Callable
from functools import partial
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfsight.data.transfer import without_waiting
from selfsight.data.views import View

DRAWS = 9  # uniform numbers that a view's colour is made from
_LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has them
Draws = NDArray[np.float64]


def change_colour(pixels: Tensor, view: View, draws: Draws) -> Tensor:
    """The colour of a batch of views, pixels (B, C, H, W) or (B, C, D, H, W) in 0..1, from B rows of `DRAWS` uniform numbers.

    What asks for three channels (saturation, hue, greyscale) leaves images of another number as they are. All planes of a
    clip or volume get the same change, with the contrast of the whole.
    """
    shape, coloured = pixels.shape, pixels.shape[1] == 3
    pixels = pixels.flatten(2, -2)
    jittered = draws[:, 0] < view.jitter
    for column, strength, change in (
        (1, view.brightness, adjust_brightness),
        (2, view.contrast, adjust_contrast),
        (3, view.saturation if coloured else 0.0, adjust_saturation),
        (4, view.hue if coloured else 0.0, shift_hue),
    ):
        if strength:
            low, high = (-strength, strength) if change is shift_hue else (max(0.0, 1 - strength), 1 + strength)
            pixels = _where(jittered, pixels, change, low + (high - low) * draws[:, column])
    if coloured:
        pixels = _where(draws[:, 5] < view.grayscale, pixels, lambda some: to_gray(some).expand_as(some))
    low, high = view.blur_sigma
    pixels = pixels.view(len(pixels), -1, *shape[-2:])  # planes side by side, where none is blurred into the next
    pixels = _where(
        draws[:, 6] < view.blur, pixels, partial(gaussian_blur, most=high), low + (high - low) * draws[:, 7]
    )
    pixels = _where(draws[:, 8] < view.solarize, pixels, lambda some: torch.where(some < 0.5, some, 1 - some))
    return pixels.view(shape)


def _where(
    chosen: NDArray[np.bool_], pixels: Tensor, change: Callable[..., Tensor], values: Draws | None = None
) -> Tensor:
    """`change` the chosen images only. They are known on the host: the device is not waited for."""
    if not chosen.any():
        return pixels
    index = without_waiting(torch.from_numpy(np.flatnonzero(chosen)), pixels.device)
    if values is None:
        return pixels.index_copy(0, index, change(pixels[index]))
    amounts = without_waiting(torch.from_numpy(values[chosen]).to(pixels.dtype), pixels.device)
    return pixels.index_copy(0, index, change(pixels[index], amounts.view(-1, 1, 1, 1)))


def to_gray(pixels: Tensor) -> Tensor:
    """Luma (B, 1, H, W); one channel is its own."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (pixels * factor).clamp(0, 1)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luma."""
    mean = to_gray(pixels).mean((1, 2, 3), keepdim=True)
    return (mean + (pixels - mean) * factor).clamp(0, 1)


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own greys."""
    gray = to_gray(pixels)
    return (gray + (pixels - gray) * factor).clamp(0, 1)


def shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of the colour circle, through HSV; value and saturation stay."""
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    span = high - low
    red, green, blue = pixels.split(1, dim=1)
    safe = torch.where(span == 0, torch.ones_like(span), span)
    other = torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(high == red, (green - blue) / safe, other) + 6 * shift  # in sixths of the circle
    place = torch.cat([hue + 5, hue + 3, hue + 1], dim=1) % 6
    return high - span * torch.minimum(place, 4 - place).clamp(0, 1)


def gaussian_blur(pixels: Tensor, sigma: Tensor, most: float) -> Tensor:
    """Gaussian blur with a deviation for each image, in pixels, of at most `most`; mirrored at the borders.

    Rows and columns are blurred by a product with a banded matrix: one batched matmul each instead of B convolutions.
    """
    # The same window for all: an image must not depend on which others are blurred beside it.
    radius = min(ceil(3 * most), min(pixels.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device)
    weights = (-0.5 * (offsets / sigma.view(-1, 1)).square()).exp()
    weights = weights / weights.sum(1, keepdim=True)
    across = _band(weights, offsets, pixels.shape[-1])
    down = _band(weights, offsets, pixels.shape[-2])
    return down[:, None] @ pixels @ across[:, None].transpose(-1, -2)


def _band(weights: Tensor, offsets: Tensor, size: int) -> Tensor:
    """(B, size, size): row i holds the weights of the pixels around i, those beyond a border folded back."""
    places = (torch.arange(size, device=weights.device)[:, None] + offsets).abs()
    places = torch.where(places >= size, 2 * (size - 1) - places, places)
    band = weights.new_zeros(len(weights), size, size)
    return band.scatter_add(2, places.expand(len(weights), -1, -1), weights[:, None].expand(-1, size, -1))
