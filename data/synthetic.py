"""Random images in place of a set that is not there yet, for `selfsight bench --synthetic`: alike in size and cost, not to be learned from."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.data.index import build_index, cache_folder, index_path, write_index
from selfsight.data.packing import Encoding, Sample, write_shards
from selfsight.errors import StorageError, UsageError
from selfsight.recipe import DataConfig, EncoderConfig

DISTINCT, SAMPLES = 64, 131_072  # images in the tar, and samples in its index: each image stands there again and again
PHOTOGRAPH = (500, 375)  # pixels, as most of ImageNet
SMALL = 64  # pixels of a view up to which images are as large as it, as CIFAR's are
GRAIN = 12  # pixels of a patch of one colour; with a little noise the JPEGs have about ImageNet's 110 KB


def synthetic(data: DataConfig, encoder: EncoderConfig) -> Path:
    """A shard of random images for this encoder, in the cache folder, written the first time it is asked for.

    Views of more than 64 pixels come from JPEGs of 500 x 375, smaller ones from PNGs of their own size.

    Raises:
        UsageError: an encoder that wants other than images of 8 bits with one or three channels.
    """
    if encoder.channels not in (1, 3) or encoder.frames > 1 or data.depth != 8:
        raise UsageError("--synthetic: makes images of 8 bits with 1 or 3 channels only; build shards of your own data")
    side = encoder.image_size
    folder = cache_folder() / f"synthetic-1-{'photographs' if side > SMALL else side}-{encoder.channels}"
    shard = folder / "synthetic-000000.tar"
    if shard.exists():
        return shard
    draft = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="synthetic-", dir=folder.parent))
        _write(draft, side, encoder.channels)
        with suppress(OSError):  # another process may have been first: its copy is as good
            os.rename(draft, folder)
        if not shard.exists():
            raise StorageError(f"{folder}: is in the way of random images; remove it, or set SELFSIGHT_CACHE")
    except OSError as error:
        raise StorageError(f"{folder.parent}: cannot be written ({error.strerror}); set SELFSIGHT_CACHE") from None
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)
    return shard


def _write(folder: Path, side: int, channels: int) -> None:
    large = side > SMALL
    size = PHOTOGRAPH if large else (side, side)
    write_shards(
        (Sample(image) for image in images(DISTINCT, size, channels)),
        folder,
        "synthetic",
        Encoding(format="jpeg" if large else "png"),
    )
    shard = folder / "synthetic-000000.tar"
    records = build_index(shard)
    write_index(index_path(shard), np.tile(records, SAMPLES // DISTINCT), shard.stat().st_size)


def images(count: int, size: tuple[int, int] = PHOTOGRAPH, channels: int = 3) -> Iterator[Image.Image]:
    """So many random images, the same ones every time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = rng.integers(0, 256, (-(-size[1] // GRAIN), -(-size[0] // GRAIN), 3), np.uint8)
        smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 9, (size[1], size[0], 3))
        made = Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))
        yield made if channels == 3 else made.convert("L")
