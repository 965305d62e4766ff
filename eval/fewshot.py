"""Few-shot: how far a few labelled samples a class go, by the nearest class mean (SimpleShot, Wang et al. 2019, arXiv 1911.04623).

Features are centred by the mean of train, which needs no label, and scaled to length 1 (SimpleShot's CL2N); a test sample gets
the class whose mean of k such features is nearest. Nothing is chosen, so nothing is held out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight import keyed
from selfsight.errors import UsageError
from selfsight.eval.features import Features
from selfsight.eval.knn import unit
from selfsight.eval.labels import checked, one_label
from selfsight.eval.ranks import own_device
from selfsight.eval.subject import Options, Outcome, Subject

DRAWS = 10  # a single sample a class varies by several points from draw to draw
SHOTS = (1, 5, 10)
_CELLS = 2**26  # distances at a time


def fewshot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    groups: Tensor | None = None,
) -> dict[int, Tensor]:
    """For each number of shots, which test samples are right in which draw: (draws, M) bool.

    Args:
        train, test: (N, D) and (M, D).
        train_labels, test_labels: (N,) and (M,) integers.
        shots: labelled samples a class. The samples of few shots are among those of more.
        groups: of the training samples (N,), -1 for none: as few of one group as can be, see `drawn`.

    Raises:
        UsageError: as `checked`; classes with fewer samples than shots.
        NumericError: features that are not finite, or that equal the mean of all.
    """
    dense, truth, classes = checked(train, train_labels, test, test_labels)
    refuse_rare(train_labels, shots)
    centre = train.double().mean(0)
    fit, held = (unit((own.double() - centre).float()) for own in (train, test))
    hits = {k: torch.empty(draws, len(held), dtype=torch.bool) for k in shots}
    for draw in range(draws):
        order = drawn(dense, groups, draw)
        for k in shots:
            means = torch.stack([fit[order[label][:k]].mean(0) for label in range(classes)])
            hits[k][draw] = nearest(means, held) == truth
    return hits


def require_enough(train: Features, test: Features, options: Options) -> None:
    """As `refuse_rare`, and lists of labels; before any feature is taken."""
    one_label(train.labels, test.labels)
    refuse_rare(train.labels, options.shots)


def refuse_rare(labels: Tensor, shots: Sequence[int]) -> None:
    """Raises UsageError: no shots, or classes that have not so many samples."""
    if not shots or min(shots) < 1:
        raise UsageError(f"shots {', '.join(map(str, shots)) or 'missing'}: choose numbers of at least 1")
    names, counts = labels.unique(return_counts=True)
    rare = [
        f"{name} ({count})" for name, count in zip(names.tolist(), counts.tolist(), strict=True) if count < max(shots)
    ]
    if rare:
        more = f" and {len(rare) - 10} more" if len(rare) > 10 else ""
        raise UsageError(
            f"train: {len(rare)} classes have fewer than {max(shots)} samples: {', '.join(rare[:10])}{more}; "
            f"choose shots of at most {int(counts.min())}"
        )


def drawn(labels: Tensor, groups: Tensor | None, draw: int) -> list[Tensor]:
    """The samples of each class, 0 to C - 1, in the order in which a draw takes them.

    A function of the draw and a sample's place alone. Where there are groups, first one sample of each, then a second of
    each, and so on: patches of one slide say less than those of several.
    """
    key = torch.from_numpy(keyed.hashes(draw, "few shots", range(len(labels)), 1)[:, 0].argsort(kind="stable").copy())
    split = [key[labels[key] == label] for label in range(int(labels.max()) + 1)]
    return split if groups is None else [own[turns(groups[own]).argsort(stable=True)] for own in split]


def turns(groups: Tensor) -> Tensor:
    """How many before each one are of its group, (n,); -1 is a group of its own."""
    units = torch.where(groups >= 0, groups, -1 - torch.arange(len(groups)))
    order = units.argsort(stable=True)
    _, counts = units[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - starts)


def nearest(means: Tensor, queries: Tensor) -> Tensor:
    """The nearest of C means (C, D) to each query (M, D) by Euclidean distance, the first of equals: (M,)."""
    device = own_device()
    means = means.to(device)
    offset = means.square().sum(1) / 2
    parts = queries.split(max(1, _CELLS // len(means)))
    return torch.cat([(part.to(device) @ means.T - offset).argmax(1).cpu() for part in parts])


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: accuracy for each number of shots, over draws; an untrained encoder has as many draws."""
    fit, held, options = subject.train, subject.test, subject.options
    draws = max(DRAWS, options.seeds)
    hits = fewshot(subject.fit, fit.labels, subject.held, held.labels, options.shots, draws, fit.groups)
    return [
        Outcome(
            tuple(100 * own.double().mean(1).numpy()),
            f"few-shot: {k} of train a class{_spread(fit.labels, fit.groups, k)}, {draws} draws; nearest class mean of centred features of length 1 "
            f"(SimpleShot CL2N); features: {subject.taken}",
            {"pool": subject.pool},
            f"{k}-shot",
            each=own.float().mean(0),
        )
        for k, own in hits.items()
    ]


def _spread(labels: Tensor, groups: Tensor, shots: int) -> str:
    """What the protocol says of groups."""
    if not (groups >= 0).any():
        return ""
    apart = all(int((turns(groups[labels == label]) == 0).sum()) >= shots for label in labels.unique())
    return ", at most one of a group" if apart else ", of as many groups as there are"
