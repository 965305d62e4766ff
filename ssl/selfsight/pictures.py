"""Pictures on the page: arrays as data URLs of bounded size, and the training's own views of the first images."""

import base64
from dataclasses import replace
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selfsight.assemble import Parts
from selfsight.data.mixture import Samples
from selfsight.data.placer import normalize
from selfsight.errors import DataError
from selfsight.eval.features import CentralCrops
from selfsight.preprocessing import Preprocessing

PICTURES = 8  # images in each row
SHOWN = 160  # pixels of a picture's side on the page, at most
EXACT = 64  # pixels of a side up to which every one is kept as it is
QUALITY = 82

Pixels = NDArray[np.uint8]
"""(H, W) or (H, W, 3)."""


class Picture(NamedTuple):
    """An image of the page."""

    url: str
    alt: str
    exact: bool
    """Whether its pixels are to be seen as squares."""


class Strip(NamedTuple):
    """A row of pictures under one caption."""

    caption: str
    pictures: list[Picture]
    detail: bool = False
    """Whether it is shown on request only."""


def array(image: Tensor, made: Preprocessing) -> Pixels:
    """A normalised image (C, S, S), or the middle one of its planes (C, D, S, S), in 8 bits of grey or RGB.

    Of 8 bits as they are. Of other values no screen shows the whole range: black to white is 2.5 deviations
    either side of the mean, and of more than three channels the first three are shown in false colours.
    """
    image = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    plain = made.channels in (1, 3) and made.depth == 8
    shown = made._replace(frames=1).pixels(image) if plain else image / 5 + 0.5
    pixels = (shown.nan_to_num(0.5).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return np.ascontiguousarray(np.moveaxis(pixels[:3], 0, -1) if len(pixels) >= 3 else pixels[0])


def picture(pixels: Pixels, alt: str) -> Picture:
    """A data URL: small images as PNG, larger ones reduced to the page's size as JPEG."""
    image, out = Image.fromarray(pixels), BytesIO()
    exact = max(image.size) <= EXACT
    if exact:
        image.save(out, "PNG", optimize=True)
    else:
        image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        image.save(out, "JPEG", quality=QUALITY)
    kind = "png" if exact else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", alt, exact)


def row(caption: str, images: Tensor, made: Preprocessing) -> Strip:
    """Normalised images (B, ...) side by side."""
    return Strip(caption, [picture(array(image, made), f"{caption} {i}") for i, image in enumerate(images, 1)])


class First(NamedTuple):
    """The first training images."""

    ids: NDArray[np.int64]
    sources: Tensor
    """(B, ...) normalised, in evaluation's view."""
    strips: list[Strip]


@torch.no_grad()
def training_pictures(parts: Parts, device: torch.device) -> First:
    """The objective's pictures of the first training images, one row a caption; above them the images themselves."""
    few = replace(parts.batches(), batch_size=PICTURES, accumulate=1)[0]
    parts.objective.eval()
    shown = parts.objective.pictures(parts.placer(device)(few))
    parts.objective.train()
    made = parts.encoder.preprocessing
    ids, sources = crops(parts.shards, few.ids.numpy(), made, device)
    shown = {"source image": sources, **shown}
    return First(ids, sources, [row(caption, images, made) for caption, images in shown.items()])


def crops(
    shards: Samples, ids: NDArray[np.int64], made: Preprocessing, device: torch.device
) -> tuple[NDArray[np.int64], Tensor]:
    """Evaluation's view of those samples that can be read, normalised, and which they are; a picture is worth no error."""
    good, pixels = [], []
    try:
        pixels, good = [CentralCrops.of(shards, ids, made)[0]], list(ids)
    except DataError:
        for sample in ids:
            try:
                pixels.append(CentralCrops.of(shards, np.array([sample]), made)[0])
                good.append(sample)
            except DataError:
                continue
    if not good:
        raise DataError(f"{shards.spec}: none of {len(ids):,} images can be read")
    return np.array(good), normalize(torch.cat(pixels).to(device), *made.statistics(device), made.values)
