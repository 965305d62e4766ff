"""Extraction of features against the encoder's bare forward pass: how much of it is left with reading, decoding and hashing.

python benchmarks/eval_extract.py --json          about four minutes on two cores

Photographs: 768 JPEGs of 256 x 256 (pieces of scikit-learn's two), ViT-S/16 at 224. Tiny: 6,144 PNGs of 32 x 32, a ViT of width
192, depth 12 and patch 4. Paired and alternating, wall time, all in one process without workers: the bare forward pass has
its normalised batches ready in memory. The ratio is theirs / ours in seconds: 1 is as fast as the encoder alone. The ratio of CPU time, which other
work on the machine disturbs least, is what reading and decoding take of the same cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from selfsight.data.build import Encoding, write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.eval.features import extract, prepared
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "photos": (768, 256, {"name": "vit_small_patch16_224", "image_size": 224}),
    "tiny": (6144, 32, {"image_size": 32, "patch": 4, "width": 192, "depth": 12, "heads": 3}),
}


def pieces(count: int, size: int) -> list[tuple[Image.Image, int]]:
    """So many places of two photographs."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        x, y = int(rng.integers(640 - size)), int(rng.integers(427 - size))
        made.append((photos[n % 2].crop((x, y, x + size, y + size)), n % 2))
    return made


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time of a run, and CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(encoder: Encoder, shards: Shards, repeats: int) -> dict[str, float]:
    """Median ratio of the pairs, its range, and images a second of both."""
    ready = list(prepared(encoder.preprocessing, shards, CPU))

    @torch.inference_mode()
    def bare() -> None:
        for images in ready:
            encoder.embed(images)

    pairs = [(seconds(bare), seconds(lambda: extract(encoder, shards, CPU))) for _ in range(repeats + 1)][1:]
    ratios = [theirs[0] / ours[0] for theirs, ours in pairs]
    images = len(shards)
    return {
        "ratio": round(median(ratios), 3),
        "ratio_of_cpu_time": round(median(theirs[1] / ours[1] for theirs, ours in pairs), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "forward_images_per_second": round(images / median(theirs[0] for theirs, _ in pairs), 1),
        "extract_images_per_second": round(images / median(ours[0] for _, ours in pairs), 1),
    }


def extract_vs_forward(repeats: int, share: float = 1.0) -> dict[str, float]:
    """`extract_vs_forward` (photographs, ViT-S/16), `extract_vs_forward_tiny`, and what they are made of.

    Args:
        share: of the images; with fewer than a few batches nothing is read ahead.
    """
    found: dict[str, float] = {}
    for case, (count, size, fields) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            encoding = Encoding(format="jpeg") if case == "photos" else Encoding()
            write_shards(iter(pieces(int(share * count), size)), Path(folder), "s", encoding)
            config = EncoderConfig(**fields)
            encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()
            told = measured(encoder, Shards(folder), repeats)
        name = "extract_vs_forward" + ("" if case == "photos" else f"_{case}")
        found |= {name if key == "ratio" else f"{name}_{key}": value for key, value in told.items()}
    return found


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the images (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = extract_vs_forward(options.repeats, options.share)
    print(json.dumps(found, indent=1) if options.json else "\n".join(f"{k:50} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
