"""Near duplicates: images that differ by compression, size or brightness, found by a hash and confirmed by a thumbnail.

The hash is pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions"): the signs of the 63
lowest frequencies of the image's cosine transform around their median, the constant left out. Alone it takes one digit for
another of its kind, so that thumbnails must agree, too.
"""

from functools import cache
from math import pi

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE, LOWEST = 32, 8  # pixels that are transformed; frequencies along each axis, and pixels of the thumbnail
FLAT = 0.02  # deviation of normalised grey below which an image has no features to compare
NEAR = 4  # bits of 64
ALIKE = 0.98  # correlation of thumbnails
CANDIDATES = 4  # nearest hashes whose thumbnails are looked at
_LEVELS = 31.0  # of a standard deviation, in a byte


@torch.no_grad()
def phash(images: Tensor) -> Tensor:
    """What is compared of each image: 8 bytes of hash and 64 of thumbnail, (B, 72) uint8; all 0 for a flat one.

    Args:
        images: (B, C, H, W), or (B, C, D, H, W) with planes, normalised; channels and planes are averaged.
    """
    grey = images.float().flatten(1, -3).mean(1, keepdim=True)
    large = F.interpolate(grey, (SIDE, SIDE), mode="area")[:, 0]
    small = F.interpolate(large[:, None], (LOWEST, LOWEST), mode="area").flatten(1)
    std = small.std(1, keepdim=True)
    thumbnail = ((small - small.mean(1, keepdim=True)) / std.clamp(min=1e-6) * _LEVELS + 128).clamp(1, 255).byte()
    basis = _cosines(images.device)
    found = (basis @ large @ basis.T).flatten(1)[:, 1:]
    bits = F.pad(found > found.median(1, keepdim=True).values, (1, 0))
    packed = torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=1))
    return torch.cat([packed, thumbnail.cpu()], 1) * (std > FLAT).cpu()


@cache
def _cosines(device: torch.device) -> Tensor:
    places, frequencies = torch.arange(SIDE, device=device), torch.arange(LOWEST, device=device)
    return torch.cos(pi * (2 * places + 1) * frequencies[:, None] / (2 * SIDE))


def near(train: Tensor, test: Tensor) -> np.ndarray:
    """Which test images (M,) have a training image that is nearly the same; flat ones never.

    Args:
        train, test: (N, 72) and (M, 72) uint8 from `phash`.
    """
    train = train[(train != 0).any(1)]
    if not len(train) or not len(test):
        return np.zeros(len(test), bool)
    bits = LOWEST * LOWEST // 8
    index = faiss.IndexBinaryFlat(8 * bits)
    index.add(np.ascontiguousarray(train[:, :bits].numpy()))
    distance, found = index.search(np.ascontiguousarray(test[:, :bits].numpy()), min(CANDIDATES, len(train)))
    bank, own = _standard(train[:, bits:]), _standard(test[:, bits:])
    alike = torch.einsum("mkd,md->mk", bank[torch.from_numpy(found)], own).numpy() >= ALIKE
    return ((distance <= NEAR) & alike).any(1) & (test != 0).any(1).numpy()


def _standard(thumbnails: Tensor) -> Tensor:
    values = thumbnails.float()
    return F.normalize(values - values.mean(1, keepdim=True))
