"""How good the answers of many probes at once are: what a choice among them is made by; and what features are scaled by."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.errors import UsageError

LEAST_STD = 1e-6  # of a dimension's largest value: below, it is a constant and its rounding
_ROWS = 256  # samples answered at once


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension of (N, D); 1 for a dimension that does not vary. Of any magnitude."""
    least, most = features.aminmax(dim=0)
    largest = torch.maximum(-least, most)
    size = torch.where(largest > 0, largest, torch.ones_like(largest))  # so that no square overflows or vanishes
    scaled = features / size
    mean = scaled.mean(0, dtype=torch.float64)
    variance = scaled.sub_(mean.to(scaled.dtype)).square_().sum(0, dtype=torch.float64) / max(1, len(features) - 1)
    std = torch.where(variance > LEAST_STD**2, variance.sqrt() * size, 1.0)
    return (mean * size).to(features.dtype), std.to(features.dtype)


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(C, C) counts, rows: truth; what has the truth -1 is left out.

    Args:
        predicted, truth: of one shape, 0 to classes - 1.
    """
    counted = truth >= 0
    return (truth[counted] * classes + predicted[counted]).bincount(minlength=classes**2).view(classes, classes)


def rankable(labels: Tensor) -> np.ndarray:
    """The classes that some samples have and others lack; labels are (N, C) bool.

    Raises:
        UsageError: there is none.
    """
    told = (labels.any(0) & ~labels.all(0)).nonzero()[:, 0].numpy()
    if not len(told):
        raise UsageError(f"no class that some of {len(labels):,} samples have and others lack: nothing can be ranked")
    return told


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision, 0 to 1, mean over the classes that can be ranked.

    Args:
        scores: (N, C), larger for likelier; any monotonous scale.
        labels: (N, C) bool.
    """
    from sklearn.metrics import average_precision_score

    truth, given = labels.numpy(), scores.numpy()
    return float(np.mean([average_precision_score(truth[:, c], given[:, c]) for c in rankable(labels)]))


def judged(answer: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy or mAP (percent) and mean cross-entropy of each of the H heads. A head that diverged has 0 and infinity."""
    parts = zip(features.split(_ROWS), labels.split(_ROWS), strict=True)
    if labels.ndim == 1:
        return _accuracy((answer(x).double().cpu(), y) for x, y in parts)
    logits = torch.cat([answer(x).cpu() for x, _ in parts])  # (N, H, C): a ranking needs all samples
    truth = labels[:, None].expand_as(logits).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").double().sum(2).mean(0)
    losses = losses.nan_to_num(torch.inf, torch.inf)
    known = losses.isfinite().tolist()
    ranked = [100 * mean_average_precision(logits[:, h], labels) if known[h] else 0.0 for h in range(len(known))]
    return ranked, losses.tolist()


def _accuracy(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Of logits (b, H, C) and labels (b,), part after part."""
    hits, losses = torch.zeros(2, 1, dtype=torch.float64)
    count = 0
    for logits, y in parts:
        hits = hits + (logits.argmax(-1) == y[:, None]).sum(0)
        losses = losses - logits.log_softmax(-1)[torch.arange(len(y)), :, y].sum(0)
        count += len(y)
    mean = losses / count  # not finite where any logit was not
    accuracies = torch.where(mean.isfinite(), 100 * hits / count, 0.0)
    return accuracies.tolist(), mean.nan_to_num(torch.inf, torch.inf).tolist()
