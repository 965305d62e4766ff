"""Multiple-instance learning: one label for all tiles of a slide, by gated attention (Ilse, Tomczak, Welling 2018, arXiv 1802.04712).

A bag is the samples of one group. Beside attention (abmil.py) stands the baseline that weighs all samples alike: logistic
regression on the means of bags.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.errors import UsageError
from selfsight.eval.abmil import HIDDEN, fit_attention, scored
from selfsight.eval.features import Features
from selfsight.eval.labels import checked, dense_labels, held_out, one_label, plain
from selfsight.eval.linear import Standardizer
from selfsight.eval.logistic import logistic
from selfsight.eval.places import places_of
from selfsight.eval.subject import SEEDS, Options, Outcome, Subject

RATES, DECAYS = (3e-4, 1e-3, 3e-3), (0.1, 10.0)
MOST_BAGS, MOST_TILES = 20, 50  # of attention that scores.json keeps


class Bags(NamedTuple):
    """B bags of N samples, in the order of their first samples."""

    of: Tensor
    """(N,) the bag of each sample, 0 to B - 1."""
    labels: Tensor
    """(B,) as the samples have them."""
    groups: Tensor
    """(B,) the group's number, -1 for a sample in none."""


class BagsResult(NamedTuple):
    """Over seeds, percent, and what was chosen without test."""

    auc: tuple[float, ...]
    accuracy: tuple[float, ...]
    rate: float
    decay: float
    attention: Tensor
    """(M,) the weight of each test sample in its bag, mean over seeds; those of a bag sum to 1."""
    bags: Bags
    """Of test."""


def bags(
    train: Tensor,
    train_labels: Tensor,
    train_groups: Tensor,
    test: Tensor,
    test_labels: Tensor,
    test_groups: Tensor,
    seeds: int = SEEDS,
) -> BagsResult:
    """Choose rate and decay on a held-out tenth of train's bags by cross-entropy, refit on all, score test's bags.

    Args:
        train, test: (N, D) and (M, D); standardised here by train.
        train_labels, test_labels: (N,) and (M,) integers, one and the same within a group.
        train_groups, test_groups: (N,) and (M,), -1 for a sample that is a bag of its own.

    Raises:
        UsageError: as `checked` and `bags_of`; a class of fewer than two bags; one class in test.
        NumericError: features that are not finite.
    """
    fit, held = bags_of(train_labels, train_groups, "train"), bags_of(test_labels, test_groups, "test")
    labels, truth, classes = _labels(train, train_labels, fit, test, test_labels, held)
    rate, decay = _chosen(train, fit, labels, classes)
    scale = Standardizer(train)
    heads = fit_attention(scale(train), fit.of, labels, classes, [(rate, decay)] * seeds, range(seeds))
    logits, weights = scored(heads, scale(test), held.of)
    shares = logits.softmax(2).double()
    return BagsResult(
        tuple(macro_auc(shares[:, seed], truth) for seed in range(seeds)),
        tuple(100 * (shares[:, seed].argmax(1) == truth).double().mean().item() for seed in range(seeds)),
        rate, decay, weights.mean(1), held,
    )  # fmt: skip


def mean_pooled(
    train: Tensor,
    train_labels: Tensor,
    train_groups: Tensor,
    test: Tensor,
    test_labels: Tensor,
    test_groups: Tensor,
) -> tuple[float, float, float]:
    """The baseline: AUC and accuracy, percent, of `logistic` on the means of bags, and its C. Arguments as for `bags`."""
    fit, held = bags_of(train_labels, train_groups, "train"), bags_of(test_labels, test_groups, "test")
    truth = _labels(train, train_labels, fit, test, test_labels, held)[1]
    found = logistic(_means(train, fit), fit.labels, _means(test, held), held.labels)
    hits = found.scores.argmax(1) == truth
    return macro_auc(found.scores.softmax(1), truth), 100 * hits.double().mean().item(), found.strength


def _means(features: Tensor, bags: Bags) -> Tensor:
    """The mean of each bag (B, D)."""
    features = plain(features)
    total = features.new_zeros(len(bags.labels), features.shape[1]).index_add_(0, bags.of, features)
    return total / bags.of.bincount()[:, None]


def _labels(
    train: Tensor, train_labels: Tensor, fit: Bags, test: Tensor, test_labels: Tensor, held: Bags
) -> tuple[Tensor, Tensor, int]:
    """Labels of bags as 0 to C - 1, and C; raises what `bags` says."""
    checked(train, train_labels, test, test_labels)
    labels, truth, classes = dense_labels(fit.labels, held.labels)
    if (labels.bincount() < 2).any():
        raise UsageError(f"train: {labels.bincount().tolist()} bags a class; every class needs two at least")
    if len(truth.unique()) < 2:
        raise UsageError(
            f"test: all {len(truth):,} bags have the label {int(held.labels[0])}; an AUC needs two classes"
        )
    return labels, truth, classes


def require_groups(train: Features, test: Features, options: Options) -> None:
    """As `bags_of`, of both sets, before any feature is taken."""
    bags_of(train.labels, train.groups)
    bags_of(test.labels, test.groups, "test")


def bags_of(labels: Tensor, groups: Tensor, name: str = "train") -> Bags:
    """Samples by group.

    Raises:
        UsageError: lists of labels, no groups at all, or a group whose samples have several labels.
    """
    one_label(labels)
    if len(groups) != len(labels):
        raise UsageError(f"{name}: {len(labels):,} samples have {len(groups):,} groups")
    if not (groups >= 0).any():
        raise UsageError(
            f"{name}: no sample has a group, and a bag is a group (slide, patient); build with --group-by or --tile"
        )
    units = torch.where(groups >= 0, groups, -1 - torch.arange(len(groups)))
    _, sorted_of = units.unique(return_inverse=True)
    count = int(sorted_of.max()) + 1
    first = torch.full((count,), len(groups)).scatter_reduce(0, sorted_of, torch.arange(len(groups)), "amin")
    of, first = first.argsort().argsort()[sorted_of], first.sort().values
    if len(odd := (labels != labels[first][of]).nonzero()):
        group = int(groups[odd[0, 0]])
        own = labels[groups == group].unique().tolist()
        raise UsageError(
            f"{name}: the samples of group {group} have the labels {', '.join(map(str, own[:10]))}; a bag has one"
        )
    return Bags(of, labels[first], groups[first])


def _chosen(train: Tensor, fit: Bags, labels: Tensor, classes: int) -> tuple[float, float]:
    """Rate and decay with the lowest cross-entropy on a held-out tenth of the bags."""
    heads = [(rate, decay) for rate in RATES for decay in DECAYS]
    kept, out = held_out(len(labels))
    inside = torch.isin(fit.of, kept)
    scale, place = Standardizer(train[inside]), torch.full((len(labels),), -1)
    place[kept], place[out] = torch.arange(len(kept)), torch.arange(len(out))
    trained = fit_attention(scale(train[inside]), place[fit.of[inside]], labels[kept], classes, heads, [0] * len(heads))
    logits, _ = scored(trained, scale(train[~inside]), place[fit.of[~inside]])
    target = labels[out][:, None].expand(-1, len(heads))
    losses = F.cross_entropy(logits.movedim(2, 1).double(), target, reduction="none").mean(0)
    return heads[int(losses.nan_to_num(torch.inf).argmin())]


def macro_auc(shares: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve, percent: each class against the rest, mean over the classes that are there and not alone."""
    from sklearn.metrics import roc_auc_score

    told = [label for label in range(shares.shape[1]) if 0 < int((truth == label).sum()) < len(truth)]
    return 100 * float(np.mean([roc_auc_score(truth == label, shares[:, label]) for label in told]))


def attention_of(found: BagsResult, most_bags: int = MOST_BAGS, most: int = MOST_TILES) -> dict[str, list[list[Any]]]:
    """Of each group its samples with the largest weights: {group: [[sample, weight], ...]}, of the largest groups first."""
    sizes = found.bags.of.bincount()
    sizes[found.bags.groups < 0] = 0
    largest = [bag for bag in sizes.argsort(descending=True, stable=True).tolist() if sizes[bag]][:most_bags]
    answer = {}
    for bag in largest:
        rows = (found.bags.of == bag).nonzero()[:, 0]
        top = found.attention[rows].argsort(descending=True, stable=True)[:most]
        pairs = zip(rows[top].tolist(), found.attention[rows[top]].tolist(), strict=True)
        answer[str(int(found.bags.groups[bag]))] = [[row, round(weight, 6)] for row, weight in pairs]
    return answer


def _details(subject: Subject, found: BagsResult) -> dict[str, Any]:
    """`attention_of`, and where those samples lie in their slides, if the shards say so: {group: [[left, top], ...]}."""
    told = attention_of(found)
    places = places_of(subject.sets[1]) if subject.encoder is not None and subject.sets is not None else None
    if places is None:
        return {"attention": told}
    return {
        "attention": told,
        "places": {group: places[[row for row, _ in pairs]].tolist() for group, pairs in told.items()},
    }


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: AUC and accuracy over bags, of attention over seeds and of the means of bags."""
    fit, held, options = subject.train, subject.test, subject.options
    given = subject.fit, fit.labels, fit.groups, subject.held, held.labels, held.groups
    found = bags(*given, seeds=options.seeds)
    auc, accuracy, strength = mean_pooled(*given)
    of = f"{len(found.bags.labels)} bags of test, AUC each class against the rest"
    attention = (
        f"bags: gated attention (ABMIL, L={HIDDEN}), {len(RATES)} rates x {len(DECAYS)} decays; rate {found.rate:g}, decay {found.decay:g} chosen "
        f"by cross-entropy on a held-out tenth of train's bags, refitted on all of them; {of}; standardised features: {subject.taken}"
    )
    mean = f"bags: logistic regression on the means of bags, C={strength:.3g} chosen on a held-out tenth of train's bags; {of}; features: {subject.taken}"
    chosen, plain = (
        {"rate": found.rate, "decay": found.decay, "pool": subject.pool},
        {"C": strength, "pool": subject.pool},
    )
    return [
        Outcome(found.auc, attention, chosen, "AUC", detail=_details(subject, found)),
        Outcome(found.accuracy, attention, chosen, "accuracy"),
        Outcome((auc,), mean, plain, "AUC, means"),
        Outcome((accuracy,), mean, plain, "accuracy, means"),
    ]
