"""Whether a GPU decodes JPEGs here, and how fast: random photographs, in batches as `data.decode: device` decodes them.

python benchmarks/nvjpeg.py

Fails where it does not, as a run would.
"""

import argparse
import json
import time
from io import BytesIO
from statistics import median

import numpy as np
import torch
from PIL import Image

from selfsight.data.device_jpeg import AT_ONCE, require_decoder
from selfsight.data.packing import Encoding, encode
from selfsight.data.synthetic import images
from selfsight.exports.card import hardware_of
from selfsight.speed import synchronize

LEVELS = 8.0  # of 255, on average: two decoders that differ by more do not decode the same


def measure(device: torch.device, rounds: int) -> dict[str, float | str]:
    """The rate, and how far the pixels are from Pillow's."""
    bodies = [encode(image, Encoding(format="jpeg"))[1] for image in images(AT_ONCE)]  # as shards have them
    decode_jpeg = require_decoder()
    made = decode_jpeg(bodies, mode="RGB", device=device)
    theirs = [torch.from_numpy(np.array(Image.open(BytesIO(body)))).permute(2, 0, 1).float() for body in bodies]
    levels = torch.stack(
        [(one.cpu().float() - other).abs().mean() for one, other in zip(made, theirs, strict=True)]
    ).max()
    if levels > LEVELS:
        raise SystemExit(f"pixels are {levels:.1f} levels from Pillow's on average")
    found = []
    for _ in range(rounds):
        synchronize(device)
        begun = time.perf_counter()
        decode_jpeg(bodies, mode="RGB", device=device)
        synchronize(device)
        found.append(len(bodies) / (time.perf_counter() - begun))
    return {
        "hardware": hardware_of(device),
        "images_per_second": round(median(found), 1),
        "spread": round((max(found) - min(found)) / 2 / median(found), 4),
        "rounds": rounds,
        "levels_from_pillow": round(levels.item(), 3),
    }


def main() -> None:
    """Print one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    print(json.dumps(measure(torch.device(options.device), options.rounds), indent=1))


if __name__ == "__main__":
    main()
