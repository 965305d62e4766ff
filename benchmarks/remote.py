"""What a store far away costs: samples per second of one process, read from a web server with 0 and with 50 ms before each answer.

python benchmarks/remote.py --json          about a minute on 2 cores

One by one is what a loader without a plan does: a request for each sample, the next one after the answer. Planned is what loader
workers do: the batch and the next one are asked for together, neighbours in one request, up to 32 requests in flight. With
blocks the order keeps 64 neighbours near each other, which are read together into the cache on the disk. Warm is the same
order when all samples are in that cache. Local is a file beside. The server runs in a process of its own on the same
machine and is Python, too: without latency it is what limits. Wall time; medians over the repeats. Nothing is decoded.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

from webfault import Plan, Server

from selfsight.data.index import build_index
from selfsight.data.shards import Shards

BATCH, BLOCK = 64, 64
FEW = 128  # samples that are read one by one


def write_shard(folder: Path, number: int, samples: int, size: int) -> None:
    """A tar of random bytes that are called images."""
    rng = np.random.default_rng(number)
    with tarfile.open(folder / f"x-{number}.tar", "w") as tar:
        for sample in range(samples):
            entry = tarfile.TarInfo(f"{sample:06d}.jpg")
            entry.size = size
            tar.addfile(entry, io.BytesIO(rng.bytes(size)))
    build_index(folder / f"x-{number}.tar")


def serve(folder: Path, latency: float, told: Any) -> None:
    """Serve the files of a folder until the process is ended."""
    plans = {f"/{file.name}": Plan(file.read_bytes(), etag=f'"{file.name}"') for file in folder.iterdir()}
    with Server(plans, latency) as server:
        told.put(server.address)
        time.sleep(3600)


@contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    """The address of a server with this latency."""
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=serve, args=(folder, latency, told), daemon=True)
    process.start()
    try:
        yield told.get(timeout=60)
    finally:
        process.kill()
        process.join()


def one_by_one(shards: Shards, samples: int) -> int:
    """Each sample when the one before it is there."""
    for sample in shards.ids(np.arange(min(samples, FEW)), 0).tolist():
        shards.read(sample)
    return min(samples, FEW)


def planned(shards: Shards, samples: int) -> int:
    """In batches, each asked for while the one before it is read, as loader workers do."""
    ids = shards.ids(np.arange(samples + BATCH), 0)
    for start in range(0, samples, BATCH):
        shards.prefetch(ids[start : start + BATCH])
        shards.prefetch(ids[start + BATCH : start + 2 * BATCH])
        for sample in ids[start : start + BATCH].tolist():
            shards.read(sample)
    return samples


def rate(read: Callable[[Shards, int], int], spec: str, samples: int, block: int = 1) -> float:
    """Samples per second of one pass, in a process state as at the start of a run."""
    shards = Shards(spec, block)
    started = time.perf_counter()
    count = read(shards, samples)
    seconds = time.perf_counter() - started
    shards.close()
    return count / seconds


def rates(folder: Path, cache: Path, latency: float, samples: int, repeats: int) -> dict[str, float]:
    """Of all ways of reading, the medians."""
    found: dict[str, list[float]] = {}

    def measure(name: str, read: Callable[[Shards, int], int], gigabytes: str, block: int = 1) -> None:
        os.environ["SELFSIGHT_CACHE_GB"] = gigabytes
        found.setdefault(name, []).append(rate(read, spec, samples, block))

    with served(folder, latency) as address:
        for repeat in range(repeats):
            spec = f"{address}/x-{{0..3}}.tar"
            os.environ["SELFSIGHT_CACHE"] = str(cache / f"{latency}-{repeat}")
            measure("one_by_one", one_by_one, "0")
            measure("planned", planned, "0")
            measure("blocks", planned, "20", BLOCK)
            measure("warm", planned, "20", BLOCK)
    return {name: round(median(values), 1) for name, values in found.items()}


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--bytes", type=int, default=20_000, help="of a sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "shards", Path(name) / "cache"
        folder.mkdir()
        for number in range(4):
            write_shard(folder, number, options.samples // 4, options.bytes)
        samples = 4 * (options.samples // 4)
        result: dict[str, Any] = {
            "samples": samples,
            "bytes_of_a_sample": options.bytes,
            "batch": BATCH,
            "block": BLOCK,
        }
        result["local_samples_per_second"] = round(
            median(rate(planned, str(folder), samples) for _ in range(options.repeats)), 1
        )
        for latency in (0.0, 0.05):
            found = rates(folder, cache, latency, samples, options.repeats)
            result |= {f"{name}_at_{1000 * latency:.0f}_ms": value for name, value in found.items()}
    result["plan_against_one_by_one_at_50_ms"] = round(result["planned_at_50_ms"] / result["one_by_one_at_50_ms"], 1)
    result["blocks_against_one_by_one_at_50_ms"] = round(result["blocks_at_50_ms"] / result["one_by_one_at_50_ms"], 1)
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:40} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
