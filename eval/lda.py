"""Linear discriminant analysis: Gaussian classes with one covariance, in closed form (Friedman 1989, regularised; scikit-learn's lsqr).

The covariance within classes is shrunk towards the multiple of the identity that has its trace: (1 - s) S + s tr(S) / D I.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.errors import NumericError, UsageError
from selfsight.eval.labels import checked, dense_labels, held_out
from selfsight.eval.linear import Standardizer
from selfsight.eval.protocol import detail_of, tenth
from selfsight.eval.ranks import own_device
from selfsight.eval.subject import Outcome, Subject

SHRINKAGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_LEAST_PRIOR = 1e-12  # of a class that stands in the held-out tenth only


class LDAResult(NamedTuple):
    """Scores on test, and the shrinkage that was chosen without it."""

    scores: Tensor
    """(M, C) float64: the logarithm of each class's probability, up to a constant a sample."""
    shrinkage: float


def lda(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    groups: Tensor | None = None,
    shrinkages: tuple[float, ...] = SHRINKAGES,
) -> LDAResult:
    """Choose the shrinkage on a held-out tenth of train (accuracy, of equals the lowest cross-entropy), refit, score test.

    Args:
        train, test: (N, D) and (M, D); standardised here by train, so that shrinking treats all dimensions alike.
        groups: of the training samples, as for `held_out`.

    Raises:
        UsageError: as `checked` and `held_out`; a shrinkage that is not in (0, 1].
        NumericError: features that are not finite, or that do not vary within classes.
    """
    train_labels, _, classes = checked(train, train_labels, test, test_labels)
    fit, choose = held_out(len(train), groups=groups)
    scale = _Scaled(train[fit])
    y, target = scale(train[choose]), train_labels[choose]
    tried = []
    for shrinkage, (weights, bias) in fit_lda(scale(train[fit]), train_labels[fit], classes, shrinkages).items():
        scores = y @ weights + bias
        accuracy = (scores.argmax(1) == target).double().mean().item()
        tried.append((accuracy, -F.cross_entropy(scores, target).item(), shrinkage))
    best = max(tried)[2]  # the strongest of equals
    scale = _Scaled(train)
    weights, bias = fit_lda(scale(train), train_labels, classes, (best,))[best]
    return LDAResult(scale(test) @ weights + bias, best)


class _Scaled:
    """Standardised by the features given, float64; without the constant of the linear probe."""

    def __init__(self, features: Tensor) -> None:
        self.scale = Standardizer(features.double())

    def __call__(self, features: Tensor) -> Tensor:
        return self.scale(features.double())[:, :-1]


def fit_lda(
    features: Tensor, labels: Tensor, classes: int, shrinkages: tuple[float, ...]
) -> dict[float, tuple[Tensor, Tensor]]:
    """For each shrinkage the weights (D, C) and biases (C,) of scikit-learn's LinearDiscriminantAnalysis("lsqr", shrinkage).

    Args:
        features: (N, D) float64, as they are.
        labels: (N,) 0 to classes - 1; a class may have no sample.

    Raises:
        UsageError: a shrinkage that is not in (0, 1].
        NumericError: a covariance that is not positive definite all the same.
    """
    if bad := [value for value in shrinkages if not 0 < value <= 1]:
        raise UsageError(
            f"shrinkage {bad[0]:g}: choose one above 0 and at most 1; without any a covariance may be singular"
        )
    device = own_device()
    x, labels = features.to(device), labels.to(device)
    counts = labels.bincount(minlength=classes).double()
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
    apart = x - means[labels]
    within = apart.T @ apart / len(x)
    common = within.diagonal().mean()
    priors = (counts / len(x)).clamp(min=_LEAST_PRIOR).log()
    found = {}
    for shrinkage in shrinkages:
        covariance = (1 - shrinkage) * within
        covariance.diagonal().add_(shrinkage * common)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            raise NumericError(
                f"the covariance within classes is not positive definite at shrinkage {shrinkage:g}: features hardly vary, or not at all"
            )
        weights = torch.cholesky_solve(means.T, factor)
        bias = priors - (means.T * weights).sum(0) / 2
        found[shrinkage] = weights.cpu(), bias.cpu()
    return found


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: accuracy. Deterministic: one value."""
    fit, held = subject.train, subject.test
    found = lda(subject.fit, fit.labels, subject.held, held.labels, fit.groups)
    protocol = (
        f"LDA: shared covariance, shrinkage {found.shrinkage:g} chosen from {SHRINKAGES} on {tenth(subject)}, refitted on all "
        f"of it; closed form in float64; standardised features: {subject.taken}"
    )
    predicted = found.scores.argmax(1)
    each = (predicted == dense_labels(fit.labels, held.labels)[1]).float()
    value = 100 * each.double().mean().item()
    chosen = {"shrinkage": found.shrinkage, "pool": subject.pool}
    return [Outcome((value,), protocol, chosen, each=each, detail=detail_of(predicted[None], fit.labels, held.labels))]
