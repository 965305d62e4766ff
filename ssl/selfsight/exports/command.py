"""`selfsight export`: find the weights, change what was asked, write, check, publish; everything that was done is said."""

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
from selfsight.exports.origin import provenance_of, run_facts
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
        hub.require_name(asked.push)
    elif asked.private:
        raise UsageError("--private: is of --push")
    if asked.labels and (asked.average or [""])[0] != "greedy":
        raise UsageError("--labels: is of --average greedy")
    changed = bool(asked.weights or asked.average)
    origin = provenance_of(asked.source, from_checkpoint=changed)
    encoder, notes = _weights(asked, origin)
    if asked.image_size and asked.image_size != encoder.preprocessing.image_size:
        encoder, lines = resized(encoder, asked.image_size)
        notes, changed = (*notes, *lines), True
    for line in notes:
        say(line)
    named = {"weights": asked.weights} if asked.weights else {}
    told = {"version": __version__, **origin, **named, "source": asked.source, "notes": list(notes)}
    facts = run_facts(asked.source, asked.license, (), same=not changed)
    difference = export(encoder, asked.target, told, asked.to, asked.half, facts)
    say(f"exported; {asked.to}'s features differ by {difference:.1e} at most")
    if asked.push:
        say(f"published: {hub.push(asked.target, asked.push, asked.private)}")
    return line_of(asked.target, asked.to)


def _weights(asked: Request, origin: dict[str, Any]) -> tuple[Encoder, tuple[str, ...]]:
    if not asked.average:
        return load_encoder(asked.source, asked.weights), ()
    method, *words = asked.average
    if method not in METHODS:
        raise UsageError(f"--average: {method!r} is neither of {', '.join(METHODS)}; it stands before the checkpoints")
    names = averaging.sources(asked.source, words)
    labels = asked.labels or ((origin.get("recipe") or {}).get("eval") or {}).get("train")
    if method == "uniform":
        soup = averaging.uniform(averaging.load_all(names, asked.weights), names)
        return soup.encoder, soup.notes
    if not labels:
        raise UsageError("--average greedy: chooses by labels, and the run has no eval.train; give --labels SPEC")
    score = averaging.held_out_knn(labels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    soup = averaging.greedy(averaging.load_all(names, asked.weights), names, score)
    return soup.encoder, soup.notes


def line_of(folder: Path, to: str) -> str:
    """The one line that loads an export."""
    where = folder.resolve()
    return {
        "timm": timm_line(folder),
        "transformers": f'transformers.AutoModel.from_pretrained("{where}")',
        "onnx": f'onnxruntime.InferenceSession("{where}/model.onnx")',
        "torch": f'torch.export.load("{where}/model.pt2").module()',
    }[to]
