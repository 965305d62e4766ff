"""One call, one protocol: an encoder's scores beside the floors (the text of the protocol is docs/evaluation.md)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from selfsight import __version__
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder
from selfsight.errors import UsageError
from selfsight.eval.features import Features, extract, groups_of, labels_of, pixels_of
from selfsight.eval.knn import DEFAULT_K, TEMPERATURE, dense_labels, held_out, knn, usable_k
from selfsight.eval.linear import DECAYS, RATES, SEEDS, linear
from selfsight.redact import redact

Score = dict[str, Any]
EVALUATORS = ("knn", "linear")
TWINS = 3  # untrained encoders behind the random-init floor


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
        What scores.json holds: {"scores": [{encoder, evaluator, train, test, value, std, n, ...}]}, values in percent;
        addresses without what opens them.

    Raises:
        UsageError: unknown evaluators, unlabelled data, one class, unknown classes, or a k larger than the bank.
        DataError: images that cannot be read; a score never rests on a substitute.
    """
    from selfsight.export import load_encoder

    if unknown := set(evaluators) - set(EVALUATORS):
        raise UsageError(f"no evaluator {', '.join(sorted(unknown))}; there are {', '.join(EVALUATORS)}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = scorable_sets(train, test, k)
    live = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    live = live.to(device)
    if all(own.fingerprinted for own in sets) and (common := int(np.isin(sets[1].prints, sets[0].prints).sum())):
        say(f"warning: {common:,} of the {len(sets[1]):,} test images are in train, too; their score is worth little")
    scores: list[Score] = []
    # One at a time: the features of several encoders would not fit beside each other.
    say("scoring the pretrained encoder")
    fit, held = _features(live, sets, device, workers)
    for evaluator in evaluators:
        scores.append({"encoder": "pretrained"} | _score(evaluator, fit, held, live.pool, k))
    say(f"scoring the floors: {TWINS} untrained twins, raw pixels")
    twins = []
    for seed in range(TWINS):
        twin = build_encoder(live.config, live.preprocessing, seed).to(device)
        fit, held = _features(twin, sets, device, workers)
        twins.append([_score(evaluator, fit, held, live.pool, k, probe_seeds=1) for evaluator in evaluators])
    scores += [{"encoder": "random-init"} | _mean_score(parts) for parts in zip(*twins, strict=True)]
    fit, held = (pixels_of(shards, live.preprocessing, workers) for shards in sets)
    for evaluator in evaluators:
        scores.append({"encoder": "pixels"} | _score(evaluator, fit, held, "pixels", k))
    scores.append({"encoder": "majority"} | _majority(fit, held))
    shared = {"train": redact(sets[0].spec), "test": redact(sets[1].spec), "samples": len(sets[1])}
    return {"scores": [score | shared for score in scores]}


def scorable_sets(train: str | Sequence[str], test: str | Sequence[str], k: Sequence[int]) -> tuple[Shards, Shards]:
    """The two sets, after asking all that labels and sizes can answer before any image is read.

    Raises:
        UsageError: unlabelled samples, one class, classes of test that train lacks, or no k that the bank can serve.
    """
    sets = (Shards(train), Shards(test))
    fit, held = (labels_of(shards, np.arange(len(shards))) for shards in sets)
    dense_labels(fit, held)
    usable_k(k, len(held_out(len(fit), groups=groups_of(sets[0], np.arange(len(fit))))[0]))
    return sets


def _features(
    encoder: Encoder, sets: tuple[Shards, Shards], device: torch.device, workers: int
) -> tuple[Features, Features]:
    fit, held = (extract(encoder, shards, device, _pools(encoder), workers=workers) for shards in sets)
    return fit, held


def _pools(encoder: Encoder) -> tuple[str, ...]:
    """The pools that the linear probe chooses from; the first is the encoder's own, which kNN uses."""
    others = ("cls", "mean", "cls+mean") if encoder.has_class_token and encoder.plain else ()
    return (encoder.pool, *[pool for pool in others if pool != encoder.pool])


def _score(
    evaluator: str, fit: Features, held: Features, pool: str, k: Sequence[int], probe_seeds: int = SEEDS
) -> Score:
    whole = " of whole groups" if (fit.groups >= 0).any() else ""
    if evaluator == "knn":
        near = knn(fit.vectors[pool], fit.labels, held.vectors[pool], held.labels, k, fit.groups)
        values: tuple[float, ...] = (near.accuracy,)
        chosen: dict[str, Any] = {"k": near.k, "pool": pool}
        protocol = (
            f"kNN: cosine, weights exp(s/{TEMPERATURE}), k={near.k} chosen from {near.candidates} on a held-out tenth of "
            f"train{whole}; features: {pool}, fp32; selfsight {__version__}"
        )
    else:
        probe = linear(fit.vectors, fit.labels, held.vectors, held.labels, probe_seeds, fit.groups)
        values = probe.accuracies
        chosen = {"rate": probe.rate, "decay": probe.decay, "pool": probe.pool}
        protocol = (
            f"linear: {len(RATES)} rates x {len(DECAYS)} decays x {len(fit.vectors)} pools; rate {probe.rate:g}, decay "
            f"{probe.decay:g}, {probe.pool} chosen on a held-out tenth of train{whole}, refitted on all of it; standardised "
            f"features, fp32; selfsight {__version__}"
        )
    return {"evaluator": evaluator, **_spread(values), "protocol": protocol, "chosen": chosen}


def _mean_score(parts: Sequence[Score]) -> Score:
    """One score of several initialisations: mean and deviation over them; each chose for itself."""
    protocol = f"mean over {len(parts)} initialisations, each as: {parts[0]['protocol']}"
    chosen = [part["chosen"] for part in parts]
    values = tuple(part["value"] for part in parts)
    return {"evaluator": parts[0]["evaluator"], **_spread(values), "protocol": protocol, "chosen": chosen}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "n": len(values)}


def _majority(fit: Features, held: Features) -> Score:
    common = fit.labels.mode().values
    value = 100 * (held.labels == common).double().mean().item()
    protocol = f"the commonest class of train, {int(common)}"
    return {"evaluator": "majority", **_spread((value,)), "protocol": protocol, "chosen": {}}
