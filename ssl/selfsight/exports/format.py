"""What a format is: the contract between `export` and each file beside this one."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsight.encoder import Encoder
from selfsight.errors import UsageError

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = (1, 2, 7)  # batches in which an export is compared: none of them may be the one that it was traced with


class Format(NamedTuple):
    """One way of writing an encoder, and of reading it without us."""

    files: tuple[str, ...]
    """That hold the weights; beside them config.json, README.md and manifest.json."""
    require: Callable[[Encoder], None]
    """Raises UsageError, naming what does not fit, before anything is written."""
    write: Callable[[Encoder, Path, dict[str, Any], torch.dtype], None]
    """Writes `files` and config.json, with our own fields under "selfsight"."""
    clean: str
    """Python that loads `folder` and defines `outputs(images) -> {name: tensor}`; sees no selfsight."""
    expected: Callable[[Encoder, Tensor], dict[str, Tensor]]
    """The same from the live encoder."""
    shape: Callable[[Encoder], tuple[int, ...]]
    """Of an input, without the batch."""
    code: Callable[[Encoder], str]
    """Python for the card, that makes `features` of `images` from `folder`."""
    tolerance: float = 1e-4
    """Of a feature, fp32; of the largest where it is above 1."""
    half: bool = False
    """Whether weights may be stored in 16 bits."""


def shape_of(encoder: Encoder) -> tuple[int, ...]:
    """Of an input, as `Encoder.embed` takes it."""
    return encoder.preprocessing.shape


def features_of(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """What a graph of the whole encoder gives: features (B, D) by its own pool, and patch tokens (B, N, D)."""
    tokens, pooled = encoder.encode(images, (encoder.pool,))
    return {"features": pooled[encoder.pool], "patches": tokens.patches}


class Graph(torch.nn.Module):
    """An encoder as a function of images alone, which is what is traced."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, ...) to features (B, D) and patch tokens (B, N, D)."""
        found = features_of(self.encoder, images)
        return found["features"], found["patches"]


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json of an export."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def require_extra(*modules: str) -> None:
    """Raise UsageError with the line to type where a library of the `export` extra is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(f"export: needs {name}: pip install 'selfsight[export]'") from None
