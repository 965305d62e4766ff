"""Where the encoder puts a thousand training images: the nearest of some of them, and maps of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from selfsight import keyed
from selfsight.curves import Chart
from selfsight.data.mixture import Mixture, Samples
from selfsight.encoder import Encoder, evaluating
from selfsight.marks import colour, scatter
from selfsight.pictures import Picture, Pixels, array, crops, picture

MOST = 1_000  # images, whatever the set
MAPPED = 500  # of them on the maps: more would tell an eye little, and t-SNE takes a second for these
FEWEST = 32
REMOTE = 256  # images of a set that has to be fetched
CPU_WORK, GPU_WORK = 3e11, 1e14  # operations that a page may cost: ten to twenty seconds of two cores
FEWEST_MAPPED = 8
COLLAPSED = 1e-6  # largest difference of unit vectors that are all the same
CHUNK = 32
QUERIES, NEAREST = 6, 6
PERPLEXITY = 30.0
NAMED = 20  # classes in the legend


@dataclass(frozen=True)
class Bank:
    """Training images with their features."""

    ids: NDArray[np.int64]
    vectors: Tensor
    """(N, D) of unit length, on the CPU."""
    labels: NDArray[np.int64]
    """(N,), -1 where there is none; of a mixture, whose sets name their classes each for itself, the number of the set."""
    kind: str = "class"
    """What the labels are: "class" or "set"."""

    @property
    def classes(self) -> list[int]:
        """The labels that there are, if all samples have one and they are not all alike."""
        known = sorted({int(label) for label in self.labels})
        return known if len(known) > 1 and known[0] >= 0 else []


@dataclass(frozen=True)
class Neighbours:
    """A query, and its nearest images."""

    query: Picture
    found: list[tuple[Picture, str]]
    """With what is said under each."""


def bank_of(encoder: Encoder, shards: Samples, device: torch.device, seed: int) -> Bank | None:
    """Features of a fixed choice of training images; None if they are not finite or all of length zero.

    The choice is a function of the seed alone, and as large as the encoder's cost allows.
    """
    count = min(len(shards), how_many(encoder, device), REMOTE if shards.remote else MOST)
    order = np.argsort(keyed.hashes(seed, "report's bank", np.arange(len(shards)), 1)[:, 0], kind="stable")
    chosen = np.sort(order[:count]).astype(np.int64)
    ids: list[NDArray[np.int64]] = []
    vectors: list[Tensor] = []
    with evaluating(encoder), torch.inference_mode():
        for start in range(0, len(chosen), CHUNK):
            good, images = crops(shards, chosen[start : start + CHUNK], encoder.preprocessing, device)
            ids.append(good)
            vectors.append(encoder.embed(images).float().cpu())
    features, known = torch.cat(vectors).clone(), np.concatenate(ids)
    lengths = features.norm(dim=1, keepdim=True)
    if not features.isfinite().all() or not bool((lengths > 0).all()):
        return None
    mixed = isinstance(shards, Mixture) and len(shards.sets) > 1
    labels = shards.set_of(known) if isinstance(shards, Mixture) and mixed else shards.labels[known]
    return Bank(known, features / lengths, labels.astype(np.int64), "set" if mixed else "class")


def how_many(encoder: Encoder, device: torch.device) -> int:
    """Images that may be encoded: a forward pass takes two operations a weight and token."""
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    tokens = encoder.patches if encoder.plain else (encoder.preprocessing.image_size // 16) ** 2
    work = GPU_WORK if device.type == "cuda" else CPU_WORK
    return int(min(MOST, max(FEWEST, work / (2 * weights * tokens))))


def nearest(vectors: Tensor, queries: Sequence[int], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The most similar others (Q, count) of unit vectors (N, D), nearest first, and their cosines."""
    asked = torch.tensor(list(queries))
    similar = vectors[asked] @ vectors.T
    similar[torch.arange(len(asked)), asked] = -2.0
    cosines, found = similar.topk(min(count, len(vectors) - 1), dim=1)
    return found.numpy(), cosines.double().numpy()


def neighbours(bank: Bank, encoder: Encoder, shards: Samples) -> list[Neighbours]:
    """Some images spread over the bank, each with its nearest."""
    queries = np.unique(np.linspace(0, len(bank.ids) - 1, QUERIES).round().astype(int)).tolist()
    if len(bank.ids) < 2:
        return []
    found, cosines = nearest(bank.vectors, queries, NEAREST)
    made, labelled = encoder.preprocessing, bool(bank.classes)

    def shown(place: int) -> Pixels:
        return array(crops(shards, bank.ids[[place]], made, torch.device("cpu"))[1][0], made)

    rows = []
    for number, (query, others, near) in enumerate(zip(queries, found, cosines, strict=True), 1):
        mine = bank.labels[query]
        pictures = []
        for place, (other, cosine) in enumerate(zip(others.tolist(), near.tolist(), strict=True), 1):
            agrees = {True: " ✓", False: " ✗"}[bool(bank.labels[other] == mine)] if labelled else ""
            pictures.append((picture(shown(other), f"neighbour {place} of query {number}"), f"{cosine:.3f}{agrees}"))
        rows.append(Neighbours(picture(shown(query), f"query {number}"), pictures))
    return rows


def agreement(bank: Bank) -> str:
    """How often the nearest neighbour has the same label, in words; empty where labels are not known."""
    if not bank.classes or len(bank.ids) < 2:
        return ""
    first = nearest(bank.vectors, range(len(bank.ids)), 1)[0][:, 0]
    share = 100 * float((bank.labels[first] == bank.labels).mean())
    return f"Of {len(bank.ids):,} training images {share:.1f} % have a nearest neighbour of their own {bank.kind}."


def map_charts(bank: Bank) -> list[Chart]:
    """Maps of the bank: PCA, and t-SNE or, where it is installed, UMAP; none of a few points, or of collapsed features."""
    from sklearn.decomposition import PCA

    if len(bank.ids) < FEWEST_MAPPED or bool((bank.vectors - bank.vectors[0]).abs().max() < COLLAPSED):
        return []
    every = -(-len(bank.ids) // MAPPED)
    vectors, classes = bank.vectors[::every].double().numpy(), bank.classes
    numbers = [classes.index(int(label)) if classes else 0 for label in bank.labels[::every]]
    names = [f"{bank.kind} {label}" for label in classes]
    linear = PCA(2, svd_solver="full").fit(vectors)
    share = 100 * float(linear.explained_variance_ratio_.sum())
    made = [("PCA", linear.transform(vectors), f"The two directions that hold most, {share:.0f} % of the variance.")]
    made.append(curved_map(vectors))
    return [
        Chart(title, scatter(places.tolist(), numbers, names, f"{title} of {len(places):,} training images"), hint, "")
        for title, places, hint in made
    ]


def curved_map(vectors: NDArray[np.float64]) -> tuple[str, NDArray[np.float64], str]:
    """UMAP if umap-learn is installed, else t-SNE (van der Maaten, Hinton 2008); one thread, so that it is the same again."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    with threadpool_limits(1):
        if find_spec("umap"):
            import umap  # an addition of the user's own

            return (
                "UMAP",
                umap.UMAP(random_state=0).fit_transform(vectors),
                "Neighbours stay neighbours; distances are not.",
            )
        perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
        start = PCA(min(50, *vectors.shape), svd_solver="full").fit_transform(vectors)
        made = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=400).fit_transform(start)
    return (
        "t-SNE",
        made,
        f"Perplexity {perplexity:.0f}. Neighbours stay neighbours; distances and sizes of groups say little.",
    )


def legend(bank: Bank) -> list[tuple[str, str]]:
    """Classes and their colours, as styles; empty where they are too many to tell apart."""
    classes = bank.classes
    return [(str(label), colour(i, len(classes))) for i, label in enumerate(classes)] if len(classes) <= NAMED else []
