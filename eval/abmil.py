"""Gated attention over the samples of a bag (Ilse, Tomczak, Welling 2018, arXiv 1802.04712, equations 8 and 9).

A bag's feature is z = sum_k a_k h_k, with a_k = softmax_k(w (tanh(V h_k) * sigmoid(U h_k))) over its samples, and a linear
layer classifies z. That layer goes through the sum: each sample has C logits of its own, which attention averages; so no z
is ever made. Several heads are trained side by side, as the linear probe's are.
"""

from collections.abc import Sequence
from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight import keyed
from selfsight.eval.ranks import own_device

HIDDEN = 64  # width of V and U
BATCH, EPOCHS, LEAST_STEPS, MOST_STEPS = 16, 30, 200, 5000  # bags
MOST_TRAINED = 1024  # samples of a bag in a step
_ROWS = 65536  # samples scored at a time


class Attention(NamedTuple):
    """H trained heads."""

    gates: Tensor
    """(D, H, 2, L): V and U, the constant's row among them."""
    weights: Tensor
    """(H, L): w."""
    classifier: Tensor
    """(D, H, C)."""


def fit_attention(
    features: Tensor,
    of: Tensor,
    labels: Tensor,
    classes: int,
    heads: Sequence[tuple[float, float]],
    seeds: Sequence[int],
) -> Attention:
    """Train H heads by AdamW on cross-entropy, batches of bags in a keyed order, cosine rate.

    Args:
        features: (N, D) from a Standardizer.
        of: (N,) the bag of each sample.
        labels: (B,) 0 to classes - 1.
        heads: (rate, decay) of each.
        seeds: of each head's initial weights; the first one's of the order, too.
    """
    device = own_device()
    order = of.argsort(stable=True)
    features, parts = features[order].to(device), of.bincount(minlength=len(labels)).tolist()
    spans = list(torch.arange(len(of)).split(parts))
    made = [_initial(features.shape[1], classes, seed, device) for seed in seeds]
    groups = [{"params": own, "weight_decay": decay} for own, (_, decay) in zip(made, heads, strict=True)]
    solver = torch.optim.AdamW(groups)
    steps = min(MOST_STEPS, max(LEAST_STEPS, EPOCHS * len(labels) // BATCH))
    waiting: list[int] = []
    for step in range(steps):
        if len(waiting) < min(BATCH, len(labels)):
            waiting += keyed.hashes(seeds[0], f"bag order {step}", range(len(labels)), 1)[:, 0].argsort().tolist()
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        for group, (rate, _) in zip(solver.param_groups, heads, strict=True):
            group["lr"] = rate * (0.5 + 0.5 * cos(pi * step / steps))
        chosen = [_some(spans[bag], step) for bag in batch]
        within = torch.arange(len(batch)).repeat_interleave(torch.tensor([*map(len, chosen)])).to(device)
        evidence = of_samples(_together(made), features[torch.cat(chosen).to(device)])
        logits, _ = attended(*evidence, within, len(batch))
        target = labels[batch].to(device)[:, None].expand(-1, len(heads))
        solver.zero_grad()
        # Summed over heads: each has the gradient that it would have alone.
        F.cross_entropy(logits.movedim(2, 1), target, reduction="none").mean(0).sum().backward()
        solver.step()
    return Attention(*(part.detach() for part in _together(made)))


def _some(rows: Tensor, step: int) -> Tensor:
    """At most so many samples of a bag, drawn anew in each step."""
    if len(rows) <= MOST_TRAINED:
        return rows
    return rows[keyed.hashes(step, "samples of bags", rows.numpy(), 1)[:, 0].argsort()[:MOST_TRAINED].copy()]


def _initial(width: int, classes: int, seed: int, device: torch.device) -> list[Tensor]:
    """A head's parameters: gates (D, 2, L) and w (L,) uniform within one by the root of what goes in, classifier (D, C) of 0."""
    draws = torch.from_numpy(keyed.uniform(seed, "attention", range(width + 1), 2 * HIDDEN)).float() * 2 - 1
    gates, weights = draws[:width].view(width, 2, HIDDEN) / width**0.5, draws[width, :HIDDEN] / HIDDEN**0.5
    return [part.to(device).requires_grad_() for part in (gates, weights, torch.zeros(width, classes))]


def _together(heads: Sequence[Sequence[Tensor]]) -> Attention:
    gates, weights, classifiers = zip(*heads, strict=True)
    return Attention(torch.stack(gates, 1), torch.stack(weights), torch.stack(classifiers, 1))


def of_samples(heads: Attention, features: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples (N, D): the scores before the softmax (N, H), and the logits (N, H, C)."""
    gates = (features @ heads.gates.flatten(1)).view(len(features), *heads.gates.shape[1:])
    scores = ((gates[:, :, 0].tanh() * gates[:, :, 1].sigmoid()) * heads.weights).sum(2)
    return scores, (features @ heads.classifier.flatten(1)).view(len(features), *heads.classifier.shape[1:])


def attended(scores: Tensor, own: Tensor, of: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits of bags (B, H, C) and the weights of samples in them (N, H), from what `of_samples` gives.

    Args:
        of: (N,) the bag of each, 0 to count - 1.
    """
    weights = softmax_within(scores, of, count)
    return own.new_zeros(count, *own.shape[1:]).index_add(0, of, weights[:, :, None] * own), weights


def softmax_within(scores: Tensor, of: Tensor, count: int) -> Tensor:
    """Softmax of scores (N, H) over the samples of each bag."""
    index = of[:, None].expand_as(scores)
    highest = (
        scores.detach().new_full((count, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    )
    raised = (scores - highest[of]).exp()
    return raised / raised.new_zeros(count, scores.shape[1]).index_add(0, of, raised)[of]


@torch.no_grad()
def scored(heads: Attention, features: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, H, C) and weights (N, H) of all bags, on the CPU."""
    parts = [of_samples(heads, part.to(heads.gates.device)) for part in features.split(_ROWS)]
    scores, own = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return attended(scores, own, of, int(of.max()) + 1)
