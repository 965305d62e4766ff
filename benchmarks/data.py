"""The data path against what others use: images per second of one core, from stored bytes to a normalised float32 batch.

python benchmarks/data.py --json          about two minutes on one core

Every ratio is the median of paired runs: theirs, ours, theirs, ours, on the same images, one thread, in CPU time of the
process (`time.process_time`), which other work on the machine disturbs least; ratios of wall time stand beside them.
`jpeg` and `resized` are set against torchvision's v1 transforms on an ImageFolder of the original files (what MAE and
lightly use): PIL, RandomResizedCrop(224, bicubic), flip, ToTensor, Normalize. `resized` reads shards built with --short-side
256; what torchvision does with the same smaller files is told, too. `cifar` is set against webdataset, PNG and v1 transforms.
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
import webdataset as wds
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from selfsight.data import jpeg
from selfsight.data.build import Encoding, build
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import Form
from selfsight.data.index import RECORD, index_path, write_index
from selfsight.data.loader import Batches
from selfsight.data.pixel_cache import build_cache
from selfsight.data.placer import Placer
from selfsight.data.shards import Shards
from selfsight.data.views import View

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO, TINY = 224, 32  # sides of the views
BATCH, TINY_BATCH = 48, 256
MILLION = 1_000_000
Times = tuple[float, float]  # images per second of CPU time and of wall time


def rate(run: Callable[[], int]) -> Times:
    """Images per second of a run that says how many it made."""
    wall, cpu = time.perf_counter(), time.process_time()
    images = run()
    return images / (time.process_time() - cpu), images / (time.perf_counter() - wall)


def paired(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[Times]]:
    """The rates of several ways, in turn, after one round that warms caches."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            times = rate(run)
            if round_:
                found[name].append(times)
    return found


def ratio(found: dict[str, list[Times]], ours: str, theirs: str, kind: int = 0) -> float:
    """Median over the pairs."""
    return round(median(a[kind] / b[kind] for a, b in zip(found[ours], found[theirs], strict=True)), 2)


def selfsight_epoch(shards: Shards, size: int, batch: int, batches: int, **options: Any) -> Callable[[], int]:
    """Batches of ours, up to normalised views."""
    makers = (ViewMaker(View(), 0, size, "bicubic", 0),)
    made = Batches(shards, makers, 0, Form(3), batch, **options)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    place = Placer((View(),), mean, std, 0)

    def run() -> int:
        return sum(len(place(made[number]).views[0]) for number in range(batches))

    return run


def without_simplejpeg(run: Callable[[], int]) -> Callable[[], int]:
    """The same by Pillow."""

    def patched() -> int:
        known, jpeg.library = jpeg.library, lambda: None  # type: ignore[assignment]
        try:
            return run()
        finally:
            jpeg.library = known

    return patched


def v1(size: int) -> transforms.Compose:
    """torchvision's first transforms, as in MAE's main_pretrain.py."""
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )


def torchvision_epoch(shards: Shards, folder: Path) -> Callable[[], int]:
    """An ImageFolder of the same files."""
    for sample in range(len(shards)):
        path = folder / str(sample % 10) / f"{sample}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.read(sample))
    loader = DataLoader(datasets.ImageFolder(str(folder), v1(PHOTO)), batch_size=BATCH, shuffle=True)
    return lambda: sum(len(images) for images, _ in loader)


def webdataset_epoch(shards: Shards, images: int) -> Callable[[], int]:
    """The first images of the same tars."""
    urls = [str(path) for path in shards.paths]
    made = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("png", "cls")
    loader = DataLoader(made.map_tuple(v1(TINY), int), batch_size=TINY_BATCH)

    def run() -> int:
        seen = 0
        for batch, _ in loader:
            seen += len(batch)
            if seen >= images:
                break
        return seen

    return run


def reading(shards: Shards, count: int) -> Callable[[], int]:
    """Samples in the run's order, with their checksums."""

    def run() -> int:
        for start in range(0, count, TINY_BATCH):
            for sample in shards.ids(np.arange(start, start + TINY_BATCH), 0).tolist():
                shards.read(sample)
        return -(-count // TINY_BATCH) * TINY_BATCH

    return run


def first_batch_seconds(tiny: Shards, folder: Path) -> float:
    """From nothing open to the first batch of a million samples: a sparse tar whose index names one image a million times."""
    body, shard = tiny.read(0), folder / "million.tar"
    with shard.open("wb") as file:
        file.write(bytes(512) + body)
        file.truncate(MILLION * 1024)
    records = np.zeros(MILLION, RECORD)
    records["offset"], records["size"], records["label"], records["group"] = 512, len(body), -1, -1
    records["crc"] = tiny._locate(0)[1]["crc"]
    write_index(index_path(shard), records, shard.stat().st_size)
    started = time.perf_counter()
    selfsight_epoch(Shards(str(shard)), TINY, TINY_BATCH, 1)()
    return round(time.perf_counter() - started, 3)


def photographs(spec: str, folder: Path, rounds: int) -> dict[str, float]:
    """Original and smaller JPEGs against torchvision."""
    build(spec, folder / "photos")
    build(spec, folder / "resized", encoding=Encoding(short_side=256))
    photos, resized = Shards(str(folder / "photos")), Shards(str(folder / "resized"))
    count = len(photos) // BATCH
    runs = {
        "torchvision": torchvision_epoch(photos, folder / "files"),
        "jpeg": selfsight_epoch(photos, PHOTO, BATCH, count),
        "resized": selfsight_epoch(resized, PHOTO, BATCH, count),
        "torchvision_resized": torchvision_epoch(resized, folder / "small"),
        "jpeg_without_simplejpeg": without_simplejpeg(selfsight_epoch(photos, PHOTO, BATCH, count)),
        "jpeg_repeat_4": selfsight_epoch(photos, PHOTO, BATCH, count, repeat=4),
    }
    found = paired(runs, rounds)
    told = {f"{name}_images_per_second": round(median(cpu for cpu, _ in times), 1) for name, times in found.items()}
    return told | {
        "jpeg_vs_torchvision": ratio(found, "jpeg", "torchvision"),
        "jpeg_vs_torchvision_wall": ratio(found, "jpeg", "torchvision", 1),
        "resized_vs_torchvision": ratio(found, "resized", "torchvision"),
        "resized_vs_torchvision_wall": ratio(found, "resized", "torchvision", 1),
        "resized_vs_torchvision_resized": ratio(found, "resized", "torchvision_resized"),
        "without_simplejpeg_vs_torchvision": ratio(found, "jpeg_without_simplejpeg", "torchvision"),
        "repeat_4_vs_torchvision": ratio(found, "jpeg_repeat_4", "torchvision"),
    }


def tiny_images(spec: str, folder: Path, rounds: int) -> dict[str, float]:
    """CIFAR-size images against webdataset; reading alone; the first batch of a million."""
    build(spec, folder / "tiny")
    shards = Shards(str(folder / "tiny"))
    started = time.process_time()
    cache = build_cache(shards, Form(3))
    built = time.process_time() - started
    runs = {
        "webdataset": webdataset_epoch(shards, min(len(shards), 2048)),
        "cifar": selfsight_epoch(shards, TINY, TINY_BATCH, 60, cache=cache),
        "cifar_without_cache": selfsight_epoch(shards, TINY, TINY_BATCH, 8),
        "read": reading(shards, 20_000),
    }
    found = paired(runs, rounds)
    rates = {name: round(median(cpu for cpu, _ in times), 1) for name, times in found.items()}
    return {
        **{f"{name}_images_per_second": value for name, value in rates.items() if name != "read"},
        "read_samples_per_second": rates["read"],
        "cifar_vs_webdataset": ratio(found, "cifar", "webdataset"),
        "cifar_vs_webdataset_wall": ratio(found, "cifar", "webdataset", 1),
        "cifar_without_cache_vs_webdataset": ratio(found, "cifar_without_cache", "webdataset"),
        "cache_built_images_per_second": round(len(shards) / built, 1),
        "first_batch_of_a_million_seconds": median(first_batch_seconds(shards, folder) for _ in range(3)),
    }


def main() -> None:
    """Print the rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos, cifar = SHARED / "photos/photos-*.tar", SHARED / "cifar10/cifar10-train-00000{0..1}.tar.xz"
    parser.add_argument("--photos", default=str(photos), metavar="SPEC", help="tars of JPEGs (default: %(default)s)")
    parser.add_argument(
        "--cifar", default=str(cifar), metavar="SPEC", help="tars of 32 x 32 PNGs (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SELFSIGHT_CACHE"] = f"{folder}/cache"
        result = photographs(options.photos, Path(folder), options.rounds)
        result |= tiny_images(options.cifar, Path(folder), options.rounds)
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:40} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
