"""What the safeguards cost: seconds for index and checksum of a sample, and for the finite check of a step, as shares.

python benchmarks/overhead.py [SHARDS] [--recipe NAME] --json          about a minute on 2 cores

A safeguard costs microseconds beside a step of milliseconds: on a machine whose runs differ by more than that, with and
without cannot be told apart (tried: docs/log.md). So each safeguard is timed alone, in a loop, and set against the
median of what it is a part of. CPU time of one thread; medians over the repeats, with their spread.
"""

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged
from selfsight.finite import BadSteps, Step, gradient_norm
from selfsight.recipe import load
from selfsight.verdict import Verdicts


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of one call, and the spread of the repeats as a share of it."""
    run()  # warms caches
    found = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return median(found), (max(found) - min(found)) / 2 / median(found)


def reading(parts: Parts, samples: int, repeats: int) -> dict[str, float]:
    """Of a sample: bytes alone at a known place, by index and with its checksum, and made into a view."""
    data, batches = parts.shards, parts.batches()
    places = [data._locate(sample) for sample in range(samples)]
    files = {shard: os.open(data.paths[shard], os.O_RDONLY) for shard, _ in places}
    known = [(files[shard], int(record["size"]), int(record["offset"])) for shard, record in places]
    bodies = [os.pread(*place) for place in known]
    bare, _ = seconds(lambda: [os.pread(*place) for place in known], repeats)
    safe, noise = seconds(lambda: [data.read(sample) for sample in range(samples)], repeats)
    crc, _ = seconds(lambda: [zlib.crc32(body) for body in bodies], repeats)
    steps = max(1, samples // parts.recipe.train.batch_size)
    made, made_noise = seconds(lambda: [batches[number] for number in range(steps)], repeats)
    made *= samples / (steps * parts.recipe.train.batch_size)
    return {
        "bytes_of_a_sample": round(sum(map(len, bodies)) / samples),
        "crc_microseconds": round(1e6 * crc / samples, 3),
        "index_crc_and_retries_microseconds": round(1e6 * (safe - bare) / samples, 2),
        "sample_made_microseconds": round(1e6 * made / samples, 1),
        "crc_percent": round(100 * crc / made, 2),
        "index_crc_and_retries_percent": round(100 * (safe - bare) / made, 2),
        "noise_percent_of_each": round(100 * max(noise, made_noise), 1),
    }


def stepping(parts: Parts, repeats: int) -> dict[str, float]:
    """Of a step without its data: the norm that clipping wants anyway, and the check with its agreement."""
    accelerator, place = Accelerator(cpu=True), parts.placer(torch.device("cpu"))
    backward, host = Averaged(parts.objective, accelerator), parts.batches()[0]
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]

    def step() -> None:
        backward([host], place)
        gradient_norm(trained)
        parts.optimizer.step()
        parts.optimizer.zero_grad()

    whole, noise = seconds(step, repeats)
    losses = backward([host], place)
    norm = gradient_norm(trained)
    verdicts = Verdicts(accelerator, BadSteps(parts, 0))

    def check_once() -> None:
        verdicts.ask(Step(1, [], losses, norm), [False] * 5)
        verdicts.hear()

    check, _ = seconds(lambda: [check_once() for _ in range(100)], repeats)
    norms, _ = seconds(lambda: gradient_norm(trained), repeats)
    return {
        "step_milliseconds": round(1e3 * whole, 2),
        "finite_check_percent": round(100 * check / 100 / whole, 3),
        "finite_check_and_norm_percent": round(100 * (check / 100 + norms) / whole, 2),
        "step_noise_percent": round(100 * noise, 1),
    }


def main() -> None:
    """Print the cost of each safeguard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", default="digits:train")
    parser.add_argument("--recipe", default="digits/mae")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {"run_dir": "/nowhere", "data.train": options.shards, "train.batch_size": options.batch}
    given |= {"eval.train": None, "eval.test": None}
    parts = assemble(load(options.recipe, given), torch.device("cpu"))
    samples = min(options.samples, len(parts.shards))
    result = reading(parts, samples, options.repeats) | stepping(parts, options.repeats)
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:40} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
