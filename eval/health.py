"""How healthy features are, without labels: how many dimensions they use, how they spread, what augmentation moves.

Numbers to compare encoders and checkpoints by, on the same images: docs/evaluation.md says which way each of them points.
"""

from math import isfinite, log, nan

import torch
from torch import Tensor

from selfsight.attention import attention_distance
from selfsight.data.crops import ViewMaker
from selfsight.data.loader import Batches
from selfsight.data.placer import normalize
from selfsight.data.views import View
from selfsight.encoder import evaluating
from selfsight.errors import DataError, UsageError
from selfsight.eval.features import prepared
from selfsight.eval.knn import unit
from selfsight.eval.subject import Outcome, Subject

PAIRED = 4096  # samples whose pairs are compared
ALIGNED, LOOKED_AT, BATCH = 512, 64, 64  # images that are encoded anew: in two views, and for their attention
FIRST_RANK, LAST_RANK = 4, 100  # of the eigenvalues that a power law is fitted to, as in the authors' code
VIEW = View()  # the house's: a crop of 0.2 to 1 of the area, half of them mirrored


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1): exp of the entropy of the normalised singular values.

    Between 1 (all features on one line: collapse) and the width D.

    Args:
        features: (N, D), not centred.

    Returns:
        NaN where they are not finite.
    """
    features = features.double()
    if not features.isfinite().all():
        return nan
    if features.shape[1] > 4 * len(features):  # the singular values are those of the smaller Gram matrix
        values = torch.linalg.eigvalsh(features @ features.T).clamp(min=0).sqrt()
    else:
        values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=1e-300) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


def eigenvalues(features: Tensor) -> Tensor:
    """Of the covariance of features (N, D), largest first, float64: min(N, D) of them, none below 0."""
    centred = features.double() - features.double().mean(0)
    gram = centred.T @ centred if len(centred) >= centred.shape[1] else centred @ centred.T
    return torch.linalg.eigvalsh(gram / max(1, len(centred) - 1)).flip(0).clamp(min=0)


def alpha_req(features: Tensor) -> float:
    """alpha-ReQ (Agrawal et al. 2022, NeurIPS, section 3): the exponent alpha of lambda_i ~ i^-alpha, the covariance's spectrum.

    A line through log(lambda_i) against log(i) by least squares with weights 1 / i, over ranks 4 to 100 or as many as are
    above 1e-12 of the largest (numerically there). Near 1 is healthy; far above, a few dimensions have it all.

    Args:
        features: (N, D).

    Returns:
        NaN where they are not finite, or have fewer than six dimensions in use.
    """
    if not features.isfinite().all():
        return nan
    values = eigenvalues(features)
    used = int((values > 1e-12 * values[0]).sum()) if len(values) else 0
    last = min(used, LAST_RANK)
    if last < FIRST_RANK + 2:
        return nan
    ranks = torch.arange(FIRST_RANK, last + 1, dtype=torch.float64)
    x, y, weights = ranks.log(), values[FIRST_RANK - 1 : last].log(), 1 / ranks
    x, y = x - (weights * x).sum() / weights.sum(), y - (weights * y).sum() / weights.sum()
    return -((weights * x * y).sum() / (weights * x * x).sum()).item()


def effective_rank(features: Tensor) -> float:
    """Effective rank (Roy, Vetterli 2007, EUSIPCO, definition 1) of the features' covariance: exp of its spectrum's entropy.

    Between 1 and D. RankMe asks the same of the features themselves: singular values, not squared, the mean not removed.

    Args:
        features: (N, D).

    Returns:
        NaN where they are not finite; 1 where they do not vary at all.
    """
    if not features.isfinite().all():
        return nan
    shares = eigenvalues(features)
    shares = shares / shares.sum().clamp(min=1e-300)
    return torch.special.entr(shares).sum().exp().item()


def dimension_std(features: Tensor) -> float:
    """Standard deviation of each dimension of the features at length 1, mean over dimensions (SimSiam: Chen, He 2021, section 4.1).

    0 where all point one way (collapse), 1 / sqrt(D) where they point everywhere alike.

    Args:
        features: (N, D).

    Raises:
        NumericError: a feature that is not finite or has length zero.
    """
    return unit(features).double().std(0, correction=0).mean().item()


def mean_cosine(features: Tensor) -> float:
    """Cosine of two different samples' features, mean over all pairs: 1 where all point one way, 0 where they are spread evenly.

    Args:
        features: (N, D), N at least 2.

    Raises:
        UsageError: one sample.
        NumericError: as for `dimension_std`.
    """
    require_pairs(features)
    near = unit(features).double()  # |sum of u|^2 has every pair twice, and each sample with itself
    return ((near.sum(0).square().sum() - near.square().sum()) / (len(near) * (len(near) - 1))).item()


def require_pairs(features: Tensor) -> None:
    """Raises UsageError: fewer than two samples."""
    if len(features) < 2:
        raise UsageError(f"health compares images with each other; test has {len(features)}")


def uniformity(features: Tensor, t: float = 2.0, most: int = PAIRED) -> float:
    """Uniformity (Wang, Isola 2020, arXiv 2005.10242, equation 5): log of the mean of exp(-t |x - y|^2) over pairs at length 1.

    0 where all are one point, and the lower the more evenly they lie on the sphere: about -2 t for many dimensions.

    Args:
        features: (N, D), N at least 2.
        most: of more samples than so many, which lie evenly among them, the pairs are taken; exact below.

    Raises:
        UsageError: one sample.
        NumericError: as for `dimension_std`.
    """
    require_pairs(features)
    near = unit(features)[spread(len(features), most)].double()
    rows, columns = torch.triu_indices(len(near), len(near), 1)
    cosine = (near @ near.T)[rows, columns]
    return (torch.logsumexp(2 * t * (cosine - 1), 0) - log(len(cosine))).item()


def alignment(first: Tensor, second: Tensor) -> float:
    """Alignment (Wang, Isola 2020, arXiv 2005.10242, equation 4, alpha = 2): mean of |x - y|^2 over two views, at length 1.

    0 where augmentation moves nothing (a collapsed encoder, too: read it beside uniformity), 2 where views of an image
    are strangers.

    Args:
        first, second: features (N, D) of two views of the same images.

    Raises:
        NumericError: as for `dimension_std`.
    """
    return (unit(first).double() - unit(second).double()).square().sum(1).mean().item()


def spread(size: int, most: int) -> Tensor:
    """At most so many of `size` indices, evenly from the first on."""
    return torch.arange(size) if size <= most else torch.arange(most) * size // most


@torch.inference_mode()
def two_views(subject: Subject, most: int = ALIGNED) -> tuple[Tensor, Tensor]:
    """Features (at most `most`, D) of two augmented views of test images, drawn by the samples' numbers: always the same.

    Raises:
        DataError: an image that cannot be read.
    """
    assert subject.encoder and subject.preprocessing and subject.sets
    made, shards, encoder = subject.preprocessing, subject.sets[1], subject.encoder
    makers = tuple(ViewMaker(VIEW, number, made.image_size, made.interpolation, 0) for number in (0, 1))
    batches = Batches(shards, makers, 0, made.form, BATCH, step=made.step)
    mean, std = made.statistics(subject.device)
    parts: list[list[Tensor]] = []
    for chunk in spread(len(shards), most).split(BATCH):
        ids = chunk.numpy()
        host = batches.make(ids, ids.copy(), ids)
        if host.bad:  # a score must not depend on a substitute
            raise DataError(f"{host.bad[0].where}: {host.bad[0].reason}")
        views = [normalize(view.to(subject.device), mean, std, made.values) for view in host.views]
        with evaluating(encoder):
            parts.append([encoder.embed(view, subject.pool).float().cpu() for view in views])
    first, second = (torch.cat(view) for view in zip(*parts, strict=True))
    return first, second


def attention_reach(subject: Subject, most: int = LOOKED_AT) -> Tensor | None:
    """`attention_distance` (layers, heads) on at most so many test images, pixels; None: the backbone has no such attention."""
    assert subject.encoder and subject.preprocessing and subject.sets
    if not subject.encoder.plain:
        return None
    ids, found = spread(len(subject.sets[1]), most).numpy(), []
    for images in prepared(subject.preprocessing, subject.sets[1], subject.device, ids):
        found += [attention_distance(subject.encoder, part) * len(part) for part in images.split(8)]
    return torch.stack(found).sum(0) / len(ids)


def run_health(subject: Subject) -> list[Outcome]:
    """Every number of this file, of test features; labels are not looked at."""
    held = subject.held
    require_pairs(held)
    told = f"{len(held):,} test images, {held.shape[1]} dimensions; features: {subject.taken}; no labels"
    pairs = f" on {PAIRED:,} of them" if len(held) > PAIRED else ""
    rows = [
        ("RankMe", rankme(held), "RankMe: exp of the entropy of the singular values"),
        (
            "alpha-ReQ",
            alpha_req(held),
            f"alpha-ReQ: exponent of the covariance's spectrum, ranks {FIRST_RANK} to {LAST_RANK}",
        ),
        ("effective rank", effective_rank(held), "effective rank: exp of the entropy of the covariance's spectrum"),
        ("std", dimension_std(held), "std: of a dimension at length 1, mean over dimensions"),
        ("cosine", mean_cosine(held), "cosine: of two different images, mean over pairs"),
        ("uniformity", uniformity(held), f"uniformity: log mean exp(-2 |x - y|^2) at length 1{pairs}"),
    ]
    # A number that cannot be had (too few dimensions for a power law) has no row.
    made = [
        Outcome((value,), f"health, {how}; {told}", metric=name, unit="")
        for name, value, how in rows
        if isfinite(value)
    ]
    return made + (_of_images(subject) if subject.encoder and subject.sets else [])


def _of_images(subject: Subject) -> list[Outcome]:
    """What needs the encoder again."""
    assert subject.sets
    size = len(subject.sets[1])
    told = f"features: {subject.pool}, fp32{subject.plainly}; no labels"
    how = f"alignment: mean |x - y|^2 at length 1 of two views (crop 0.2-1 of the area, flip) of {min(size, ALIGNED)} images"
    made = [Outcome((alignment(*two_views(subject)),), f"health, {how}; {told}", metric="alignment", unit="")]
    if (reach := attention_reach(subject)) is not None:
        how = f"attention distance: pixels, weighted by attention between patches, mean over heads and blocks, {min(size, LOOKED_AT)} images"
        detail = {"attention_distance": [[round(head, 3) for head in layer] for layer in reach.tolist()]}
        value = reach.mean().item()
        made.append(Outcome((value,), f"health, {how}; {told}", metric="attention distance", unit="px", detail=detail))
    return made
