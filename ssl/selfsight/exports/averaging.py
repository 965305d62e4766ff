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
from selfsight.exports.origin import export_in, name_of
from selfsight.run_folder import differences

MAX_NAMED = 6


class Soup(NamedTuple):
    """An average, and what is in it."""

    encoder: Encoder
    taken: tuple[str, ...]
    """Sources whose weights are in it, in the order in which they were added."""
    notes: tuple[str, ...]


Load = Callable[[str], Encoder]


def uniform(names: Sequence[str], load: Load) -> Soup:
    """The mean of every weight, in float64; whole numbers and flags are the first one's. One encoder is held at a time.

    Raises:
        UsageError: encoders of different architectures or inputs; what differs is named.
    """
    first = require_same(names, load)
    total = _added({}, first)
    for name in names[1:]:
        total = _added(total, load(name))
    return Soup(_mean(first, total, len(names)), tuple(names), (f"weights: the mean of {len(names)}: {_told(names)}",))


def greedy(names: Sequence[str], load: Load, score: Callable[[Encoder], float]) -> Soup:
    """From the best on, each is added that does not lower the score of the average (the paper's recipe 1).

    Args:
        load: gives the encoder of a name, each time it is asked; few are held at a time.
        score: larger is better; on held-out training data, never on test.

    Raises:
        UsageError: as `uniform`.
    """
    require_same(names, load)
    alone = [score(load(name)) for name in names]
    best, *rest = sorted(range(len(names)), key=lambda i: -alone[i])  # of equals the first given
    first, taken, reached = load(names[best]), [best], alone[best]
    total = _added({}, first)
    for i in rest:
        tried = _added(total, load(names[i]))
        found = score(_mean(first, tried, len(taken) + 1))
        if found >= reached:
            total, taken, reached = tried, [*taken, i], found
    chosen = tuple(names[i] for i in taken)
    told = f"weights: greedy soup of {len(taken)} of {len(names)}: {_told(chosen)}; held-out kNN {reached:.2f} (best alone {max(alone):.2f})"
    return Soup(_mean(first, total, len(taken)), chosen, (told,))


def require_same(names: Sequence[str], load: Load) -> Encoder:
    """The first; raises UsageError unless all have the same tensors, in the same shapes, of the same inputs."""
    if len(names) < 2:
        raise UsageError(f"--average: {', '.join(names) or 'nothing'}: needs two at least")
    first = load(names[0])
    for name in names[1:]:
        other = load(name)
        mine, shapes = _shapes(first), _shapes(other)
        odd = sorted(n for n in {*mine, *shapes} if mine.get(n) != shapes.get(n))
        if odd:
            told = f"{', '.join(odd[:MAX_NAMED])}{f' and {len(odd) - MAX_NAMED} more' if odd[MAX_NAMED:] else ''}"
            raise UsageError(
                f"--average: {name} is of another architecture than {names[0]}; tensors that differ: {told}"
            )
        inputs = differences(_inputs(first), _inputs(other))
        if inputs:
            raise UsageError(f"--average: {name} is not like {names[0]}: {'; '.join(inputs.values())}")
    return first


def held_out_knn(spec: Sequence[str] | str, device: torch.device, workers: int = 0) -> Callable[[Encoder], float]:
    """A score for `greedy`: kNN accuracy (percent) on the held-out tenth of a labelled training set, with the smallest k.

    Raises:
        UsageError: unlabelled samples, lists of labels, one class, or too few samples.
    """
    from selfsight.data.shards import Shards
    from selfsight.eval.features import extract, groups_of, labels_of
    from selfsight.eval.knn import DEFAULT_K, dense_labels, held_out, predict, unit, usable_k

    shards = Shards(spec)
    ids = np.arange(len(shards))
    labels = labels_of(shards, ids)
    if labels.ndim == 2:
        raise UsageError(
            f"--average greedy: {shards.spec} has lists of labels, and the accuracy that it chooses by takes one of each image; "
            "give --labels SPEC of such, or --average uniform"
        )
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
        UsageError: a run without as many checkpoints, or one source twice.
    """
    if words and not (len(words) == 1 and words[0].isdigit()):
        return _all_different([source, *words])
    folder = Path(source) / "checkpoints"
    steps = checkpoint.steps(folder) if folder.is_dir() else []
    count = int(words[0]) if words else len(steps)
    if count < 2 or len(steps) < count:
        raise UsageError(
            f"--average: {source} has {len(steps)} checkpoints; name at least two, or keep more (train.keep, train.keep_every)"
        )
    return [str(folder / f"step-{step:08d}") for step in steps[-count:]]


def _all_different(names: list[str]) -> list[str]:
    seen: dict[Path, str] = {}
    for name in names:
        where = export_in(Path(name).resolve())
        if where in seen:
            raise UsageError(f"--average: {name} is {seen[where]}, which would count twice")
        seen[where] = name
    return names


def _added(total: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """A sum of weights, in float64 on the CPU, with those of one more."""
    state = {n: tensor for n, tensor in encoder.state_dict().items() if tensor.is_floating_point()}
    return {n: tensor.cpu().double() + total.get(n, 0) for n, tensor in state.items()}


def _mean(first: Encoder, total: dict[str, Tensor], count: int) -> Encoder:
    """A copy of the first with this sum by so many as its weights."""
    made = deepcopy(first).cpu()
    state = made.state_dict()
    mixed = {name: (tensor / count).to(state[name].dtype) for name, tensor in total.items()}
    made.load_state_dict(state | mixed, strict=True)
    return made


def _told(names: Sequence[str]) -> str:
    return ", ".join(map(name_of, names))


def _shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def _inputs(encoder: Encoder) -> dict[str, object]:
    made = encoder.preprocessing._asdict() | {"pool": encoder.pool, "heads": encoder.config.heads}
    return made | {"name": encoder.config.name}
