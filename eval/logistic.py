"""Logistic regression with an L2 penalty: the convex optimum, where the linear probe is an SGD that was told when to stop.

The objective is scikit-learn's: C times the sum of the cross-entropies plus half the squared weights, the bias free. The
sizes of C are tried from the smallest to the largest, each from the optimum of the one before; by L-BFGS on all samples.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.eval import multilabel
from selfsight.eval.labels import checked, dense_labels, held_out, plain
from selfsight.eval.linear import Standardizer
from selfsight.eval.protocol import detail_of, tenth
from selfsight.eval.ranks import own_device
from selfsight.eval.subject import Outcome, Subject

STRENGTHS = tuple(10 ** (power / 2) for power in range(-10, 7))  # C from 1e-5 to 1000, two a decade
TOLERANCE = 1e-4  # scikit-learn's: on the largest entry of the gradient of the mean loss
MOST_ITERATIONS = 1000


class LogisticResult(NamedTuple):
    """Scores on test, and the C that was chosen without it."""

    scores: Tensor
    """(M, C) float64: logits."""
    strength: float
    """scikit-learn's C."""
    unfinished: tuple[float, ...]
    """The C of fits that had not converged, if any; the last fit on all of train counts as `strength`."""


def logistic(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    groups: Tensor | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
) -> LogisticResult:
    """Choose C on a held-out tenth of train, refit on all of train, score test.

    Chosen is the best accuracy (of equals the lowest cross-entropy); of lists of labels, which are fitted one against the
    rest, the lowest cross-entropy.

    Args:
        train, test: (N, D) and (M, D); standardised here by train.
        train_labels, test_labels: (N,) and (M,) integers, or (N, C) and (M, C) bool.
        groups: of the training samples, as for `held_out`.

    Raises:
        UsageError: as `checked` and `held_out`, or lists of labels of two lengths.
        NumericError: features that are not finite.
    """
    targets = checked(train, train_labels, test, test_labels, lists=True)[0]
    train, test = plain(train).double(), plain(test).double()
    lists, columns = targets.ndim == 2, (targets if targets.ndim == 2 else F.one_hot(targets)).double()
    fit, choose = held_out(len(train), groups=groups)
    tried: list[tuple[float, float, float]] = []
    unfinished: list[float] = []
    scale, weights = Standardizer(train[fit]), None
    x, y = scale(train[fit]), scale(train[choose])
    for strength in sorted(strengths):
        weights, done = fit_logistic(x, columns[fit], strength, lists, weights)
        unfinished += [] if done else [strength]
        tried.append((*_merit(y @ weights, targets[choose]), -strength))
    best = -max(tried)[2]  # the smallest C of equals
    scale = Standardizer(train)
    weights, done = fit_logistic(scale(train), columns, best, lists)
    return LogisticResult(scale(test) @ weights, best, tuple(unfinished) if done else (*unfinished, best))


def _merit(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """What is to be largest on the held-out tenth: accuracy, then less cross-entropy."""
    if targets.ndim == 2:
        return 0.0, -F.binary_cross_entropy_with_logits(scores, targets.double()).item()
    return (scores.argmax(1) == targets).double().mean().item(), -F.cross_entropy(scores, targets).item()


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    strength: float,
    lists: bool = False,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, bool]:
    """Weights (D, C) at the optimum, and whether it was reached.

    Of two classes scikit-learn has one column, whose penalty is half of that of the two here: so theirs is doubled.

    Args:
        features: (N, D) float64 whose last column is a constant 1: the bias, which is not penalised.
        targets: (N, C) float64, 0 or 1.
        strength: scikit-learn's C.
        lists: whether samples have lists of labels: a regression for each column. Otherwise the classes exclude each other:
            softmax regression.
        start: weights to start from; zeros if None.
    """
    from scipy.optimize import minimize

    device = own_device()
    features, targets = features.to(device), targets.to(device)
    penalty = (2.0 if targets.shape[1] == 2 and not lists else 1.0) / (strength * len(features))
    shape = targets.shape[1], features.shape[1]  # this way round both products run along the features' rows

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).to(device).view(shape)
        loss, share = (_sigmoid if lists else _softmax)(features @ weights.T, targets)
        gradient = share.T @ features / len(features)
        gradient[:, :-1] += penalty * weights[:, :-1]
        loss = loss / len(features) + penalty / 2 * weights[:, :-1].square().sum()
        return loss.item(), gradient.flatten().cpu().numpy()

    first = torch.zeros(shape, dtype=torch.float64) if start is None else start.T
    limits = {"maxiter": MOST_ITERATIONS, "maxfun": 2 * MOST_ITERATIONS, "gtol": tolerance, "ftol": 0.0}
    found = minimize(loss_and_gradient, first.flatten().numpy(), jac=True, method="L-BFGS-B", options=limits)
    return torch.from_numpy(found.x).view(shape).T, bool(abs(found.jac).max() <= tolerance)


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies, and its gradient by the logits."""
    told = logits.log_softmax(1)
    return -(told * targets).sum(), told.exp_() - targets


def _sigmoid(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss, logits.sigmoid_() - targets


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: accuracy, or mAP and AUC of lists of labels. Deterministic: one value."""
    fit, held = subject.train, subject.test
    found = logistic(subject.fit, fit.labels, subject.held, held.labels, fit.groups)
    lacking = ", ".join(f"{strength:.3g}" for strength in found.unfinished)
    protocol = (
        f"logistic regression: L2, C={found.strength:.3g} chosen from {len(STRENGTHS)} of {min(STRENGTHS):g} to "
        f"{max(STRENGTHS):g} on {tenth(subject)}{' by cross-entropy' if fit.multilabel else ''}, refitted on all of it; L-BFGS to a gradient of {TOLERANCE:g}"
        f"{f', NOT reached within {MOST_ITERATIONS} iterations at C={lacking}' if lacking else ''}; "
        f"standardised features: {subject.taken}"
    )
    chosen = {"C": found.strength, "pool": subject.pool}
    if fit.multilabel:
        return multilabel.outcomes([found.scores], held.labels, f"{protocol}; one class against the rest", chosen)
    predicted = found.scores.argmax(1)
    each = (predicted == dense_labels(fit.labels, held.labels)[1]).float()
    detail = detail_of(predicted[None], fit.labels, held.labels)
    return [Outcome((100 * each.double().mean().item(),), protocol, chosen, each=each, detail=detail)]
