"""What probes on plain tensors ask of their input before they say any number, and the table of their mistakes."""

from typing import Any

import torch
from torch import Tensor

from selfsight.errors import NumericError, UsageError
from selfsight.eval.knn import dense_labels

MOST_CLASSES = 100  # of a confusion matrix that a report can show


def device_of_fits() -> torch.device:
    """Where probes are fitted: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels as 0 to C - 1 and C, after asking what no probe can do without.

    Args:
        train, test: (N, D) and (M, D).
        train_labels, test_labels: (N,) and (M,) integers of at least 0.

    Raises:
        UsageError: no samples, other widths, labels that are lists or lacking, one class, classes of test that train lacks.
        NumericError: features that are not finite.
    """
    one_label(train_labels, test_labels)
    checked_vectors(train, train_labels, test, test_labels)
    for name, labels in (("train", train_labels), ("test", test_labels)):
        if lacking := int((labels < 0).sum()):
            raise UsageError(
                f"{name}: {lacking:,} of {len(labels):,} samples have no label; label them or leave them out"
            )
    if len(train_labels.unique()) < 2:
        raise UsageError(
            f"train: all {len(train_labels):,} samples have the label {int(train_labels[0])}; scores need two classes"
        )
    return dense_labels(train_labels, test_labels)


def one_label(*labels: Tensor) -> None:
    """Raises UsageError: a sample has a list of labels."""
    if any(own.ndim != 1 for own in labels):
        raise UsageError(
            "samples have lists of labels, which this evaluator cannot score; knn, linear, logistic and finetune can"
        )


def checked_vectors(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    """Features (N, D) and (M, D), whatever their labels are.

    Raises:
        UsageError: no samples, another number of labels than of samples, other widths.
        NumericError: features that are not finite.
    """
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or not features.numel():
            raise UsageError(f"{name}: features must be (samples, width), both above 0, not {tuple(features.shape)}")
        if len(features) != len(labels):
            raise UsageError(f"{name}: {len(features):,} samples have {len(labels):,} labels")
        if bad := int((~features.isfinite().all(1)).sum()):
            raise NumericError(f"{name}: {bad:,} of {len(features):,} samples have features that are not finite")
    if train.shape[1] != test.shape[1]:
        raise UsageError(f"train has features of width {train.shape[1]}, test of {test.shape[1]}: not of one encoder")


def confusion(truth: Tensor, predicted: Tensor, names: Tensor) -> dict[str, Any]:
    """The confusion matrix for a report, rows the truth; empty where there are too many classes to show.

    Args:
        truth, predicted: (M,) 0 to C - 1.
        names: (C,) what the classes are called in the set.
    """
    classes = len(names)
    if classes > MOST_CLASSES:
        return {}
    counts = (truth * classes + predicted).bincount(minlength=classes**2).view(classes, classes)
    return {"confusion": counts.tolist(), "classes": names.tolist()}
