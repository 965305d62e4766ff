"""Linear discriminant analysis against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from vectors import blobs, refuses_bad_input, refuses_lists, subject_of

from selfsight.errors import NumericError, UsageError
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.knn import held_out
from selfsight.eval.lda import SHRINKAGES, fit_lda, lda, run
from selfsight.eval.linear import Standardizer


def uneven(count: int, seed: int = 0, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of other sizes and dimensions of other scales, correlated."""
    x, _ = blobs(count, 3, seed=seed, noise=noise)
    labels = torch.arange(count) % 3
    kept = (labels != 1) | (torch.arange(count) % 4 == 0)
    mix = torch.eye(12) + 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    return (x @ mix * torch.logspace(-1, 1, 12))[kept], labels[kept]


@pytest.mark.parametrize("shrinkage", [1e-4, 0.1, 0.5, 1.0])
def test_scores_are_scikit_learns(shrinkage: float) -> None:
    (x, labels), (y, _) = uneven(300), uneven(90, 1)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.double().numpy(), labels)
    weights, bias = fit_lda(x.double(), labels, 3, (0.7, shrinkage))[shrinkage]
    assert np.allclose(y.double() @ weights + bias, theirs.decision_function(y.double().numpy()), rtol=1e-8, atol=1e-8)


def test_the_whole_is_scikit_learns_with_the_shrinkage_that_the_tenth_chooses() -> None:
    (x, labels), (y, truth) = uneven(160, noise=3), uneven(90, 1, 3)
    found = lda(x, labels, y, truth)
    fit, choose = held_out(len(x))
    tried = []
    for shrinkage in SHRINKAGES:
        scale = StandardScaler().fit(x[fit].double().numpy())
        deviation = scale.scale_ * (len(fit) / (len(fit) - 1)) ** 0.5  # torch's, which differs by a hair
        a, b = ((x[part].double().numpy() - scale.mean_) / deviation for part in (fit, choose))
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(a, labels[fit])
        loss = log_loss(labels[choose], theirs.predict_proba(b), labels=[0, 1, 2])
        tried.append((theirs.score(b, labels[choose]), -loss, shrinkage))
    assert found.shrinkage == max(tried)[2]
    a, b = (Standardizer(x.double())(own.double())[:, :-1].numpy() for own in (x, y))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=found.shrinkage).fit(a, labels)
    assert np.allclose(found.scores, theirs.decision_function(b), rtol=1e-6, atol=1e-6)


def test_more_dimensions_than_samples() -> None:
    x, y = torch.randn(30, 200), torch.randn(10, 200)
    found = lda(x, torch.arange(30) % 3, y, torch.arange(10) % 3)
    assert found.scores.isfinite().all()


def test_test_chooses_nothing_and_groups_are_whole() -> None:
    (x, labels), (y, truth) = uneven(120, noise=4), uneven(60, 1, 4)
    assert lda(x, labels, y, truth).shrinkage == lda(x, labels, y, (truth + 1) % 3).shrinkage
    noise, own = torch.randn(100, 80, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 2
    twice = noise.repeat_interleave(2, 0), own.repeat_interleave(2)
    split, whole = (lda(*twice, noise, own, groups=g) for g in (None, torch.arange(100).repeat_interleave(2)))
    assert whole.shrinkage > split.shrinkage


def test_a_class_of_the_held_out_tenth_only() -> None:
    (x, labels), (y, truth) = blobs(120), blobs(40, seed=1)
    labels[held_out(120)[1][0]] = 9
    assert lda(x, labels, y, truth).scores.isfinite().all()
    weights, bias = fit_lda(x.double(), labels.clamp(max=4), 6, (0.1,))[
        0.1
    ]  # a class without a sample is never the answer
    scores = x.double() @ weights + bias
    assert scores.isfinite().all()
    assert (scores.argmax(1) < 5).all()


def test_outcomes_add_up() -> None:
    (x, labels), (y, truth) = uneven(200), uneven(60, 1)
    names = torch.tensor([4, 10, 12])
    (found,) = run(subject_of(x, names[labels], y, names[truth]))
    assert found.each is not None
    assert found.values == (pytest.approx(100 * found.each.mean().item()),)
    table = torch.tensor(found.detail["confusion"])
    assert table.sum(1).tolist() == truth.bincount().tolist()
    assert 100 * table.trace().item() / len(truth) == pytest.approx(found.values[0])
    assert found.detail["classes"] == [4, 10, 12]
    assert found.values[0] > 60
    assert f"shrinkage {found.chosen['shrinkage']:g} chosen" in found.protocol
    assert EVALUATORS["lda"].run is run


def test_bad_input_is_refused() -> None:
    refuses_bad_input(lda)
    refuses_lists(lda)
    x, labels = blobs(40)
    for bad in (0.0, -0.1, 1.5):
        with pytest.raises(UsageError, match=f"shrinkage {bad:g}: choose one above 0"):
            lda(x, labels, x, labels, shrinkages=(bad,))
    with pytest.raises(NumericError, match="the covariance within classes is not positive definite"):
        lda(torch.ones(40, 3), labels, torch.ones(40, 3), labels)
    with pytest.raises(UsageError, match="of one group"):
        lda(x, labels, x, labels, groups=torch.ones(40, dtype=torch.long))
