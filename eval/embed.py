"""Features of a set as one file: `selfsight embed ENCODER SPEC OUT`, and `selfsight.embed` in Python."""

from collections.abc import Sequence
from pathlib import Path

import torch

from selfsight import __version__
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import UsageError
from selfsight.eval.asked import TOKEN_POOLS, pools_of
from selfsight.eval.cache import Cache, key_of, opened, weights_of
from selfsight.eval.extracted import Extractor
from selfsight.eval.features import Extraction, Features
from selfsight.eval.leaks import prints_of
from selfsight.eval.ranks import ALONE, Ranks, own_device
from selfsight.eval.stored import SUFFIXES, Stored, write
from selfsight.eval.subject import Options
from selfsight.redact import redact


def embed(
    encoder: Encoder | str | Path,
    spec: str | Sequence[str],
    *,
    pools: Sequence[str] | None = None,
    scales: Sequence[int] = Extraction.scales,
    merge: int = Extraction.merge,
    workers: int = 0,
    device: torch.device | None = None,
    cache: Cache | Path | str | bool | None = None,
    ranks: Ranks = ALONE,
) -> Features:
    """Features of a set, as every evaluator sees them: vectors by pool (N, D) float32 on the CPU, labels, groups.

    Args:
        encoder: in memory, or whatever `load_encoder` takes.
        spec: shards; labels need not be there (-1).
        pools: of `Encoder.pools`; None: the encoder's own alone.
        cache: as for `evaluate`.

    Raises:
        UsageError: pools that the encoder does not have.
        DataError: images that cannot be read.
        NumericError: features that are not finite.
    """
    return stored(encoder, spec, pools, Extraction(tuple(scales), merge), workers, device, cache, ranks).features


def embed_to(path: Path, made: Stored, ranks: Ranks = ALONE) -> str:
    """Write what `stored` has made, on the first rank; what to say of it."""
    if ranks.main:
        write(path, made)
    vectors = made.features.vectors
    told = ", ".join(f"{pool} {rows.shape[1]}" for pool, rows in vectors.items())
    return f"{path}: {len(made.features.labels):,} samples, {told}"


def require_writable_as(path: Path) -> None:
    """Raise UsageError before hours are spent on features that cannot be written."""
    if path.suffix not in SUFFIXES[:2]:
        raise UsageError(f"{path}: features are written as .safetensors or .npz")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder")


def stored(
    encoder: Encoder | str | Path,
    spec: str | Sequence[str],
    pools: Sequence[str] | None,
    extraction: Extraction,
    workers: int = 0,
    device: torch.device | None = None,
    cache: Cache | Path | str | bool | None = None,
    ranks: Ranks = ALONE,
) -> Stored:
    """Features of a set with what tells where they are from; see `embed`."""
    from selfsight.loading import load_encoder

    shards = Shards(spec)
    live = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    if token := [pool for pool in pools or () if pool in TOKEN_POOLS]:
        raise UsageError(f"{', '.join(token)}: is learned by the linear probe from tokens; it is no vector to store")
    chosen = pools_of(live, Options(pools=tuple(pools or (live.pool,))))
    extractor = Extractor(device or own_device(), workers, opened(cache), ranks)
    with evaluating(live, extractor.device):
        features = extractor.features(live, chosen, shards, extraction)
    about = {
        "encoder": "in memory" if isinstance(encoder, Encoder) else redact(str(encoder)),
        "key": key_of({"weights": weights_of(live), "scales": extraction.scales, "merge": extraction.merge})[:16],
        "data": redact(shards.spec),
        "selfsight": __version__,
    }
    return Stored(features, prints_of(shards), about)
