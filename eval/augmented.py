"""Images of a set for who trains on them with labels: evaluation's view, and augmented ones in an order of their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from selfsight import keyed
from selfsight.data.crops import ViewMaker
from selfsight.data.loader import Batches, loader
from selfsight.data.order import Ids, sample_ids
from selfsight.data.placer import normalize
from selfsight.data.shards import Shards
from selfsight.data.views import View
from selfsight.errors import DataError
from selfsight.eval.features import FEW_BATCHES, LONGEST_WAIT, prepared
from selfsight.preprocessing import Preprocessing

SMALLEST, LARGEST, STEPS = 16, 256, 64  # batches, and the steps of an epoch that they are chosen for
SMALL = 32  # pixels, below which little can be taken from an image
VIEW, GENTLE = View(crop_scale=(0.35, 1.0)), View(crop_scale=(0.7, 1.0), flip=0.0)  # of images, and of small ones
RANDAUGMENT = (2, 9)  # changes of an image, and their strength of 30
Change = Callable[[Tensor], Tensor]


class Drawn(NamedTuple):
    """A batch to train on."""

    images: Tensor
    """(B, C, S, S) or with planes, normalised, on the device."""
    ids: Tensor
    """(B,) samples, on the CPU."""
    positions: Tensor
    """(B,) places in the run, which all randomness is drawn by, on the CPU."""


class Images(Protocol):
    """What fine-tuning asks of a set."""

    def shown(self, ids: Ids) -> Iterator[Tensor]:
        """Evaluation's view of samples, in order, in batches on the device."""

    def drawn(self, ids: Ids, steps: int, seed: int) -> Iterator[Drawn]:
        """So many batches of these samples, each once an epoch; a function of the seed."""


@dataclass(frozen=True)
class TensorImages:
    """Normalised images (N, C, S, S) or with planes, in memory and on their device; they are not augmented."""

    images: Tensor

    def shown(self, ids: Ids) -> Iterator[Tensor]:
        """See `Images`."""
        yield from self.images[torch.from_numpy(ids)].split(LARGEST)

    def drawn(self, ids: Ids, steps: int, seed: int) -> Iterator[Drawn]:
        """See `Images`."""
        for step in range(steps):
            chosen, positions = due(ids, step, seed)
            yield Drawn(self.images[torch.from_numpy(chosen)], torch.from_numpy(chosen), torch.from_numpy(positions))


@dataclass(frozen=True)
class ShardImages:
    """Images of shards, augmented: crops and flips, and RandAugment (Cubuk et al. 2020, arXiv 1909.13719); see `augments`.

    Of images under 32 pixels only gentle crops: they are letters, digits and the like, and turned or cut they are others.
    """

    shards: Shards
    made: Preprocessing
    device: torch.device
    workers: int = 0

    @property
    def augments(self) -> bool:
        """Whether RandAugment takes such images: torchvision's knows plain ones of 1 or 3 channels in 8 bits."""
        plain = self.made.depth == 8 and self.made.channels in (1, 3) and self.made.frames == 1
        return plain and self.made.image_size >= SMALL

    @property
    def view(self) -> View:
        """How images are cropped and flipped."""
        return VIEW if self.made.image_size >= SMALL else GENTLE

    def shown(self, ids: Ids) -> Iterator[Tensor]:
        """See `Images`.

        Raises:
            DataError: an image that cannot be read.
        """
        return prepared(self.made, self.shards, self.device, ids, self.workers)

    def drawn(self, ids: Ids, steps: int, seed: int) -> Iterator[Drawn]:
        """See `Images`.

        Raises:
            DataError: an image that cannot be read.
        """
        made, pin = self.made, self.device.type == "cuda"
        maker = ViewMaker(self.view, 0, made.image_size, made.interpolation, seed)
        source = Batches(self.shards, (maker,), seed, made.form, batch_of(len(ids)), step=made.step)
        change = v2.RandAugment(*RANDAUGMENT) if self.augments else None
        mean, std = made.statistics(self.device)
        workers = self.workers if steps > FEW_BATCHES else 0
        for drawn in loader(_Augmented(source, ids, seed, change), range(steps), workers, pin, LONGEST_WAIT):
            pixels = drawn.images.to(self.device, non_blocking=True)
            yield drawn._replace(images=normalize(pixels, mean, std, made.values))


@dataclass(frozen=True)
class _Augmented(Dataset[Drawn]):
    """Batches by number, before they are normalised."""

    source: Batches
    ids: Ids
    seed: int
    change: Change | None

    def __getitem__(self, step: int) -> Drawn:
        ids, positions = due(self.ids, step, self.seed)
        self.source.shards.prefetch(ids)
        host = self.source.make(positions, ids, positions)
        if host.bad:  # a score must not depend on a substitute
            raise DataError(f"{host.bad[0].where}: {host.bad[0].reason}")
        pixels = changed(host.views[0], self.change, self.seed, positions) if self.change else host.views[0]
        return Drawn(pixels, host.ids, host.positions)


def due(ids: Ids, step: int, seed: int) -> tuple[Ids, Ids]:
    """The samples of a step, and its positions in the run; a batch may have the end of one epoch and the start of the next."""
    size = batch_of(len(ids))
    positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
    return ids[sample_ids(positions, len(ids), seed)], positions


def steps_of(ids: Ids, epochs: int) -> int:
    """Steps in which each of these samples is seen so many times."""
    return -(-len(ids) * epochs // batch_of(len(ids)))


def batch_of(size: int) -> int:
    """Images in a batch of a set of so many: small sets need steps, large ones speed. A power of two from 16 to 256."""
    return min(size, max(SMALLEST, min(LARGEST, 2 ** (max(1, size // STEPS).bit_length() - 1))))


def changed(pixels: Tensor, change: Change, seed: int, positions: Ids) -> Tensor:
    """Each image (B, C, S, S) changed by a torchvision transform, whose draws belong to the image's position.

    Such transforms ask torch's own generator, which is set for each image and afterwards as it was.
    """
    words = keyed.hashes(seed, "randaugment", positions, 1)[:, 0] >> np.uint64(1)
    made = torch.empty_like(pixels)
    with torch.random.fork_rng(devices=[]):
        for number, word in enumerate(words.tolist()):
            torch.manual_seed(word)
            made[number] = change(pixels[number])
    return made
