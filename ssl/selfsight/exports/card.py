"""README.md of an export: what it is, how it was made and scored, how to load it. It tells what is recorded, and nothing else."""

import json
import platform
import re
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
import yaml

from selfsight import __version__, checkpoint
from selfsight.cost import hours_text, spent_before
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.redact import redact
from selfsight.run_folder import write_atomically
from selfsight.score_tables import Score, scores_of

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
    """Device-hours that the training took, of all ranks and restarts."""
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
    """What a run's folder tells: scores.json of the weights in its encoder/, and hours; of a folder that is no run nothing."""
    facts = Facts(hours=_hours(run), **more)
    try:
        found = json.loads((run / "scores.json").read_text())
        rows = tuple(dict(row) for row in found["scores"])
        if rows and found.get("weights") != weights_of(run / "encoder"):
            return facts._replace(notes=(*facts.notes, "the run's scores are of other weights than its encoder has"))
        return facts._replace(scores=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return facts  # not scored, or not readable: a card without scores says so


def weights_of(folder: Path) -> str:
    """SHA-256 of an export's weights, as its manifest says: which weights a score is of."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    return str(manifest["model.safetensors"]["sha256"])


def _hours(run: Path) -> float | None:
    hours = spent_before(run / "metrics.jsonl").hours
    return None if isnan(hours) or not hours else hours


def write_card(folder: Path, encoder: Encoder, ours: dict[str, Any], code: str, facts: Facts) -> None:
    """README.md of an export whose config.json says `ours`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, from the recipe's owner
    )
    environment.filters["plain"] = _plain
    recipe = ours.get("recipe")
    told = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else ""
    scores = scores_of({"scores": facts.scores})
    libraries = ours.get("libraries")
    hours = facts.hours or ours.get("device_hours")
    known = dict.fromkeys(("version", "source", "data", "steps", "weights", "hardware"))
    page = environment.get_template("card.md.j2").render(
        ours=known | ours,
        license=license_of(str(ours.get("license", "unknown")) if facts.license == "unknown" else facts.license),
        library=LIBRARY[ours["format"]],
        title=encoder.config.name,
        objective=_objective(recipe),
        recipe=told,
        fence="`" * (1 + max(2, *map(len, re.findall("`+", told)), 0)),  # which the recipe must not close
        parameters=sum(p.numel() for p in encoder.parameters()) / 1e6,
        made=encoder.preprocessing,
        shape=", ".join(map(str, encoder.preprocessing.shape)),
        width=encoder.feature_width,
        code=code,
        rows=[_row(score) for score in scores],
        protocols=list(dict.fromkeys(score.protocol for score in scores if score.protocol and not score.floor)),
        samples=next((score.samples for score in scores if score.samples), None),
        hours=hours_text(hours) if isinstance(hours, int | float) else None,
        libraries=libraries if isinstance(libraries, dict) else {},
        notes=[*ours.get("notes", []), *facts.notes],
        version=__version__,
    )
    write_atomically(folder / CARD, redact(page))


def _plain(text: object) -> str:
    """Text that stays on its line, in its cell and in its code span."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")


def _objective(recipe: Any) -> str | None:
    objective = recipe.get("objective") if isinstance(recipe, dict) else None
    return objective.get("name") if isinstance(objective, dict) else None


def _row(score: Score) -> list[str]:
    """A line of the table."""
    value = f"{score.shown}{'%' * (score.unit == '%')} {score.deviation}".strip()
    return [score.encoder, score.evaluator, score.metric, score.test, value, ", ".join(score.spread)]
