"""What is watched while training goes on: kNN on a held-out tenth of eval.train, and RankMe. Test is never touched."""

import numpy as np
import torch

from selfsight.console import say
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder
from selfsight.errors import SelfsightError
from selfsight.eval.features import extract, groups_of, labels_of
from selfsight.eval.health import rankme
from selfsight.eval.knn import held_out, predict, unit, usable_k
from selfsight.recipe import EvalConfig


class OnlineKNN:
    """Scores the live encoder on at most `online_samples` of eval.train: a bank of nine tenths, queries from one.

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

    def score(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """The same, or nothing and a warning: labelled data that cannot be read are no reason to end a training."""
        try:
            return self(encoder, device)
        except (SelfsightError, RuntimeError, OSError) as error:  # the second: a loader worker's end
            told = error.told if isinstance(error, SelfsightError) else str(error).splitlines()[0]
            say(f"warning: the online score is left out: {told}")
            return {}

    def __call__(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """knn (percent; not where labels are lists) and rankme (number of dimensions in use)."""
        features = extract(encoder, self.shards, device, ids=self.ids, workers=self.workers)
        vectors = features.vectors[encoder.pool]
        if features.multilabel:
            return {"rankme": round(rankme(vectors), 2)}
        near = unit(vectors)
        voted = predict(near[self.bank], features.labels[self.bank], near[self.queries], (self.k,))[:, 0]
        hits = (voted == features.labels[self.queries]).double().mean().item()
        return {"knn": round(100 * hits, 2), "rankme": round(rankme(vectors), 2)}
