"""Synthetic photographs in JPEG, and shards of them: as many bytes and as much to decode as ImageNet's, and nothing to see.

python benchmarks/photographs.py FOLDER COUNT
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)  # ImageNet's usual size
QUALITY = 92


def photograph(number: int) -> Image.Image:
    """Noise of several scales, the coarse ones strong, as photographs have it."""
    draw = np.random.default_rng(number)
    made = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    for side in (4, 16, 64, 256):
        cells = Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8))
        made += np.asarray(cells.resize(SIZE, Image.Resampling.BICUBIC), np.float32) / side**0.5
    return Image.fromarray((255 * (made - made.min()) / (made.max() - made.min())).astype(np.uint8))


def main() -> None:
    """Write FOLDER/images/CLASS/NUMBER.jpg and FOLDER/shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    for number in range(options.count):
        path = options.folder / "images" / f"class{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path, quality=QUALITY)
    words = ["shards", "build", str(options.folder / "images"), str(options.folder / "shards")]
    subprocess.run([sys.executable, "-m", "selfsight", *words], check=True)


if __name__ == "__main__":
    main()
