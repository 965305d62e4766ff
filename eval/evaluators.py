"""Every evaluator on one screen. A new one is a file with a function, a line here, and a test."""

from collections.abc import Mapping
from typing import NamedTuple

from selfsight.eval import bags, cluster, fewshot, lda, logistic, retrieval
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
    "logistic": Evaluator(logistic.run, "logistic regression at its optimum, C chosen"),
    "fewshot": Evaluator(fewshot.run, "nearest class mean of a few labelled samples a class"),
    "lda": Evaluator(lda.run, "linear discriminant analysis in closed form, shrinkage chosen"),
    "retrieval": Evaluator(retrieval.run, "mAP and recall of test among train, ranked by cosine"),
    "cluster": Evaluator(cluster.run, "NMI, ARI and accuracy of k-means on test, without labels", train=False),
    "bags": Evaluator(bags.run, "one label a slide or patient: attention over the samples of a group", twins=1),
}
DEFAULT = ("knn", "linear")
