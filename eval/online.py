"""What is watched while training goes on: kNN on a held-out tenth of eval.train, and health. Test is never touched."""

from math import isfinite

import numpy as np
import torch
from torch import Tensor

from selfsight.console import say
from selfsight.data.mixture import Samples
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import SelfsightError
from selfsight.eval import health
from selfsight.eval.features import extract, groups_of, labels_of, prepared
from selfsight.eval.knn import held_out, predict, unit, usable_k
from selfsight.recipe import EvalConfig


def watcher(config: EvalConfig, samples: Samples, workers: int = 0) -> "Online":
    """What there can be watched: kNN and health of eval.train, or health alone of the training images."""
    return OnlineKNN(config, workers) if config.train else OnlineHealth(config, samples, workers)


class Online:
    """Scores of the live encoder, for metrics.jsonl."""

    def score(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """The same as a call, or nothing and a warning: data that cannot be read are no reason to end a training."""
        try:
            return self(encoder, device)
        except (SelfsightError, RuntimeError, OSError) as error:  # the second: a loader worker's end
            told = error.told if isinstance(error, SelfsightError) else str(error).splitlines()[0]
            say(f"warning: the online score is left out: {told}")
            return {}

    def __call__(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """Fields of a line."""
        raise NotImplementedError


class OnlineKNN(Online):
    """kNN on at most `online_samples` of eval.train, a bank of nine tenths and queries from one; and their health.

    Raises:
        UsageError: unlabelled samples, one class, or no k that fits.
    """

    def __init__(self, config: EvalConfig, workers: int = 0) -> None:
        assert config.train is not None
        self.shards = Shards(config.train)
        chosen = held_out(len(self.shards), seed=1)[0].numpy()  # a fixed random subset, in the order of the shards
        step = max(1, -(-len(chosen) // config.online_samples))
        self.ids: np.ndarray = chosen[::step]
        labels_of(self.shards, self.ids)
        self.bank, self.queries = held_out(len(self.ids), groups=groups_of(self.shards, self.ids))
        self.k, self.workers = min(usable_k(config.k, len(self.bank))), workers

    def __call__(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """knn (percent; not where labels are lists), and as `healthy`."""
        features = extract(encoder, self.shards, device, ids=self.ids, workers=self.workers)
        vectors = features.vectors[encoder.pool]
        if features.multilabel:
            return healthy(vectors)
        near = unit(vectors)
        voted = predict(near[self.bank], features.labels[self.bank], near[self.queries], (self.k,))[:, 0]
        hits = (voted == features.labels[self.queries]).double().mean().item()
        return {"knn": round(100 * hits, 2), **healthy(vectors)}


class OnlineHealth(Online):
    """Health of at most `online_samples` training images, evenly spaced: no labels are needed to see a collapse.

    Images that cannot be read are left out; training counts them.
    """

    def __init__(self, config: EvalConfig, samples: Samples, workers: int = 0) -> None:
        step = max(1, -(-len(samples) // config.online_samples))
        self.samples, self.ids, self.workers = samples, np.arange(0, len(samples), step), workers

    @torch.inference_mode()
    def __call__(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """As `healthy`; nothing of fewer than two images."""
        with evaluating(encoder):
            images = prepared(encoder.preprocessing, self.samples, device, self.ids, self.workers, lenient=True)
            vectors = [encoder.embed(batch).float().cpu() for batch in images]
        return healthy(torch.cat(vectors)) if sum(map(len, vectors)) > 1 else {}


def healthy(vectors: Tensor) -> dict[str, float]:
    """rankme (number of dimensions in use) and alpha (alpha-ReQ, the exponent of the spectrum) of features (N, D).

    What cannot be told, of few samples or of features that are not finite, is left out.
    """
    found = {"rankme": round(health.rankme(vectors), 2), "alpha": round(health.alpha_req(vectors), 3)}
    return {name: value for name, value in found.items() if isfinite(value)}
