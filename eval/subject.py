"""What an evaluator is given and what it answers: the contract between `evaluate` and each file beside this one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsight.data.shards import Shards
from selfsight.encoder import Encoder
from selfsight.eval.features import PLAIN, Extraction, Features
from selfsight.eval.knn import DEFAULT_K
from selfsight.preprocessing import Preprocessing

SEEDS = 3  # of probes that are trained


@dataclass(frozen=True)
class Options:
    """What a user may choose of the protocol; everything else is fixed, so that scores of different people compare."""

    k: tuple[int, ...] = DEFAULT_K
    """Candidate numbers of neighbours."""
    seeds: int = SEEDS
    """Fits of a probe that is trained; floors have one for each initialisation."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Labelled samples a class, for few-shot scores."""
    pools: tuple[str, ...] | None = None
    """What the linear probe chooses from; None: all that need no tokens."""
    epochs: int = 20
    """Passes of fine-tuning."""
    extraction: Extraction = field(default_factory=Extraction)
    """How features are taken."""


@dataclass(frozen=True)
class Subject:
    """An encoder's features of two sets, to be scored; or raw pixels, or vectors that somebody stored."""

    name: str
    """As it stands in the table."""
    pool: str
    """Whose vectors are the encoder's own feature."""
    train: Features
    test: Features
    options: Options
    device: torch.device
    workers: int = 0
    encoder: Encoder | None = None
    """None: raw pixels or stored vectors. An evaluator that needs one answers nothing then."""
    preprocessing: Preprocessing | None = None
    """How images become inputs; None: of stored vectors, there are no images."""
    sets: tuple[Shards, Shards] | None = None
    """Where train and test were read from; None: stored vectors."""
    say: Callable[[str], None] = lambda line: None

    @property
    def taken(self) -> str:
        """What the features are, for the line to cite: `mean, scales 1+2, 4 tokens merged a block, fp32`."""
        how = self.options.extraction if self.encoder else PLAIN
        scales = f", scales {'+'.join(map(str, how.scales))}" if how.scales != PLAIN.scales else ""
        merged = f", {how.merge} tokens merged a block" if how.merge else ""
        return f"{self.pool}{scales}{merged}, fp32"

    @property
    def plainly(self) -> str:
        """For the line of what encodes images itself: that scales and merging, where they were asked for, are not in it."""
        return "" if self.options.extraction == PLAIN else "; images encoded plainly, without scales and merging"

    @property
    def fit(self) -> Tensor:
        """(N, D) of train, the encoder's own pool."""
        return self.train.vectors[self.pool]

    @property
    def held(self) -> Tensor:
        """(M, D) of test, the encoder's own pool."""
        return self.test.vectors[self.pool]


class Outcome(NamedTuple):
    """One score: a row of scores.json."""

    values: tuple[float, ...]
    """One a seed; their mean is told with their deviation."""
    protocol: str
    """One line to cite: how it was made and what was chosen, without the encoder's name."""
    chosen: Mapping[str, Any] = MappingProxyType({})
    """What the held-out tenth chose."""
    metric: str = "accuracy"
    """Which number of the evaluator's this is, if it has several or another than accuracy."""
    unit: str = "%"
    """Of the values; "" for a bare number."""
    each: Tensor | None = None
    """(M,) float: what each test sample contributes, 0..1, mean over seeds; the interval over test samples comes from it."""
    detail: Mapping[str, Any] = MappingProxyType({})
    """More for the report and scores.json, JSON values only: a confusion matrix, scores of each class, a curve."""


Run = Callable[[Subject], list[Outcome]]
