"""Few-shot scores against scikit-learn's nearest centroid, and what a draw may depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from vectors import blobs, refuses_bad_input, refuses_lists, subject_of

from selfsight.errors import NumericError, UsageError
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.fewshot import drawn, fewshot, nearest, run, turns


def test_hits_are_those_of_scikit_learns_nearest_centroid() -> None:
    (x, labels), (y, truth) = blobs(200), blobs(90, seed=1)
    groups = (torch.arange(200) // 40) % 2  # which half of each class a draw may take first
    for of in (None, groups):
        found = fewshot(x + 5, labels, y + 5, truth, (2, 3), 4, of)  # an offset that centring takes away
        check_hits(found, of, x, labels, y, truth)


def check_hits(
    found: dict[int, Tensor], of: Tensor | None, x: Tensor, labels: Tensor, y: Tensor, truth: Tensor
) -> None:
    centre = x.mean(0)
    fit, held = ((own - centre) / (own - centre).norm(dim=1, keepdim=True) for own in (x, y))
    for draw in range(4):
        for k in (2, 3):
            taken = torch.cat([own[:k] for own in drawn(labels, of, draw)])
            theirs = NearestCentroid().fit(fit[taken], labels[taken]).predict(held)
            assert found[k][draw].tolist() == (theirs == truth.numpy()).tolist()


def test_draws_differ_nest_and_depend_on_nothing_else() -> None:
    _, labels = blobs(200)
    first, again, other = drawn(labels, None, 0), drawn(labels, None, 0), drawn(labels, None, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for label, own in enumerate(first):
        assert sorted(own.tolist()) == (labels == label).nonzero()[:, 0].tolist()
    # Which sample is first varies: over many draws all of a class come about equally often.
    firsts = np.bincount([int(drawn(labels, None, draw)[0][0]) for draw in range(400)], minlength=200)[0::4]
    assert firsts.max() < 25 and (firsts > 0).sum() > 40


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 6)), min_size=3, max_size=80), st.integers(0, 9))
def test_samples_of_one_group_come_last(pairs: list[tuple[int, int]], draw: int) -> None:
    labels, groups = (torch.tensor(column) for column in zip(*pairs, strict=True))
    labels = labels.unique(return_inverse=True)[1]
    for own in drawn(labels, groups, draw):
        of = [int(group) if group >= 0 else -1000 - int(i) for i, group in zip(own, groups[own], strict=True)]
        count = len(set(of))
        assert len(set(of[:count])) == count  # one of each, before a second of any
    before: dict[int, int] = {}
    for i, (group, turn) in enumerate(zip(groups.tolist(), turns(groups).tolist(), strict=True)):
        key = group if group >= 0 else -1 - i
        assert turn == before.get(key, 0)
        before[key] = turn + 1


def test_the_nearest_mean_is_by_distance_not_by_angle() -> None:
    means, queries = torch.tensor([[1.0, 0.0], [0.0, 0.2]]), torch.tensor([[0.3, 0.1], [0.9, 0.9]])
    assert nearest(means, queries).tolist() == torch.cdist(queries, means).argmin(1).tolist() == [1, 0]


def test_outcomes_are_of_at_least_ten_draws() -> None:
    (x, labels), (y, truth) = blobs(200, noise=1), blobs(60, seed=1, noise=1)
    found = run(subject_of(x, labels, y, truth, shots=(1, 10), seeds=1))
    assert [outcome.metric for outcome in found] == ["1-shot", "10-shot"]
    for outcome in found:
        assert len(outcome.values) == 10
        assert outcome.each is not None
        assert np.mean(outcome.values) == pytest.approx(100 * outcome.each.mean().item(), rel=1e-5)
    assert np.mean(found[0].values) < np.mean(found[1].values) > 90
    assert np.std(found[0].values) > np.std(found[1].values)
    assert "10 of train a class, 10 draws" in found[1].protocol
    assert EVALUATORS["fewshot"].run is run


def test_the_protocol_says_what_groups_did() -> None:
    x, labels = blobs(40)
    apart, together = torch.arange(40), torch.arange(40) // 20
    told = [run(subject_of(x, labels, x, labels, groups, shots=(5,)))[0].protocol for groups in (apart, together)]
    assert "at most one of a group" in told[0]
    assert "of as many groups as there are" in told[1]
    assert "group" not in run(subject_of(x, labels, x, labels, shots=(5,)))[0].protocol


def test_bad_input_is_refused() -> None:
    probe = lambda *given: fewshot(*given, shots=(1,))  # noqa: E731 - the table's signature
    refuses_bad_input(probe)
    refuses_lists(probe)
    (x, labels), (y, truth) = blobs(40), blobs(20, seed=1)
    names = torch.tensor([70] * 10 + [71] * 9 + [72] * 21)
    with pytest.raises(
        UsageError, match=r"train: 2 classes have fewer than 11 samples: 70 \(10\), 71 \(9\); choose shots of at most 9"
    ):
        fewshot(x, names, y, torch.full((20,), 72), (1, 11))
    for bad in ((), (0,), (-1, 5)):
        with pytest.raises(UsageError, match="choose numbers of at least 1"):
            fewshot(x, labels, y, truth, bad)
    with pytest.raises(NumericError, match="length zero"):
        fewshot(torch.ones(40, 3), labels, torch.ones(20, 3), truth, (1,))
