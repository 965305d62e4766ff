"""Does each objective learn? Every recipe of recipes/cifar10 in one command, each scored beside its untrained encoder.

    python benchmarks/cifar10.py SOURCE_TRAIN SOURCE_TEST --scale full     one GPU: all images, ViT-S/4, 200 passes
    python benchmarks/cifar10.py SOURCE_TRAIN SOURCE_TEST --scale slice    two CPU cores: 5,000 images, ViT 96 x 4 with patch 8, 10-30 passes

The sources are what `selfsight shards build` takes: tars ('cifar10-train-*.tar.xz'), or folders of classes. Runs are kept in
--runs and go on where they were. Prints a table in Markdown, or one object with --json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("mae", "simmim", "vicreg", "rotation", "dino", "data2vec", "distill", "joint")
TARGETS = {
    "mae": (80, 65),
    "simmim": (70, 50),
    "vicreg": (85, 80),
    "dino": (88, 85),
    "rotation": (75, 60),
}  # linear, kNN
SCALES: dict[str, dict[str, Any]] = {
    "full": {"encoder.name": "vit_small_patch16_224", "train.epochs": 200},
    "slice": {
        "encoder.patch": 8, "encoder.width": 96, "encoder.depth": 4, "encoder.heads": 3, "train.epochs": 30,
        "train.batch_size": 128, "train.threads": 1, "train.workers": 0, "eval.every": 1000000, "train.save_every": 200,
    },
}  # fmt: skip
# Some do several times the work a pass (four turns, six views, three objectives): on a slice they get fewer. Few steps
# want a teacher that moves sooner.
SLICED: dict[str, dict[str, Any]] = {
    "rotation": {"train.epochs": 10},
    "dino": {"train.epochs": 15, "objective.momentum": 0.99},
    "data2vec": {"objective.momentum": 0.99},
    "joint": {"train.epochs": 10},
}
SMALLER = {"full": {"encoder.depth": 6}, "slice": {"encoder.depth": 2}}  # the student, half its teacher


def main() -> None:
    """Build what is missing, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    sources = {"train": options.train, "test": options.test}
    shards = {name: build(source, options.runs / "shards" / name) for name, source in sources.items()}
    rows = [run(objective, options, shards) for objective in options.objectives.split(",")]
    print(json.dumps({"scale": options.scale, "seed": options.seed, "rows": rows}) if options.json else table(rows))


def build(source: str, target: Path) -> Path:
    """Shards of a source, made once."""
    if not target.is_dir():
        selfsight("shards", "build", source, str(target))
    return target


def run(objective: str, options: argparse.Namespace, shards: dict[str, Path]) -> dict[str, Any]:
    """One recipe from start to scores."""
    folder = options.runs / f"{options.scale}-{objective}-{options.seed}"
    data = {name: str(path) for name, path in shards.items()}
    if options.scale == "slice":
        data = {name: str(sorted(path.glob("*.tar"))[0]) for name, path in shards.items()}
    fields = SCALES[options.scale] | (SLICED.get(objective, {}) if options.scale == "slice" else {})
    fields |= {"run_dir": folder, "seed": options.seed, "data.train": data["train"]}
    fields |= {"eval.train": data["train"], "eval.test": data["test"]}
    if objective == "distill":
        fields |= SMALLER[options.scale]
        fields["objective.teacher"] = options.runs / f"{options.scale}-dino-{options.seed}"
        if not fields["objective.teacher"].is_dir():
            sys.exit("the teacher is the run of dino, which comes first: --objectives dino,distill")
    started, new = time.time(), not (folder / "checkpoints").is_dir()
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    selfsight("pretrain", f"cifar10/{objective}", *words)
    scores = {
        (score["encoder"], score["evaluator"]): score
        for score in json.loads((folder / "scores.json").read_text())["scores"]
    }
    kept = {
        f"{encoder} {evaluator}": [round(scores[encoder, evaluator][field], 1) for field in ("value", "std")]
        for encoder in ("pretrained", "random-init", "pixels")
        for evaluator in ("knn", "linear")
    }
    return {"objective": objective, "minutes": round((time.time() - started) / 60, 1) if new else None, **kept}


def selfsight(*words: str) -> None:
    """One command, which must succeed."""
    subprocess.run([sys.executable, "-m", "selfsight", *words], check=True, stdout=sys.stderr)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the gain over the untrained encoder."""
    lines = [
        "| objective | kNN, % | random-init | gain | linear, % | random-init | gain | target kNN / linear (full) | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["objective"]]
        for evaluator in ("knn", "linear"):
            (value, _), (floor, std) = row[f"pretrained {evaluator}"], row[f"random-init {evaluator}"]
            cells += [f"{value}", f"{floor} ± {std}", f"{value - floor:+.1f}"]
        target = TARGETS.get(row["objective"])
        cells += [f"{target[1]} / {target[0]}" if target else "", f"{row['minutes']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
