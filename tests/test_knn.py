"""kNN against scikit-learn and DINO, and the held-out tenth."""

import json

import numpy as np
import pytest
import torch
from conftest import blobs
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from selfsight.errors import NumericError, UsageError
from selfsight.eval.features import Features
from selfsight.eval.knn import knn, knn_ranked, predict, search, unit, usable_k, vote
from selfsight.eval.labels import dense_labels, held_out
from selfsight.eval.linear import linear
from selfsight.eval.multilabel import outcomes
from selfsight.eval.protocol import run_knn
from selfsight.eval.subject import Options, Subject


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_scikit_learns(k: int) -> None:
    (train, train_labels), (test, _) = blobs(300), blobs(100, seed=1)
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 - cosine distance back to similarity
    theirs = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute").fit(train, train_labels)
    ours = predict(unit(train), train_labels, unit(test), (k,))[:, 0]
    assert ours.tolist() == theirs.predict(test).tolist()


def test_votes_are_dinos_for_every_k_at_once() -> None:
    """facebookresearch/dino's eval_knn.py, knn_classifier, for one k after another."""
    (train, train_labels), (test, _) = blobs(300), blobs(80, seed=1)
    bank, queries = unit(train), unit(test)
    together = predict(bank, train_labels, queries, (3, 10, 50))
    for column, k in enumerate((3, 10, 50)):
        distances, indices = torch.mm(queries, bank.t()).topk(k, largest=True, sorted=True)
        retrieved = train_labels.view(1, -1).expand(80, -1).gather(1, indices)
        one_hot = torch.zeros(80 * k, 4).scatter_(1, retrieved.view(-1, 1), 1)
        votes = (one_hot.view(80, k, 4) * distances.clone().div_(0.07).exp_().view(80, k, 1)).sum(1)
        assert together[:, column].tolist() == votes.argmax(1).tolist()


def test_search_is_exact() -> None:
    bank, queries = unit(torch.randn(500, 32)), unit(torch.randn(70, 32))
    similarity, neighbour = search(bank, queries, 9)
    exact = (queries.double() @ bank.double().T).sort(1, descending=True)
    assert neighbour.tolist() == exact.indices[:, :9].tolist()
    assert torch.allclose(similarity.double(), exact.values[:, :9], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_k_is_chosen_without_the_test_set(seed: int) -> None:
    (train, train_labels), (test, labels) = blobs(200, seed=seed, noise=2.5), blobs(50, seed=10 + seed, noise=2.5)
    honest = knn(train, train_labels, test, labels)
    lying = knn(train, train_labels, test, (labels + 1) % 4)
    assert honest.k == lying.k
    fit, choose = held_out(200)
    bank, queries, candidates = unit(train)[fit], unit(train)[choose], (10, 20, 100)
    votes = {k: predict(bank, train_labels[fit], queries, (k,))[:, 0] for k in candidates}
    accuracies = {k: (vote == train_labels[choose]).double().mean() for k, vote in votes.items()}
    assert honest.k == max(accuracies, key=lambda k: (accuracies[k], -k))
    assert honest.candidates == candidates  # 200 is more than the 180 that are left to fit on
    hits = predict(unit(train), train_labels, unit(test), (honest.k,))[:, 0] == labels
    assert honest.accuracy == pytest.approx(100 * hits.double().mean().item())


@given(st.integers(10, 3000), st.integers(0, 5))
def test_a_tenth_is_held_out(size: int, seed: int) -> None:
    fit, choose = held_out(size, seed)
    assert len(choose) == size // 10
    assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(size))


@given(st.lists(st.integers(-1, 12), min_size=4, max_size=300), st.integers(0, 3))
def test_whole_groups_are_held_out(groups: list[int], seed: int) -> None:
    own = torch.tensor(groups)
    if len(set(groups)) == 1 and groups[0] >= 0:
        with pytest.raises(UsageError, match=r"all .* samples are of one group"):
            held_out(len(groups), seed, own)
        return
    fit, choose = held_out(len(groups), seed, own)
    assert sorted([*fit.tolist(), *choose.tolist()]) == list(range(len(groups)))
    assert not {*own[fit].tolist()} & {*own[choose].tolist()} - {-1}
    largest = max(groups.count(group) for group in {*groups} - {-1}) if max(groups) >= 0 else 1
    assert 1 <= len(choose) < len(groups) // 10 + largest + 1
    assert len(fit) >= 1


def test_samples_of_no_group_are_split_as_ever() -> None:
    for split, same in zip(held_out(70), held_out(70, groups=torch.full((70,), -1)), strict=True):
        assert torch.equal(split, same)


def test_k_is_not_chosen_by_recognising_a_group() -> None:
    """Twins of one group, a third of them with a wrong label: split by sample, the twin makes k = 1 perfect."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, 4, generator=generator)
    labels = ((centres[:, 0] > 0) ^ (torch.rand(500, generator=generator) < 0.3)).long().repeat_interleave(2)
    train = centres.repeat_interleave(2, 0) + 0.01 * torch.randn(1000, 4, generator=generator)
    given_ = train, labels, torch.randn(10, 4, generator=generator), torch.arange(10) % 2, (1, 41)
    assert knn(*given_).k == 1
    assert knn(*given_, groups=torch.arange(500).repeat_interleave(2)).k == 41


def test_bad_banks_are_refused() -> None:
    (train, labels), (test, test_labels) = blobs(50), blobs(20, seed=1)
    with pytest.raises(UsageError, match=r"k = 200: the bank has only 45 samples; choose k of at most 45"):
        knn(train, labels, test, test_labels, k=(200,))
    with pytest.raises(UsageError, match="choose k of at most 5"):
        usable_k((10, 20), 5)
    with pytest.raises(
        UsageError, match=r"k = 5, 60: the bank has only 45"
    ):  # a list of one's own is not cut in silence
        knn(train, labels, test, test_labels, k=(5, 60))
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 9"):
        knn(train, labels, test, torch.where(test_labels == 0, 9, test_labels))
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 9"):
        linear({"x": train}, labels, {"x": test}, torch.where(test_labels == 0, 9, test_labels))
    for bad in (float("nan"), float("inf")):
        broken = test.clone()
        broken[3, 2] = bad
        with pytest.raises(NumericError, match="not finite"):
            knn(train, labels, broken, test_labels)
    with pytest.raises(NumericError, match="length zero"):
        knn(torch.zeros_like(train), labels, test, test_labels)


def test_one_search_serves_ks_in_any_order_and_labels_of_any_size() -> None:
    (train, labels), (test, _) = blobs(300), blobs(80, seed=1)
    names = torch.tensor([2**40, 5, 7, 3])
    bank, queries = unit(train), unit(test)
    sorted_, mixed = (predict(bank, names[labels], queries, k) for k in ((3, 10, 50), (50, 3, 3, 10)))
    assert torch.equal(mixed, sorted_[:, [2, 0, 0, 1]])
    assert set(mixed.unique().tolist()) <= set(names.tolist())


def test_parts_of_the_queries_vote_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (test, _) = blobs(200), blobs(50, seed=1)
    given_ = unit(train), labels, unit(test), (5, 20)
    several = unit(train), torch.nn.functional.one_hot(labels).bool(), unit(test), (5, 20)
    whole, shares = predict(*given_), vote(*several)
    monkeypatch.setattr("selfsight.eval.knn._VOTES", 300)
    assert torch.equal(predict(*given_), whole)
    assert torch.equal(vote(*several), shares)


def test_faiss_is_left_as_it_was() -> None:
    import faiss

    before = faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs
    search(unit(torch.randn(50, 8)), unit(torch.randn(5, 8)), 3)
    assert before == (faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs)


def test_nobody_votes_who_is_not_there() -> None:
    """faiss answers -1 where it finds nobody, which would be the vote of the last sample."""
    bank = unit(torch.randn(5, 4))
    with pytest.raises(UsageError, match="k = 20: the bank has only 5 samples"):
        predict(bank, torch.arange(5), bank, (20,))
    for bad in (float("nan"), float("inf")):
        queries = bank.clone()
        queries[2, 0] = bad
        with pytest.raises(NumericError, match="1 queries have no 3 nearest neighbours"):
            search(bank, queries, 3)


BAD_LABELS = [
    (torch.zeros(50, dtype=torch.long), torch.zeros(20, dtype=torch.long), "train: all 50 samples have the label 0"),
    (torch.arange(50) % 2 - 1, torch.zeros(20, dtype=torch.long), "train: 25 of 50 samples have no label"),
    (torch.arange(50) % 2, -torch.ones(20, dtype=torch.long), "test: 20 of 20 samples have no label"),
    ((torch.arange(50) % 2).float(), torch.zeros(20), "train: labels are torch.float32"),
    (torch.arange(49) % 2, torch.zeros(20, dtype=torch.long), "train: 50 samples have 49 labels"),
    (torch.arange(50) % 2, torch.zeros(21, dtype=torch.long), "test: 20 samples have 21 labels"),
    (torch.arange(50) % 2, torch.full((20,), 2**62), "test has 1 classes that train lacks: 4611686018427387904"),
]


@pytest.mark.parametrize("train_labels, test_labels, told", BAD_LABELS)
def test_labels_that_cannot_be_scored_are_refused(train_labels: Tensor, test_labels: Tensor, told: str) -> None:
    train, test = blobs(50)[0], blobs(20)[0]
    with pytest.raises(UsageError, match=told):
        knn(train, train_labels, test, test_labels)
    with pytest.raises(UsageError, match=told):
        linear({"x": train}, train_labels, {"x": test}, test_labels)


def test_features_of_other_widths_and_empty_sets_are_refused() -> None:
    train, labels = blobs(50)
    with pytest.raises(UsageError, match="train has features of width 12, test of 11"):
        knn(train, labels, train[:, :11], labels)
    with pytest.raises(UsageError, match="test: features must be"):
        knn(train, labels, train[:0], labels[:0])


@given(st.lists(st.integers(0, 2**62), min_size=2, max_size=40).filter(lambda labels: len(set(labels)) > 1))
def test_dense_labels_keep_order_and_equality(labels: list[int]) -> None:
    dense, same, classes = dense_labels(torch.tensor(labels), torch.tensor(labels[::-1]))
    assert [sorted(set(labels))[index] for index in dense.tolist()] == labels
    assert same.tolist() == dense.tolist()[::-1]
    assert classes == len(set(labels))


# -- several labels a sample


def several(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and labels (N, 5): two classes a sample, a third for some, and one that nobody has."""
    x, labels = blobs(count, seed=seed)
    has = torch.nn.functional.one_hot(labels, 5).bool() | torch.nn.functional.one_hot((labels + 1) % 4, 5).bool()
    has[:, 0] |= x[:, 0] > 1
    return x, has


def test_shares_are_those_of_a_written_out_vote() -> None:
    (train, has), (test, _) = several(60), several(7, seed=1)
    bank, queries = unit(train), unit(test)
    found = vote(bank, has, queries, (3, 9))
    for i, k in enumerate((3, 9)):
        for q, query in enumerate(queries):
            cosines = bank @ query
            near = cosines.argsort(descending=True)[:k]
            weights = (cosines[near].double() / 0.07).exp()
            share = (weights[:, None] * has[near]).sum(0) / weights.sum()
            assert torch.allclose(found[i, q], share, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_k_is_chosen_by_mean_average_precision_on_the_tenth(seed: int) -> None:
    (train, has), (test, _) = several(400, seed), several(50, seed=9)
    found = knn_ranked(train, has, test, (2, 15, 80))
    fit, choose = held_out(400)
    near = NearestNeighbors(metric="cosine").fit(train[fit])
    precision = {}
    for k in (2, 15, 80):
        distance, where = near.kneighbors(train[choose], k)
        weights = np.exp((1 - distance) / 0.07)
        share = (weights[..., None] * has[fit].numpy()[where]).sum(1) / weights.sum(1, keepdims=True)
        truth = has[choose].numpy()[:, :4]
        precision[k] = average_precision_score(truth, share[:, :4], average="macro")
    assert found.k == max(precision, key=lambda k: precision[k])
    assert torch.equal(found.scores, vote(unit(train), has, unit(test), (found.k,))[0])


def test_groups_are_held_out_from_rankings_too() -> None:
    x, has = several(40)
    with pytest.raises(UsageError, match="of one group"):
        knn_ranked(x, has, x, (1, 3), torch.zeros(40, dtype=torch.long))


def test_nothing_to_rank_is_told() -> None:
    x, has = several(40)
    with pytest.raises(UsageError, match="no class that some of 4 samples have and others lack"):
        knn_ranked(x, torch.ones_like(has), x, (1, 3))
    with pytest.raises(UsageError, match=r"train: labels are torch.int64 \[40, 5\]; several labels a sample are bool"):
        knn_ranked(x, has.long(), x, (1, 3))
    with pytest.raises(UsageError, match="a ranking needs lists"):
        knn_ranked(x, torch.arange(40) % 2, x, (1, 3))
    with pytest.raises(UsageError, match="no class that some of 40 samples have and others lack"):
        outcomes([has.double()], torch.zeros_like(has), "", {})
    with pytest.raises(NumericError, match="scores that are not finite"):
        outcomes([torch.full(has.shape, torch.nan)], has, "", {})
    with pytest.raises(UsageError, match="train and test differ in classes"):
        outcomes([has[:, :4].double()], has, "", {})


# -- the evaluator


def subject_of(train: Features, test: Features) -> Subject:
    return Subject("stored", "x", train, test, Options(k=(5, 20)), torch.device("cpu"))


def test_the_outcome_tells_the_confusion_and_what_each_sample_gives() -> None:
    (x, labels), (y, truth) = blobs(300, noise=2.5), blobs(90, seed=1, noise=2.5)
    names, none = torch.tensor([30, 10, 40, 20]), torch.full((300,), -1)
    [found] = run_knn(subject_of(Features({"x": x}, names[labels], none), Features({"x": y}, names[truth], none[:90])))
    near = knn(x, names[labels], y, names[truth], (5, 20))
    assert found.values == (near.accuracy,) == (pytest.approx(100 * found.each.mean().item()),)  # type: ignore[union-attr]
    assert found.detail["classes"] == [10, 20, 30, 40]
    told = np.array([10, 20, 30, 40])[near.predicted]
    assert found.detail["confusion"] == confusion_matrix(names[truth], told).tolist()
    assert f"k={near.k} chosen from (5, 20) on a held-out tenth of train; features: x, fp32" in found.protocol
    json.dumps(dict(found.detail))


def test_outcomes_of_several_labels_are_scikit_learns() -> None:
    (x, has), (y, truth) = several(300), several(90, seed=1)
    none = torch.full((300,), -1)
    precision, area = run_knn(subject_of(Features({"x": x}, has, none), Features({"x": y}, truth, none[:90])))
    scores = knn_ranked(x, has, y, (5, 20)).scores[:, :4]
    assert (precision.metric, area.metric) == ("mAP", "AUC")
    assert precision.values[0] == pytest.approx(100 * average_precision_score(truth[:, :4], scores, average="macro"))
    assert area.values[0] == pytest.approx(100 * roc_auc_score(truth[:, :4], scores, average="macro"))
    assert "by mAP" in precision.protocol
    assert "1 classes that test has not both with and without left out" in precision.protocol
