"""Several encoders as one: the mean of their weights, or a greedy soup.

Wortsman et al. 2022, "Model soups" (arXiv 2203.05482): section 2's uniform soup, and recipe 1, the greedy soup.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsight import checkpoint
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.loading import load_encoder
from selfsight.run_folder import differences

MAX_NAMED = 6


class Soup(NamedTuple):
    """An average, and what is in it."""

    encoder: Encoder
    taken: tuple[str, ...]
    """Sources whose weights are in it, in the order in which they were added."""
    notes: tuple[str, ...]


def uniform(encoders: Sequence[Encoder], names: Sequence[str]) -> Soup:
    """The mean of every weight, in float64; whole numbers and flags are the first one's.

    Raises:
        UsageError: encoders of different architectures or inputs; what differs is named.
    """
    require_same(encoders, names)
    return Soup(_mean(encoders), tuple(names), (f"weights: the mean of {len(names)}: {', '.join(names)}",))


def greedy(encoders: Sequence[Encoder], names: Sequence[str], score: Callable[[Encoder], float]) -> Soup:
    """From the best on, each is added that does not lower the score of the average (the paper's recipe 1).

    Args:
        score: larger is better; on held-out training data, never on test.

    Raises:
        UsageError: as `uniform`.
    """
    require_same(encoders, names)
    alone = [score(encoder) for encoder in encoders]
    order = sorted(range(len(encoders)), key=lambda i: -alone[i])  # of equals the first given
    taken, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        reached = score(_mean([encoders[j] for j in [*taken, i]]))
        if reached >= best:
            taken, best = [*taken, i], reached
    chosen = tuple(names[i] for i in taken)
    told = f"weights: greedy soup of {len(taken)} of {len(names)}: {', '.join(chosen)}; held-out kNN {best:.2f} (best alone {max(alone):.2f})"
    return Soup(_mean([encoders[i] for i in taken]), chosen, (told,))


def require_same(encoders: Sequence[Encoder], names: Sequence[str]) -> None:
    """Raise UsageError unless all have the same tensors, in the same shapes, of the same inputs."""
    if len(encoders) < 2:
        raise UsageError(f"--average: {', '.join(names) or 'nothing'}: needs two at least")
    first = _shapes(encoders[0])
    for other, name in zip(encoders[1:], names[1:], strict=True):
        shapes = _shapes(other)
        odd = sorted(n for n in {*first, *shapes} if first.get(n) != shapes.get(n))
        if odd:
            told = f"{', '.join(odd[:MAX_NAMED])}{f' and {len(odd) - MAX_NAMED} more' if odd[MAX_NAMED:] else ''}"
            raise UsageError(
                f"--average: {name} is of another architecture than {names[0]}; tensors that differ: {told}"
            )
        inputs = differences(_inputs(encoders[0]), _inputs(other))
        if inputs:
            raise UsageError(f"--average: {name} is not like {names[0]}: {'; '.join(inputs.values())}")


def held_out_knn(spec: Sequence[str] | str, device: torch.device, workers: int = 0) -> Callable[[Encoder], float]:
    """A score for `greedy`: kNN accuracy (percent) on the held-out tenth of a labelled training set, with the smallest k.

    Raises:
        UsageError: unlabelled samples, one class, or too few samples.
    """
    from selfsight.data.shards import Shards
    from selfsight.eval.features import extract, groups_of, labels_of
    from selfsight.eval.knn import DEFAULT_K, dense_labels, held_out, predict, unit, usable_k

    shards = Shards(spec)
    ids = np.arange(len(shards))
    labels = labels_of(shards, ids)
    dense = dense_labels(labels, labels)[0]
    fit, choose = held_out(len(ids), groups=groups_of(shards, ids))
    k = usable_k(DEFAULT_K, len(fit))[0]

    def score(encoder: Encoder) -> float:
        near = unit(extract(encoder.to(device), shards, device, workers=workers).vectors[encoder.pool])
        voted = predict(near[fit], dense[fit], near[choose], (k,))[:, 0]
        return 100 * (voted == dense[choose]).double().mean().item()

    return score


def sources(source: str, words: Sequence[str]) -> list[str]:
    """What `--average METHOD WORDS` averages: SOURCE and these; without any, or for a number N, the last N checkpoints of the run.

    Raises:
        UsageError: a run without as many checkpoints that verify.
    """
    if words and not (len(words) == 1 and words[0].isdigit()):
        return [source, *words]
    folder = Path(source) / "checkpoints"
    steps = checkpoint.steps(folder) if folder.is_dir() else []
    count = int(words[0]) if words else len(steps)
    if count < 2 or len(steps) < count:
        raise UsageError(
            f"--average: {source} has {len(steps)} checkpoints; name at least two, or keep more (train.keep, train.keep_every)"
        )
    return [str(folder / f"step-{step:08d}") for step in steps[-count:]]


def load_all(names: Sequence[str], weights: str | None = None) -> list[Encoder]:
    """All of them, in the order of their names."""
    return [load_encoder(name, weights) for name in names]


@torch.no_grad()
def _mean(encoders: Sequence[Encoder]) -> Encoder:
    made = deepcopy(encoders[0]).cpu()
    states = [encoder.state_dict() for encoder in encoders]
    mixed: dict[str, Tensor] = {}
    for name, first in made.state_dict().items():
        if first.is_floating_point():
            total = sum((state[name].cpu().double() for state in states), torch.zeros(first.shape, dtype=torch.float64))
            mixed[name] = (total / len(states)).to(first.dtype)
        else:
            mixed[name] = first
    made.load_state_dict(mixed, strict=True)
    return made


def _shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def _inputs(encoder: Encoder) -> dict[str, object]:
    made = encoder.preprocessing._asdict() | {"pool": encoder.pool, "heads": encoder.config.heads}
    return made | {"name": encoder.config.name}
