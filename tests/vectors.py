"""Features without an encoder, for tests of probes on plain tensors, and the input that every such probe refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight.errors import NumericError, UsageError
from selfsight.eval.features import Features
from selfsight.eval.subject import Options, Subject


def blobs(count: int, classes: int = 4, width: int = 12, seed: int = 0, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Normal clouds about the same centres whatever the seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    made = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + noise * torch.randn(count, width, generator=made), labels


def subject_of(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    train_groups: Tensor | None = None,
    test_groups: Tensor | None = None,
    **options: Any,
) -> Subject:
    """Stored vectors, as `evaluate` hands them to an evaluator."""
    none = [torch.full((len(own),), -1) for own in (train, test)]
    groups = [
        given if given is not None else lacking
        for given, lacking in zip((train_groups, test_groups), none, strict=True)
    ]
    fit = Features({"own": train}, train_labels, groups[0])
    held = Features({"own": test}, test_labels, groups[1])
    return Subject("stored", "own", fit, held, Options(**options), torch.device("cpu"))


def refuses_bad_input(probe: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> None:
    """The table of FAULTS that every probe of train and test answers with one line."""
    (x, a), (y, b) = blobs(40), blobs(20, seed=1)
    holed, endless = y.clone(), y.clone()
    holed[3, 2], endless[3, 2] = torch.nan, torch.inf
    table: list[tuple[tuple[Tensor, Tensor, Tensor, Tensor], type[Exception], str]] = [
        ((x, a, holed, b), NumericError, "test: 1 of 20 samples have features that are not finite"),
        ((endless, b, y, b), NumericError, "train: 1 of 20 samples have features that are not finite"),
        ((x, torch.zeros_like(a), y, b), UsageError, "train: all 40 samples have the label 0; scores need two classes"),
        ((x, a, y, torch.where(b == 0, 9, b)), UsageError, "test has 1 classes that train lacks: 9"),
        ((x, torch.where(a == 1, -1, a), y, b), UsageError, "train: 10 of 40 samples have no label"),
        ((x, a, y, torch.where(b == 1, -1, b)), UsageError, "test: 5 of 20 samples have no label"),
        ((x, a, y[:, :5], b), UsageError, "train has features of width 12, test of 5"),
        ((x, a, y, b[:7]), UsageError, "test: 20 samples have 7 labels"),
        ((x, a, y[:0], b[:0]), UsageError, "test: features must be"),
        ((x[0], a, y, b), UsageError, "train: features must be"),
    ]  # fmt: skip
    for given, kind, message in table:
        with pytest.raises(kind, match=message):
            probe(*given)


def refuses_lists(probe: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> None:
    """Lists of labels: who cannot score them says who can."""
    x, lists = torch.randn(20, 4), torch.rand(20, 3) < 0.5
    with pytest.raises(UsageError, match=r"lists of labels.*; knn, linear, logistic and finetune can"):
        probe(x, lists, x, lists)
