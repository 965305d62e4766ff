"""README.md of an export: what it is, how it was made and scored, how to load it. It tells what is recorded, and nothing else."""

import json
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
import yaml

from selfsight import __version__
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.redact import redact
from selfsight.run_folder import read_lines, write_atomically

CARD = "README.md"
LIBRARY = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "torch": "pytorch"}
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


class Facts(NamedTuple):
    """What a card tells beside what stands in config.json."""

    license: str = "unknown"
    """An SPDX identifier, as the owner of the weights gives it."""
    scores: tuple[dict[str, Any], ...] = ()
    """Rows of scores.json: the encoder's and the floors'."""
    hours: float | None = None
    """That the training took, without pauses between its parts."""
    notes: tuple[str, ...] = ()
    """What was done to the weights on the way here, line by line."""


def hardware_of(device: torch.device) -> str:
    """What computed: the GPU, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def license_of(text: str) -> str:
    """An identifier as SPDX writes them.

    Raises:
        UsageError: something else.
    """
    if not _LICENSE.fullmatch(text):
        raise UsageError(f"--license: {text!r} is no SPDX identifier, such as Apache-2.0, CC-BY-4.0 or unknown")
    return text


def facts_of(run: Path, **more: Any) -> Facts:
    """What a run's folder tells: scores.json, and hours from metrics.jsonl; of a folder that is no run nothing."""
    scores: Any = ()
    try:
        scores = tuple(dict(row) for row in json.loads((run / "scores.json").read_text())["scores"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        scores = ()  # not scored, or not readable: a card without scores says so
    return Facts(scores=scores, hours=_hours(run), **more)


def _hours(run: Path) -> float | None:
    """From the speeds that were logged, each holding since the line before it."""
    batch, spent, step = _batch_size(run), 0.0, 0
    for line in read_lines(run / "metrics.jsonl"):
        rate, now = line.get("images_per_second"), line.get("step")
        if isinstance(rate, int | float) and isinstance(now, int) and rate > 0 and now > step:
            spent, step = spent + (now - step) * batch / rate, now
    return spent / 3600 if batch and step else None


def _batch_size(run: Path) -> int:
    try:
        return int(yaml.safe_load((run / "recipe.yaml").read_text())["train"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0


def write_card(folder: Path, encoder: Encoder, ours: dict[str, Any], code: str, facts: Facts) -> None:
    """README.md of an export whose config.json says `ours`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, from the recipe's owner
    )
    recipe = ours.get("recipe")
    known = dict.fromkeys(("version", "source", "data", "steps", "weights", "hardware", "libraries"))
    page = environment.get_template("card.md.j2").render(
        ours=known | ours,
        license=license_of(facts.license),
        library=LIBRARY[ours["format"]],
        title=encoder.config.name,
        objective=_objective(recipe),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else None,
        parameters=sum(p.numel() for p in encoder.parameters()) / 1e6,
        made=encoder.preprocessing,
        shape=", ".join(map(str, encoder.preprocessing.shape)),
        width=encoder.feature_width,
        code=code,
        rows=[_row(score) for score in facts.scores],
        protocols=list(dict.fromkeys(f"{s['protocol']}" for s in facts.scores if "protocol" in s and not _floor(s))),
        samples=next((s["samples"] for s in facts.scores if "samples" in s), None),
        hours=facts.hours,
        notes=[*ours.get("notes", []), *facts.notes],
        version=__version__,
    )
    write_atomically(folder / CARD, redact(page))


def _objective(recipe: Any) -> str | None:
    objective = recipe.get("objective") if isinstance(recipe, dict) else None
    return objective.get("name") if isinstance(objective, dict) else None


def _floor(score: dict[str, Any]) -> bool:
    return score.get("encoder") in ("random-init", "pixels", "majority")


def _row(score: dict[str, Any]) -> dict[str, str]:
    """A line of the table; a value that is no number is left as it is."""
    value, std, n = score.get("value"), score.get("std"), score.get("n")
    told = f"{value:.1f}{score.get('unit', '%')}" if isinstance(value, int | float) else str(value)
    told += f" ± {std:.1f} (n={n})" if isinstance(std, int | float) and isinstance(n, int) and n > 1 else ""
    test = score.get("test", "")
    return {
        "encoder": str(score.get("encoder", "")),
        "evaluator": str(score.get("evaluator", "")),
        "metric": str(score.get("metric", "accuracy")),
        "test": test if isinstance(test, str) else ", ".join(map(str, test)),
        "value": told,
    }
