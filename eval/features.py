"""Features of a whole set, extracted once: frozen encoder, evaluation's view, every sample exactly once and in order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsight.data.crops import resize_and_crop
from selfsight.data.decode import BadSample, Form
from selfsight.data.loader import loader
from selfsight.data.mixture import Samples
from selfsight.data.picture import Picture
from selfsight.data.placer import normalize, unit
from selfsight.data.samples import LISTED, NONE
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval.ahead import ahead
from selfsight.eval.extraction import check_extraction, embed, reading_size
from selfsight.eval.phash import phash
from selfsight.eval.ranks import ALONE, Ranks
from selfsight.preprocessing import Preprocessing

BATCH = 256  # images at most
BATCH_BYTES = 2**29  # of a batch's inputs in float32; 256 images of 384 x 384 in three channels fit
LONGEST_WAIT = 300.0  # seconds for a batch, before its workers count as frozen
FEW_BATCHES = 16
HASHES = "hashes"  # beside the pools, for near duplicates
PIXEL_SIDE = 32  # the raw-pixel floor is taken at most at this size


class Features(NamedTuple):
    """Vectors of N samples and their labels."""

    vectors: dict[str, Tensor]
    """By pool: (N, D) float32 on the CPU."""
    labels: Tensor
    """(N,) int64, -1 where there is none; or (N, C) bool where labels are lists."""
    groups: Tensor
    """(N,) int64: patient, slide or scene, -1 where there is none."""
    hashes: Tensor | None = None
    """(N, 8) uint8: perceptual hashes of the images that were encoded, where there were any."""

    @property
    def multilabel(self) -> bool:
        """Whether a sample has a list of labels."""
        return self.labels.ndim == 2


@dataclass(frozen=True)
class Extraction:
    """How features are taken from an encoder, beyond its plain forward pass."""

    scales: tuple[int, ...] = (1,)
    """S2: the image in multiples of the encoder's size, larger ones in tiles; features side by side."""
    merge: int = 0
    """Token merging: patch tokens that each block merges away."""


PLAIN = Extraction()


@dataclass(frozen=True)
class CentralCrops(Dataset[Tensor]):
    """Evaluation's view of given samples, in batches: item n is (b, C, S, S), of planes the middle ones (b, C, D, S, S)."""

    shards: Samples
    ids: np.ndarray
    size: int
    form: Form
    interpolation: str
    crop_pct: float
    batch: int
    step: int = 1
    lenient: bool = False
    """Leave out images that cannot be read; for what is only watched."""

    @classmethod
    def of(cls, shards: Samples, ids: np.ndarray, made: Preprocessing, size: int | None = None) -> "CentralCrops":
        """The view that belongs to an encoder, in its size or another."""
        size = size or made.image_size
        return cls(shards, ids, size, made.form, made.interpolation, made.crop_pct, batch_of(made, size), made.step)

    def read(self, workers: int, pin: bool) -> DataLoader:
        """All batches in order. Workers take seconds to start: a few batches are read sooner without them."""
        numbers = range(-(-len(self.ids) // self.batch))
        return loader(self, numbers, workers if len(numbers) > FEW_BATCHES else 0, pin, LONGEST_WAIT)

    def __getitem__(self, number: int) -> Tensor:
        made, ids = [], self.ids[number * self.batch : (number + 1) * self.batch]
        self.shards.prefetch(ids)
        for sample in ids:
            try:
                pixels = Picture(self.shards.read_images(int(sample)), self.form, self.step).window(0.5)
            except (BadSample, DataError) as error:
                if self.lenient:
                    continue
                # A score must not depend on a substitute.
                raise DataError(f"{self.shards.describe(int(sample))}: {error}") from None
            made.append(resize_and_crop(pixels, self.size, self.crop_pct, self.interpolation))
        return torch.from_numpy(np.stack(made)) if made else torch.empty(0)


def batch_of(made: Preprocessing, size: int) -> int:
    """How many images of a side of `size` pixels are in memory at once: of shapes alone, so that ranks and runs agree."""
    image = 4 * made.channels * made.frames * size**2
    return max(1, min(BATCH, BATCH_BYTES // image))


def labels_of(shards: Shards, ids: np.ndarray) -> Tensor:
    """Labels of samples, all there and of at least two classes: (N,) int64, or (N, C) bool where they are lists.

    Raises:
        UsageError: samples without a label, single labels beside lists, or all alike.
    """
    labels = shards.labels[ids].astype(np.int64)
    lacking, listed = int((labels == NONE).sum()), int((labels == LISTED).sum())
    if lacking:
        raise UsageError(
            f"{shards.spec}: {lacking:,} of {len(labels):,} samples have no label; scores need labels"
            f"{' (of a list that is empty: KEY.cls with [])' * (listed > 0)}"
        )
    if 0 < listed < len(labels):
        raise UsageError(
            f"{shards.spec}: {listed:,} of {len(labels):,} samples have a list of labels, the others a single one; make "
            "them all the same ([3] for 3)"
        )
    targets = targets_of(shards, ids)
    if len(targets) and bool((targets == targets[:1]).all()):
        told = f"the labels {targets[0].nonzero().flatten().tolist()}" if listed else f"the label {labels[0]}"
        raise UsageError(f"{shards.spec}: all {len(labels):,} samples have {told}; scores need two classes")
    return targets


def targets_of(shards: Shards, ids: np.ndarray) -> Tensor:
    """Labels of samples as they are: (N,) int64, -1 where there is none; or (N, C) bool where any of the set's is a list.

    C - 1 is the largest label of the whole set: two sets may differ in it, see `labels.same_classes`.
    """
    lists = shards.label_lists()
    return torch.from_numpy(shards.labels[ids].astype(np.int64) if lists is None else lists[ids])


def groups_of(shards: Shards, ids: np.ndarray) -> Tensor:
    """Groups of samples (N,), -1 where there is none."""
    return torch.from_numpy(shards.groups[ids].astype(np.int64))


def labels_only(shards: Shards) -> Features:
    """What is known of a set before any image is read."""
    ids = np.arange(len(shards))
    return Features({}, targets_of(shards, ids), groups_of(shards, ids))


def prepared(
    made: Preprocessing,
    shards: Samples,
    device: torch.device,
    ids: np.ndarray | None = None,
    workers: int = 0,
    size: int | None = None,
    lenient: bool = False,
) -> Iterator[Tensor]:
    """Normalised inputs of samples `ids` (all, if not given) in order, (b, C, S, S) or with planes, on the device.

    The one way from a set to an evaluator's images. Batches are read ahead while the caller works on one.
    """
    crops = CentralCrops.of(shards, np.arange(len(shards)) if ids is None else ids, made, size)
    mean, std = made.statistics(device)
    with closing(ahead(replace(crops, lenient=lenient).read(workers, device.type == "cuda"))) as batches:
        for pixels in batches:
            if len(pixels):
                yield normalize(pixels.to(device, non_blocking=True), mean, std, made.values)


@torch.inference_mode()
def extract(
    encoder: Encoder,
    shards: Shards,
    device: torch.device,
    pools: Sequence[str] | None = None,
    ids: np.ndarray | None = None,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
    extraction: Extraction = PLAIN,
    ranks: Ranks = ALONE,
) -> Features:
    """Features of samples `ids` (all, if not given) by `encoder.embed`, in fp32, taken as `extraction` says.

    Args:
        ranks: share the batches, which are the same for any number of them; the features are whole on the first rank only.

    Raises:
        NumericError: features that are not finite.
        UsageError: an extraction that the encoder cannot serve.
    """
    ids = np.arange(len(shards)) if ids is None else ids
    pools = tuple(pools or (encoder.pool,))
    check_extraction(encoder, pools, extraction)
    parts: dict[str, list[Tensor]] = {name: [] for name in (*pools, HASHES)}
    size = reading_size(encoder, extraction)
    batch = batch_of(encoder.preprocessing, size)
    own = ranks.share(-(-len(ids) // batch))
    mine = ids[own.start * batch : own.stop * batch]
    with evaluating(encoder):
        for images in prepared(encoder.preprocessing, shards, device, mine, workers, size):
            for pool, feature in embed(encoder, images, pools, extraction).items():
                parts[pool].append(feature.float().cpu())
            parts[HASHES].append(phash(images))
            advance(len(images))
    # Not inference tensors, which a probe could not train on.
    made = {name: torch.cat(part or [torch.empty(0)]).clone() for name, part in parts.items()}
    vectors = {name: ranks.joined(rows, len(ids), batch) for name, rows in made.items()}
    hashes = vectors.pop(HASHES)
    require_finite(vectors, shards.spec)
    return Features(vectors, targets_of(shards, ids), groups_of(shards, ids), hashes)


def require_finite(vectors: Mapping[str, Tensor], where: str) -> None:
    """Raise NumericError unless all features are numbers."""
    for pool, values in vectors.items():
        if bad := int((~values.isfinite()).any(1).sum() if values.ndim == 2 else 0):
            raise NumericError(
                f"the encoder gives features that are not finite ({pool}, {bad:,} of {len(values):,} samples of {where})"
            )


def pixels_of(shards: Shards, preprocessing: Preprocessing, workers: int = 0) -> Features:
    """Raw pixels as features, at most 32 x 32: the floor that any encoder must justify itself against.

    In 0..1. A constant of a thousandth beside them gives an image that is black all over a direction, too.
    """
    ids = np.arange(len(shards))
    crops = CentralCrops.of(shards, ids, preprocessing, min(preprocessing.image_size, PIXEL_SIDE))
    pixels = torch.cat(list(crops.read(workers, False)))
    values = unit(pixels.flatten(1), preprocessing.values)
    vectors = torch.cat([values, torch.full((len(pixels), 1), 1e-3)], dim=1)
    return Features({"pixels": vectors}, targets_of(shards, ids), groups_of(shards, ids))
