"""What is left of an encoder's features when images get worse: occluded, cut up, moved, noisy, blurred, faded, bands lost.

The clean kNN is asked: a bank of clean training features, k as `knn` chooses it, and test images that are perturbed.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsight import keyed
from selfsight.encoder import Encoder, evaluating, pool_tokens
from selfsight.errors import UsageError
from selfsight.eval.features import Extraction, extract, prepared
from selfsight.eval.knn import TEMPERATURE, knn, predict, unit
from selfsight.eval.labels import dense_labels
from selfsight.eval.masked import pixel_patch
from selfsight.eval.perturb import corrupt, kept, occlude, permute_patches, severities, shift
from selfsight.eval.subject import Outcome, Subject

SAMPLES = 2000  # test images, evenly spaced
PART = 64  # images that are perturbed at a time
SHARES = (0.25, 0.5, 0.75, 0.9)
GRIDS = (2, 4, 8)
SHIFTS = (16, 8, 4)  # a sixteenth, an eighth and a quarter of the side
CLEAN = ("clean", 0.0)
CORRUPTED = {
    "noise": ("standard deviation", 0.0),
    "blur": ("standard deviation, pixels of 224", 0.0),
    "contrast": ("share of contrast left", 1.0),
}
WAYS = ((0, 1), (0, -1), (1, 0), (-1, 0))

Key = tuple[str, float]
"""What was done to the images, and how strongly."""


class Answers(NamedTuple):
    """What the bank says of every test image, (M,) float each, by what was done to them."""

    hits: dict[Key, Tensor]
    same: dict[Key, Tensor]
    """Whether the answer is that to the clean image."""
    cosine: dict[Key, Tensor]
    """With the clean image's feature."""


def judge(made: Mapping[Key, Tensor], bank: Tensor, fit: Tensor, held: Tensor, k: int) -> Answers:
    """Ask the bank for each perturbation's features.

    A perturbed image of which an encoder leaves nothing (ReLUs of one that is untrained) is told wrong, at a cosine of 0.

    Args:
        made: (M, D) features by what was done, those of `CLEAN` among them.
        bank: (N, D) of unit length; `fit` their labels, 0 to C - 1.
        held: (M,) the true labels.

    Raises:
        NumericError: features that are not finite, or clean ones of length zero.
    """
    clean, found = unit(made[CLEAN]), Answers({}, {}, {})
    answer = predict(bank, fit, clean, (k,))[:, 0]
    for key, feature in made.items():
        gone = feature.norm(dim=1) == 0
        directions = unit(torch.where(gone[:, None], clean, feature))
        said = predict(bank, fit, directions, (k,))[:, 0].masked_fill(gone, -1)
        found.hits[key], found.same[key] = (said == held).float(), (said == answer).float()
        found.cosine[key] = (directions * clean).sum(1) * ~gone
    return found


def curve(answers: Mapping[Key, Tensor], kind: str) -> dict[float, Tensor]:
    """What was answered to one kind of perturbation, by its strength."""
    return {strength: values for (name, strength), values in answers.items() if name == kind}


@torch.inference_mode()
def run_robust(subject: Subject) -> list[Outcome]:
    """Accuracies and agreements under perturbation; of raw pixels and stored vectors nothing.

    Raises:
        UsageError: labels that are lists.
        NumericError: features that are not finite or have length zero.
    """
    if subject.encoder is None or subject.sets is None:
        return []
    if subject.train.multilabel or subject.test.multilabel:
        raise UsageError("robust: scores one label a sample; lists are for knn, linear, logistic and finetune")
    bank = subject.fit
    if subject.options.extraction != Extraction():  # the perturbed images are seen plainly, so must the bank be
        bank = extract(
            subject.encoder, subject.sets[0], subject.device, (subject.pool,), workers=subject.workers
        ).vectors[subject.pool]
    fit, held, _ = dense_labels(subject.train.labels, subject.test.labels)
    k = _chosen_k(subject, bank)
    size = len(subject.sets[1])
    ids = np.linspace(0, size - 1, min(SAMPLES, size)).round().astype(np.int64)
    found = judge(_seen(subject, subject.encoder, ids), unit(bank), fit, held[torch.from_numpy(ids)], k)
    test = f"{len(ids):,} of {size:,} test images, evenly spaced" if len(ids) < size else f"all {size:,} test images"
    on = f"clean kNN (weights exp(s/{TEMPERATURE}), k={k}, {subject.pool}) on {test}{subject.plainly}"
    return _outcomes(found, on, subject.encoder, subject.pool)


def _chosen_k(subject: Subject, bank: Tensor) -> int:
    """As `knn` chooses it, on train alone: its test set is one training sample here."""
    labels = subject.train.labels
    return knn(bank, labels, bank[:1], labels[:1], subject.options.k, subject.train.groups).k


def _seen(subject: Subject, encoder: Encoder, ids: np.ndarray) -> dict[Key, Tensor]:
    """Features of samples `ids` by what was done; all of it to a few images at a time, which are decoded once."""
    assert subject.sets is not None
    made: dict[Key, list[Tensor]] = {}
    first = 0
    with evaluating(encoder):
        for batch in prepared(encoder.preprocessing, subject.sets[1], subject.device, ids, subject.workers):
            for images in batch.split(PART):
                for key, feature in features(encoder, images, ids[first : first + len(images)], subject.pool):
                    made.setdefault(key, []).append(feature)
                first += len(images)
    return {key: torch.cat(parts) for key, parts in made.items()}


def features(encoder: Encoder, images: Tensor, ids: np.ndarray, pool: str) -> Iterator[tuple[Key, Tensor]]:
    """Features (B, D) of normalised images, first as they are, then under every perturbation, with what was done.

    Args:
        ids: (B,) of the samples, which all that is random belongs to.
    """
    made = encoder.preprocessing

    def embedded(changed: Tensor) -> Tensor:
        return encoder.embed(changed, pool).float().cpu()

    yield CLEAN, embedded(images)
    draws = _uniform("occlusion", ids, (made.image_size // occluded_patch(encoder)) ** 2, images)
    for share in SHARES:
        yield ("occlusion", share), _occluded(encoder, images, share, draws, pool).float().cpu()
    for grid in grids(made.image_size):
        order = _uniform(f"permutation {grid}", ids, grid * grid, images).argsort(1)
        yield ("permutation", grid), embedded(permute_patches(images, grid, order))
    ways = torch.tensor(WAYS)[(_uniform("shift", ids, 1, torch.empty(0))[:, 0] * len(WAYS)).long()]
    for part in SHIFTS:
        if by := made.image_size // part:
            yield ("shift", 1 / part), embedded(shift(images, by * ways[:, 0], by * ways[:, 1]))
    pixels = made.pixels(images)
    mean, std = made.statistics(images.device)
    noise = _normal("noise", ids, images)
    for kind in CORRUPTED:
        for strength in severities(kind, made.image_size):
            yield (kind, strength), embedded((corrupt(pixels, kind, strength, noise) - mean) / std)
    if made.channels > 1:
        for channel in range(made.channels):
            yield ("missing channel", channel), _without(encoder, images, channel, pool).float().cpu()


def grids(size: int) -> list[int]:
    """The grids of tiles that divide a side."""
    return [grid for grid in GRIDS if size % grid == 0 and size > grid]


def _occluded(encoder: Encoder, images: Tensor, share: float, draws: Tensor, pool: str) -> Tensor:
    """Without a share of the patches where the encoder can leave them out, else with them in the mean colour."""
    if not leaves_out(encoder, pool):
        return encoder.embed(occlude(images, share, occluded_patch(encoder), draws), pool)
    places = kept(draws, share)
    planes = encoder.patches // draws.shape[1]
    starts = torch.arange(planes, device=places.device)[:, None] * draws.shape[1]
    keep = (starts[None] + places[:, None]).flatten(1)  # the same places of all planes
    return pool_tokens(encoder(images, keep=keep), pool)


def occluded_patch(encoder: Encoder) -> int:
    """Side of what is occluded, pixels: the patch of a plain ViT; of others the largest of which 14 a side fit, as raw pixels have."""
    return encoder.patch if encoder.plain else pixel_patch(encoder.preprocessing.image_size)


def leaves_out(encoder: Encoder, pool: str) -> bool:
    """Whether patches can be left out for this pool, which is one of tokens."""
    return encoder.plain and set(pool.split("+")) <= {"cls", "mean", "gem"}


def _without(encoder: Encoder, images: Tensor, channel: int, pool: str) -> Tensor:
    """Channel tokens without those of a channel; else the channel at its mean everywhere."""
    if encoder.config.channel_tokens:
        rest = [one for one in range(images.shape[1]) if one != channel]
        return encoder.embed(images[:, rest], pool, channels=rest)
    changed = images.clone()
    changed[:, channel] = 0
    return encoder.embed(changed, pool)


def _uniform(purpose: str, ids: np.ndarray, count: int, like: Tensor) -> Tensor:
    return torch.from_numpy(keyed.uniform(0, f"robust {purpose}", ids, count)).to(like.device)


def _normal(purpose: str, ids: np.ndarray, like: Tensor) -> Tensor:
    """Standard normal draws of the images' shape: uniform ones through the inverse of the normal distribution."""
    uniform = _uniform(purpose, ids, like[0].numel(), like)
    return torch.special.ndtri(uniform.clamp(2**-54, 1 - 2**-53)).to(like.dtype).view_as(like)


class Row(NamedTuple):
    """One perturbation's line of the table."""

    metric: str
    x: str
    """What its strengths are."""
    told: str
    values: Mapping[float, Tensor]
    """(M,) by strength; nothing, if the images cannot be perturbed so."""
    at: float | None = None
    """The strength whose value is the line's; None: the mean over all."""
    start: float | None = None
    """The strength that means the clean images."""
    unit: str = "%"


def _rows(found: Answers, encoder: Encoder, pool: str) -> Iterator[Row]:
    cut, moved = curve(found.hits, "permutation"), curve(found.same, "shift")
    left = "left out" if leaves_out(encoder, pool) else "in the mean colour"
    told = f"half of the patches {left}, drawn for each image (Naseer et al. 2021)"
    yield Row("occlusion 50 %", "share of patches dropped", told, curve(found.hits, "occlusion"), 0.5, 0.0)
    tiles = min(cut, key=lambda grid: abs(grid - 4), default=4)
    told = f"{tiles:g} x {tiles:g} tiles in another order, drawn for each image"
    yield Row(f"permutation {tiles:g}x{tiles:g}", "tiles a side", told, cut, tiles, 1.0)
    told = f"mean over shifts of {', '.join(f'1/{1 / part:g}' for part in moved)} of the side, borders mirrored"
    x = "shift, share of the side"
    yield Row("shift, same answer", x, f"answers that stay those to the unmoved image, {told}", moved)
    told = f"cosine with the unmoved image's feature, {told}"
    yield Row("shift, cosine", x, told, curve(found.cosine, "shift"), unit="")
    for kind, (x, start) in CORRUPTED.items():
        values = curve(found.hits, kind)
        told = f"{kind}, mean over severities of ImageNet-C ({', '.join(f'{one:g}' for one in values)})"
        yield Row(kind, x, told, values, None, start)
    how = "left out" if encoder.config.channel_tokens else "at its mean"
    told = f"one channel {how}, mean over the channels"
    yield Row("missing channel", "channel", told, curve(found.hits, "missing channel"))


def _outcomes(found: Answers, on: str, encoder: Encoder, pool: str) -> list[Outcome]:
    clean = found.hits[CLEAN]
    told = f"robust: {on}; "
    made = [Outcome((_mean(clean, "%"),), f"{told}images as they are", metric="clean", each=clean)]
    for row in _rows(found, encoder, pool):
        if not row.values:
            continue
        each = row.values[row.at] if row.at is not None else torch.stack([*row.values.values()]).mean(0)
        points = [] if row.start is None else [[row.start, _mean(clean, "%")]]
        points += [[strength, _mean(values, row.unit)] for strength, values in row.values.items()]
        values = (_mean(each, row.unit),)
        shares = each if row.unit == "%" else None  # a cosine is no share
        detail = {"curve": points, "x": row.x}
        made.append(Outcome(values, told + row.told, {}, row.metric, row.unit, shares, detail))
    return made


def _mean(values: Tensor, unit: str) -> float:
    return (100 if unit == "%" else 1) * values.double().mean().item()
