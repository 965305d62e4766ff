"""What every probe asks of features and labels: that they can be scored; and a tenth of train to choose by."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight import keyed
from selfsight.errors import NumericError, UsageError


def held_out(size: int, seed: int = 0, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A split of `size` training samples: (nine tenths to fit, one tenth to choose by), sorted indices.

    Args:
        groups: (N,) patient, slide or scene of each sample, -1 for one of its own; whole groups are held out, so that nothing
            is chosen by how well a patient is recognised. The tenth is then the least number of groups that has as many.

    Raises:
        UsageError: all samples are of one group.
    """
    units = torch.arange(size)
    if groups is not None and (groups >= 0).any():
        units = torch.where(groups >= 0, groups, -1 - units).unique(return_inverse=True)[1]
    count = int(units.max()) + 1 if size else 0
    if count == 1 and size > 1:
        raise UsageError(f"all {size:,} samples are of one group (patient, slide, scene): none can be held out")
    order = torch.from_numpy(keyed.hashes(seed, "held out", range(count), 1)[:, 0].argsort().copy())
    sizes = units.bincount(minlength=count)[order]
    before = sizes.cumsum(0) - sizes
    held = torch.zeros(count, dtype=torch.bool)
    held[order[(before < max(1, size // 10)) & (torch.arange(count) < count - 1)]] = True
    chosen = held[units]
    return torch.nonzero(~chosen)[:, 0], torch.nonzero(chosen)[:, 0]


def plain(features: Tensor) -> Tensor:
    """Features to compute with: no gradient, float32 at least."""
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))


def checked(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, lists: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Labels of train and test and the number of classes C, after asking what no probe can do without.

    Args:
        train, test: (N, D) and (M, D).
        train_labels, test_labels: (N,) and (M,) integers of at least 0, which become 0 to C - 1; or (N, C) and (M, C) bool.
        lists: whether those can be scored.

    Raises:
        UsageError: as `check_pairs` and `dense_labels`, or lists of labels that cannot be scored.
        NumericError: features that are not finite.
    """
    if not lists:
        one_label(train_labels, test_labels)
    check_pairs(train, train_labels, test, test_labels)
    if train_labels.ndim == 1:
        return dense_labels(train_labels, test_labels)
    if train_labels.shape[1:] != test_labels.shape[1:]:
        raise UsageError(
            f"train has labels {[*train_labels.shape]}, test {[*test_labels.shape]}; give the same classes"
        )
    return train_labels, test_labels, train_labels.shape[1]


def one_label(*labels: Tensor) -> None:
    """Raises UsageError: a sample has a list of labels."""
    if any(own.ndim != 1 for own in labels):
        raise UsageError(
            "samples have lists of labels, which this evaluator cannot score; knn, linear, logistic and finetune can"
        )


def check_pairs(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor | None = None) -> None:
    """As `check_features` for both sets.

    Raises:
        UsageError: also, other widths.
    """
    check_features("train", train, train_labels)
    check_features("test", test, test_labels)
    if train.shape[1:] != test.shape[1:]:
        widths = [" x ".join(map(str, own.shape[1:])) for own in (train, test)]
        raise UsageError(f"train has features of width {widths[0]}, test of {widths[1]}: not of one encoder")


def check_features(name: str, features: Tensor, labels: Tensor | None = None) -> None:
    """Features (N, D), or tokens (N, T, D), and the labels that belong to them.

    Raises:
        UsageError: no samples, another number of labels than of samples, several labels a sample that are not bool.
        NumericError: features that are not finite.
    """
    if features.ndim not in (2, 3) or not features.numel():
        raise UsageError(f"{name}: features must be (samples, width), both above 0, not {tuple(features.shape)}")
    if labels is not None and len(labels) != len(features):
        raise UsageError(f"{name}: {len(features):,} samples have {len(labels):,} labels")
    if labels is not None and labels.ndim == 2 and labels.dtype != torch.bool:
        raise UsageError(
            f"{name}: labels are {labels.dtype} {[*labels.shape]}; several labels a sample are bool (N, C)"
        )
    if bad := int((~features.isfinite()).flatten(1).any(1).sum()):
        raise NumericError(f"{name}: {bad:,} of {len(features):,} samples have features that are not finite")


def check_labels(name: str, labels: Tensor) -> None:
    """Raises UsageError: labels that are not one integer of at least 0 a sample."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise UsageError(f"{name}: labels are {labels.dtype} {[*labels.shape]}; one integer a sample is needed here")
    if missing := int((labels < 0).sum()):
        raise UsageError(
            f"{name}: {missing:,} of {len(labels):,} samples have no label (it is below 0); label them or leave them out"
        )


def same_width(fit: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of labels (N, C) and (M, C) of the same classes: those of the set with fewer are padded; single ones as they are."""
    if fit.ndim == 1 or held.ndim == 1:
        return fit, held
    wide = max(fit.shape[1], held.shape[1])
    return F.pad(fit, (0, wide - fit.shape[1])), F.pad(held, (0, wide - held.shape[1]))


def same_classes(fit: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """As `same_width`, after asking whether the labels of train and test can be scored together.

    Raises:
        UsageError: lists on one side only, or what `dense_labels` raises, of lists, too.
    """
    if fit.ndim != held.ndim:
        sides = ("single labels", "lists of labels")
        raise UsageError(f"train has {sides[fit.ndim - 1]}, test has {sides[held.ndim - 1]}: pack both the same way")
    if fit.ndim == 1:
        dense_labels(fit, held)
        return fit, held
    fit, held = same_width(fit, held)
    _refuse_unknown((held.any(0) & ~fit.any(0)).nonzero().flatten().tolist())
    return fit, held


def _refuse_unknown(classes: list[int]) -> None:
    if classes:
        raise UsageError(f"test has {len(classes)} classes that train lacks: {', '.join(map(str, classes[:10]))}")


def dense_labels(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels as 0 to C - 1 in the order of train's classes, and C; they may be any integers >= 0 before.

    Raises:
        UsageError: labels that are no such integers, only one class in train, or classes in test that train lacks.
    """
    check_labels("train", train)
    check_labels("test", test)
    classes, dense = train.unique(return_inverse=True)
    if len(classes) == 1:
        raise UsageError(f"train: all {len(train):,} samples have the label {int(classes)}; scores need two classes")
    _refuse_unknown(sorted(set(test.tolist()) - set(classes.tolist())))
    return dense, torch.searchsorted(classes, test), len(classes)
