"""Linear probe: softmax regression on frozen features; every learning rate and weight decay trained at once.

The gradient of softmax regression is a closed form, and H probes on the same features are one matrix product with H * C
columns; so a sweep costs hardly more than one probe.
"""

from collections.abc import Mapping
from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor

from selfsight import keyed
from selfsight.eval.knn import dense_labels, held_out

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.0, 1e-4, 1e-3)
SEEDS = 3
BATCH, MOMENTUM, EPOCHS = 256, 0.9, 100
LEAST_STEPS, MOST_STEPS = 500, 10_000


class LinearResult(NamedTuple):
    """Accuracy on test over seeds, and what was chosen without it."""

    accuracies: tuple[float, ...]
    """Percent, one a seed."""
    pool: str
    rate: float
    decay: float


def linear(
    train: Mapping[str, Tensor],
    train_labels: Tensor,
    test: Mapping[str, Tensor],
    test_labels: Tensor,
    seeds: int = SEEDS,
    groups: Tensor | None = None,
) -> LinearResult:
    """Choose pool, rate and decay on a held-out tenth of train, refit on all of train, score test once a seed.

    Args:
        train, test: features by pool, (N, D) and (M, D).
        groups: of the training samples, as for `held_out`.

    Raises:
        UsageError: test has classes that train lacks.
    """
    train_labels, test_labels, classes = dense_labels(train_labels, test_labels)
    fit, choose = held_out(len(train_labels), groups=groups)
    heads = [(rate, decay) for rate in RATES for decay in DECAYS]
    tried: list[tuple[float, float, str, float, float]] = []
    for pool, features in train.items():
        scale = Standardizer(features[fit])
        weights = fit_heads(scale(features[fit]), train_labels[fit], classes, heads, seed=0)
        accuracies, losses = score(weights, scale(features[choose]), train_labels[choose])
        tried += [(a, -loss, pool, *head) for a, loss, head in zip(accuracies, losses, heads, strict=True)]
    _, _, pool, rate, decay = max(tried)  # a tenth is small: among equal accuracies the lowest cross-entropy wins
    scale = Standardizer(train[pool])
    final = []
    for seed in range(seeds):
        weights = fit_heads(scale(train[pool]), train_labels, classes, [(rate, decay)], seed)
        final += score(weights, scale(test[pool]), test_labels)[0]
    return LinearResult(tuple(final), pool, rate, decay)


class Standardizer:
    """Subtract the mean and divide by the standard deviation of the training features; append a constant 1 for the bias."""

    def __init__(self, features: Tensor) -> None:
        self.mean, std = features.mean(0), features.std(0)
        self.std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a constant feature stays 0

    def __call__(self, features: Tensor) -> Tensor:
        scaled = (features - self.mean) / self.std
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)


def fit_heads(features: Tensor, labels: Tensor, classes: int, heads: list[tuple[float, float]], seed: int) -> Tensor:
    """Train H = len(heads) softmax regressions by SGD with momentum and a cosine rate: weights (D, H, C).

    Args:
        features: (N, D) from a Standardizer; the last column is the bias, which is not decayed.
        classes: how many there are; labels are 0 to classes - 1.
        heads: (learning rate, weight decay) of each.
        seed: of the order of the samples and the initial weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, labels = features.to(device), labels.to(device)
    size, width = len(features), features.shape[1]
    steps = min(MOST_STEPS, max(LEAST_STEPS, EPOCHS * size // BATCH))
    rates, decays = (torch.tensor(column, device=device).view(1, -1, 1) for column in zip(*heads, strict=True))
    start = torch.from_numpy(keyed.uniform(seed, "probe weights", range(width), classes)).float() * 0.02 - 0.01
    weights = start.to(device)[:, None].repeat(1, len(heads), 1)
    velocity = torch.zeros_like(weights)
    decayed = torch.ones(width, 1, 1, device=device)
    decayed[-1] = 0
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < min(BATCH, size):
            draws = keyed.hashes(seed, f"probe order {step}", range(size), 1)[:, 0]
            order = torch.cat([order, torch.from_numpy(draws.argsort().copy())])
        batch, order = order[:BATCH].to(device), order[BATCH:]
        x = features[batch]
        error = (x @ weights.flatten(1)).view(len(batch), -1, classes).softmax(-1)
        error[torch.arange(len(batch)), :, labels[batch]] -= 1
        gradient = (x.T @ error.flatten(1)).view_as(weights) / len(batch)
        velocity = MOMENTUM * velocity + gradient + decays * decayed * weights
        weights = weights - rates * (0.5 + 0.5 * cos(pi * step / steps)) * velocity
    return weights


def score(weights: Tensor, features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy (percent) and mean cross-entropy of each of the H heads. A head that diverged has 0 and infinity."""
    hits, losses = torch.zeros(2, weights.shape[1], dtype=torch.float64)
    for x, y in zip(features.split(BATCH), labels.split(BATCH), strict=True):
        logits = (x.to(weights.device) @ weights.flatten(1)).view(len(x), *weights.shape[1:]).double().cpu()
        hits += (logits.argmax(-1) == y[:, None]).sum(0)
        losses -= logits.log_softmax(-1)[torch.arange(len(y)), :, y].sum(0)
    losses = losses / len(labels)  # not finite where any logit was not
    accuracies = torch.where(losses.isfinite(), 100 * hits / len(labels), 0.0)
    return accuracies.tolist(), losses.nan_to_num(torch.inf, torch.inf).tolist()
