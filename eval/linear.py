"""Linear probe: softmax regression on frozen features; every learning rate, weight decay and pool trained at once.

The gradient of softmax regression is a closed form, and H probes on the same features are one matrix product with H * C
columns; so a sweep costs hardly more than one probe. Pools of equal width are one batched product more. Several labels a
sample make it logistic regressions, one a class.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import cos, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsight import keyed
from selfsight.errors import NumericError, UsageError
from selfsight.eval.labels import checked, held_out, plain
from selfsight.eval.quality import judged, moments
from selfsight.eval.ranks import own_device
from selfsight.eval.token_probe import TOKEN_HEADS, Answer, Head, fit_tokens

RATES = (0.001, 0.0022, 0.0046, 0.01, 0.022, 0.046, 0.1, 0.22, 0.46, 1.0, 2.2, 4.6, 10.0)
DECAYS = (0.0, 1e-4, 1e-3)
HEADS = tuple((rate, decay) for rate in RATES for decay in DECAYS)
SEEDS = 3
BATCH, MOMENTUM, EPOCHS = 256, 0.9, 100
LEAST_STEPS, MOST_STEPS = 1000, 10_000


class LinearResult(NamedTuple):
    """Answers on test, one a seed, and what was chosen without it."""

    accuracies: tuple[float, ...]
    """Percent, one a seed; none where samples have several labels."""
    logits: Tensor
    """(seeds, M, C), classes in the order of train's."""
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
    device: torch.device | None = None,
) -> LinearResult:
    """Choose pool, rate and decay on a held-out tenth of train, refit on all of train, score test once a seed.

    Chosen by accuracy, or by mean average precision where samples have several labels; of equals the lowest cross-entropy.

    Args:
        train, test: features by pool, (N, D) and (M, D); or of a pool of `token_probe` tokens (N, T, D) and (M, T, D).
        train_labels, test_labels: (N,) and (M,), any integers >= 0; or (N, C) and (M, C) bool.
        groups: of the training samples, as for `held_out`.
        device: where probes are trained; None: a GPU if there is one.

    Raises:
        UsageError: one class only, classes of test that train lacks, or pools of train that test lacks.
        NumericError: features that are not finite, or a probe that diverges at every rate.
    """
    train, test = (
        {pool: own.detach() if own.ndim == 3 else plain(own).float() for pool, own in side.items()}
        for side in (train, test)
    )
    labels, truth, classes = _asked(train, train_labels, test, test_labels)
    fit, choose = held_out(len(labels), groups=groups)
    device = device or own_device()
    tried: list[tuple[float, float, str, Head]] = []
    for pools in by_width(train):
        heads = heads_of(train[pools[0]])
        answers = fit_pools({pool: train[pool] for pool in pools}, fit, labels[fit], classes, heads, 0, device)
        for pool, answer in answers.items():
            qualities, losses = judged(answer, train[pool][choose], labels[choose])
            tried += [(q, -loss, pool, head) for q, loss, head in zip(qualities, losses, heads, strict=True)]
    _, loss, pool, head = max(tried)
    if loss == -torch.inf:
        raise NumericError(f"the probe diverges at every one of {len(RATES)} rates, on every pool")
    logits, everyone = [], torch.arange(len(labels))
    for seed in range(seeds):
        answer = fit_pools({pool: train[pool]}, everyone, labels, classes, (head,), seed, device)[pool]
        logits.append(torch.cat([answer(part)[:, 0].cpu() for part in test[pool].split(BATCH)]))
    return LinearResult(_accuracies(logits, truth), torch.stack(logits), pool, *head)


def _asked(
    train: Mapping[str, Tensor], train_labels: Tensor, test: Mapping[str, Tensor], test_labels: Tensor
) -> tuple[Tensor, Tensor, int]:
    """As `checked`, of every pool; errors say which."""
    if not train:
        raise UsageError("no pools of features: there is nothing to probe")
    for pool in train:
        if pool not in test:
            raise UsageError(f"test has no pool {pool}; it has {', '.join(test)}")
        try:
            found = checked(train[pool], train_labels, test[pool], test_labels, lists=True)
        except NumericError as error:
            raise NumericError(f"{pool}, {error}") from None
    return found


def _accuracies(logits: Sequence[Tensor], labels: Tensor) -> tuple[float, ...]:
    if labels.ndim == 2:
        return ()
    return tuple(100 * (answer.argmax(1) == labels).double().mean().item() for answer in logits)


def by_width(pools: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of pools, those of one shape together; tokens each alone."""
    shapes: dict[tuple[Any, ...], list[str]] = {}
    for name, features in pools.items():
        shapes.setdefault((features.shape, name if features.ndim == 3 else None), []).append(name)
    return list(shapes.values())


def heads_of(features: Tensor) -> Sequence[Head]:
    """What is tried on a pool's features."""
    return TOKEN_HEADS if features.ndim == 3 else HEADS


class Standardizer:
    """Subtract the mean and divide by the standard deviation of the training features; append a constant 1 for the bias."""

    def __init__(self, features: Tensor) -> None:
        self.mean, self.std = moments(plain(features))

    def __call__(self, features: Tensor) -> Tensor:
        scaled = (plain(features) - self.mean) / self.std
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)


def fit_pools(
    pools: Mapping[str, Tensor],
    rows: Tensor,
    labels: Tensor,
    classes: int,
    heads: Sequence[Head],
    seed: int,
    device: torch.device,
) -> dict[str, Answer]:
    """Probes on `rows` of pools of equal shape, (N, D) standardised or (N, T, D): what each answers on its pool."""
    name, first = next(iter(pools.items()))
    if first.ndim == 3:
        begin = initial(first.shape[-1] + 1, classes, seed).to(device)
        return {name: fit_tokens(name, first, rows, labels, begin, heads, lambda: schedule(len(rows), seed))}
    scales = {pool: Standardizer(features[rows]) for pool, features in pools.items()}
    scaled = torch.stack([scales[pool](features[rows]) for pool, features in pools.items()])
    weights = fit_heads(scaled, labels, classes, heads, seed, device)
    return {pool: answering(scale, own) for (pool, scale), own in zip(scales.items(), weights, strict=True)}


def answering(scale: Standardizer, weights: Tensor) -> Answer:
    """What heads (D, H, C) say of features that are not standardised yet."""
    return lambda features: _logits(scale(features), weights)


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return (features.to(weights.device) @ weights.flatten(1)).view(-1, *weights.shape[1:])


def fit_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    heads: Sequence[Head],
    seed: int,
    device: torch.device | None = None,
) -> Tensor:
    """Train H = len(heads) softmax regressions by SGD with momentum and a cosine rate: weights (D, H, C).

    Args:
        features: (N, D) from a Standardizer; the last column is the bias, which is not decayed. Or (P, N, D), of several
            pools: weights (P, D, H, C).
        labels: (N,), 0 to classes - 1; or (N, C) bool, for a logistic regression a class.
        heads: (learning rate, weight decay) of each.
        seed: of the order of the samples and the initial weights.
        device: None: a GPU if there is one.
    """
    device = device or own_device()
    pools = (features if features.ndim == 3 else features[None]).to(device)
    labels, width, count = labels.to(device), pools.shape[2], len(heads)
    start = initial(width, classes, seed).to(pools)[..., None]
    weights = start.expand(-1, -1, count).flatten(1).repeat(len(pools), 1, 1)  # classes before heads: see `errors`
    velocity = torch.zeros_like(weights)
    rates, decays = (torch.tensor(column, device=device).repeat(classes) for column in zip(*heads, strict=True))
    for batch, scale in schedule(pools.shape[1], seed):
        rows = batch.to(device)
        x = pools.index_select(1, rows)
        error = errors((x @ weights).view(*x.shape[:2], classes, count), labels[rows]).flatten(2)
        velocity.baddbmm_(x.mT, error, beta=MOMENTUM, alpha=1 / len(batch))
        velocity[:, :-1].addcmul_(weights[:, :-1], decays)
        weights.addcmul_(velocity, rates, value=-scale)
    weights = weights.view(len(pools), width, classes, count).transpose(2, 3).contiguous()
    return weights if features.ndim == 3 else weights[0]


def initial(width: int, classes: int, seed: int) -> Tensor:
    """Weights (width, classes) that a probe starts from, the same for every head."""
    return torch.from_numpy(keyed.uniform(seed, "probe weights", range(width), classes)).float() * 0.02 - 0.01


def schedule(size: int, seed: int) -> Iterator[tuple[Tensor, float]]:
    """The samples of every step, pass after pass in a new order, and the factor of the rate: a cosine from 1 to 0."""
    steps = min(MOST_STEPS, max(LEAST_STEPS, EPOCHS * size // BATCH))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < min(BATCH, size):
            draws = keyed.hashes(seed, f"probe order {step}", range(size), 1)[:, 0]
            order = torch.cat([order, torch.from_numpy(draws.argsort().copy())])
        yield order[:BATCH], 0.5 + 0.5 * cos(pi * step / steps)
        order = order[BATCH:]


def errors(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of cross-entropy, summed over samples, by logits (P, B, C, H); labels (B,), or (B, C) bool.

    A softmax over the last of several dimensions is twelve times slower on a CPU, where classes are few.
    """
    if labels.ndim == 2:
        return logits.sigmoid_().sub_(labels[..., None].to(logits.dtype))
    truth = labels[:, None] == torch.arange(logits.shape[2], device=labels.device)
    return logits.softmax(2).sub_(truth[..., None].to(logits.dtype))


def score(weights: Tensor, features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """As `judged`, of the weights (D, H, C) that `fit_heads` gave and features from their Standardizer."""
    return judged(lambda x: _logits(x, weights), features, labels)
