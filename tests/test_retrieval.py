"""Retrieval against scikit-learn's average precision, ties and groups included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from vectors import blobs, refuses_bad_input, refuses_lists, subject_of

from selfsight.errors import NumericError
from selfsight.eval import retrieval as module
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.knn import unit
from selfsight.eval.retrieval import ranked, retrieval, run


def test_average_precision_is_scikit_learns() -> None:
    (x, labels), (y, truth) = blobs(150), blobs(40, seed=1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    x, labels = x[order] * torch.rand(150, 1).add(0.1), labels[order]  # lengths do not count
    found = retrieval(x, labels, y, truth)
    similar = (unit(y) @ unit(x).T).numpy()
    for i in range(40):
        relevant = (labels == truth[i]).numpy()
        assert found.precision[i].item() == pytest.approx(average_precision_score(relevant, similar[i]), abs=1e-6)
        ranking = relevant[(-similar[i]).argsort()]
        assert found.before[i] == ranking.argmax()
        for k in (1, 5, 10):
            assert found.recall(k)[i] == ranking[:k].any()


def test_the_textbooks_formula() -> None:
    """Relevant at ranks 1, 3 and 6: (1/1 + 2/3 + 3/6) / 3."""
    similar = torch.tensor([[0.9, 0.7, 0.2, 0.8, 0.5, 0.4]])
    found = ranked(similar, slice(0, 3))
    assert found.precision.item() == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert found.before.item() == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=1, max_size=5), st.integers(1, 7))
def test_ties_are_scikit_learns_and_count_against(rows: list[list[int]], relevant: int) -> None:
    similar = torch.tensor(rows, dtype=torch.float32)
    found = ranked(similar, slice(0, relevant))
    truth = np.arange(8) < relevant
    for row, precision, before in zip(similar.numpy(), found.precision, found.before, strict=True):
        assert precision.item() == pytest.approx(average_precision_score(truth, row))
        ranking = truth[np.lexsort((truth, -row))]  # of equals those that are not relevant first
        assert before.item() == ranking.argmax()


def test_a_part_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, labels), (y, truth) = blobs(100), blobs(60, seed=1)
    groups = torch.arange(100) // 10, torch.arange(60) // 6
    whole = retrieval(x, labels, y, truth, *groups)
    monkeypatch.setattr(module, "_CELLS", 300)
    parts = retrieval(x, labels, y, truth, *groups)
    assert torch.allclose(whole.precision, parts.precision, equal_nan=True)
    assert torch.equal(whole.before, parts.before)


def test_a_querys_own_group_is_left_out() -> None:
    (x, labels), (y, truth) = blobs(100), blobs(40, seed=1)
    own, theirs = torch.randint(-1, 5, (100,)), torch.randint(-1, 5, (40,))
    found = retrieval(x, labels, y, truth, own, theirs)
    similar = (unit(y) @ unit(x).T).numpy()
    for i in range(40):
        kept = ((own != theirs[i]) | (theirs[i] < 0)).numpy()
        relevant = (labels == truth[i]).numpy()[kept]
        assert found.precision[i].item() == pytest.approx(average_precision_score(relevant, similar[i][kept]), abs=1e-6)
        assert found.before[i] == relevant[(-similar[i][kept]).argsort()].argmax()
    alone = retrieval(x, labels, y, truth, labels, truth)  # all that is relevant is of the query's group
    assert alone.precision.isnan().all()
    assert not alone.recall(10).any()
    nothing = ranked(torch.tensor([[-torch.inf, 0.5]]), slice(0, 1))
    assert not nothing.recall(2).any()


def test_outcomes_add_up() -> None:
    (x, labels), (y, truth) = blobs(100), blobs(40, seed=1)
    names = torch.tensor([9, 3, 2**31 - 1, 5])
    found = {outcome.metric: outcome for outcome in run(subject_of(x, names[labels], y, names[truth]))}
    assert list(found) == ["mAP", "recall@1", "recall@5", "recall@10"]
    for outcome in found.values():
        assert outcome.each is not None and len(outcome.each) == 40
        assert outcome.values == (pytest.approx(100 * outcome.each.mean().item(), rel=1e-5),)
    recalls = [found[f"recall@{k}"].values[0] for k in (1, 5, 10)]
    assert recalls == sorted(recalls)
    nearest = labels[(unit(y) @ unit(x).T).argmax(1)]
    assert recalls[0] == pytest.approx(100 * (nearest == truth).double().mean().item())
    assert "test asks 100 of train, cosine; average precision over the full ranking" in found["mAP"].protocol
    assert EVALUATORS["retrieval"].run is run


def test_bad_input_is_refused() -> None:
    refuses_bad_input(retrieval)
    refuses_lists(retrieval)
    x, labels = blobs(40)
    with pytest.raises(NumericError, match="1 features are not finite or have length zero"):
        retrieval(x, labels, torch.cat([x[:3], torch.zeros(1, 12)]), labels[:4])
