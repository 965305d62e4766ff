"""Weighted k-nearest-neighbour vote on cosine similarity (Wu et al. 2018, arXiv 1805.01978; DINO's protocol).

One exact search for the largest k serves every k; where samples have several labels, the vote is a score for each class.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import faiss
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.errors import NumericError, UsageError
from selfsight.eval.labels import check_pairs, dense_labels, held_out, plain
from selfsight.eval.quality import mean_average_precision

TEMPERATURE = 0.07
DEFAULT_K = (10, 20, 100, 200)
_VOTES = 2**24  # numbers held at once while votes are counted
_BLOCK = (1024, 4096)  # queries x bank of faiss's matrix products: 16 MB, and 7 % faster than its own 4096 x 1024


class KNNResult(NamedTuple):
    """Accuracy on test, and the k that was chosen without it."""

    accuracy: float
    """Percent."""
    predicted: Tensor
    """(M,) the class of each test sample, 0 to C - 1 in the order of train's classes."""
    k: int
    candidates: tuple[int, ...]


class RankedResult(NamedTuple):
    """Scores of every class for each test sample, and the k that was chosen without test."""

    scores: Tensor
    """(M, C) float64, 0 to 1: the share of the vote that has the class."""
    k: int
    candidates: tuple[int, ...]


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
        train_labels, test_labels: (N,) and (M,), any integers >= 0.
        k: candidates; those larger than nine tenths of train are left out.
        groups: of the training samples, as for `held_out`.

    Raises:
        UsageError: no candidate fits the bank, train has one class, or test has classes that train lacks.
        NumericError: a feature that is not finite or has length zero.
    """
    check_pairs(train, train_labels, test, test_labels)
    train_labels, test_labels, _ = dense_labels(train_labels, test_labels)
    train, test = unit(train), unit(test)
    fit, choose = held_out(len(train), groups=groups)
    candidates = usable_k(k, len(fit))
    best = candidates[0]
    if len(candidates) > 1:
        voted = predict(train[fit], train_labels[fit], train[choose], candidates)
        accuracy = (voted == train_labels[choose][:, None]).double().mean(0)
        best = min(candidates, key=lambda n: (-accuracy[candidates.index(n)].item(), n))
    predicted = predict(train, train_labels, test, (best,))[:, 0]
    return KNNResult(100 * (predicted == test_labels).double().mean().item(), predicted, best, candidates)


def knn_ranked(
    train: Tensor, labels: Tensor, test: Tensor, k: Sequence[int] = DEFAULT_K, groups: Tensor | None = None
) -> RankedResult:
    """Scores of several labels a sample, with the k whose mAP on a held-out tenth of train is best.

    Args:
        train, test: features (N, D) and (M, D).
        labels: (N, C) bool, of train.
        k, groups: as for `knn`.

    Raises:
        UsageError: no candidate fits the bank, or no class of the held-out tenth can be ranked.
        NumericError: a feature that is not finite or has length zero.
    """
    check_pairs(train, labels, test)
    if labels.ndim != 2:
        raise UsageError(
            f"labels are {labels.dtype} {[*labels.shape]}; a ranking needs lists, bool (N, C); else ask `knn`"
        )
    train, test = unit(train), unit(test)
    fit, choose = held_out(len(train), groups=groups)
    candidates = usable_k(k, len(fit))
    best = candidates[0]
    if len(candidates) > 1:
        shares = vote(train[fit], labels[fit], train[choose], candidates)
        precision = {n: mean_average_precision(s, labels[choose]) for n, s in zip(candidates, shares, strict=True)}
        best = min(candidates, key=lambda n: (-precision[n], n))
    return RankedResult(vote(train, labels, test, (best,))[0], best, candidates)


def predict(bank: Tensor, labels: Tensor, queries: Tensor, k: Sequence[int]) -> Tensor:
    """The class with the largest sum of exp(cosine / T) over the k nearest, for several k from one search: (Q, len(k)).

    `bank` and `queries` have unit length; labels are any integers.
    """
    classes, dense = labels.unique(return_inverse=True)
    similarity, neighbour = search(bank, queries, max(k))
    rows, voted = max(1, _VOTES // (max(k) + len(classes))), []
    for near, where in zip(similarity.split(rows), neighbour.split(rows), strict=True):
        weight, label = (near.double() / TEMPERATURE).exp(), dense[where]
        votes, counted = torch.zeros(len(near), len(classes), dtype=torch.float64), 0
        answer = {}
        for n in sorted(set(k)):  # the votes of the nearer ones are in already
            votes.scatter_add_(1, label[:, counted:n], weight[:, counted:n])
            answer[n], counted = votes.argmax(1), n
        voted.append(torch.stack([answer[n] for n in k], dim=1))
    return classes[torch.cat(voted)]


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: Sequence[int]) -> Tensor:
    """The share of each class in the vote of the k nearest, from one search: (len(k), Q, C) float64.

    A share and not a sum: a ranking of samples must not depend on how near their neighbours are.

    Args:
        labels: (N, C) bool.
    """
    similarity, neighbour = search(bank, queries, max(k))
    rows, parts = max(1, _VOTES // (max(k) * labels.shape[1])), []
    for near, where in zip(similarity.split(rows), neighbour.split(rows), strict=True):
        weight, has = (near.double() / TEMPERATURE).exp(), labels[where].double()
        shares = [torch.einsum("qk,qkc->qc", weight[:, :n], has[:, :n]) / weight[:, :n].sum(1, keepdim=True) for n in k]
        parts.append(torch.stack(shares))
    return torch.cat(parts, dim=1)


def search(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products and where they are, best first: (Q, k) each, on the CPU; found on the GPU if there is one.

    Raises:
        UsageError: the bank has fewer than k (faiss would answer with -1, which indexes the last).
        NumericError: a query that is near to nothing, since it or the bank is not finite.
    """
    usable_k((k,), len(bank))
    bank, queries = bank.float(), queries.float()  # which is what faiss knows
    if torch.cuda.is_available():
        columns = bank.cuda().T
        rows = max(1, 2**28 // len(bank))  # a gigabyte of similarities at a time
        found = [(part.cuda() @ columns).topk(k) for part in queries.split(rows)]
        similarity = torch.cat([part.values for part in found]).cpu()
        neighbour = torch.cat([part.indices for part in found]).cpu()
    else:
        similarity, neighbour = (torch.from_numpy(part) for part in _faiss(bank, queries, k))
    if bad := int((~similarity.isfinite() | (neighbour < 0)).any(1).sum()):
        raise NumericError(f"{bad} queries have no {k} nearest neighbours: features are not finite")
    return similarity, neighbour


def _faiss(bank: Tensor, queries: Tensor, k: int) -> Sequence[Any]:
    """IndexFlatIP's search without its copy of the bank."""
    sizes, own = faiss.cvar, (faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs)
    sizes.distance_compute_blas_query_bs, sizes.distance_compute_blas_database_bs = _BLOCK
    try:
        return faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    finally:
        sizes.distance_compute_blas_query_bs, sizes.distance_compute_blas_database_bs = own


def unit(features: Tensor) -> Tensor:
    """Features scaled to length 1.

    Raises:
        NumericError: a feature that is not finite or has length zero.
    """
    features = plain(features)
    lengths = features.norm(dim=1)
    if bad := int((~(lengths.isfinite() & (lengths > 0))).sum()):
        raise NumericError(f"{bad} features are not finite or have length zero: they have no direction to compare")
    return F.normalize(features).contiguous()
