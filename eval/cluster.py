"""Clustering: do the features of test fall into its classes by themselves? Spherical k-means, as many clusters as classes."""

from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from selfsight import keyed
from selfsight.errors import UsageError
from selfsight.eval.knn import unit
from selfsight.eval.labels import check_features, check_labels, one_label
from selfsight.eval.subject import SEEDS, Outcome, Subject

ITERATIONS, TRIES = 100, 10


class ClusterResult(NamedTuple):
    """Percent, one a seed, beside what they are made of."""

    nmi: tuple[float, ...]
    ari: tuple[float, ...]
    accuracy: tuple[float, ...]
    """With each cluster given to one class at most, as is best (Hungarian)."""
    right: Tensor
    """(S, M) bool: samples whose cluster was given to their class."""


def cluster(features: Tensor, labels: Tensor, clusters: int | None = None, seeds: int = SEEDS) -> ClusterResult:
    """Cluster features without labels, then ask how clusters and classes agree.

    NMI (arithmetic mean of the entropies) and the adjusted Rand index are scikit-learn's.

    Args:
        features: (M, D), any lengths.
        labels: (M,) integers of at least 0.
        clusters: how many; None: as many as classes.

    Raises:
        UsageError: labels lacking or lists, one class, fewer than two clusters, more clusters than samples.
        NumericError: features that are not finite or have length zero.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    one_label(labels)
    check_features("test", features, labels)
    check_labels("test", labels)
    classes, truth = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise UsageError(
            f"test: all {len(labels):,} samples have the label {int(classes[0])}; clusters need two classes"
        )
    count = len(classes) if clusters is None else clusters
    vectors, found = unit(features).float(), []
    for seed in range(seeds):
        own = kmeans(vectors, count, seed)
        told = own.numpy(), truth.numpy()
        scores = normalized_mutual_info_score(*told[::-1]), adjusted_rand_score(*told[::-1])
        found.append((*(100 * float(score) for score in scores), matched(own, truth) == truth))
    nmi, ari, right = zip(*found, strict=True)
    return ClusterResult(nmi, ari, tuple(100 * own.double().mean().item() for own in right), torch.stack(right))


def kmeans(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each vector (M,): the best by objective of several starts of faiss's spherical k-means.

    Args:
        vectors: (M, D) float32 of length 1.

    Raises:
        UsageError: fewer than two clusters, or more than samples.
    """
    if not 2 <= clusters <= len(vectors):
        raise UsageError(f"{clusters:,} clusters of {len(vectors):,} samples: choose from 2 to the number of samples")
    start = int(keyed.hashes(seed, "k-means", [0], 1)[0, 0] % 2**31)
    solver = faiss.Kmeans(
        vectors.shape[1], clusters, niter=ITERATIONS, nredo=TRIES, seed=start, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors),
    )  # fmt: skip
    solver.train(vectors.numpy())
    return torch.from_numpy(solver.index.search(vectors.numpy(), 1)[1][:, 0])


def matched(clusters: Tensor, labels: Tensor) -> Tensor:
    """The class that each sample's cluster was given, (M,), -1 where a cluster got none.

    Clusters and classes are paired one to one so that the most samples agree.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), np.int64)
    np.add.at(counts, (clusters.numpy(), labels.numpy()), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    given = torch.full((len(counts),), -1)
    given[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return given[clusters]


def run(subject: Subject) -> list[Outcome]:
    """The evaluator: NMI, ARI and accuracy over seeds; of train nothing is used."""
    held, labels = subject.held, subject.test.labels
    found = cluster(held, labels, seeds=subject.options.seeds)
    protocol = (
        f"clusters of test without labels: spherical k-means, {len(labels.unique())} clusters, the best of {TRIES} starts; "
        f"{{}}; features: {subject.taken}"
    )
    chosen = {"pool": subject.pool}
    return [
        Outcome(found.nmi, protocol.format("normalised mutual information, arithmetic"), chosen, "NMI"),
        Outcome(found.ari, protocol.format("adjusted Rand index"), chosen, "ARI"),
        Outcome(
            found.accuracy, protocol.format("clusters given to classes one to one by the Hungarian method"), chosen,
            each=found.right.float().mean(0),
        ),
    ]  # fmt: skip
