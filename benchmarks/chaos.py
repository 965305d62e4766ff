"""Kills runs a thousand times and looks for anything that differs; flips bits; opens malicious files.

python benchmarks/chaos.py --kills 1000 --json          about 40 minutes on 2 cores
python benchmarks/chaos.py --kills 20 --flips 500       a taste

Every history is one run, started again after each kill until it is through: SIGKILL at a random time, at a random step,
or inside a save, to all ranks or to one. Its ledger (ids, input CRCs, loss and norm bits, weights) and its final
checkpoint must be those of the run that nobody killed. Elastic histories also change the number of ranks at every start.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import corpus
import flips
from launch import Job, Launcher, words

STEPS, PARTS = 40, 4
SMALL: dict[str, dict[str, object]] = {
    "mae": {"objective.decoder_width": 16},
    "simmim": {},
    "vicreg": {"objective.expander_width": 16},
    "rotation": {},
    "distill": {},
    "dino": {"objective.outputs": 16, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2},
    "joint": {},
    "data2vec": {"objective.name": "data2vec", "objective.mask_size": 2},
}
FIELDS: dict[str, object] = {
    "data.train": "digits:train",
    "encoder.width": 16,
    "encoder.depth": 2,
    "encoder.drop_path": 0.1,
    "train.epochs": None,
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.save_every": 4,
    "train.keep_every": 16,
    "train.ema": 0.9,
    "train.workers": 0,
    "train.timeout": 30,
    "eval.train": None,
    "eval.test": None,
}
POINTS = ("data", "learn", "learned", "update")
Found = Counter[str]


def arguments(objective: str, folder: Path, more: dict[str, object]) -> list[str]:
    """The command line of a small run."""
    fields = FIELDS | SMALL[objective] | more
    if objective in {"dino", "data2vec"}:  # their teachers are averages already
        fields = fields | {"train.ema": None}
    recipe = "simmim" if objective == "data2vec" else objective
    return ["pretrain", f"digits/{recipe}", *words(fields | {"run_dir": folder})]


def lines(folder: Path, rank: int | None = None) -> list[dict[str, Any]]:
    """The ledger of a run, of all attempts: of one rank, or of all."""
    files = (folder / "ledger").glob("rank-*.jsonl" if rank is None else f"rank-{rank}.jsonl")
    found = []
    for file in files:
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off by a kill
                continue
    return found


def samples(found: Iterable[dict[str, Any]]) -> dict[int, set[tuple[int, int]]]:
    """Every (id, input CRC) that was seen at a position."""
    seen: dict[int, set[tuple[int, int]]] = {}
    for line in found:
        for position, sample, crc in zip(line["positions"], line["ids"], line["inputs"], strict=True):
            seen.setdefault(position, set()).add((sample, crc))
    return seen


def outcomes(found: Iterable[dict[str, Any]], fields: Sequence[str]) -> dict[int, set[tuple[str, ...]]]:
    """Every outcome that a step had, in all attempts."""
    seen: dict[int, set[tuple[str, ...]]] = {}
    for line in found:
        seen.setdefault(line["step"], set()).add(tuple(line.get(field, "") for field in fields))
    return seen


def disagreements(one: dict[int, set[Any]], other: dict[int, set[Any]]) -> int:
    """Keys at which two records, or two attempts of one, differ; a key that is missing differs."""
    return sum(
        len(one.get(key, set()) | other.get(key, set())) != 1 or key not in one or key not in other
        for key in {*one, *other}
    )


def same_files(one: Path, other: Path, names: Iterable[str]) -> bool:
    """Whether the last checkpoints hold the same bytes."""
    last = [folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (one, other)]
    return all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)


def tensor_files(folder: Path) -> list[str]:
    """Of the last checkpoint."""
    return sorted(path.name for path in (folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))


def compare(history: Path, oracle: Path, world: int | None) -> Found:
    """What of a history differs from the run that nobody killed; `world` None: it had several numbers of ranks."""
    found = Found()
    found["ids_differing"] = disagreements(samples(lines(history)), samples(lines(oracle)))
    if world is None:
        steps = disagreements(
            outcomes(lines(history), ["norm", "weights"]), outcomes(lines(oracle), ["norm", "weights"])
        )
    else:
        fields = ["loss", "norm", "weights"]
        steps = sum(
            disagreements(outcomes(lines(history, rank), fields), outcomes(lines(oracle, rank), fields))
            for rank in range(world)
        )
    names = tensor_files(oracle)
    found["weights_differing"] = int(
        bool(steps) or tensor_files(history) != names or not same_files(history, oracle, names)
    )
    return found


class Histories:
    """Runs that are killed again and again.

    Args:
        folder: for the runs.
        seed: of the kills.
    """

    def __init__(self, launcher: Launcher, folder: Path, seed: int) -> None:
        self.launcher, self.folder, self.random = launcher, folder, random.Random(seed)
        self.oracles: dict[tuple[str, int], tuple[Path, float]] = {}
        self.found, self.count = Found(), 0

    def oracle(self, objective: str, world: int, more: dict[str, object]) -> tuple[Path, float]:
        """A run that nobody kills, and its seconds."""
        if (objective, world) not in self.oracles:
            folder = self.folder / f"oracle-{objective}-{world}"
            started = time.monotonic()
            job = self.launcher.start(arguments(objective, folder, more), world)
            if any(job.wait(120)):
                raise SystemExit(f"the undisturbed run of {objective} failed:\n{job.told()}")
            self.oracles[objective, world] = folder, time.monotonic() - started
        return self.oracles[objective, world]

    def kill(self, job: Job, seconds: float, timed: bool, one: bool) -> list[int]:
        """Let a run go on until its fault has killed it, or kill it at a random time; the exit codes."""
        if timed:
            end = time.monotonic() + self.random.uniform(0.1, 0.9 * seconds)
            while time.monotonic() < end and not job.poll():
                time.sleep(0.002)
            if not one:
                return job.kill()
            job.signal(self.random.randrange(len(job.pids)), 9)
        return job.wait(60)

    def fault(self) -> str:
        """A fault somewhere: inside a save, or at a step."""
        if self.random.random() < 0.6:
            return f"save.* kill hit={self.random.randint(1, 60)}"
        return f"{self.random.choice(POINTS)} kill step={self.random.randint(1, STEPS)}"

    def run(self, objective: str, worlds: Sequence[int], kills: int, more: dict[str, object]) -> None:
        """One history: `kills` starts that are killed, and one that goes to the end."""
        world = worlds[0]
        oracle, seconds = self.oracle(objective, world, more)
        self.count += 1
        folder = self.folder / f"history-{self.count}"
        command = arguments(objective, folder, more)
        done, tries = 0, 0
        while done < kills and tries < 3 * kills:
            tries += 1
            world = self.random.choice(worlds)
            timed, one = self.random.random() < 0.3, world > 1 and self.random.random() < 0.3
            fault = "" if timed else self.fault() + (f" rank={self.random.randrange(world)}" if one else "")
            # Elastic ones also change the loader's workers, seldom, for these take seconds to start.
            workers = self.random.choice([0, 0, 0, 1]) if len(worlds) > 1 else 0
            job = self.launcher.start([*command, "--train.workers", workers], world, fault)
            codes = self.kill(job, seconds + 6 * workers, timed, one)
            died = -9 in codes
            done += died
            inside = died and (fault.startswith("save") or any((folder / "checkpoints").glob(".draft-*")))
            surprise = not {*codes} <= {0, -9, 76}
            if surprise:
                print(f"{objective}, {world} ranks, {fault or 'timed'}: {codes}\n{job.told()}", file=sys.stderr)
            self.found.update(kills=int(died), kills_inside_saves=int(inside), surprises=int(surprise))
            if all(code == 0 for code in codes):
                break
        last = self.launcher.start(command, world)
        lost = any(last.wait(120))
        self.found.update(histories=1, runs_lost=int(lost))
        if lost:
            print(last.told(), file=sys.stderr)
        else:
            self.found += compare(folder, oracle, worlds[0] if len(worlds) == 1 else None)
        if not lost:
            shutil.rmtree(folder)


def kill_many(launcher: Launcher, folder: Path, kills: int, seed: int) -> Found:
    """Histories of every objective on one and two ranks, until so many kills."""
    histories = Histories(launcher, folder, seed)
    plans = [(objective, world) for world in (1, 2) for objective in SMALL]
    turn = seed
    while histories.found["kills"] < kills:
        objective, world = plans[turn % len(plans)]
        left = kills - histories.found["kills"]
        histories.run(objective, [world], min(8, left), {})
        turn += 1
    return histories.found


def kill_elastic(launcher: Launcher, folder: Path, histories_of_each: int, seed: int) -> Found:
    """Histories that change the number of ranks at every start, in deterministic mode."""
    histories = Histories(launcher, folder, seed)
    for _ in range(histories_of_each):
        for objective in SMALL:
            histories.run(objective, [1, 2, 4], 3, {"train.deterministic": PARTS})
    return Found({f"elastic_{name}": value for name, value in histories.found.items()})


def measure(kills: int, elastic: int, jobs: int) -> Found:
    """Kill with so many launchers at once."""
    total, problems = Found(), []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:

        def work(number: int) -> None:
            folder = Path(name) / str(number)
            folder.mkdir()
            try:
                with Launcher(folder) as launcher:
                    found = kill_many(launcher, folder, kills // jobs + (number < kills % jobs), number)
                    if number < elastic:
                        (folder / "elastic").mkdir()
                        found += kill_elastic(launcher, folder / "elastic", -(-elastic // jobs), number)
                total.update(found)
            except BaseException as error:  # noqa: BLE001 - raised again below
                problems.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if problems:
        raise problems[0]
    return total


def damage(tries: int) -> dict[str, Any]:
    """Flip and cut so many times, and give every hostile file to whoever would read it."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        flipped = flips.flip_all(Path(name) / "flips", tries)
        attacked = corpus.attack_all(Path(name) / "attacks")
    found = {key: flipped[key] for key in ("flips", "flips_silent")}
    found |= {f"flips_{kind}": counts for kind, counts in flipped["by_kind"].items()}
    found |= {key: attacked[key] for key in ("attacks", "attacks_executed")}
    return found | {f"attacks_{key}": len(attacked[key]) for key in ("over_time", "over_memory", "not_ours")}


def main() -> None:
    """Print what was tried and what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--elastic", type=int, default=1, help="elastic histories of each objective (default: 1)")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    started = time.monotonic()
    names = ("histories", "kills", "kills_inside_saves", "runs_lost", "ids_differing", "weights_differing", "surprises")
    result: dict[str, Any] = dict.fromkeys([*names, *(f"elastic_{name}" for name in names)], 0)
    result |= measure(options.kills, options.elastic, options.jobs)
    result |= damage(options.flips)
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:28} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
