"""Every evaluator on one screen. A new one is a file with a function, a line here, and a test."""

from collections.abc import Mapping
from typing import NamedTuple

from selfsight.eval.finetune import run_finetune
from selfsight.eval.health import run_health
from selfsight.eval.protocol import run_knn, run_linear
from selfsight.eval.subject import Run


class Evaluator(NamedTuple):
    """What is known of an evaluator before it runs."""

    run: Run
    told: str
    """A line for --help."""
    labels: bool = True
    """Whether it needs labels, on both sides."""
    train: bool = True
    """Whether it needs a training set at all."""
    twins: int = 3
    """Untrained encoders behind its random-init floor: 1 where an encoder is trained or run many times over."""


EVALUATORS: Mapping[str, Evaluator] = {
    "knn": Evaluator(run_knn, "weighted vote of the k nearest neighbours"),
    "linear": Evaluator(run_linear, "softmax regression on frozen features, its rate, decay and pool chosen"),
    "finetune": Evaluator(run_finetune, "all weights trained on the labels, the rate chosen", twins=1),
    "health": Evaluator(
        run_health, "features without labels: rank, spread, alignment, attention", labels=False, train=False
    ),
}
DEFAULT = tuple(name for name in ("knn", "linear", "health") if name in EVALUATORS)
