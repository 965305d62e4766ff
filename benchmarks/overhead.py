"""What the safeguards cost: images per second with and without the checksum of every sample and the finite check.

python benchmarks/overhead.py SHARDS --json          about 2 minutes on 2 cores

Paired runs in one process, in turn; medians of the ratios. SHARDS: labels are not needed (digits:train by default).
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged
from selfsight.data import shards as reading
from selfsight.data.shards import Shards
from selfsight.finite import all_finite, gradient_norm
from selfsight.processes import agree
from selfsight.recipe import load


def read_all(data: Shards, count: int) -> None:
    """Every sample's bytes, by index."""
    for sample in range(count):
        data.read(sample)


def make_batches(parts: Parts, count: int) -> None:
    """Read, decode, crop."""
    batches = parts.batches()
    for number in range(count):
        batches[number]


def learn(parts: Parts, backward: Averaged, accelerator: Accelerator, hosts: list[Any], checked: bool) -> None:
    """Steps without data loading."""
    place = parts.placer(torch.device("cpu"))
    trained = [p for p in parts.objective.parameters() if p.requires_grad]
    for host in hosts:
        losses = backward([host], place)
        norm = gradient_norm(trained) if checked else None
        if norm is not None and agree(accelerator, [not all_finite(losses, norm), False])[0]:
            raise SystemExit("a step was not finite")
        parts.optimizer.step()
        parts.optimizer.zero_grad()


def paired(with_it: Callable[[], None], without: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median share of the time that the safeguard takes, and the spread of the pairs."""
    extra = []
    for repeat in range(repeats + 1):
        times = {}
        for name, run in (("with", with_it), ("without", without))[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            run()
            times[name] = time.perf_counter() - started
        if repeat:  # the first pair warms caches
            extra.append(times["with"] / times["without"] - 1)
    return {"percent": round(100 * median(extra), 2), "spread": round(100 * (max(extra) - min(extra)) / 2, 2)}


def main() -> None:
    """Print the cost of each safeguard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", default="digits:train")
    parser.add_argument("--recipe", default="digits/mae")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {"run_dir": "/nowhere", "data.train": options.shards, "eval.train": None, "eval.test": None}
    parts = assemble(load(options.recipe, given), torch.device("cpu"))
    accelerator = Accelerator(cpu=True)
    backward = Averaged(parts.objective, accelerator)
    batches = parts.batches()
    hosts = [batches[number] for number in range(options.steps)]

    def unchecked(run: Callable[[], None]) -> Callable[[], None]:
        def patched() -> None:
            crc = mock.Mock(side_effect=AssertionError)
            with mock.patch.object(reading, "zlib", mock.Mock(crc32=crc)), mock.patch.object(Shards, "read", bare):
                run()

        return patched

    def bare(self: Shards, sample: int) -> bytes:
        """`read` without the checksum."""
        shard, record = self._locate(sample)
        return self._pread(shard, int(record["size"]), int(record["offset"]))

    made = lambda: make_batches(parts, options.steps)  # noqa: E731
    result: dict[str, Any] = {
        "crc_of_reading_and_decoding": paired(made, unchecked(made), options.repeats),
        "finite_check_of_a_step": paired(
            lambda: learn(parts, backward, accelerator, hosts, True),
            lambda: learn(parts, backward, accelerator, hosts, False),
            options.repeats,
        ),
        "crc_mib_per_second": round(64 / crc_seconds(64), 1),
    }
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:32} {v}" for k, v in result.items()))


def crc_seconds(mib: int) -> float:
    """For so many MiB."""
    body = bytes(2**20) * mib
    started = time.perf_counter()
    zlib.crc32(body)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
