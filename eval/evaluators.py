"""Every evaluator on one screen. A new one is a file with a function, a line here, and a test."""

from collections.abc import Mapping
from typing import NamedTuple

from selfsight.eval.dense import run_dense
from selfsight.eval.protocol import run_knn, run_linear
from selfsight.eval.robust import run_robust
from selfsight.eval.subject import Run


class Evaluator(NamedTuple):
    """What is known of an evaluator before it runs."""

    run: Run
    told: str
    """A line for --help."""
    labels: bool = True
    """Whether it needs labels, on both sides."""
    masks: bool = False
    """Whether it needs a mask of every image, on both sides, instead of labels."""
    train: bool = True
    """Whether it needs a training set at all."""
    twins: int = 3
    """Untrained encoders behind its random-init floor: 1 where an encoder is trained or run many times over."""


EVALUATORS: Mapping[str, Evaluator] = {
    "knn": Evaluator(run_knn, "weighted vote of the k nearest neighbours"),
    "linear": Evaluator(run_linear, "softmax regression on frozen features, its rate, decay and pool chosen"),
    "dense": Evaluator(
        run_dense, "mIoU of a linear probe on patch tokens; needs masks", labels=False, masks=True, twins=1
    ),
    "robust": Evaluator(run_robust, "kNN of occluded, permuted, shifted and corrupted test images", twins=1),
}
DEFAULT = ("knn", "linear")
