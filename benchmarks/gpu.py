"""Everything that wants a machine with a GPU, in one command: tests, speed against peers, compile, MFU, bench, the loop, scaling, CIFAR-10.

python benchmarks/gpu.py --out gpu-results                                what needs nothing but this checkout
python benchmarks/gpu.py --out gpu-results --peers-at DIR --data DIR --cifar10 TRAIN TEST        all of it
python benchmarks/gpu.py --dry-run                                        the plan, on any machine

Two views of ViT-S/16 (imagenet/vicreg-s16) are timed end to end from storage (bench.disk: the page cache is made to forget the
shards) and from memory (bench.memory: JPEGs in the page cache, decoded by workers; bench.memory-device: by nvJPEG); bench.compile
reads the shards as the page cache has them. `loop` is what training costs beside the bare step.

Parts run in order, the tests first. Each is bounded and leaves OUT/PART.json; a part that is there is not run again (--again PART does), so a
call that ended early goes on with the same command. `--budget SECONDS` ends the call; a part that it cuts short leaves nothing
and is run again by the next one. A part that fails or lacks something is reported, and the others run; without a GPU none does,
and the exit code is 2. OUT/results.json and OUT/RESULTS.md, a section for benchmarks/RESULTS.md, are written after every part.

--peers-at   a folder with clones named mae, SimMIM, vicreg and solo-learn; those that are not there are left out
--data       shards or a folder of JPEG shards for `selfsight bench` and the loop; without it 2,000 synthetic photographs are made
--cifar10    what benchmarks/cifar10.py takes; its runs are kept in OUT and go on where they were
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from works import REPOSITORIES, WORKS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CLONES = {"mae": "mae", "simmim": "SimMIM", "vicreg": "vicreg", "solo-learn": "solo-learn"}
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "einops",
    "lightly",
    "transformers",
    "webdataset",
    "faiss",
    "pytest",
)
PHOTOGRAPHS = 2000
REASON = "needs a GPU"  # of tests that skip themselves
COMPILE = ("--train.compile", "true")
SWITCHES = {  # of `selfsight bench`
    "plain": ("--train.compile", "false"),
    "compile": COMPILE,
    "fp8": (*COMPILE, "--train.precision", "fp8"),
    "graphs": (*COMPILE, "--train.cuda_graphs", "true"),
    "recomputed": (*COMPILE, "--train.checkpoint_blocks", "true"),
    "kept": (*COMPILE, "--train.checkpoint_blocks", "false"),
    "disk": COMPILE,  # under cold.py
    "memory": (*COMPILE, "--synthetic"),  # 64 JPEGs, always in the page cache: decoding without storage
    "memory-device": (*COMPILE, "--synthetic", "--data.decode", "device"),
}
LOOP = ("--device", "cuda", "--loop", "401", "--json")
UNLABELLED = ("--unlabelled", "--batch", "256")
LOOPS = {  # of overhead.py: after `{data}` the recipe, from the longest step to one so short that the host cannot keep up
    "vicreg-s16": ("{data}", "--recipe", "imagenet/vicreg-s16", *UNLABELLED),
    "mae-s16": ("{data}", "--recipe", "imagenet/mae-s16", *UNLABELLED),
    "digits": ("digits:train", "--recipe", "digits/mae"),
}
FIRST = (
    "tests.gpu",
    "step.mae.ours",
    "step.mae.both",
    "step.mae-large.ours",
    "shards",
    "nvjpeg",
    "bench.compile",
    "bench.memory",
    "bench.memory-device",
    "bench.disk",
    "loop.vicreg-s16",
    "bench.plain",
)


@dataclass(frozen=True)
class Part:
    """A command, and how long it may take."""

    name: str
    """Group, or group.detail."""
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run."""
    after: tuple[str, ...] = ()
    """Parts that must have been done."""
    gpus: int = 1
    resumable: bool = False
    """Whether the same command goes on after it was ended."""

    @property
    def group(self) -> str:
        """What --only knows it by."""
        return self.name.partition(".")[0]


def main() -> int:
    """Run what is not done yet."""
    options = parse()
    parts = chosen(plan(options), options.only)
    if options.dry_run:
        print(
            json.dumps([shown(part, options) for part in parts], indent=1) if options.json else outline(parts, options)
        )
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    for part in parts:
        if state(part, options) != "to do":
            continue
        left = end - time.monotonic()
        if left < (60 if part.resumable else part.seconds / 2):
            print(f"{part.name}: not begun, {left:.0f} s are left of the budget; run the same command again")
            continue
        run(part, options, min(part.seconds, left))
        write(parts, options)
    write(parts, options)
    print((options.out / "RESULTS.md").read_text())
    return 0 if all(state(part, options) == "done" for part in parts) else 1


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="(default: runs/gpu of this checkout)")
    parser.add_argument("--peers-at", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--cifar10", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--only", help="groups with commas, as --dry-run lists them, and what they wait for")
    parser.add_argument(
        "--again", action="append", default=[], metavar="PART", help="run a part, or a group, once more"
    )
    parser.add_argument("--budget", type=float, default=570, help="seconds of this call (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: as an array")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.data:
        options.data = found_from_anywhere(options.data)
    if options.cifar10:
        options.cifar10 = [found_from_anywhere(shards) for shards in options.cifar10]
    groups = sorted({part.group for part in plan(options)})
    if not options.dry_run and not gpus():
        parser.exit(2, "gpu.py: torch sees no GPU; --dry-run shows the plan on any machine\n")
    options.only = [name for name in (options.only or "").split(",") if name]
    if unknown := [name for name in options.only if name not in groups]:
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(groups)}")
    known = {*groups, *(part.name for part in plan(options))}
    if unknown := [name for name in options.again if name not in known]:
        parser.error(
            f"--again: no {', '.join(unknown)}; there are {', '.join(groups)}, and parts as --dry-run lists them"
        )
    for part in plan(options):
        if not options.dry_run and {part.name, part.group} & {*options.again}:
            file_of(part.name, options).unlink(missing_ok=True)
    return options


def found_from_anywhere(shards: str) -> str:
    """Their path in full, if it is one: parts run in the checkout's folder. Patterns and addresses stay."""
    return str(Path(shards).resolve()) if Path(shards).exists() else shards


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """The parts of these groups, and those that they wait for."""
    if not only:
        return parts
    wanted = {part.name for part in parts if part.group in only}
    wanted |= {name for part in parts if part.name in wanted for name in part.after}
    return [part for part in parts if part.name in wanted]


def plan(options: argparse.Namespace) -> list[Part]:
    """All parts, the cheap and telling ones first."""
    python, out = sys.executable, options.out
    clones = [
        word
        for name in REPOSITORIES
        if options.peers_at and (options.peers_at / CLONES[name]).is_dir()
        for word in (f"--{name}", str((options.peers_at / CLONES[name]).resolve()))
    ]
    parts = [
        Part(f"tests.{path.stem.removeprefix('test_')}", (python, "-m", "pytest", "-q", str(path)), 300, ("pytest",))
        for path in tests_of_gpus()
    ]
    for compiled in ("ours", "both", "none"):
        for work in WORKS:
            words = (
                "--device",
                "cuda",
                "--work",
                work,
                "--compile",
                compiled,
                "--rounds",
                "15",
                "--seconds",
                "8",
                "--json",
                *clones,
            )
            if "loss" not in work or compiled == "none":  # a loss alone is not compiled
                parts.append(
                    Part(f"step.{work}.{compiled}", (python, str(HERE / "step.py"), *words), 300, ("accelerate",))
                )
    data, made = options.data or str(out / "photographs"), out / "photographs"
    shards = () if options.data else ("shards",)
    if not options.data:
        parts.append(
            Part("shards", (python, str(HERE / "photographs.py"), str(made), str(PHOTOGRAPHS)), 120, ("webdataset",))
        )
    parts.append(Part("nvjpeg", (python, str(HERE / "nvjpeg.py")), 60, ("torchcodec",)))
    for name, words in SWITCHES.items():
        cold = (python, str(HERE / "cold.py"), data, "--") if name == "disk" else ()
        bench = ("bench", str(ROOT / "recipes" / "imagenet" / "vicreg-s16.yaml"), "--data.train", data, "--json")
        batch = ("--train.batch_size", "256", *evaluation_off(), *words)
        after = (*(() if "--synthetic" in words else shards), *(("nvjpeg",) if "device" in words else ()))
        needs = ("webdataset", "faiss", "sklearn")
        parts.append(Part(f"bench.{name}", (*cold, python, "-m", "selfsight", *bench, *batch), 480, needs, after))
    for name, words in LOOPS.items():
        command = (python, str(HERE / "overhead.py"), *(word.format(data=data) for word in words), *LOOP)
        own = "{data}" in words
        parts.append(
            Part(f"loop.{name}", command, 420, ("faiss",) if own else ("faiss", "sklearn"), shards if own else ())
        )
    scaling = (python, str(HERE / "scaling.py"), "--device", "cuda", "--parallel", "ddp,fsdp", "--json")
    parts.append(Part("scaling", scaling, 540, gpus=2))
    if options.cifar10:
        words = (*options.cifar10, "--scale", "full", "--runs", str(out / "cifar10"), "--json")
        needs = ("webdataset", "faiss", "sklearn")
        parts.append(Part("cifar10", (python, str(HERE / "cifar10.py"), *words), 10 * 3600, needs, resumable=True))
    order = {name: number for number, name in enumerate(FIRST)}
    return sorted(parts, key=lambda part: (part.group != "tests", order.get(part.name, len(order))))


def tests_of_gpus() -> list[Path]:
    """The files with tests that skip themselves without a GPU: by their reason, since not every name says it."""
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if f'reason="{REASON}' in path.read_text()]


def evaluation_off() -> tuple[str, ...]:
    """What keeps a recipe from asking for labelled shards."""
    return "--eval.train", "null", "--eval.test", "null"


def file_of(name: str, options: argparse.Namespace) -> Path:
    """Where the result of a part is."""
    return options.out / f"{name}.json"


def result_of(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a part has left, if it has run."""
    file = file_of(name, options)
    return json.loads(file.read_text()) if file.exists() else None


def missing(part: Part, options: argparse.Namespace) -> str:
    """Why it cannot run here, or empty."""
    absent = [name for name in part.needs if find_spec(name) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    if gpus() < part.gpus:
        return f"needs {part.gpus} GPU{'s' * (part.gpus > 1)}, torch sees {gpus()}"
    waits = [name for name in part.after if (result_of(name, options) or {"exit_code": 1})["exit_code"]]
    return f"waits for {', '.join(waits)}" if waits else ""


def gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def state(part: Part, options: argparse.Namespace) -> str:
    """done, to do, or why neither."""
    if told := result_of(part.name, options):
        return "done" if told["exit_code"] == 0 else f"failed with exit code {told['exit_code']}"
    return missing(part, options) or "to do"


def run(part: Part, options: argparse.Namespace, limit: float) -> None:
    """Run it, and keep what it said; one that was cut short by the budget, or can go on, leaves nothing."""
    print(f"{part.name}: begun, at most {limit:.0f} s", flush=True)
    begun, read = time.monotonic(), read_from_disks()
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'ssl'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    # Files and no pipes, which a lost child could hold open for ever.
    with TemporaryFile() as out, TemporaryFile() as err:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:  # also when this call is interrupted
                stop_group(process)
        told, complaints = said(out), said(err)
    seconds = round(time.monotonic() - begun, 1)
    print(f"{part.name}: exit code {code} after {seconds:.0f} s", flush=True)
    if code == 124 and (part.resumable or limit < part.seconds):
        return
    made = {"command": list(part.command), "date": now(), "seconds": seconds, "exit_code": code}
    made |= {"bytes_from_disks": None if read is None else (read_from_disks() or read) - read}
    made |= {"result": parsed(told), "stderr": complaints[-4000:]}
    partial = options.out / f"{part.name}.partial"
    partial.write_text(json.dumps(made, indent=1))
    partial.replace(file_of(part.name, options))


def said(file: IO[bytes]) -> str:
    """All that a part has written, whatever the bytes."""
    file.seek(0)
    return file.read().decode(errors="replace")


def read_from_disks() -> int | None:
    """Bytes that this machine has read from its disks so far, as Linux tells; those of network file systems are not among them."""
    file = Path("/proc/vmstat")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("pgpgin ")), None)


def stop_group(process: subprocess.Popen[str]) -> None:
    """End the part and the processes it started: first asked, then told."""
    import signal

    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def parsed(out: str) -> Any:
    """The object that a part printed, after whatever else; else the end of its words."""
    for start in (0, out.find("\n{") + 1):
        try:
            return json.loads(out[start:])
        except ValueError:
            continue
    return out[-4000:]


def now() -> str:
    """The time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def about() -> dict[str, Any]:
    """The machine and the versions."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version("faiss-cpu" if name == "faiss" else name)
        except PackageNotFoundError:
            versions[name] = None
    names = [torch.cuda.get_device_name(number) for number in range(gpus())]
    return {
        "hardware": names,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def write(parts: list[Part], options: argparse.Namespace) -> None:
    """results.json and RESULTS.md of all that is done."""
    told = {part.name: found for part in parts if (found := result_of(part.name, options))}
    states = {part.name: state(part, options) for part in parts}
    made = {"date": now(), **about(), "states": states, "parts": told}
    (options.out / "results.json").write_text(json.dumps(made, indent=1))
    (options.out / "RESULTS.md").write_text(section(made))


def section(made: dict[str, Any]) -> str:
    """A section for benchmarks/RESULTS.md."""
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items() if number)
    lines = [
        f"## On a GPU ({made['date'][:10]})",
        "",
        f"`python benchmarks/gpu.py`: {', '.join(made['hardware'])}; CUDA {made['cuda']}, Python {made['python']}, {versions}.",
        "",
    ]
    lines += [
        "| step | compiled | against | ratio | spread | memory, ours / theirs | images/s | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in made["parts"].items():
        if name.startswith("step.") and isinstance(part["result"], dict):
            lines += step_rows(name, part["result"])
    lines += ["", "| bench | images/s | spread | loader alone, images/s | bound by | MFU | GiB | MB from disks |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, part in made["parts"].items():
        if name.startswith("bench.") and part["exit_code"] == 0:
            lines.append(bench_row(name, part))
    lines += ["", "| part | state | seconds |", "|---|---|---|"]
    lines += [
        f"| {name} | {what} | {made['parts'].get(name, {}).get('seconds', '')} |"
        for name, what in made["states"].items()
    ]
    for name, part in made["parts"].items():
        if not name.startswith("step.") and name != "shards":
            lines += [
                "",
                f"`{' '.join(part['command'][1:])}`",
                "",
                "```",
                told_shortly(part["result"] or part["stderr"]),
                "```",
            ]
    return "\n".join(lines) + "\n"


def step_rows(name: str, result: dict[str, Any]) -> list[str]:
    """A row for each competitor of one call of step.py."""
    _, work, compiled = name.split(".")
    if "each" not in result:
        return [f"| {work} | {compiled} | {'; '.join(result['skipped'].values())} | | | | | |"]
    rows = []
    for who, facts in result["each"].items():
        figures = [result[key].get(who) or "" for key in ("ratios", "spread", "memory_ratios")]
        rows.append(
            f"| {work} | {compiled} | {who} | "
            + " | ".join(map(str, figures))
            + f" | {facts['images_per_second']:,.0f} | {facts['mfu']:.1%} |"
        )
    return rows + [
        f"| {work} | {compiled} | {who} | skipped: {why} | | | | |" for who, why in result["skipped"].items()
    ]


def bench_row(name: str, part: dict[str, Any]) -> str:
    """A row for one call of `selfsight bench`."""
    told, read = part["result"], part.get("bytes_from_disks")
    if not isinstance(told, dict):
        return f"| {name} | {told_shortly(told).splitlines()[-1]} |  |  |  |  |  |  |"
    figures = [name, f"{told['images_per_second']:,.0f}", told["spread"], f"{told['loader']['images_per_second']:,.0f}"]
    figures += [told["bound"], f"{told['mfu']:.1%}", f"{told['memory']['peak'] / 1024:.1f}"]
    return f"| {' | '.join(map(str, figures))} | {'' if read is None else f'{read / 1e6:,.0f}'} |"


def told_shortly(result: Any) -> str:
    """JSON, or the last lines."""
    return json.dumps(result, indent=1) if not isinstance(result, str) else "\n".join(result.strip().splitlines()[-15:])


def shown(part: Part, options: argparse.Namespace) -> dict[str, Any]:
    """A line of the plan."""
    return {
        "part": part.name,
        "group": part.group,
        "seconds": part.seconds,
        "state": state(part, options),
        "command": list(part.command),
    }


def outline(parts: list[Part], options: argparse.Namespace) -> str:
    """The plan, for people."""
    return "\n".join(
        f"{part.name:28} {part.seconds:6.0f} s  {state(part, options):32} {' '.join(part.command[1:])}"
        for part in parts
    )


if __name__ == "__main__":
    sys.exit(main())
