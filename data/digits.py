"""The built-in set `digits:train` / `digits:test`: scikit-learn's 1,797 handwritten 8 x 8 digits, as shards.

Every fifth image is a test image (359), the others train (1,438). Source: the test part of UCI's "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak 1998, CC BY 4.0), which scikit-learn carries, so that nothing is downloaded.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.data.index import build_index, cache_folder
from selfsight.errors import StorageError, UsageError

SPLITS = ("train", "test")


def images(split: str) -> Iterator[tuple[Image.Image | bytes, int | None]]:
    """The images of one split with their labels, in scikit-learn's order; grey levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise UsageError(f"digits:{split}: the built-in digits have the splits {' and '.join(SPLITS)}")
    pixels, labels = load_digits(return_X_y=True)
    levels = np.rint(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    for i, (image, label) in enumerate(zip(levels, labels, strict=True)):
        if (i % 5 == 4) == (split == "test"):
            yield Image.fromarray(image), int(label)


def shards(split: str) -> list[Path]:
    """The split as one indexed shard in the cache folder, written the first time it is asked for."""
    from selfsight.data.build import write_shards

    if split not in SPLITS:
        raise UsageError(f"digits:{split}: the built-in digits have the splits {' and '.join(SPLITS)}")
    folder = cache_folder() / "digits-1"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix="digits-", dir=folder.parent))
        except OSError as error:
            raise StorageError(f"{folder.parent}: cannot be written ({error.strerror}); set SELFSIGHT_CACHE") from None
        for part in SPLITS:
            write_shards(images(part), draft, prefix=f"digits-{part}")
        try:
            os.rename(draft, folder)  # another process may have been first: its copy is as good
        except OSError:
            shutil.rmtree(draft)
    shard = folder / f"digits-{split}-000000.tar"
    if not shard.with_name(shard.name + ".idx").exists():
        build_index(shard)
    return [shard]
