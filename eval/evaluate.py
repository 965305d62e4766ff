"""One call, one protocol: encoders' scores beside the floors (the text of the protocol is docs/evaluation.md)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfsight.data.shards import Shards
from selfsight.errors import UsageError
from selfsight.eval import DEFAULT
from selfsight.eval.asked import Scored, Source, Spec, encoders_of, require_scorable, sets_of, wanted
from selfsight.eval.cache import Cache, opened
from selfsight.eval.extracted import Extractor
from selfsight.eval.features import Extraction
from selfsight.eval.job import Job
from selfsight.eval.knn import DEFAULT_K
from selfsight.eval.ranks import ALONE, Ranks, own_device
from selfsight.eval.stored import Stored
from selfsight.eval.subject import Options


def evaluate(
    encoder: Source | Sequence[Source] | Mapping[str, Source] | None,
    train: Spec | Mapping[str, Spec] | None = None,
    test: Spec | Mapping[str, Spec] | None = None,
    *,
    evaluators: Sequence[str] | str = DEFAULT,
    k: Sequence[int] = DEFAULT_K,
    shots: Sequence[int] = Options.shots,
    pools: Sequence[str] | None = None,
    scales: Sequence[int] = Extraction.scales,
    merge: int = Extraction.merge,
    epochs: int = Options.epochs,
    workers: int = 0,
    device: torch.device | None = None,
    cache: Cache | Path | str | bool | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score encoders, their random-initialised twins, raw pixels and the majority class.

    Args:
        encoder: in memory, or whatever `load_encoder` takes; several in a list, or a mapping by name. None: `train` and
            `test` are files of features (`selfsight embed`, .npz, .npy).
        train, test: labelled data; probes are fitted and chosen on train, test is scored once. A list is the shards of one
            set, a mapping is several sets by name. Evaluators that ask no labels need no train.
        evaluators: of `EVALUATORS`.
        k, shots, pools, scales, merge, epochs: see `Options` and `Extraction`.
        cache: where features are kept; True: where the command keeps them; None: nowhere.
        ranks: processes that extract together; only the first of them scores.
        say: is told what is being done.

    Returns:
        What scores.json holds: {"scores": [{encoder, evaluator, metric, unit, dataset, train, test, value, std, n, interval,
        ...}], "differences": [...], "warnings": [...]}, values in percent unless the unit says otherwise; addresses without
        what opens them. No scores on other ranks than the first.

    Raises:
        UsageError: unknown evaluators, unlabelled data, one class, unknown classes, or a k larger than the bank.
        DataError: images that cannot be read; a score never rests on a substitute.
    """
    names = wanted(evaluators.split(",") if isinstance(evaluators, str) else evaluators, train is not None)
    extraction = Extraction(tuple(scales), merge)
    options = Options(
        k=tuple(k), shots=tuple(shots), pools=tuple(pools) if pools else None, epochs=epochs, extraction=extraction
    )
    encoders, sets = encoders_of(encoder), sets_of(train, test)
    for data in sets.values():
        if (not encoders) != isinstance(data.test, Stored):
            lack = "holds features; leave the encoder out" if encoders else "holds images; name an encoder"
            raise UsageError(f"{data.test_spec}: {lack}")
        require_scorable(data, names, options)
    extractor = Extractor(device or own_device(), workers, opened(cache), ranks)
    job = Job(names, options, sets, extractor, say if ranks.main else lambda line: None)
    if encoders:
        job.score_encoders(encoders)
    else:
        job.score_stored()
    return job.answer()


def scorable_sets(train: Spec, test: Spec, k: Sequence[int]) -> tuple[Shards, Shards]:
    """The two sets, after asking all that labels and sizes can answer before any image is read.

    Raises:
        UsageError: unlabelled samples, one class, classes of test that train lacks, or no k that the bank can serve.
    """
    data = Scored("", Shards(train), Shards(test), str(train), str(test))
    require_scorable(data, ("knn",), Options(k=tuple(k)))
    return data.shards
