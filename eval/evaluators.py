"""Every evaluator on one screen. A new one is a file with a function, a line here, and a test."""

from collections.abc import Mapping
from typing import NamedTuple

from selfsight.eval import bags, cluster, fewshot, lda, logistic, retrieval
from selfsight.eval.dense import run_dense
from selfsight.eval.finetune import run_finetune
from selfsight.eval.health import run_health
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
    "logistic": Evaluator(logistic.run, "logistic regression at its optimum, C chosen"),
    "fewshot": Evaluator(fewshot.run, "nearest class mean of a few labelled samples a class"),
    "lda": Evaluator(lda.run, "linear discriminant analysis in closed form, shrinkage chosen"),
    "finetune": Evaluator(run_finetune, "all weights trained on the labels, the rate chosen", twins=1),
    "retrieval": Evaluator(retrieval.run, "mAP and recall of test among train, ranked by cosine"),
    "cluster": Evaluator(cluster.run, "NMI, ARI and accuracy of k-means on test, without labels", train=False),
    "dense": Evaluator(
        run_dense, "mIoU of a linear probe on patch tokens; needs masks", labels=False, masks=True, twins=1
    ),
    "bags": Evaluator(bags.run, "one label a slide or patient: attention over the samples of a group", twins=1),
    "robust": Evaluator(run_robust, "kNN of occluded, permuted, shifted and corrupted test images", twins=1),
    "health": Evaluator(
        run_health, "features without labels: rank, spread, alignment, attention", labels=False, train=False
    ),
}
DEFAULT = ("knn", "linear", "health")
