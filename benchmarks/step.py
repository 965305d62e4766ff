"""Training-step throughput against what users would run instead: forward, backward, optimizer, on data that lie on the device.

python benchmarks/step.py --peers lightly,transformers --precision bf16 --json         MAE ViT-B/16; about three minutes on 2 cores
python benchmarks/step.py --all --mae DIR --simmim DIR --vicreg DIR --solo-learn DIR --json     every work; at most twelve

Each competitor is a process of its own, as its users would start it (its model, loss and optimizer; selfsight's is what `selfsight
pretrain` assembles), and two of them, selfsight and a peer, take rounds of steps in turn. Ratios are medians over those pairs of
theirs / ours (above 1: selfsight is faster), `spread` the largest minus the smallest (null of one pair); on a CPU also of CPU
time, which other work on the machine disturbs less. Peak memory is that of a step after others: on a GPU of torch's allocator, on a CPU what is resident above
the imports. FLOPs are those of products, convolutions and attentions in a step, counted; MFU is their rate as a share of the
machine's own matrix product, measured in the same run. Peers whose loop takes the gradient's norm take it here too.

vicreg-loss-2048 and -8192 are VICReg's loss without a model, forward and backward, of embeddings of that width; `--work vicreg-loss`
is both. What follows a colon is a variant of a peer, timed with it: `explicit` computes attention by two products and a softmax in
place of torch's fused kernel (mae as it was released; lightly and transformers only in bf16 on a CPU, where fused is the slower
one by far), `simmim:rpb` has the relative position biases and layer scale of its released recipe.

Installable peers: pip install 'selfsight[bench]'. The others are folders, taken as they are: clones of facebookresearch/mae (--mae),
vturrisi/solo-learn (--solo-learn), microsoft/SimMIM (--simmim) and facebookresearch/vicreg (--vicreg). Who cannot be run is
in `skipped`, with the reason.
"""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from paired import Competitor, Round, in_turn, ratio
from works import EXPLICIT, PEERS, REPOSITORIES, SHORT, WORKS, Work

from selfsight.speed import matmul_peak

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS = "selfsight"


def main() -> int:
    """Time, print."""
    options = parse()
    begun = time.perf_counter()
    torch.set_num_threads(options.threads)  # the competitors' number, for their peak
    peaks: dict[str, float] = {}
    found = [measure(work, options, peaks, begun) for work in options.work]
    result = about(options, peaks) | (found[0] if len(found) == 1 else {"works": {one["work"]: one for one in found}})
    result["seconds"] = round(time.perf_counter() - begun, 1)
    print(json.dumps(result, indent=1) if options.json else table(found))
    return 0 if any("images_per_second" in one for one in found) else 1


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options, with their defaults for this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="mae", help=f"of {', '.join([*WORKS, *SHORT])} (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every work that suits the device")
    parser.add_argument("--peers", default=",".join(PEERS), help="(default: %(default)s)")
    parser.add_argument(
        "--precision", choices=DTYPES, default="bf16", help="where the work does not say (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", help="a timm ViT in place of the work's own")
    parser.add_argument("--batch", type=int, help="images in a step (default: the work's, for the device)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs with each peer, at most (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of pairs with each peer, after three (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=660,
        help="seconds after which neither a work nor a peer is begun (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument(
        "--compile", choices=("auto", "ours", "both", "none"), default="auto", help="auto: ours on a GPU, else none"
    )
    for name, repository in REPOSITORIES.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"a clone of github.com/{repository}")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args(words)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.compile == "auto":
        options.compile = "ours" if options.device == "cuda" else "none"
    if min(options.rounds, options.threads, options.batch or 1) < 1:
        parser.error("--rounds, --threads and --batch are 1 at least")
    options.peers = chosen(parser, "--peers", options.peers, PEERS)
    works = chosen(parser, "--work", options.work, (*WORKS, *SHORT))
    options.work = [name for work in works for name in SHORT.get(work, (work,))]
    if options.all:
        options.work = [name for name, work in WORKS.items() if options.device == "cuda" or not work.gpu_only]
    return options


def chosen(parser: argparse.ArgumentParser, option: str, given: str, known: tuple[str, ...]) -> list[str]:
    """The names in a list with commas; an unknown one ends the program with exit code 2."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{option}: no {name!r}; there are {', '.join(known)}")
    if not names:
        parser.error(f"{option}: names none; there are {', '.join(known)}")
    return names


def measure(name: str, options: argparse.Namespace, peaks: dict[str, float], begun: float) -> dict[str, Any]:
    """One work: selfsight with each peer in turn."""
    work = WORKS[name]
    spent = f"the budget of {options.budget:g} seconds is spent"
    if time.perf_counter() - begun > options.budget:
        return {"work": name, "skipped": {OURS: spent}}
    precision = work.precision or options.precision
    if precision not in peaks:  # while nothing else of this run is at work
        peaks[precision] = matmul_peak(torch.device(options.device), DTYPES[precision])
    batch = options.batch or (work.gpu_batch if options.device == "cuda" else work.cpu_batch)
    spec = {
        "work": name, "precision": precision, "batch": batch, "device": options.device, "threads": options.threads,
        "model": options.model, "paths": {peer: getattr(options, peer.replace("-", "_")) for peer in REPOSITORIES},
    }  # fmt: skip
    rivals = rivals_of(work, options, precision)
    skipped: dict[str, str] = {}
    each: dict[str, dict[str, Any]] = {}
    pairs: dict[str, tuple[list[Round], list[Round]]] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(Competitor(spec | {"who": OURS, "compile": options.compile != "none"}))
        theirs_of = lambda rival: Competitor(spec | {"who": rival, "compile": options.compile == "both"})  # noqa: E731
        first = stack.enter_context(theirs_of(rivals[0])) if rivals else None  # imports while ours does
        each[OURS] = ours.answer()
        if "skipped" in each[OURS]:
            return {"work": name, "skipped": {OURS: each[OURS]["skipped"]}}
        for rival in rivals:
            if time.perf_counter() - begun > options.budget:
                skipped[rival] = spent
                continue
            with first or theirs_of(rival) as theirs:
                first = None
                facts = theirs.answer()
                if "skipped" in facts:
                    skipped[rival] = facts["skipped"]
                    continue
                mine, others, gone = in_turn(ours, theirs, options.rounds, options.seconds)
                if gone:
                    skipped[OURS if gone.ours else rival] = gone.why
                else:
                    memory = theirs.ask("memory")
                    pairs[rival], each[rival] = (mine, others), facts | {"peak_memory": memory.get("peak_memory")}
            if OURS in skipped:
                break
        alone: list[Round] = []
        while not pairs and OURS not in skipped and len(alone) < options.rounds:
            told = ours.ask("round")
            if "skipped" in told:
                skipped[OURS] = told["skipped"]
            else:
                alone.append(Round(told["wall"], told["cpu"]))
        each[OURS]["peak_memory"] = None if OURS in skipped else ours.ask("memory").get("peak_memory")
    if not pairs and not alone:
        return {"work": name, "precision": precision, "batch": batch, "skipped": skipped}
    times = {OURS: alone + [one for mine, _ in pairs.values() for one in mine]}
    times |= {rival: others for rival, (_, others) in pairs.items()}
    for rival, facts in each.items():
        rate = batch / median(one.wall for one in times[rival])
        facts |= {"images_per_second": rate, "rounds": len(times[rival])}
        facts["mfu"] = facts["flops"] * rate / batch / peaks[precision]
    return (
        {"work": name, "precision": precision, "batch": batch}
        | report(each, pairs, options.device)
        | {"skipped": skipped}
    )


def rivals_of(work: Work, options: argparse.Namespace, precision: str) -> list[str]:
    """Who is compared: packages with fused attention also with explicit, where fused is the slower one by far."""
    slow = options.device == "cpu" and precision == "bf16"
    rivals = [rival for rival in work.rivals if slow or rival not in EXPLICIT]
    return [rival for rival in rivals if rival.partition(":")[0] in options.peers]


def report(each: dict[str, Any], pairs: dict[str, tuple[list[Round], list[Round]]], device: str) -> dict[str, Any]:
    """Ratios and what selfsight reached, then every competitor's own figures."""
    ours = each[OURS]
    made: dict[str, Any] = {"ratios": {}, "spread": {}}
    if device == "cpu":
        made["ratios_cpu_time"] = {}
    made["memory_ratios"] = {}
    for rival, (mine, others) in pairs.items():
        middle, spread = ratio([one.wall for one in mine], [one.wall for one in others])
        made["ratios"][rival], made["spread"][rival] = round(middle, 3), spread if spread is None else round(spread, 3)
        if device == "cpu":
            middle, _ = ratio([one.cpu for one in mine], [one.cpu for one in others])
            made["ratios_cpu_time"][rival] = round(middle, 3)
        if ours["peak_memory"] and each[rival]["peak_memory"]:
            made["memory_ratios"][rival] = round(ours["peak_memory"] / each[rival]["peak_memory"], 3)
    for facts in each.values():
        facts["images_per_second"], facts["mfu"] = round(facts["images_per_second"], 3), round(facts["mfu"], 4)
    made |= {key: ours[key] for key in ("images_per_second", "peak_memory", "mfu")}
    return made | {"each": each}


def about(options: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """With what and on what this was measured."""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": gpu or f"{os.cpu_count()} CPUs, {processor()}",
        "device": options.device,
        "threads": options.threads,
        "compile": options.compile,
        "rounds": options.rounds,
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in ("torch", "timm", *PEERS[:2])},
        "matmul_peak": {precision: round(peak / 1e12, 3) for precision, peak in peaks.items()},
        "matmul_peak_unit": "TFLOP/s",
        "units": {"peak_memory": "bytes", "flops": "of a step", "mfu": "share of matmul_peak", "memory_ratios": "ours / theirs"},
    }  # fmt: skip


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.machine()


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(found: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'work':18}{'competitor':16}{'images/s':>10}{'MFU':>7}{'GB':>7}{'ratio':>8}{'spread':>8}"]
    for one in found:
        for who, facts in one.get("each", {}).items():
            memory = f"{facts['peak_memory'] / 1e9:7.2f}" if facts["peak_memory"] else "      -"
            ratios = f"{one['ratios'][who]:8.2f}" if who in one["ratios"] else ""
            ratios += f"{one['spread'][who]:8.2f}" if one["spread"].get(who) is not None else ""
            lines.append(
                f"{one['work']:18}{who:16}{facts['images_per_second']:10.2f}{facts['mfu']:7.1%}{memory}{ratios}"
            )
        lines += [f"{one['work']:18}{who:16}skipped: {why}" for who, why in one["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
