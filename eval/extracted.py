"""Features of whole sets for whoever asks: from the cache if they are there, else extracted, by all ranks together."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder
from selfsight.eval import features
from selfsight.eval.cache import NOWHERE, Cache, key_of, source_of, weights_of
from selfsight.eval.features import HASHES, PLAIN, Extraction, Features, extract, groups_of, pixels_of, targets_of
from selfsight.eval.ranks import ALONE, Ranks
from selfsight.preprocessing import Preprocessing


@dataclass(frozen=True)
class Extractor:
    """How features come about, beside the encoder and the set."""

    device: torch.device
    workers: int = 0
    cache: Cache = NOWHERE
    ranks: Ranks = ALONE

    def features(
        self,
        encoder: Encoder,
        pools: tuple[str, ...],
        shards: Shards,
        extraction: Extraction = PLAIN,
        weights: str | None = None,
    ) -> Features:
        """Features by pool; whole on the first rank only.

        Args:
            weights: what `weights_of` says of the encoder, if it is known.
        """
        key = self.key(weights or self.weights(encoder), pools, shards, extraction)
        if (found := self._kept(key, shards)) is not None:
            return found
        made = extract(encoder, shards, self.device, pools, None, self.workers, extraction=extraction, ranks=self.ranks)
        self._keep(key, made)
        return made

    def pixels(self, made: Preprocessing, shards: Shards) -> Features:
        """Raw pixels as features; on the first rank only."""
        key = self.key(f"pixels {made!r}", ("pixels",), shards, PLAIN)
        if (found := self._kept(key, shards)) is not None or not self.ranks.main:
            return found or _nothing()
        pixels = pixels_of(shards, made, self.workers)
        self._keep(key, pixels)
        return pixels

    def weights(self, encoder: Encoder) -> str:
        """What the encoder is, for `key`; not worked out where nothing is kept."""
        return weights_of(encoder) if self.cache.folder else ""

    def key(self, weights: str, pools: tuple[str, ...], shards: Shards, extraction: Extraction) -> str:
        """The name under which features are kept."""
        more = {"device": self.device.type, "batch": features.BATCH}  # sums are rounded as both have it
        return key_of(source_of(weights, extraction, pools, shards.contents, **more)) if self.cache.folder else ""

    def _kept(self, key: str, shards: Shards) -> Features | None:
        tensors = self.cache.get(key, len(shards)) if self.ranks.main else None
        if not self.ranks.told(tensors is not None):
            return None
        if tensors is None:  # another rank than the first
            return _nothing()
        hashes = tensors.pop(HASHES, None)
        ids = np.arange(len(shards))
        return Features(tensors, targets_of(shards, ids), groups_of(shards, ids), hashes)

    def _keep(self, key: str, made: Features) -> None:
        if self.ranks.main:
            hashes: dict[str, Tensor] = {HASHES: made.hashes} if made.hashes is not None else {}
            self.cache.put(key, {**made.vectors, **hashes})


def _nothing() -> Features:
    return Features({}, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
