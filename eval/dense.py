"""Dense probes: which class each pixel is of, told from frozen patch tokens by a linear map, and by neighbours.

The linear probe is DINOv2's linear head (Oquab et al. 2023, arXiv 2304.07193, section 7.4): one linear map on the standardised
patch tokens of the last block, its logits upsampled bilinearly to the pixels. It is fitted on patches, each with the
commonest class of its pixels, instead of on pixels: so the closed-form sweep of `linear` serves it, and memory does not
grow with the pixels. The neighbours are those of Balazevic et al. 2023 (arXiv 2306.01667): 30 patches of train vote.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight import keyed
from selfsight.data.targets import IGNORED
from selfsight.errors import DataError, UsageError
from selfsight.eval.knn import TEMPERATURE, search, unit
from selfsight.eval.labels import held_out
from selfsight.eval.linear import Standardizer, fit_heads
from selfsight.eval.masked import Batch, need_masks, tokens_and_masks
from selfsight.eval.protocol import MOST_CLASSES
from selfsight.eval.quality import confusion
from selfsight.eval.subject import Outcome, Subject

HEADS = tuple((rate, decay) for rate in (0.01, 0.1, 1.0) for decay in (0.0, 1e-3))
K, BANK = 30, 20_000
CLASSES_MOST = 1000
VALUES_MOST = 2**29  # of train's tokens that are held: 2 GiB
PIXELS_MOST = 2**29  # of train's masks that are held: 2 GiB
PART = 64  # images whose masks are looked at in 64 bits at a time
LOGITS_MOST = 2**25  # that are upsampled at a time: 128 MiB

Probe = Callable[[Tensor], Tensor]
"""From tokens (b, h, w, D) to scores of classes (b, h, w, C)."""


class DenseResult(NamedTuple):
    """Confusions of test's pixels, (U, U) int64 with rows of truth, and what was chosen without them."""

    linear: tuple[Tensor, ...]
    """One a seed."""
    neighbours: Tensor
    majority: Tensor
    """Of the answer that is always train's commonest class."""
    classes: tuple[int, ...]
    """The values of the masks that the U stand for: those of train, then those that only test has."""
    trained: int
    """How many of them train has."""
    rate: float
    decay: float


def dense(train: Batch, test: Iterable[Batch], seeds: int = 3, groups: Tensor | None = None) -> DenseResult:
    """Fit both probes on train's tokens and score them on the pixels of test's masks.

    Rate and decay of the linear probe are those with the best mIoU on the pixels of a held-out tenth of train (the first of
    equals); then it is fitted on all of train.

    Args:
        train: tokens (N, h, w, D) and masks (N, H, W), of which 255 counts nowhere; H and W are multiples of h and w.
        test: batches of the same kinds, gone through once.
        groups: (N,) as for `held_out`.

    Raises:
        UsageError: train's masks have one class, none, or more than 1,000; or test's have none.
        DataError: masks that are no multiple of the grid.
    """
    tokens, masks = train
    counts = counts_of(masks)
    classes = classes_of(counts)
    grid = tokens.shape[1], tokens.shape[2]
    labels = torch.cat([patch_labels(index_of(part, classes), len(classes), *grid) for part in masks.split(PART)])
    fit, choose = held_out(len(tokens), groups=groups)
    scale, weights = _fitted(tokens[fit], labels[fit], len(classes), HEADS, 0)
    probes = [_linear(scale, weights[:, head]) for head in range(len(HEADS))]
    tried = score(probes, [(tokens[choose], masks[choose])], classes)[0]
    best = HEADS[int(np.argmax([mean_iou(table) for table in tried]))]
    fitted = [_fitted(tokens, labels, len(classes), [best], seed) for seed in range(seeds)]
    common = int(counts[classes].argmax())
    final = [_linear(scale, weights[:, 0]) for scale, weights in fitted]
    tables, told = score([*final, neighbours(tokens, labels, len(classes)), _constant(common)], test, classes)
    if not tables[-1].sum():
        raise UsageError("test's masks have no pixel of a class: all are 255, which counts nowhere")
    return DenseResult(tuple(tables[:-2]), tables[-2], tables[-1], tuple(told), len(classes), *best)


def counts_of(masks: Tensor) -> Tensor:
    """How many pixels of masks (N, H, W) have each value of 16 bits, 255 not counted: (65536,)."""
    counts = torch.zeros(2**16, dtype=torch.int64)
    for part in masks.split(PART):
        counts += part.flatten().bincount(minlength=2**16)
    counts[IGNORED] = 0
    return counts


def classes_of(counts: Tensor) -> list[int]:
    """The values that there are.

    Raises:
        UsageError: one class, none, or more than 1,000.
    """
    found = counts.nonzero()[:, 0].tolist()
    if not 2 <= len(found) <= CLASSES_MOST:
        raise UsageError(
            f"train's masks have {len(found):,} classes ({', '.join(map(str, found[:5]))}{', ...' * (len(found) > 5)}; 255 "
            f"counts nowhere); dense scores need 2 to {CLASSES_MOST:,}"
        )
    return found


def index_of(masks: Tensor, classes: Sequence[int]) -> Tensor:
    """Where in `classes` each value is, int64; -1 for 255 and what is not among them."""
    places = torch.full((2**16,), -1)
    places[torch.tensor(classes)] = torch.arange(len(classes))
    return places[masks.long()]


def patch_labels(truth: Tensor, classes: int, rows: int, columns: int) -> Tensor:
    """The commonest class of each patch's pixels (the lower of equals), -1 where none counts: (N, H, W) to (N, rows, columns).

    Raises:
        DataError: H or W is no multiple.
    """
    height, width = truth.shape[1:]
    if height % rows or width % columns:
        raise DataError(f"masks of {height} x {width} pixels on {rows} x {columns} patches: no whole pixels a patch")
    made = []
    for part in truth.split(max(1, LOGITS_MOST // (rows * columns * classes))):
        pixels = part.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3).flatten(3).flatten(0, 2)
        patch = torch.arange(len(pixels))[:, None].expand_as(pixels)
        counted = pixels >= 0
        counts = (patch * classes + pixels)[counted].bincount(minlength=len(pixels) * classes).view(-1, classes)
        made.append(torch.where(counts.any(1), counts.argmax(1), -1).view(len(part), rows, columns))
    return torch.cat(made)


def _fitted(
    tokens: Tensor, labels: Tensor, classes: int, heads: Sequence[tuple[float, float]], seed: int
) -> tuple[Standardizer, Tensor]:
    known = labels >= 0
    features = tokens[known]
    scale = Standardizer(features)
    return scale, fit_heads(scale(features), labels[known], classes, list(heads), seed)


def _linear(scale: Standardizer, weights: Tensor) -> Probe:
    def probe(tokens: Tensor) -> Tensor:
        return (scale(tokens.flatten(0, 2)).to(weights.device) @ weights).unflatten(0, tokens.shape[:3])

    return probe


def _constant(answer: int) -> Probe:
    return lambda tokens: F.one_hot(torch.full(tokens.shape[:3], answer)).float()


def neighbours(tokens: Tensor, labels: Tensor, classes: int, k: int = K, bank: int = BANK) -> Probe:
    """A vote of the k nearest of at most `bank` patches by cosine, drawn by a fixed seed; shares of the classes.

    Args:
        tokens: (N, h, w, D).
        labels: (N, h, w), -1 for patches that are left out.
    """
    known = torch.nonzero(labels.flatten() >= 0)[:, 0]
    drawn = keyed.hashes(0, "dense bank", range(len(known)), 1)[:, 0].argsort()[:bank]
    chosen = known[torch.from_numpy(np.sort(drawn))]
    stored, answers = unit(tokens.flatten(0, 2)[chosen]), labels.flatten()[chosen]

    def probe(queries: Tensor) -> Tensor:
        similarity, near = search(stored, unit(queries.flatten(0, 2)), min(k, len(stored)))
        votes = torch.zeros(len(near), classes).scatter_add_(1, answers[near], (similarity / TEMPERATURE).exp())
        return F.normalize(votes, p=1, dim=1).unflatten(0, queries.shape[:3])

    return probe


def upsampled(scores: Tensor, height: int, width: int) -> Tensor:
    """The class of each pixel: scores (b, h, w, C) bilinearly upsampled, and the largest of them, (b, height, width)."""
    parts = scores.movedim(-1, 1).split(max(1, LOGITS_MOST // (scores.shape[-1] * height * width)))
    return torch.cat([F.interpolate(part, (height, width), mode="bilinear").argmax(1) for part in parts])


def score(probes: Sequence[Probe], batches: Iterable[Batch], classes: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """The confusion of each probe over all pixels, and the values it is of: `classes`, and after them what else was seen."""
    told = list(classes)
    tables = [torch.zeros(len(told), len(told), dtype=torch.int64) for _ in probes]
    for tokens, masks in batches:
        more = sorted(set(masks.unique().tolist()) - {*told, IGNORED})
        told += more
        tables = [F.pad(table, (0, len(more), 0, len(more))) for table in tables]
        truth = index_of(masks, told)
        for number, probe in enumerate(probes):
            tables[number] += confusion(upsampled(probe(tokens), *masks.shape[1:]).cpu(), truth, len(told))
    return tables, told


def iou(table: Tensor) -> Tensor:
    """Intersection over union of each class, (C,) float64; NaN of a class that is neither there nor predicted."""
    inside = table.diagonal().double()
    return inside / (table.sum(0) + table.sum(1) - inside)


def mean_iou(table: Tensor) -> float:
    """The mean over the classes that are there or predicted."""
    return float(iou(table).nanmean())


def pixel_accuracy(table: Tensor) -> float:
    """The share of pixels that are told right."""
    return float(table.diagonal().sum() / table.sum())


def run_dense(subject: Subject) -> list[Outcome]:
    """mIoU and pixel accuracy of the linear probe, mIoU of neighbours; see `dense`. Raw pixels are probed as patches.

    Raises:
        UsageError: images without a mask, or an encoder of planes.
    """
    if subject.sets is None or subject.preprocessing is None:
        return []
    if subject.preprocessing.frames > 1:
        raise UsageError("dense: masks are of plain images; this encoder takes planes (encoder.frames)")
    for shards in subject.sets:
        need_masks(shards)
    tokens, masks, ids = _train(subject)
    found = dense((tokens, masks), _batches(subject, 1, np.arange(len(subject.sets[1]))), *_how(subject, ids))
    return _outcomes(found, _protocol(subject, found, len(ids), tokens))


def _how(subject: Subject, ids: np.ndarray) -> tuple[int, Tensor]:
    return subject.options.seeds, subject.train.groups[torch.from_numpy(ids)]


def _batches(subject: Subject, side: int, ids: np.ndarray) -> Iterable[Batch]:
    assert subject.sets is not None
    assert subject.preprocessing is not None
    of = subject.encoder, subject.preprocessing, subject.sets[side]
    return tokens_and_masks(*of, ids, subject.device, subject.workers)


def _train(subject: Subject) -> tuple[Tensor, Tensor, np.ndarray]:
    """Train's tokens and masks, and of which samples: all, or as many, evenly spaced, as memory is bounded to."""
    assert subject.sets is not None
    size = len(subject.sets[0])
    first, mask = next(iter(_batches(subject, 0, np.arange(1))))
    count = min(size, max(10, min(VALUES_MOST // first.numel(), PIXELS_MOST // mask.numel())))
    ids = np.linspace(0, size - 1, count).round().astype(np.int64)
    made = list(_batches(subject, 0, ids))
    return torch.cat([tokens for tokens, _ in made]), torch.cat([masks for _, masks in made]), ids


def _protocol(subject: Subject, found: DenseResult, used: int, tokens: Tensor) -> str:
    assert subject.sets is not None
    size, lost = len(subject.sets[0]), len(found.classes) - found.trained
    what = "patch tokens" if subject.encoder else "raw pixels"
    grouped = " of whole groups" if (subject.train.groups >= 0).any() else ""
    return (
        f"on {what}, {tokens.shape[1]} x {tokens.shape[2]} an image, bilinearly upsampled; mIoU over "
        f"{len(found.classes)} classes in the crop, 255 left out"
        + (f", {lost} that train lacks count 0" if lost else "")
        + (f"; {used:,} of {size:,} training images, evenly spaced" if used < size else "")
        + f"; rate {found.rate:g}, decay {found.decay:g} of {len(HEADS)} chosen by mIoU on a held-out tenth of train{grouped}"
        + (subject.plainly if subject.encoder else "")
    )


def _outcomes(found: DenseResult, protocol: str) -> list[Outcome]:
    chosen: Mapping[str, Any] = {"rate": found.rate, "decay": found.decay}
    floor = {"mIoU": 100 * mean_iou(found.majority), "pixel accuracy": 100 * pixel_accuracy(found.majority)}

    def of(tables: Sequence[Tensor], metric: str, line: str, chosen: Mapping[str, Any]) -> Outcome:
        value = pixel_accuracy if "accuracy" in metric else mean_iou
        each = torch.stack([iou(table) for table in tables]).mean(0).mul(100).tolist()
        detail: dict[str, Any] = {"classes": list(found.classes), "majority": floor}
        detail["each"] = [None if one != one else round(one, 2) for one in each]  # NaN is no JSON
        if len(found.classes) <= MOST_CLASSES:
            detail["confusion"] = tables[0].tolist()
        return Outcome(tuple(100 * value(table) for table in tables), line, chosen, metric, detail=detail)

    line = f"dense: linear {protocol}, refitted on all of it"
    near = protocol.partition("; rate")[0]
    return [
        of(found.linear, "mIoU", line, chosen),
        of(found.linear, "pixel accuracy", line, chosen),
        of([found.neighbours], "kNN mIoU", f"dense: vote of {K} neighbours among {BANK:,} patches, {near}", {"k": K}),
    ]
