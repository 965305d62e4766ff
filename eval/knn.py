"""Weighted k-nearest-neighbour vote on cosine similarity (Wu et al. 2018, arXiv 1805.01978; DINO's protocol)."""

from collections.abc import Sequence
from typing import NamedTuple

import faiss
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight import keyed
from selfsight.errors import NumericError, UsageError

TEMPERATURE = 0.07
DEFAULT_K = (10, 20, 100, 200)
_QUERIES = 4096  # voted on at once, to bound memory


class KNNResult(NamedTuple):
    """Accuracy on test, and the k that was chosen without it."""

    accuracy: float
    """Percent."""
    predicted: Tensor
    """(M,) the class of each test sample, 0 to C - 1 in the order of train's classes."""
    k: int
    candidates: tuple[int, ...]


def held_out(size: int, seed: int = 0, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A split of `size` training samples: (nine tenths to fit, one tenth to choose by), sorted indices.

    Args:
        groups: (N,) patient, slide or scene of each sample, -1 for one of its own; whole groups are held out, so that nothing
            is chosen by how well a patient is recognised. The tenth is then the least number of groups that has as many.

    Raises:
        UsageError: all samples are of one group.
    """
    units = torch.arange(size)
    if groups is not None and (groups >= 0).any():
        units = torch.where(groups >= 0, groups, -1 - units).unique(return_inverse=True)[1]
    count = int(units.max()) + 1 if size else 0
    if count == 1 and size > 1:
        raise UsageError(f"all {size:,} samples are of one group (patient, slide, scene): none can be held out")
    order = torch.from_numpy(keyed.hashes(seed, "held out", range(count), 1)[:, 0].argsort().copy())
    sizes = units.bincount(minlength=count)[order]
    before = sizes.cumsum(0) - sizes
    held = torch.zeros(count, dtype=torch.bool)
    held[order[(before < max(1, size // 10)) & (torch.arange(count) < count - 1)]] = True
    chosen = held[units]
    return torch.nonzero(~chosen)[:, 0], torch.nonzero(chosen)[:, 0]


def usable_k(candidates: Sequence[int], bank: int) -> tuple[int, ...]:
    """The candidates that a bank can serve: of the default ones those that fit, of others all.

    Raises:
        UsageError: none of the default ones fits, or not all of the others.
    """
    fitting = tuple(k for k in candidates if 1 <= k <= bank)
    if not fitting or (len(fitting) < len(candidates) and tuple(candidates) != DEFAULT_K):
        raise UsageError(
            f"k = {', '.join(map(str, candidates))}: the bank has only {bank} samples; choose k of at most {bank}"
        )
    return fitting


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: Sequence[int] = DEFAULT_K,
    groups: Tensor | None = None,
) -> KNNResult:
    """Accuracy on test with the k that is best on a held-out tenth of train (the smaller k of equals).

    Args:
        train, test: features (N, D) and (M, D).
        k: candidates; those larger than nine tenths of train are left out.
        groups: of the training samples, as for `held_out`.

    Raises:
        UsageError: no candidate fits the bank, or test has classes that train lacks.
        NumericError: a feature that is not finite or has length zero.
    """
    train_labels, test_labels, _ = dense_labels(train_labels, test_labels)
    train, test = unit(train), unit(test)
    fit, choose = held_out(len(train), groups=groups)
    candidates = usable_k(k, len(fit))
    if len(candidates) > 1:
        votes = predict(train[fit], train_labels[fit], train[choose], candidates)
        accuracy = (votes == train_labels[choose][:, None]).double().mean(0)
        best = candidates[int(accuracy.argmax())]
    else:
        best = candidates[0]
    predicted = predict(train, train_labels, test, (best,))[:, 0]
    return KNNResult(100 * (predicted == test_labels).double().mean().item(), predicted, best, candidates)


def predict(bank: Tensor, labels: Tensor, queries: Tensor, k: Sequence[int]) -> Tensor:
    """The class with the largest sum of exp(cosine / T) over the k nearest, for several k from one search: (Q, len(k)).

    `bank` and `queries` have unit length.
    """
    similarity, neighbour = search(bank, queries, max(k))
    weights, classes, voted = (similarity.double() / TEMPERATURE).exp(), int(labels.max()) + 1, []
    for weight, near in zip(weights.split(_QUERIES), labels[neighbour].split(_QUERIES), strict=True):
        empty = torch.zeros(len(near), classes, dtype=torch.float64)
        voted.append(torch.stack([empty.scatter_add(1, near[:, :n], weight[:, :n]).argmax(1) for n in k], dim=1))
    return torch.cat(voted)


def search(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products and where they are, best first: (Q, k) each, on the CPU; found on the GPU if there is one."""
    if torch.cuda.is_available():
        columns = bank.cuda().T
        rows = max(1, 2**28 // len(bank))  # a gigabyte of similarities at a time
        found = [(part.cuda() @ columns).topk(k) for part in queries.split(rows)]
        return torch.cat([part.values for part in found]).cpu(), torch.cat([part.indices for part in found]).cpu()
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    similarity, neighbour = index.search(queries.numpy(), k)
    return torch.from_numpy(similarity), torch.from_numpy(neighbour)


def unit(features: Tensor) -> Tensor:
    """Features scaled to length 1.

    Raises:
        NumericError: a feature that is not finite or has length zero.
    """
    lengths = features.norm(dim=1)
    if bad := int((~(lengths.isfinite() & (lengths > 0))).sum()):
        raise NumericError(f"{bad} features are not finite or have length zero: they have no direction to compare")
    return F.normalize(features).contiguous()


def dense_labels(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels as 0 to C - 1 in the order of train's classes, and C; they may be any integers before.

    Raises:
        UsageError: test has classes that train lacks.
    """
    classes, dense = train.unique(return_inverse=True)
    if unknown := sorted(set(test.tolist()) - set(classes.tolist())):
        raise UsageError(f"test has {len(unknown)} classes that train lacks: {', '.join(map(str, unknown[:10]))}")
    return dense, torch.searchsorted(classes, test), len(classes)
