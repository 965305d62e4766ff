"""Retrieval: every test sample asks for its class among train, ranked by cosine similarity.

mAP over the full ranking and recall at 1, 5, 10 (a sample of the class among the first K), as in Revisited Oxford (Radenović
et al. 2018, arXiv 1803.11285) and In-shop (Liu et al. 2016). Ties count against the encoder: what is as similar as a relevant
sample stands before it, as in scikit-learn's average_precision_score.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsight.eval.knn import unit
from selfsight.eval.labels import checked
from selfsight.eval.ranks import own_device
from selfsight.eval.subject import Outcome, Subject

RECALLS = (1, 5, 10)
_CELLS = 2**24  # similarities at a time: memory is bounded at about half a gigabyte


class RetrievalResult(NamedTuple):
    """What each of M queries found."""

    precision: Tensor
    """(M,) float64: average precision, NaN where there was nothing to find."""
    before: Tensor
    """(M,) how many of other classes are at least as similar as the nearest of the query's own; all, if there is none."""

    def recall(self, k: int) -> Tensor:
        """(M,) whether one of the first k is of the query's class."""
        return self.before < k


def retrieval(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    train_groups: Tensor | None = None,
    test_groups: Tensor | None = None,
) -> RetrievalResult:
    """Rank all of train for each of test.

    Args:
        train, test: (N, D) and (M, D), any lengths.
        train_labels, test_labels: (N,) and (M,) integers.
        train_groups, test_groups: (N,) and (M,), -1 for none; give them only where both number the same patients, slides or
            scenes: what is of the query's own group is then left out of its ranking, neither right nor wrong.

    Raises:
        UsageError: as `checked`.
        NumericError: features that are not finite or have length zero.
    """
    labels, truth, classes = checked(train, train_labels, test, test_labels)
    device, order = own_device(), labels.argsort(stable=True)
    bank, queries = unit(train).float()[order].to(device), unit(test).float()
    ends = labels.bincount(minlength=classes).cumsum(0).tolist()
    precision, before = torch.empty(len(test), dtype=torch.float64), torch.empty(len(test), dtype=torch.long)
    own_groups = None if train_groups is None or test_groups is None else train_groups[order].to(device)
    for label in truth.unique().tolist():
        wanted = slice(ends[label - 1] if label else 0, ends[label])
        for rows in (truth == label).nonzero()[:, 0].split(max(1, _CELLS // len(bank))):
            similar = queries[rows].to(device) @ bank.T
            if own_groups is not None and test_groups is not None:
                of = test_groups[rows].to(device)[:, None]
                similar[(of >= 0) & (of == own_groups)] = -torch.inf
            found = ranked(similar, wanted)
            precision[rows], before[rows] = found.precision.cpu(), found.before.cpu()
    return RetrievalResult(precision, before)


def ranked(similar: Tensor, wanted: slice) -> RetrievalResult:
    """Average precision from ranks alone: no sort carries an index.

    A relevant sample's rank is the number of samples at least as similar as it; the precision there is the number of relevant
    ones among them by that rank.

    Args:
        similar: (Q, N); -inf for what is left out.
        wanted: the columns that are relevant.
    """
    relevant, everything = _ascending(similar[:, wanted]), _ascending(similar)
    rank = everything.shape[1] - torch.searchsorted(everything, relevant)
    hits = relevant.shape[1] - torch.searchsorted(relevant, relevant)
    there = relevant > -torch.inf
    precision = (hits.double() / rank * there).sum(1) / there.sum(1)  # nothing by nothing is NaN
    before = torch.where(there[:, -1], (rank - hits)[:, -1], everything.shape[1])
    return RetrievalResult(precision, before)


def _ascending(values: Tensor) -> Tensor:
    """Rows sorted. numpy's sort of float32 is vectorised, torch's on the CPU is not."""
    if values.is_cuda:
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: mAP and recalls. Deterministic: one value each.

    Groups are not left out: two sets number theirs independently, and `shards split --by group` leaves none on both sides.
    """
    found = retrieval(subject.fit, subject.train.labels, subject.held, subject.test.labels)
    protocol = f"retrieval: test asks {len(subject.fit):,} of train, cosine; {{}}, ties count against; features: {subject.taken}"
    parts = {"mAP": ("average precision over the full ranking", found.precision)} | {
        f"recall@{k}": (f"one of the class among the first {k}", found.recall(k).double()) for k in RECALLS
    }
    return [
        Outcome((100 * each.mean().item(),), protocol.format(said), {"pool": subject.pool}, metric, each=each.float())
        for metric, (said, each) in parts.items()
    ]
