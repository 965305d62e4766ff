"""Crops of many small images at once, resized by two products with tables of weights: the pixels of torch's own resizing.

torch resizes uint8 images with weights rounded to 16 bits, first along rows, then along columns, each result rounded
(Pillow's way). Sums of such products are whole numbers times a power of two, which floating point adds without error in
any order: so a batched matmul gives the same bits, a hundred times faster than a call for each 32 x 32 crop.
"""

from functools import cache
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AT_ONCE = 64  # images whose intermediate results stay in a core's own memory
MOST_BYTES = 2**26  # of a table
EXACT_BITS = 24  # of a float32
SUPPORT = {"bilinear": 1, "bicubic": 2}  # pixels to either side

Boxes = NDArray[np.int64]


class Table(NamedTuple):
    """Weights of every crop of an axis, resized to one size."""

    weights: Tensor
    """(2 K, size, side), float32 or float64, for the K = side (side + 1) / 2 crops, then for the same mirrored."""
    side: int

    def rows(self, start: NDArray[np.int64], length: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Which weights belong to crops (B,) that begin at `start`: (B,) numbers."""
        shorter = length - 1  # crops of length l come after those of 1 .. l - 1, of which there are side, side - 1, ...
        first = shorter * self.side - shorter * (shorter - 1) // 2
        return torch.from_numpy(first + start + mirrored * (len(self.weights) // 2))


def resized_crops(
    pixels: Tensor, boxes: Boxes, mirrored: NDArray[np.bool_], size: int, interpolation: str = "bicubic"
) -> Tensor:
    """Each image's crop, antialiased to size x size, mirrored left to right where asked.

    Args:
        pixels: (B, H, C, W) uint8: rows, then channels, so that neither product has to move anything.
        boxes: (B, 4): left, top, right, bottom, pixels.
        mirrored: (B,).

    Returns:
        (B, C, size, size) uint8, bit for bit what `torch.nn.functional.interpolate(..., antialias=True)` makes.
    """
    _, height, channels, width = pixels.shape
    across, down = table(width, size, interpolation), table(height, size, interpolation)
    left, top, right, bottom = boxes.T
    columns = across.rows(left, right - left, mirrored)
    rows = down.rows(top, bottom - top, np.zeros_like(mirrored))
    made = np.empty((len(pixels), channels, size, size), np.uint8)
    for begin in range(0, len(pixels), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        values = pixels[some].to(across.weights.dtype).view(-1, height * channels, width)
        values = _rounded(values @ across.weights[columns[some]].transpose(1, 2)).floor_()
        values = values.to(down.weights.dtype).view(-1, height, channels * size)
        values = _rounded(down.weights[rows[some]] @ values).view(-1, size, channels, size)
        # Cuts off what is behind the point, as `floor_` does above; three times faster in NumPy.
        np.copyto(made[some], values.transpose(1, 2).numpy(), casting="unsafe")
    return torch.from_numpy(made)


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).clamp_(0, 255)


def affordable(width: int, height: int, size: int) -> bool:
    """Whether the tables that `resized_crops` needs are small enough to be kept."""
    return max(8 * side * (side + 1) * side * size for side in (width, height)) <= MOST_BYTES


@cache
def table(side: int, size: int, interpolation: str) -> Table:
    """The weights of every crop of an axis of `side` pixels, resized to `size`."""
    by_length = [axis_weights(length, size, interpolation) for length in range(1, side + 1)]
    weights = np.zeros((side * (side + 1) // 2, size, side))
    row = 0
    for length, some in enumerate(by_length, 1):
        for start in range(side - length + 1):
            weights[row, :, start : start + length] = some
            row += 1
    exact = all(_fits_float32(some) for some in by_length)
    both = np.concatenate([weights, weights[:, ::-1]])
    return Table(torch.from_numpy(both.astype(np.float32 if exact else np.float64)), side)


def axis_weights(length: int, size: int, interpolation: str) -> NDArray[np.float64]:
    """torch's weights of an axis, antialiased and rounded to 16 bits: (size, length), each a multiple of a power of two."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = SUPPORT[interpolation] * stretch
    centres = scale * (np.arange(size) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), length)
    places = np.arange(length)
    inside = (places >= first[:, None]) & (places < last[:, None])
    weights = np.where(inside, _filter((places - centres[:, None] + 0.5) / stretch, interpolation), 0.0)
    weights /= weights.sum(1, keepdims=True)
    unit = 2.0 ** _precision(weights.max())
    return np.trunc(weights * unit + np.copysign(0.5, weights)) / unit


def _filter(x: NDArray[np.float64], interpolation: str) -> NDArray[np.float64]:
    """The triangle, or Keys' cubic (1981) with a = -0.5."""
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _precision(largest: float) -> int:
    """Bits behind the point, so that the largest weight fills 16 bits with its sign; 22 at most, as in torch."""
    precision = 0
    while precision < 22 and int(0.5 + largest * 2 ** (precision + 1)) < 2**15:
        precision += 1
    return precision


def _fits_float32(weights: NDArray[np.float64]) -> bool:
    """Whether sums of 8-bit values by these weights are exact in float32."""
    unit = 2.0 ** _precision(weights.max())
    return ceil(np.abs(weights).sum(1).max() * 255 * unit + unit) < 2**EXACT_BITS
