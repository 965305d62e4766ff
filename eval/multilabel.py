"""Scores of several labels a sample: mean average precision and area under the ROC curve, both scikit-learn's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from selfsight.errors import NumericError, UsageError
from selfsight.eval.quality import rankable
from selfsight.eval.subject import Outcome


def outcomes(answers: Sequence[Tensor], labels: Tensor, protocol: str, chosen: Mapping[str, Any]) -> list[Outcome]:
    """mAP and AUC, percent, mean over the classes that test has both with and without.

    Args:
        answers: of each seed the scores (M, C), larger for likelier; any monotonous scale.
        labels: (M, C) bool.

    Raises:
        UsageError: no class is there both with and without, or scores of another shape.
        NumericError: a score that is not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, told = labels.numpy(), rankable(labels)
    made: dict[str, list[np.ndarray]] = {"mAP": [], "AUC": []}
    for scores in answers:
        if scores.shape != labels.shape:
            raise UsageError(f"scores {[*scores.shape]} for labels {[*labels.shape]}: train and test differ in classes")
        if not scores.isfinite().all():
            raise NumericError("scores that are not finite: they cannot be ranked")
        given = scores.numpy()
        made["mAP"].append(np.array([average_precision_score(truth[:, c], given[:, c]) for c in told]))
        made["AUC"].append(np.array([roc_auc_score(truth[:, c], given[:, c]) for c in told]))
    left = f", {truth.shape[1] - len(told)} classes that test has not both with and without left out"
    protocol += left if len(told) < truth.shape[1] else ""
    return [
        Outcome(
            tuple(100 * float(seed.mean()) for seed in seeds),
            protocol,
            chosen,
            metric,
            detail={"classes": told.tolist(), "each": (100 * np.mean(seeds, axis=0)).round(2).tolist()},
        )
        for metric, seeds in made.items()
    ]
