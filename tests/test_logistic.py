"""Logistic regression against scikit-learn's optimum.

Mutations that these tests caught when they were tried: the bias penalised, the penalty of two classes not doubled, lists taken for
classes, C chosen the other way round, the rows and columns of the confusion matrix swapped.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from vectors import blobs, refuses_bad_input, subject_of

from selfsight.errors import NumericError, UsageError
from selfsight.eval import logistic as module
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.knn import held_out
from selfsight.eval.linear import Standardizer
from selfsight.eval.logistic import fit_logistic, logistic, run


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 10.0])
def test_weights_are_scikit_learns(classes: int, strength: float) -> None:
    x, labels = blobs(300, classes)
    x = Standardizer(x.double())(x.double())
    weights, _ = fit_logistic(x, F.one_hot(labels).double(), strength, tolerance=1e-8)
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x[:, :-1].numpy(), labels)
    ours = weights[:, 1:] - weights[:, :1] if classes == 2 else weights  # of two classes theirs is one column
    assert np.allclose(ours[:-1].T, theirs.coef_, atol=1e-4)
    if classes == 2:
        assert ours[-1].item() == pytest.approx(theirs.intercept_[0], abs=1e-5)
    else:
        assert np.allclose(ours[-1] - ours[-1].mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5)


def test_lists_of_labels_are_one_regression_a_column() -> None:
    x, labels = blobs(300)
    lists = torch.stack([labels == 0, labels < 2, labels == 3], 1)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    with_one = torch.cat([torch.from_numpy(scaled), torch.ones(300, 1).double()], 1)
    weights, _ = fit_logistic(with_one, lists.double(), 0.5, True, tolerance=1e-8)
    for column in range(3):
        theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(scaled, lists[:, column])
        assert np.allclose(weights[:-1, column], theirs.coef_[0], atol=1e-5)
        assert weights[-1, column].item() == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_lists_that_look_like_classes_are_columns_all_the_same() -> None:
    """Every sample with exactly one label of three: still one against the rest."""
    (x, labels), (y, _) = blobs(200, 3), blobs(50, 3, seed=1)
    lists = F.one_hot(labels).bool()
    found = logistic(x, lists, y, lists[:50], strengths=(0.1,))
    scale = StandardScaler().fit(x.double().numpy())
    for column in range(3):
        theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(
            scale.transform(x.double().numpy()), lists[:, column]
        )
        assert np.allclose(
            found.scores[:, column], theirs.decision_function(scale.transform(y.double().numpy())), atol=2e-2
        )


def test_the_whole_is_scikit_learns_with_the_c_that_the_tenth_chooses() -> None:
    (x, labels), (y, truth) = blobs(400, noise=2.5), blobs(150, seed=1, noise=2.5)
    strengths = (1e-4, 1e-3, 1e-2, 0.1)  # larger ones differ by less than the fits' tolerance
    found = logistic(x, labels, y, truth, strengths=strengths)
    fit, choose = held_out(400)
    tried = []
    for strength in strengths:
        scale = StandardScaler().fit(x[fit].numpy())
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=2000).fit(
            scale.transform(x[fit].numpy()), labels[fit]
        )
        shares = theirs.predict_log_proba(scale.transform(x[choose].numpy()))
        loss = -shares[np.arange(len(choose)), labels[choose]].mean()
        tried.append((theirs.score(scale.transform(x[choose].numpy()), labels[choose]), -loss, -strength))
    assert found.strength == -max(tried)[2]
    assert found.unfinished == ()
    # Two that are right equally often on the tenth: the lower cross-entropy.
    assert logistic(x, labels, y, truth, strengths=(0.1, 1.0)).strength == 1.0
    scale = StandardScaler().fit(x.numpy())
    theirs = LogisticRegression(C=found.strength, tol=1e-8, max_iter=2000).fit(scale.transform(x.numpy()), labels)
    assert found.scores.argmax(1).tolist() == theirs.predict(scale.transform(y.numpy())).tolist()


def test_test_chooses_nothing_and_groups_are_whole() -> None:
    (x, labels), (y, truth) = blobs(200, noise=3), blobs(60, seed=1, noise=3)
    assert logistic(x, labels, y, truth).strength == logistic(x, labels, y, (truth + 1) % 4).strength
    # Two copies of each sample: only whole groups tell knowledge from memory, so that they choose a smaller C.
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    twice, of = noise.repeat_interleave(2, 0), labels.repeat_interleave(2)
    split = logistic(twice, of, noise, labels)
    whole = logistic(twice, of, noise, labels, groups=torch.arange(200).repeat_interleave(2))
    assert whole.strength < split.strength or split.strength == min(module.STRENGTHS)
    with pytest.raises(UsageError, match="all 200 samples are of one group"):
        logistic(x, labels, y, truth, groups=torch.zeros(200, dtype=torch.long))


def test_a_fit_that_did_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, labels), (y, truth) = blobs(100), blobs(40, seed=1)
    assert "NOT" not in run(subject_of(x, labels, y, truth))[0].protocol
    monkeypatch.setattr(module, "MOST_ITERATIONS", 1)
    found = run(subject_of(x, labels, y, truth))[0]
    assert "NOT reached within 1 iterations at C=" in found.protocol
    result = logistic(x, labels, y, truth, strengths=(1.0,))
    assert result.unfinished == (1.0, 1.0)  # on nine tenths, and on all


def test_labels_may_be_any_integers_and_constants_do_no_harm() -> None:
    (x, labels), (y, truth) = blobs(120), blobs(40, seed=1)
    x, y = (torch.cat([own, torch.full((len(own), 1), 7.0)], 1) for own in (x, y))
    names = torch.tensor([3, 7, 40_000, 2**31 - 1])
    found, plain = run(subject_of(x, names[labels], y, names[truth]))[0], run(subject_of(x, labels, y, truth))[0]
    assert found.values == plain.values
    assert found.detail["classes"] == names.tolist()
    assert found.detail["confusion"] == plain.detail["confusion"]
    rare = labels.clone()
    rare[held_out(120)[1][0]] = 9  # a class that stands in the held-out tenth only
    assert logistic(x, rare, y, truth).scores.isfinite().all()


def test_outcomes_add_up() -> None:
    (x, labels), (y, truth) = blobs(200), blobs(60, seed=1)
    (found,) = run(subject_of(x, labels, y, truth))
    assert found.each is not None
    assert found.values == (pytest.approx(100 * found.each.mean().item()),)
    table = torch.tensor(found.detail["confusion"])
    assert table.sum(1).tolist() == truth.bincount().tolist()  # rows are the truth
    assert 100 * table.trace().item() / 60 == pytest.approx(found.values[0])
    assert f"C={found.chosen['C']:.3g} chosen" in found.protocol
    assert "held-out tenth of train," in found.protocol
    assert EVALUATORS["logistic"].run is run


def test_outcomes_of_lists() -> None:
    (x, labels), (y, truth) = blobs(200), blobs(60, seed=1)
    lists, held = (torch.stack([own == 0, own < 2, own == 3], 1) for own in (labels, truth))
    found = {outcome.metric: outcome for outcome in run(subject_of(x, lists, y, held))}
    assert set(found) == {"mAP", "AUC"}
    assert found["AUC"].values[0] > 80
    assert logistic(x, lists, y, held, strengths=(1e-5, 0.1)).strength == 0.1  # the lower cross-entropy
    assert "one class against the rest" in found["mAP"].protocol
    assert "chosen from 17 of 1e-05 to 1000 on a held-out tenth of train by cross-entropy" in found["mAP"].protocol


def test_bad_input_is_refused() -> None:
    refuses_bad_input(logistic)
    x = torch.randn(20, 4)
    with pytest.raises(UsageError, match=r"train has labels \[20, 3\], test \[20, 2\]"):
        logistic(x, torch.ones(20, 3).bool(), x, torch.ones(20, 2).bool())
    with pytest.raises(NumericError, match="not finite"):
        logistic(x * torch.nan, torch.ones(20, 3).bool(), x, torch.ones(20, 3).bool())
