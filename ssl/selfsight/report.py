"""report.html: one page that needs nothing else. Curves, what the model sees and makes of it, scores beside floors."""

import base64
import platform
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import accelerate
import jinja2
import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor

from selfsight import __version__, console
from selfsight.assemble import Parts
from selfsight.charts import Series, line_chart
from selfsight.data.placer import normalize
from selfsight.eval.features import CentralCrops
from selfsight.export import timm_line
from selfsight.preprocessing import Preprocessing
from selfsight.quarantine import replaced
from selfsight.redact import redact
from selfsight.run_folder import read_lines, write_atomically

PICTURES = 8  # images in each row
FLOORS = {
    "random-init": "the same encoder, untrained",
    "pixels": "no encoder: raw pixels",
    "majority": "always the commonest class",
}
Curve = tuple[str, tuple[str, ...], str, str]  # title, fields of metrics.jsonl, unit, what to look for
_BELOW = "Below the dashed floor, the model predicts better than one that has learned nothing."
_TERMS = {
    "accuracy": "Share of right answers.",
    "teacher_entropy": "Nats; how undecided the teacher is about an image. Near 0 or near log(outputs) for long: collapse.",
    "teacher_mean_entropy": "Nats, of the mean over images: a fall to 0 means one answer to all.",
}
_CURVES: tuple[Curve, ...] = (
    ("Online kNN", ("knn",), " %", "On a held-out tenth of the labelled training set; the test set is not touched."),
    ("RankMe", ("rankme",), "", "Dimensions in use. A fall towards 1 is collapse."),
    ("Learning rate", ("lr",), "", "Warmup, then half a cosine."),
    ("Gradient norm", ("grad_norm",), "", "Spikes that come back ask for a lower rate or optim.clip."),
    ("Images per second", ("images_per_second",), "", "Over all ranks."),
    ("Memory", ("memory",), " MiB", "Peak of the main process: the GPU's, or resident memory on a CPU."),
    ("Waiting for data", ("data_wait",), "", "Share of the time; above 0.1 more train.workers help."),
)


def write_report(parts: Parts, scores: list[dict[str, Any]], device: torch.device) -> Path:
    """Write the page into the run folder."""
    folder, made = parts.recipe.run_dir, parts.encoder.preprocessing
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    lines = _numbers(read_lines(folder / "metrics.jsonl"))
    page = environment.get_template("report.html.j2").render(
        name=folder.name,
        objective=parts.recipe.objective.name,
        samples=len(parts.shards),
        steps=parts.steps,
        passes=parts.epoch(parts.steps),
        image=(f"{made.frames} planes of " if made.frames > 1 else "")
        + f"{made.image_size} × {made.image_size} × {made.channels}",
        parameters=sum(p.numel() for p in parts.encoder.parameters()) / 1e6,
        architecture=parts.recipe.encoder.name,
        charts=_charts(lines),
        rows=picture_rows(parts, device),
        replaced=replaced(folder),
        scores=_score_rows(scores),
        evaluators=[name for name in dict.fromkeys(s["evaluator"] for s in scores) if name != "majority"],
        protocols=[s for s in scores if s["encoder"] == "pretrained"],
        test_samples=scores[0]["samples"] if scores else 0,
        load_line=timm_line(folder / "encoder"),
        recipe=parts.recipe.to_yaml(),
        environment=_environment(device),
    )
    write_atomically(folder / "report.html", redact(page))
    return folder / "report.html"


def _numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What can be drawn of the lines; a file that somebody else wrote may hold anything."""
    kept = [{field: value for field, value in line.items() if isinstance(value, int | float)} for line in lines]
    return [line for line in kept if "step" in line and "loss" in line]


def _charts(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    charts = []
    for title, fields, unit, hint in (*_own_curves(lines), *_CURVES):
        series = [
            Series(
                field.rpartition("/")[2],
                [(line["step"], line[field]) for line in lines if field in line],
                field.endswith("floor"),
            )
            for field in fields
        ]
        if drawn := line_chart(series, unit, title):
            last = next(s.points[-1][1] for s in series if s.points)
            charts.append({"title": title, "svg": drawn, "hint": hint, "last": f"{last:.4g}{unit}"})
    return charts


def _own_curves(lines: list[dict[str, Any]]) -> list[Curve]:
    """The loss and its terms, each with its floor if it has one, and the vectors that are watched for collapse."""
    fields = list(dict.fromkeys(field for line in lines for field in line))
    terms = [field for field in fields if field.startswith("loss/") and not field.endswith("floor")]
    terms = [field for field in terms if any(line[field] != line["loss"] for line in lines if field in line)]
    watched = dict.fromkeys(field.rpartition("/")[0] for field in fields if field.startswith("watch/"))
    told = (
        _BELOW
        if "loss/floor" in fields
        else "This objective has no floor to compare with: look at kNN, and at what follows."
    )
    curves: list[Curve] = [("Loss", ("loss", "loss/floor"), "", told)]
    for field in terms:
        floored = f"{field}/floor" in fields
        hint = _TERMS.get(field.rpartition("/")[2], _BELOW if floored else "A term of the loss.")
        curves.append((field.removeprefix("loss/"), (field, f"{field}/floor"), "", hint))
    for name in watched:
        what = name.removeprefix("watch/")
        hint = "Blue, std: 1 where vectors of different images point everywhere, 0 where all are the same. Brown: mean cosine."
        curves.append((f"Spread of {what}", (f"{name}/std", f"{name}/cosine"), "", hint))
        curves.append((f"RankMe of {what}", (f"{name}/rank",), "", "Dimensions in use by a batch."))
    return curves


@torch.no_grad()
def picture_rows(parts: Parts, device: torch.device) -> list[dict[str, Any]]:
    """The objective's pictures of the first training images, one row a caption."""
    few = replace(parts.batches(), batch_size=PICTURES, accumulate=1)[0]
    parts.objective.eval()
    shown = parts.objective.pictures(parts.placer(device)(few))
    parts.objective.train()
    made = parts.encoder.preprocessing
    sources = CentralCrops.of(parts.shards, few.ids.numpy(), made)[0]
    shown = {"source image": normalize(sources.to(device), *made.statistics(device), made.values), **shown}
    return [
        {"caption": caption, "images": [png(image, made) for image in images.cpu()]}
        for caption, images in shown.items()
    ]


def png(image: Tensor, made: Preprocessing) -> str:
    """A normalised image (C, S, S), or the middle one of its planes (C, D, S, S), as a data URL.

    Grey and RGB of 8 bits as they are. Of other values no screen shows the whole range: black to white is 2.5 deviations
    either side of the mean, and of more than three channels the first three are shown in false colours.
    """
    image = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    plain = made.channels in (1, 3) and made.depth == 8
    shown = made._replace(frames=1).pixels(image) if plain else image / 5 + 0.5
    pixels = (shown.clamp(0, 1) * 255).round().byte().numpy()
    array = np.moveaxis(pixels[:3], 0, -1) if len(pixels) >= 3 else pixels[0]
    out = BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _score_rows(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    evaluators = [name for name in dict.fromkeys(s["evaluator"] for s in scores) if name != "majority"]
    for encoder in dict.fromkeys(s["encoder"] for s in scores):
        own = {s["evaluator"]: s for s in scores if s["encoder"] == encoder}
        cells = [own.get(name) or own.get("majority") for name in evaluators]
        bars = [{"text": console.format_score(cell), "value": cell["value"] if cell else 0.0} for cell in cells]
        rows.append({"encoder": encoder, "note": FLOORS.get(encoder, "this run's export"), "bars": bars})
    return rows


def _environment(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"selfsight": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions |= {"timm": timm.__version__, "accelerate": accelerate.__version__, "Python": platform.python_version()}
    return {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.release()}",
    } | versions
