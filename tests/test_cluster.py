"""Clustering: pairs by brute force, scores by scikit-learn, and starts that are fixed."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from vectors import blobs, refuses_lists, subject_of

from selfsight.errors import NumericError, UsageError
from selfsight.eval.cluster import cluster, kmeans, matched, run
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.knn import unit


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_pairs_are_the_best_of_all(pairs: list[tuple[int, int]]) -> None:
    clusters, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    best = max(sum(given[c] == label for c, label in pairs) for given in permutations(range(4)))
    assert (matched(clusters, labels) == labels).sum() == best


def test_more_clusters_than_classes_leave_some_without() -> None:
    clusters, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert matched(clusters, labels).tolist() == [0, 0, -1, 1, 1, 1]


def test_scores_are_scikit_learns() -> None:
    x, labels = blobs(200, noise=1.2)
    names = torch.tensor([5, 9, 2, 70])[labels]
    found = cluster(x, names, seeds=2)
    for seed in range(2):
        own = kmeans(unit(x), 4, seed)
        assert found.nmi[seed] == pytest.approx(100 * normalized_mutual_info_score(names, own))
        assert found.ari[seed] == pytest.approx(100 * adjusted_rand_score(names, own))
        assert found.accuracy[seed] == pytest.approx(100 * found.right[seed].double().mean().item())
    dense = names.unique(return_inverse=True)[1]
    assert found.accuracy[0] == pytest.approx(
        100 * (matched(kmeans(unit(x), 4, 0), dense) == dense).double().mean().item()
    )


def test_clusters_are_as_good_as_scikit_learns() -> None:
    """By the objective of spherical k-means: the sum of cosines to the clusters' directions."""
    x, _ = blobs(300, classes=6, noise=1.5)
    vectors = unit(x)
    theirs = torch.from_numpy(KMeans(6, n_init=10, random_state=0).fit(vectors).labels_).long()
    worth = [
        vectors.new_zeros(6, 12).index_add(0, own, vectors).norm(dim=1).sum() for own in (kmeans(vectors, 6, 0), theirs)
    ]
    assert worth[0] > 0.995 * worth[1]


def test_lengths_do_not_count_and_starts_are_fixed() -> None:
    x, labels = blobs(200, noise=0.3)
    lengths = torch.logspace(-2, 2, 200)[:, None]
    assert cluster(x * lengths, labels).accuracy == (100.0, 100.0, 100.0)
    hard, _ = blobs(300, noise=4)
    assert torch.equal(kmeans(unit(hard), 4, 1), kmeans(unit(hard), 4, 1))
    assert not torch.equal(kmeans(unit(hard), 9, 1), kmeans(unit(hard), 9, 2))


def test_a_collapsed_encoder_finds_nothing() -> None:
    found = cluster(torch.ones(60, 8), torch.arange(60) % 3)
    assert found.nmi == (0.0, 0.0, 0.0)
    assert found.accuracy[0] == pytest.approx(100 / 3)


def test_outcomes_need_no_train() -> None:
    (x, labels), (y, truth) = blobs(100), blobs(80, seed=1)
    found = {outcome.metric: outcome for outcome in run(subject_of(x, labels, y, truth, seeds=2))}
    assert list(found) == ["NMI", "ARI", "accuracy"]
    assert found["NMI"].values == cluster(y, truth, seeds=2).nmi
    assert found["accuracy"].each is not None
    assert sum(found["accuracy"].values) / 2 == pytest.approx(100 * found["accuracy"].each.mean().item(), rel=1e-5)
    assert "4 clusters, the best of 10 starts" in found["ARI"].protocol
    assert EVALUATORS["cluster"].run is run
    assert not EVALUATORS["cluster"].train


def test_bad_input_is_refused() -> None:
    x, labels = blobs(20)
    refuses_lists(lambda a, b, c, d: cluster(a, b))
    for count in (1, 0, 21):
        with pytest.raises(UsageError, match=f"{count} clusters of 20 samples: choose from 2"):
            cluster(x, labels, count)
    with pytest.raises(UsageError, match="all 20 samples have the label 0; clusters need two classes"):
        cluster(x, torch.zeros_like(labels))
    with pytest.raises(UsageError, match="5 of 20 samples have no label"):
        cluster(x, torch.where(labels == 0, -1, labels))
    with pytest.raises(UsageError, match="20 samples have 3 labels"):
        cluster(x, labels[:3])
    with pytest.raises(NumericError, match="not finite"):
        cluster(x * torch.nan, labels)
    with pytest.raises(NumericError, match="length zero"):
        cluster(x * 0, labels)
