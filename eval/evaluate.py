"""One call, one protocol: an encoder's scores beside the floors (the text of the protocol is docs/evaluation.md)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from selfsight import __version__
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder
from selfsight.errors import UsageError
from selfsight.eval.evaluators import DEFAULT, EVALUATORS
from selfsight.eval.features import Features, extract, groups_of, labels_of, pixels_of
from selfsight.eval.knn import DEFAULT_K, dense_labels, held_out, usable_k
from selfsight.eval.subject import Options, Outcome, Subject
from selfsight.redact import redact

Score = dict[str, Any]
TWINS = 3  # untrained encoders behind the random-init floor


def evaluate(
    encoder: Encoder | str | Path,
    train: str | Sequence[str],
    test: str | Sequence[str],
    *,
    evaluators: Sequence[str] = DEFAULT,
    k: Sequence[int] = DEFAULT_K,
    workers: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Score]]:
    """Score an encoder, its random-initialised twin, raw pixels and the majority class.

    Args:
        encoder: one in memory, or whatever `load_encoder` takes.
        train, test: labelled data; probes are fitted and chosen on train, test is scored once.
        evaluators: of `EVALUATORS`.
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
    options = Options(k=tuple(k))
    scores: list[Score] = []
    # One at a time: the features of several encoders would not fit beside each other.
    say("scoring the pretrained encoder")
    subject = _subject("pretrained", live, sets, options, device, workers)
    scores += [row for name in evaluators for row in _rows(name, subject)]
    say(f"scoring the floors: {TWINS} untrained twins, raw pixels")
    twins = []
    for seed in range(TWINS):
        twin = build_encoder(live.config, live.preprocessing, seed).to(device)
        subject = _subject("random-init", twin, sets, replace(options, seeds=1), device, workers)
        twins.append([row for name in evaluators for row in _rows(name, subject)])
    scores += [_mean_score(parts) for parts in zip(*twins, strict=True)]
    fit, held = (pixels_of(shards, live.preprocessing, workers) for shards in sets)
    subject = Subject("pixels", "pixels", fit, held, options, device, workers, None, live.preprocessing, sets)
    scores += [row for name in evaluators for row in _rows(name, subject)]
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


def _subject(
    name: str, encoder: Encoder, sets: tuple[Shards, Shards], options: Options, device: torch.device, workers: int
) -> Subject:
    pools = options.pools or encoder.pools
    fit, held = (
        extract(encoder, shards, device, pools, workers=workers, extraction=options.extraction) for shards in sets
    )
    made = encoder.preprocessing
    return Subject(name, encoder.pool, fit, held, options, device, workers, encoder, made, sets)


def _rows(evaluator: str, subject: Subject) -> list[Score]:
    return [_row(evaluator, subject.name, outcome) for outcome in EVALUATORS[evaluator].run(subject)]


def _row(evaluator: str, name: str, outcome: Outcome) -> Score:
    protocol = f"{outcome.protocol}; selfsight {__version__}"
    told = {"encoder": name, "evaluator": evaluator, "metric": outcome.metric, "unit": outcome.unit}
    return (
        told
        | _spread(outcome.values)
        | {"protocol": protocol, "chosen": dict(outcome.chosen), "detail": dict(outcome.detail)}
    )


def _mean_score(parts: Sequence[Score]) -> Score:
    """One score of several initialisations: mean and deviation over them; each chose for itself."""
    protocol = f"mean over {len(parts)} initialisations, each as: {parts[0]['protocol']}"
    chosen = [part["chosen"] for part in parts]
    values = tuple(part["value"] for part in parts)
    return parts[0] | _spread(values) | {"protocol": protocol, "chosen": chosen, "detail": {}}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "n": len(values)}


def _majority(fit: Features, held: Features) -> Score:
    common = fit.labels.mode().values
    value = 100 * (held.labels == common).double().mean().item()
    protocol = f"the commonest class of train, {int(common)}"
    told = {"evaluator": "majority", "metric": "accuracy", "unit": "%"}
    return told | _spread((value,)) | {"protocol": protocol, "chosen": {}, "detail": {}}
