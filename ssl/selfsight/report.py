"""report.html: one page that needs nothing else. Scores beside floors, curves, what the model sees and makes of it."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import jinja2
import timm
import torch
import torchvision

from selfsight import __version__
from selfsight.assemble import Parts
from selfsight.cost import cost
from selfsight.curves import Chart, charts, numbers
from selfsight.details import confusion, detail_charts
from selfsight.errors import SelfsightError, Stopped, UsageError
from selfsight.eval.tables import difference_lines
from selfsight.exports.export import timm_line
from selfsight.maps import attention_strips, token_strips
from selfsight.neighbours import Neighbours, agreement, bank_of, legend, map_charts, neighbours
from selfsight.pictures import Strip, training_pictures
from selfsight.quarantine import replaced
from selfsight.redact import redact
from selfsight.run_folder import damaged_lines, read_lines, write_atomically
from selfsight.score_tables import (
    FLOORS,
    health_tables,
    scores_of,
    tables,
    warnings,
)

METRICS = "metrics.jsonl"
_FAILURES = (
    SelfsightError,
    OSError,
    RuntimeError,
    ValueError,
)  # of pictures; the last two of PyTorch, NumPy, scikit-learn


@dataclass
class Seen:
    """What of the page is made of images."""

    strips: list[Strip] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)
    agreement: str = ""
    maps: list[Chart] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Why something is missing: the report of a finished run fails of no picture."""


def write_report(parts: Parts, found: Mapping[str, Any], device: torch.device, out: Path | None = None) -> Path:
    """Write the page into the run folder, or to `out`.

    Args:
        found: what scores.json holds, or is going to.
    """
    folder, made, eval_sets = parts.recipe.run_dir, parts.encoder.preprocessing, parts.recipe.eval
    lines = numbers(read_lines(folder / METRICS))
    scores = scores_of(found, str(folder / "scores.json"))
    page = template("report.html.j2").render(
        name=folder.name,
        objective=parts.recipe.objective.name,
        samples=len(parts.shards),
        steps=parts.steps,
        passes=parts.epoch(parts.steps),
        image=(f"{made.frames} planes of " if made.frames > 1 else "")
        + f"{made.image_size} × {made.image_size} × {made.channels}",
        parameters=sum(p.numel() for p in parts.encoder.parameters()) / 1e6,
        architecture=parts.recipe.encoder.name,
        charts=charts(lines),
        damaged=damaged_lines(folder / METRICS),
        seen=what_it_sees(parts, device),
        replaced=replaced(folder),
        tables=tables(scores),
        health=health_tables(scores),
        details=detail_charts(scores),
        confusion=confusion(scores),
        differences=difference_lines(found),
        warnings=warnings(found),
        floors=FLOORS,
        cost=cost(lines, parts.recipe.train.batch_size),
        sets_named=bool(eval_sets.train and eval_sets.test),
        load_line=timm_line(folder / "encoder") if (folder / "encoder").is_dir() else "",
        recipe=parts.recipe.to_yaml(),
        environment=_environment(device),
    )
    target = out or folder / "report.html"
    write_atomically(target, redact(page))
    return target


def require_page(out: Path) -> None:
    """Raise UsageError where a folder stands at the place of a page."""
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; name a file, such as {out / 'report.html'}")


def template(name: str) -> jinja2.Template:
    """A page's template; whatever it is given is escaped, and what it lacks is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def what_it_sees(parts: Parts, device: torch.device) -> Seen:
    """Pictures, maps and neighbours, as far as the encoder and the data have them."""
    seen, encoder = Seen(), parts.scored

    def pictures() -> None:
        first = training_pictures(parts, device)
        seen.strips = first.strips
        seen.strips = [*first.strips, *attention_strips(encoder, first.sources), *token_strips(encoder, first.sources)]

    def near() -> None:
        bank = bank_of(encoder, parts.shards, device, parts.recipe.seed)
        if bank is None:
            seen.left_out.append("neighbours: the encoder's features are not finite, or all zero")
            return
        seen.neighbours = neighbours(bank, encoder, parts.shards)
        seen.agreement, seen.maps, seen.legend = agreement(bank), map_charts(bank), legend(bank)
        if not seen.maps:
            seen.left_out.append("maps: there are too few images, or all have the same features")

    sections: Mapping[str, Callable[[], None]] = {"pictures": pictures, "neighbours": near}
    for name, make in sections.items():
        try:
            make()
        except Stopped:
            raise
        except _FAILURES as error:
            seen.left_out.append(f"{name}: {told_briefly(error)}")
    return seen


def told_briefly(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, SelfsightError):
        return error.told
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _environment(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"selfsight": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions |= {"timm": timm.__version__, "accelerate": accelerate.__version__, "Python": platform.python_version()}
    return {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.release()}",
    } | versions
