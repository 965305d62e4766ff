"""How the rate grows with the number of processes: selfsight's own step at a fixed batch for each, over gloo on a CPU, NCCL on GPUs.

python benchmarks/scaling.py --json          1, 2 and 4 processes of one thread; about two minutes on two cores

Every process trains MAE on a batch that lies on its device. Two kinds of step take turns, one as it is and one that tells the
other ranks nothing (`no_sync`): the second is `compute`, what the first takes longer is `communication` (what of the all-reduce is
not hidden behind the backward pass). Sharded weights (fsdp) have no such step. The slowest rank's times count; medians over the rounds, in seconds of a step.
`efficiency` is rate(N) / (N rate(1)). With more processes than cores it says how well they share them:
`efficiency_of_cores` is rate(N) / (min(N, cores) rate(1)).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import nan
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LIMIT = 240.0  # seconds for one number of processes


def main() -> int:
    """Print the table."""
    options = parse()
    if options.rank:
        return rank(json.loads(options.rank))
    result = measure(options)
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0 if result["rows"] else 1


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options; lists as lists, the device and numbers of processes of this machine where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", help="numbers with commas (default: 1,2,4 on a CPU, doubling to all GPUs)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--parallel", default="ddp", help="of train.parallel, with commas: ddp, fsdp (default: %(default)s)"
    )
    parser.add_argument("--model", help="a timm ViT (default: vit_tiny_patch16_224, on GPUs vit_large_patch16_224)")
    parser.add_argument("--batch", type=int, help="images for each process in a step (default: 4, on GPUs 128)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.rank:
        return options
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    options.places = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    counts = options.processes or "1,2,4"
    if not all(count.strip().isdecimal() and int(count) for count in counts.split(",")):
        parser.error(f"--processes {counts}: give whole numbers above 0 with commas, such as 1,2,4")
    doubling = [2**power for power in range(options.places.bit_length())]
    options.processes = (
        doubling if options.device == "cuda" and not options.processes else [*map(int, counts.split(","))]
    )
    if options.device == "cuda" and max(options.processes) > options.places:
        parser.error(f"--processes {max(options.processes)}: torch sees {options.places} GPUs")
    options.parallel = options.parallel.split(",")
    if unknown := [kind for kind in options.parallel if kind not in ("ddp", "fsdp")]:
        parser.error(f"--parallel: no {', '.join(map(repr, unknown))}; there are ddp, fsdp")
    if min(options.rounds, 1 if options.batch is None else options.batch) < 1:
        parser.error("--rounds and --batch are 1 at least")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every number of processes, for each kind of parallel training."""
    import torch

    device, places, large = options.device, options.places, options.device == "cuda"
    spec = {
        "work": "mae", "device": device, "precision": "bf16" if large else "fp32", "threads": None if large else 1,
        "model": options.model or ("vit_large_patch16_224" if large else "vit_tiny_patch16_224"), "compile": large,
        "batch": options.batch or (128 if large else 4), "rounds": options.rounds,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for parallel in options.parallel:
        first = None
        for count in options.processes:
            row = together(spec | {"parallel": parallel} if parallel != "ddp" else spec, count)
            if "skipped" in row:
                skipped[f"{parallel}, {count} processes"] = row["skipped"]
                continue
            row = {"parallel": parallel, "processes": count, **row}
            first = first or row
            rows.append(row | efficiency(row, first, places))
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    hardware = torch.cuda.get_device_name() if large else f"{places} CPUs"
    return {
        "command": " ".join(["python", *sys.argv]), "date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware,
        "versions": versions, **{key: spec[key] for key in ("model", "batch", "precision", "device")}, "rows": rows, "skipped": skipped,
    }  # fmt: skip


def efficiency(row: dict[str, Any], first: dict[str, Any], places: int) -> dict[str, float]:
    """Of a row against the first one's rate for each process."""
    count, alone = row["processes"], first["images_per_second"] / first["processes"]
    return {
        "efficiency": round(row["images_per_second"] / (count * alone), 3),
        "efficiency_of_cores": round(row["images_per_second"] / (min(count, places) * alone), 3),
    }


def together(spec: dict[str, Any], count: int) -> dict[str, Any]:
    """Start `count` ranks of this file; what rank 0 says, or why it could not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(count):
        place = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_PORT": port,
        }
        given = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [
            sys.executable,
            "-W",
            "ignore",
            os.path.abspath(__file__),
            "--rank",
            json.dumps(spec | {"world": count}),
        ]
        ranks.append(subprocess.Popen(command, env=os.environ | given, stdout=subprocess.PIPE, text=True))
    end = time.monotonic() + LIMIT
    try:
        said = [one.communicate(timeout=max(1.0, end - time.monotonic()))[0] for one in ranks]
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {LIMIT:g} seconds"}
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    lines = [line for line in said[0].splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"skipped": f"rank 0 failed with exit code {ranks[0].returncode}"}


def rank(spec: dict[str, Any]) -> int:
    """One process of several: rank 0 prints the times."""
    import torch
    from works import Missing, imported

    try:
        training = imported(spec | {"who": "selfsight"})()
    except Missing as missing:
        print(json.dumps({"skipped": str(missing)}), flush=True)
        return 0
    kinds = {"whole": training.step} | ({"compute": training.alone} if training.alone else {})
    for step in (training.step, training.step, *kinds.values()):  # the first ones build buckets
        step()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(spec["rounds"]):
        for name, step in kinds.items():
            times[name].append(slowest(step, spec["world"], spec["device"]))
    whole = median(times["whole"])
    if int(os.environ["RANK"]) == 0:
        apart = (max(times["whole"]) - min(times["whole"])) / whole
        made = {"step": whole, "spread": apart if spec["rounds"] > 1 else None}
        if training.alone:
            compute = median(times["compute"])
            made |= {"compute": compute, "communication": max(0.0, whole - compute) * (spec["world"] > 1)}
        rate = spec["world"] * spec["batch"] / whole
        print(
            json.dumps(
                {"images_per_second": round(rate, 3)} | {key: value and round(value, 5) for key, value in made.items()}
            ),
            flush=True,
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


def slowest(step: Callable[[], object], world: int, device: str) -> float:
    """Seconds of a step that all begin together, of the rank that took longest."""
    import torch

    from selfsight.speed import synchronize

    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    if world > 1:
        torch.distributed.barrier()
    synchronize(where)
    begun = time.perf_counter()
    step()
    synchronize(where)
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=where)
    if world > 1:
        torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
    return took.item()


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{'parallel':10}{'processes':>10}{'images/s':>10}{'efficiency':>12}{'of cores':>10}{'step s':>9}{'compute':>9}{'communication':>15}"
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['parallel']:10}{row['processes']:10}{row['images_per_second']:10.2f}{row['efficiency']:12.2f}"
            f"{row['efficiency_of_cores']:10.2f}{row['step']:9.3f}{row.get('compute', nan):9.3f}{row.get('communication', nan):15.3f}"
        )
    return "\n".join(lines + [f"{what}: {why}" for what, why in result["skipped"].items()])


if __name__ == "__main__":
    sys.exit(main())
