"""Geometry of a view: which planes, where to crop, how to resize, whether to flip; drawn from (seed, key), done on the CPU.

The definitions are torchvision's (`RandomResizedCrop`, `RandomHorizontalFlip`, `Resize` + `CenterCrop`); only the source
of the randomness differs. Colour and normalisation come later, batched on the device (`selfsight.data.colour`).
"""

from collections.abc import Sequence
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from selfsight import keyed
from selfsight.data.decode import Pixels
from selfsight.data.jpeg import Need, reduction
from selfsight.data.picture import MOMENTS
from selfsight.data.resample import Boxes, affordable, resized_crops
from selfsight.data.views import View

CROP_TRIES = 10  # as in torchvision
LONGEST = 8  # times the shorter side; of longer images only the middle is resized: 1 x 20,000 would become gigabytes


def crop_box(width: int, height: int, draws: NDArray[np.float64], view: View) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop box (left, top, right, bottom) from 4 x CROP_TRIES uniform numbers.

    Each try draws an area and a log-ratio; the first that fits is placed at random; if none fits, the largest central
    crop within the ratios is taken.
    """
    assert view.crop_scale is not None
    least, most = view.crop_scale
    low, high = map(log, view.crop_ratio)
    for u_area, u_ratio, u_top, u_left in zip(
        *[iter(draws.tolist())] * 4, strict=True
    ):  # plain floats: ten times faster
        area = width * height * (least + (most - least) * u_area)
        ratio = exp(low + (high - low) * u_ratio)
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < view.crop_ratio[0]:
        h = max(1, round(width / view.crop_ratio[0]))
    elif width / height > view.crop_ratio[1]:
        w = max(1, round(height * view.crop_ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_boxes(width: int, height: int, draws: NDArray[np.float64], view: View) -> Boxes:
    """`crop_box` for images of one size, from draws (B, 4 x CROP_TRIES): (B, 4)."""
    assert view.crop_scale is not None
    least, most = view.crop_scale
    low, high = map(log, view.crop_ratio)
    u_area, u_ratio, u_top, u_left = draws.reshape(len(draws), CROP_TRIES, 4).transpose(2, 0, 1)
    area = width * height * (least + (most - least) * u_area)
    ratio = np.exp(low + (high - low) * u_ratio)
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    left, top = np.trunc(u_left * (width - w + 1)), np.trunc(u_top * (height - h + 1))
    first = np.arange(len(draws)), fits.argmax(1)
    boxes = np.stack([left[first], top[first], (left + w)[first], (top + h)[first]], axis=1).astype(np.int64)
    for row in np.flatnonzero(~fits.any(1)):
        boxes[row] = crop_box(width, height, draws[row], view)
    return boxes


class ViewMaker:
    """Draws one view of each image of a batch. `number` tells the views of an objective apart."""

    def __init__(self, view: View, number: int, size: int, interpolation: str, seed: int) -> None:
        self.view, self.number, self.size, self.seed = view, number, view.size or size, seed
        self.interpolation = interpolation

    def draws(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """All that the views with these keys are made from: (P, 1 + 4 x CROP_TRIES)."""
        return keyed.uniform(self.seed, f"view {self.number}", keys, 1 + 4 * CROP_TRIES)

    def shifts(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples away each view is taken from: (P,), 1 to `shift`, or 0."""
        if not self.view.shift:
            return np.zeros(len(keys), np.int64)
        draws = keyed.uniform(self.seed, f"shift {self.number}", keys, 1)[:, 0]
        return 1 + (draws * self.view.shift).astype(np.int64)

    def moments(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """Where in a sequence each view lies, (P,) of 0..1: a moment of its own, or one of three in order that the views share."""
        if self.view.moment is None:
            return keyed.uniform(self.seed, f"moment {self.number}", keys, 1)[:, 0]
        return np.sort(keyed.uniform(self.seed, "moments", keys, MOMENTS), axis=1)[:, self.view.moment]

    def box(self, width: int, height: int, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
        """What a view shows of an image: left, top, right, bottom."""
        return crop_box(width, height, draws[1:], self.view) if self.view.crop_scale else (0, 0, width, height)

    def __call__(self, pixels: Pixels, draws: NDArray[np.float64], stored: tuple[int, int] | None = None) -> Pixels:
        """One view (C, size, size) or (C, D, size, size) of an image or its planes, from one row of `draws`.

        Args:
            stored: width and height of what the pixels were reduced from.
        """
        if self.view.crop_scale is None:
            pixels = resize_and_crop(pixels, self.size, 1.0, self.interpolation)
        else:
            height, width = pixels.shape[-2:]
            whole = stored or (width, height)
            left, top, right, bottom = _scaled(self.box(whole[0], whole[1], draws), width, height, whole)
            pixels = resize(pixels[..., top:bottom, left:right], self.size, self.size, self.interpolation)
        return mirrored(pixels) if draws[0] < self.view.flip else pixels

    def of_batch(self, pixels: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """The same views as one by one, bit for bit, of images of one shape, (B, H, C, W) uint8: (B, C, size, size)."""
        height, width = pixels.shape[1], pixels.shape[3]
        boxes = crop_boxes(width, height, draws[:, 1:], self.view)
        return resized_crops(pixels, boxes, draws[:, 0] < self.view.flip, self.size, self.interpolation)

    def batches(self, height: int, width: int) -> bool:
        """Whether `of_batch` makes this view of images of this size."""
        return bool(self.view.crop_scale) and not self.view.shift and affordable(width, height, self.size)


def _scaled(
    box: tuple[int, int, int, int], width: int, height: int, stored: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box of a stored image in one that was reduced to width x height: the nearest pixels, at least one."""
    if stored == (width, height):
        return box
    across, down = width / stored[0], height / stored[1]
    left, top = round(box[0] * across), round(box[1] * down)
    return left, top, max(left + 1, round(box[2] * across)), max(top + 1, round(box[3] * down))


class Drawn(NamedTuple):
    """What the views of a batch are made from: by view, then by slot."""

    crops: list[NDArray[np.float64]]
    shifts: list[list[int]]
    moments: list[list[float]]

    @classmethod
    def of(cls, makers: Sequence[ViewMaker], keys: NDArray[np.int64]) -> "Drawn":
        """The draws that belong to these keys."""
        shifts = [maker.shifts(keys).tolist() for maker in makers]
        return cls([maker.draws(keys) for maker in makers], shifts, [maker.moments(keys).tolist() for maker in makers])


def needed(
    makers: Sequence[ViewMaker], crops: Sequence[NDArray[np.float64]], reduce: bool, width: int, height: int
) -> Need:
    """What of an image of this size the makers look at, each with its rows of draws (R, ...)."""
    boxes = [
        (maker.size, maker.box(width, height, row)) for maker, rows in zip(makers, crops, strict=True) for row in rows
    ]
    reduced = [reduction(min(box[2] - box[0], box[3] - box[1]), size) for size, box in boxes] if reduce else [1]
    return Need(max(bottom for _, (_, _, _, bottom) in boxes), min(reduced))


def resize(pixels: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """Pixels (..., H, W) in another size, antialiased as Pillow does it: 8 bits within a level or so (mean 0.04 on photographs), others in float32."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    if interpolation == "nearest":  # of masks, whose values are classes
        return nearest(pixels, height, width)
    pixels_in = pixels if pixels.flags.writeable else pixels.copy(order="K")  # torch wants to own what it reads
    planes = torch.from_numpy(pixels_in if pixels.dtype == np.uint8 else pixels.astype(np.float32))
    lead = pixels.shape[:-2]
    planes = planes[None] if len(lead) == 1 else planes.reshape(1, -1, *pixels.shape[-2:])
    found = _interpolate(planes, height, width, interpolation)[0].numpy()
    if pixels.dtype == np.uint16:  # bicubic overshoots
        found = np.rint(found).clip(0, 65535).astype(np.uint16)
    return found.reshape(*lead, height, width) if len(lead) != 1 else found


def nearest(pixels: Pixels, height: int, width: int) -> Pixels:
    """Pixels (..., H, W) in another size: of each new pixel the one in which its centre lies (torch's nearest-exact, exactly)."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip((height, width), pixels.shape[-2:], strict=True)
    )
    return pixels[..., rows[:, None], columns]


def _interpolate(planes: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """torch's antialiased resizing of (1, P, H, W). Colours that lie side by side stay so: torch would spend a third of the
    time on taking them apart, which normalisation does on the way."""
    if planes.dtype == torch.uint8 and planes.shape[1] == 3 and planes.stride(1) == 1:
        resizing = (
            torch.ops.aten._upsample_bicubic2d_aa
            if interpolation == "bicubic"
            else torch.ops.aten._upsample_bilinear2d_aa
        )
        found = torch.empty(1, 3, height, width, dtype=torch.uint8, memory_format=torch.channels_last)
        resizing.out(planes, [height, width], False, None, None, out=found)
        return found
    return F.interpolate(planes, (height, width), mode=interpolation, antialias=True)


def mirrored(pixels: Pixels) -> Pixels:
    """Left to right, by torch: NumPy takes 20 times as long where colours lie side by side."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy(order="K")).flip(-1).numpy()


def resize_and_crop(pixels: Pixels, size: int, crop_pct: float, interpolation: str) -> Pixels:
    """Evaluation's view (..., size, size): shorter side to floor(size / crop_pct), then the centre, as timm does it."""
    short = int(size / crop_pct)
    sides = pixels.shape[-2:]
    if max(sides) > LONGEST * min(sides):
        pixels = _centre(pixels, *(min(side, LONGEST * min(sides)) for side in sides))
    height, width = pixels.shape[-2:]
    if min(height, width) != short:
        longer = short * max(height, width) // min(height, width)
        height, width = (longer, short) if width <= height else (short, longer)
        pixels = resize(pixels, height, width, interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[..., top : top + size, left : left + size]


def _centre(pixels: Pixels, height: int, width: int) -> Pixels:
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
