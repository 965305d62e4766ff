"""Images with their masks: the same crop of both, and the tokens of its patches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from selfsight.data.crops import resize_and_crop
from selfsight.data.loader import loader
from selfsight.data.picture import Picture
from selfsight.data.placer import normalize, unit
from selfsight.data.shards import Shards
from selfsight.data.targets import decode_mask
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval.features import FEW_BATCHES, LONGEST_WAIT, CentralCrops
from selfsight.preprocessing import Preprocessing
from selfsight.stem import patchify

BATCH = 32  # images, with all their tokens
SIDE = 14  # patches a side, at least, that raw pixels are cut into: as many as a ViT has of 16 pixels at 224

Batch = tuple[Tensor, Tensor]
"""Tokens (b, h, w, D) float32 and masks (b, H, W) integers of the same images, on the CPU."""


@dataclass(frozen=True)
class MaskedCrops(Dataset[Batch]):
    """Evaluation's view of samples and of their masks, in batches: item n is (b, C, S, S) and (b, S, S) int32.

    A mask goes through its image's resize and crop, to the nearest pixel's class.
    """

    view: CentralCrops
    shards: Shards

    def __getitem__(self, number: int) -> Batch:
        view, images, masks = self.view, [], []
        ids = view.ids[number * view.batch : (number + 1) * view.batch]
        self.shards.prefetch(ids)
        for sample in ids:
            try:
                pixels = Picture(self.shards.read_images(int(sample)), view.form, view.step).window(0.5)
                mask = decode_mask(self.shards.read_mask(int(sample)))
                if mask.shape != pixels.shape[-2:]:
                    sizes = " x ".join(map(str, mask.shape[::-1])), " x ".join(map(str, pixels.shape[:-3:-1]))
                    raise DataError(f"mask of {sizes[0]} pixels, of an image of {sizes[1]}; store them in one size")
            except DataError as error:  # a score must not depend on a substitute
                raise DataError(f"{self.shards.describe(int(sample))}: {error}") from None
            images.append(resize_and_crop(pixels, view.size, view.crop_pct, view.interpolation))
            masks.append(resize_and_crop(mask, view.size, view.crop_pct, "nearest"))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def need_masks(shards: Shards) -> None:
    """Asks, before any image is read, whether every sample has a mask.

    Raises:
        UsageError: some have none.
    """
    if lacking := int((~shards.masks).sum()):
        raise UsageError(
            f"{shards.spec}: {lacking:,} of {len(shards):,} samples have no mask, which dense scores need: KEY.mask.png "
            "beside KEY.jpg, or selfsight shards build FOLDER TARGET --masks FOLDER"
        )


@torch.inference_mode()
def tokens_and_masks(
    encoder: Encoder | None,
    made: Preprocessing,
    shards: Shards,
    ids: np.ndarray,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Batch]:
    """Tokens of samples `ids` by an encoder, or without one by `pixel_tokens`, with the masks of the same crops.

    Raises:
        DataError: masks of another size than their images, and what cannot be read.
        NumericError: tokens that are not finite.
    """
    view = CentralCrops(shards, ids, made.image_size, made.form, made.interpolation, made.crop_pct, BATCH, made.step)
    numbers = range(-(-len(ids) // BATCH))
    mean, std = made.statistics(device)
    crops = MaskedCrops(view, shards)
    for pixels, masks in loader(crops, numbers, workers if len(numbers) > FEW_BATCHES else 0, False, LONGEST_WAIT):
        if encoder is None:
            yield pixel_tokens(unit(pixels, made.values)), masks
            continue
        tokens = patch_tokens(encoder, normalize(pixels.to(device), mean, std, made.values)).cpu()
        if not tokens.isfinite().all():
            raise NumericError(f"the encoder gives patch tokens that are not finite ({shards.spec})")
        yield tokens, masks


def patch_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """The patch tokens of normalised images in their places, (b, h, w, D) float32; of channel tokens the channels' mean.

    Raises:
        UsageError: an encoder of planes, or one whose tokens lie in no square of patches.
    """
    with evaluating(encoder):
        tokens = encoder(images).patches.float()
    side = encoder.preprocessing.image_size // encoder.stride
    planes = encoder.planes if encoder.config.channel_tokens else 1
    if encoder.config.frames > 1 or tokens.shape[1] != planes * side * side:
        raise UsageError(
            f"{encoder.config.name}: dense probes are for encoders of plain images with a square of patches"
        )
    return tokens.unflatten(1, (planes, side, side)).mean(1)


def pixel_tokens(images: Tensor) -> Tensor:
    """Raw pixels 0..1 (b, C, S, S) of the largest patches of which there are at least 14 a side: (b, h, w, D).

    A constant of a thousandth beside them gives a patch that is black a direction, too.
    """
    size = images.shape[-1]
    patch = pixel_patch(size)
    patches = patchify(images, patch)
    patches = torch.cat([patches, torch.full_like(patches[..., :1], 1e-3)], dim=-1)
    return patches.unflatten(1, (size // patch, size // patch))


def pixel_patch(size: int) -> int:
    """Side of the largest patches that divide an image of this size and of which there are at least 14 a side, pixels."""
    return max((p for p in range(1, size + 1) if size % p == 0 and size // p >= SIDE), default=1)
