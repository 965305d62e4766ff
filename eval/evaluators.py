"""Every evaluator on one screen. A new one is a file with a function, a line here, and a test."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from selfsight.eval import bags, cluster, fewshot, lda, logistic, majority, retrieval
from selfsight.eval.dense import run_dense
from selfsight.eval.features import Features
from selfsight.eval.finetune import check_epochs, run_finetune
from selfsight.eval.health import run_health
from selfsight.eval.knn import usable_k
from selfsight.eval.labels import held_out
from selfsight.eval.protocol import run_knn, run_linear
from selfsight.eval.robust import run_robust
from selfsight.eval.subject import Options, Outcome, Run


def _bank(train: Features, test: Features, options: Options) -> None:
    """The bank that k is chosen with must have so many."""
    usable_k(options.k, len(held_out(len(train.labels), groups=train.groups)[0]))


class Evaluator(NamedTuple):
    """What is known of an evaluator before it runs."""

    run: Run
    told: str
    """A line for --help."""
    labels: bool = True
    """Whether it needs labels, on both sides."""
    masks: bool = False
    """Whether it needs a mask of every image, on both sides, instead of labels."""
    lists: bool = False
    """Whether it can score lists of labels."""
    train: bool = True
    """Whether it needs a training set at all."""
    twins: int = 3
    """Untrained encoders behind its random-init floor: 1 where an encoder is trained or run many times over."""
    ready: Callable[[Features, Features, Options], object] = lambda train, test, options: None
    """Raises, of labels and groups alone, what would end it after all features were taken."""
    floor: Callable[[Features, Features], list[Outcome]] = lambda train, test: []
    """What the majority class gets, of labels and groups alone; nothing where it is no rival."""


EVALUATORS: Mapping[str, Evaluator] = {
    "knn": Evaluator(
        run_knn, "weighted vote of the k nearest neighbours", lists=True, ready=_bank, floor=majority.of_samples
    ),
    "linear": Evaluator(
        run_linear,
        "softmax regression on frozen features, its rate, decay and pool chosen",
        lists=True,
        floor=majority.of_samples,
    ),
    "logistic": Evaluator(
        logistic.run, "logistic regression at its optimum, C chosen", lists=True, floor=majority.of_samples
    ),
    "fewshot": Evaluator(
        fewshot.run, "nearest class mean of a few labelled samples a class", ready=fewshot.require_enough
    ),
    "lda": Evaluator(
        lda.run, "linear discriminant analysis in closed form, shrinkage chosen", floor=majority.of_samples
    ),
    "finetune": Evaluator(
        run_finetune,
        "all weights trained on the labels, the rate chosen",
        lists=True,
        twins=1,
        ready=lambda train, test, options: check_epochs(options.epochs),
        floor=majority.of_samples,
    ),
    "retrieval": Evaluator(retrieval.run, "mAP and recall of test among train, ranked by cosine"),
    "cluster": Evaluator(cluster.run, "NMI, ARI and accuracy of k-means on test, without labels", train=False),
    "dense": Evaluator(
        run_dense, "mIoU of a linear probe on patch tokens; needs masks", labels=False, masks=True, twins=1
    ),
    "bags": Evaluator(
        bags.run,
        "one label a slide or patient: attention over the samples of a group",
        ready=bags.require_groups,
        floor=majority.of_bags,
    ),
    "robust": Evaluator(
        run_robust, "kNN of occluded, permuted, shifted and corrupted test images", twins=1, ready=_bank
    ),
    "health": Evaluator(
        run_health, "features without labels: rank, spread, alignment, attention", labels=False, train=False
    ),
}
