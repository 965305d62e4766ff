"""One call, one protocol: an encoder's scores beside the floors (the text of the protocol is docs/evaluation.md)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from selfsight import __version__
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder
from selfsight.errors import UsageError
from selfsight.eval.features import Features, extract, pixels_of
from selfsight.eval.knn import DEFAULT_K, TEMPERATURE, knn, refuse_unknown_classes
from selfsight.eval.linear import DECAYS, RATES, linear

Score = dict[str, Any]
EVALUATORS = ("knn", "linear")


def evaluate(
    encoder: Encoder | str | Path,
    train: str | Sequence[str],
    test: str | Sequence[str],
    *,
    evaluators: Sequence[str] = EVALUATORS,
    k: Sequence[int] = DEFAULT_K,
    workers: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Score]]:
    """Score an encoder, its random-initialised twin, raw pixels and the majority class.

    Args:
        encoder: one in memory, or whatever `load_encoder` takes.
        train, test: labelled data; probes are fitted and chosen on train, test is scored once.
        evaluators: of "knn" and "linear".
        say: is told what is being done.

    Returns:
        What scores.json holds: {"scores": [{encoder, evaluator, train, test, value, std, n, ...}]}, values in percent.

    Raises:
        UsageError: unknown evaluators, unlabelled data, one class, unknown classes, or a k larger than the bank.
        DataError: images that cannot be read; a score never rests on a substitute.
    """
    from selfsight.export import load_encoder

    if unknown := set(evaluators) - set(EVALUATORS):
        raise UsageError(f"no evaluator {', '.join(sorted(unknown))}; there are {', '.join(EVALUATORS)}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = (Shards(train), Shards(test))
    live = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    live = live.to(device)
    scores: list[Score] = []
    sources: dict[str, Callable[[], tuple[Features, Features]]] = {
        "pretrained": lambda: _features(live, sets, device, workers),
        "random-init": lambda: _features(_twin(live).to(device), sets, device, workers),
        "pixels": lambda: (
            pixels_of(sets[0], live.preprocessing, workers),
            pixels_of(sets[1], live.preprocessing, workers),
        ),
    }
    for name, features in sources.items():
        say(f"scoring {name}")
        fit, held = features()
        refuse_unknown_classes(fit.labels, held.labels)
        pool = live.pool if name != "pixels" else "pixels"
        for evaluator in evaluators:
            scores.append({"encoder": name, "evaluator": evaluator} | _score(evaluator, fit, held, pool, k))
    scores.append({"encoder": "majority", "evaluator": "majority"} | _majority(fit, held))
    shared = {"train": sets[0].spec, "test": sets[1].spec, "samples": len(sets[1])}
    return {"scores": [score | shared for score in scores]}


def _features(
    encoder: Encoder, sets: tuple[Shards, Shards], device: torch.device, workers: int
) -> tuple[Features, Features]:
    fit, held = (extract(encoder, shards, device, _pools(encoder), workers=workers) for shards in sets)
    return fit, held


def _pools(encoder: Encoder) -> tuple[str, ...]:
    """The pools that the linear probe chooses from; the first is the encoder's own, which kNN uses."""
    others = ("cls", "mean", "cls+mean") if encoder.has_class_token and encoder.plain else ()
    return (encoder.pool, *[pool for pool in others if pool != encoder.pool])


def _twin(encoder: Encoder) -> Encoder:
    """The same architecture with fresh weights."""
    return build_encoder(encoder.config, encoder.preprocessing, seed=0)


def _score(evaluator: str, fit: Features, held: Features, pool: str, k: Sequence[int]) -> Score:
    if evaluator == "knn":
        near = knn(fit.vectors[pool], fit.labels, held.vectors[pool], held.labels, k)
        protocol = (
            f"kNN: cosine, weights exp(s/{TEMPERATURE}), k={near.k} chosen from {near.candidates} on a held-out tenth of train; "
            f"features: {pool}, fp32; selfsight {__version__}"
        )
        return {"value": near.accuracy, "std": 0.0, "n": 1, "protocol": protocol, "chosen": {"k": near.k, "pool": pool}}
    probe = linear(fit.vectors, fit.labels, held.vectors, held.labels)
    protocol = (
        f"linear: {len(RATES)} rates x {len(DECAYS)} decays x {len(fit.vectors)} pools, rate {probe.rate:g}, decay {probe.decay:g}, "
        f"{probe.pool} chosen on a held-out tenth of train, refitted on all of it, {len(probe.accuracies)} seeds; "
        f"standardised features, fp32; selfsight {__version__}"
    )
    chosen = {"rate": probe.rate, "decay": probe.decay, "pool": probe.pool}
    spread = stdev(probe.accuracies)
    return {
        "value": mean(probe.accuracies),
        "std": spread,
        "n": len(probe.accuracies),
        "protocol": protocol,
        "chosen": chosen,
    }


def _majority(fit: Features, held: Features) -> Score:
    common = fit.labels.mode().values
    value = 100 * (held.labels == common).double().mean().item()
    return {
        "value": value,
        "std": 0.0,
        "n": 1,
        "protocol": f"the commonest class of train, {int(common)}",
        "chosen": {},
    }
