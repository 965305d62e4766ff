"""`selfsight export`: find the weights, change what was asked, write, check, publish; everything that was done is said."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from selfsight import __version__
from selfsight.console import say
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.exports import averaging, hub
from selfsight.exports.card import license_of
from selfsight.exports.export import export, timm_line
from selfsight.exports.origin import name_of, provenance_of, run_facts
from selfsight.exports.resize import resized
from selfsight.loading import load_encoder

METHODS = ("uniform", "greedy")


class Request(NamedTuple):
    """The command's options; see `selfsight export --help`."""

    source: str
    target: Path
    to: str = "timm"
    half: str | None = None
    weights: str | None = None
    average: list[str] | None = None
    labels: list[str] | None = None
    image_size: int | None = None
    license: str = "unknown"
    push: str | None = None
    private: bool = False


def run(asked: Request) -> str:
    """Do it; the answer is the line that loads the export.

    Raises:
        UsageError: options that do not go together, or what `export`, `load_encoder`, `averaging` and `hub` refuse.
    """
    license_of(asked.license)
    if asked.push:
        hub.require_token(hub.require_name(asked.push))
    elif asked.private:
        raise UsageError("--private: is of --push")
    if asked.labels and (asked.average or [""])[0] != "greedy":
        raise UsageError("--labels: is of --average greedy")
    _refuse_encoder_of_a_run(asked.target)
    chosen = bool(asked.weights or asked.average)
    names = _names(asked)
    origin = provenance_of(asked.source, from_checkpoint=chosen)
    encoder, notes = _weights(asked, names, origin)
    changed = bool(chosen or asked.half)
    if asked.image_size and asked.image_size != encoder.preprocessing.image_size:
        encoder, lines = resized(encoder, asked.image_size)
        notes, changed = (*notes, *lines), True
    for line in notes:
        say(line)
    if asked.average:
        origin.pop("source", None)
    if asked.half:
        notes = (*notes, f"weights rounded to {asked.half}")
    if asked.weights:
        origin["weights"] = asked.weights
    notes = (*origin.get("notes", ()), *notes)  # of exports before this one, too
    told = {"version": __version__, "source": ", ".join(map(name_of, names)), **origin, "notes": list(notes)}
    facts = run_facts(asked.source, asked.license, same=not changed)
    difference = export(encoder, asked.target, told, asked.to, asked.half, facts)
    say(f"exported; {asked.to}'s features differ by {difference:.1e} at most")
    if asked.push:
        say(f"published: {hub.push(asked.target, asked.push, asked.private)}")
    return line_of(asked.target, asked.to)


def _refuse_encoder_of_a_run(target: Path) -> None:
    target = target.resolve()
    if target.name == "encoder" and (target.parent / "recipe.yaml").is_file():
        raise UsageError(
            f"{target}: is the encoder of a run, of which its scores and its report are; name another folder"
        )


def _names(asked: Request) -> list[str]:
    if not asked.average:
        return [asked.source]
    method, *words = asked.average
    if method not in METHODS:
        raise UsageError(f"--average: {method!r} is neither of {', '.join(METHODS)}; it stands before the checkpoints")
    return averaging.sources(asked.source, words)


def _weights(asked: Request, names: list[str], origin: dict[str, Any]) -> tuple[Encoder, tuple[str, ...]]:
    """The encoder and what was done; where sources differ in their licence, `origin` loses it."""
    if not asked.average:
        return load_encoder(asked.source, asked.weights), ()
    load = partial(load_encoder, weights=asked.weights)
    labels = asked.labels or ((origin.get("recipe") or {}).get("eval") or {}).get("train")
    if asked.average[0] == "uniform":
        soup = averaging.uniform(names, load)
        return soup.encoder, (*soup.notes, *_of_one(names, asked.source, origin))
    if not labels:
        raise UsageError("--average greedy: chooses by labels, and the run has no eval.train; give --labels SPEC")
    score = averaging.held_out_knn(labels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    soup = averaging.greedy(names, load, score)
    return soup.encoder, (*soup.notes, *_of_one(names, asked.source, origin))


def _of_one(names: list[str], source: str, origin: dict[str, Any]) -> list[str]:
    """A line that says of which of several sources recipe and data are told; a licence is told if all have it."""
    if names[0] != source:  # checkpoints of one run
        return []
    others = [provenance_of(name) for name in names[1:]]
    if any(other.get("license") != origin.get("license") for other in others):
        origin.pop("license", None)
    return [f"recipe, data, steps and hours are those of {name_of(source)} alone"] if origin else []


def line_of(folder: Path, to: str) -> str:
    """The one line that loads an export."""
    where = folder.resolve()
    return {
        "timm": timm_line(folder),
        "transformers": f'transformers.AutoModel.from_pretrained("{where}")',
        "onnx": f'onnxruntime.InferenceSession("{where}/model.onnx")',
        "torch": f'torch.export.load("{where}/model.pt2").module()',
    }[to]
