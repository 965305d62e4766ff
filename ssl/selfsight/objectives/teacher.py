"""A frozen teacher, and the files in which its outputs are stored.

teacher.json      whose outputs they are, of which data and augmentation
NAME.npy          float16 (rows, ...), row = augmentation * samples + sample; NAME is embedding, patches or probabilities
classes.npy       int32 (rows, K), the classes that `probabilities` belong to
"""

import json
import shutil
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.transfer import without_waiting
from selfsight.encoder import Encoder
from selfsight.errors import NumericError, StorageError, UsageError
from selfsight.ledger import weights_hash
from selfsight.objectives.configs import DistillConfig
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import packaged
from selfsight.run_folder import differences

Outputs = dict[str, Tensor]
# What outputs of a release that did not say it were made with.
LATER: dict[str, Any] = {"depth": 8, "range": None, "frames": 1, "step": 1, "plain_pixels": True}
_TYPES = {"classes": np.int32}
_OUTPUTS = {"embedding", "patches", "probabilities", "classes"}
# Weight of a recipe -> the outputs that it needs.
_NEEDS = {
    "embedding": ("embedding",),
    "similarity": ("embedding",),
    "patches": ("patches",),
    "logits": ("probabilities", "classes"),
}


class Teacher(nn.Module):
    """An encoder that is not trained, with its own idea of an input, and a classifier if it has one."""

    def __init__(self, encoder: Encoder, config: DistillConfig, classifier: nn.Linear | None = None) -> None:
        super().__init__()
        self.encoder, self.classifier, self.config = encoder, classifier, config
        self.widths = {"embedding": encoder.feature_width, "patches": encoder.width}
        if classifier is not None:
            self.widths["classes"] = classifier.out_features
            if config.top_k and config.top_k > classifier.out_features:
                raise UsageError(f"objective.top_k: {config.top_k} of the teacher's {classifier.out_features} classes")
        self.requires_grad_(False).eval()
        self.weights = weights_hash(self)[:16]

    def __deepcopy__(self, memo: dict[int, object]) -> "Teacher":
        """It never changes: a copy of its student shares it."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, made: Preprocessing) -> Outputs:
        """What a student of `config` learns from, of images (B, C, S, S), or volumes (B, C, D, S, S), made for the student.

        Returns:
            Of embedding (B, D), patches (B, N, D), and the largest probabilities (B, K) with their classes (B, K).
        """
        images = self.as_input(images, made)
        config = self.config
        outputs: Outputs = {}
        own = (self.encoder.pool,) if config.embedding or config.similarity else ()
        tokens, features = self.encoder.encode(images, (*own, *(("head",) if self.classifier is not None else ())))
        if own:
            outputs["embedding"] = features[self.encoder.pool].float()
        if config.patches:
            outputs["patches"] = tokens.patches.float()
        if self.classifier is not None:
            logits = self.classifier(features["head"]).float()
            found = F.softmax(logits / config.temperature, dim=-1).topk(config.top_k or logits.shape[1])
            outputs |= {"probabilities": found.values, "classes": found.indices}
        return outputs

    def as_input(self, images: Tensor, made: Preprocessing) -> Tensor:
        """The student's images as the teacher wants them: its size, channels and normalisation."""
        own = self.encoder.preprocessing
        images = made.pixels(images)
        if own.channels == 3 and made.channels == 1:
            images = images.expand(-1, 3, *images.shape[2:])
        if own.image_size != images.shape[-1]:
            size = (own.image_size, own.image_size)
            resized = F.interpolate(images.flatten(1, -3), size, mode="bicubic", antialias=True)
            images = resized.view(*images.shape[:-2], *size)
        mean, std = own.statistics(images.device)
        return (images - mean) / std


def load_teacher(config: DistillConfig, made: Preprocessing) -> Teacher:
    """The teacher of a recipe, ready for images that are made for its student.

    Raises:
        UsageError: nothing of the kind, no classifier where one is needed, other channels, or patch tokens without a grid.
    """
    from selfsight.loading import load_encoder

    shipped = packaged() / config.teacher
    source = str(shipped) if not Path(config.teacher).exists() and shipped.is_dir() else config.teacher
    encoder = load_encoder(source)
    own = encoder.preprocessing
    if own.channels != made.channels and (own.channels, made.channels) != (3, 1):
        raise UsageError(f"objective.teacher: {source} takes {own.channels} channels, the student {made.channels}")
    if own.frames != made.frames:
        raise UsageError(f"objective.teacher: {source} takes {own.frames} planes, the student {made.frames}")
    if config.patches:
        refuse_planes(encoder, source)
        with torch.no_grad():
            tokens = encoder(torch.zeros(1, own.channels, own.image_size, own.image_size)).patches.shape[1]
        square(tokens, source)
    return Teacher(encoder, config, _classifier(source) if config.logits else None)


def refuse_planes(encoder: Encoder, whose: str) -> None:
    """Raise UsageError if patch tokens lie in planes, of a volume or for each channel, which have no counterpart elsewhere."""
    if encoder.volumetric:
        raise UsageError(f"objective.patches: the patch tokens of {whose} lie in planes; distil its embedding")


def square(tokens: int, whose: str) -> int:
    """Side of a square grid of patch tokens.

    Raises:
        UsageError: they are no square grid, so that the other's cannot be matched.
    """
    side = isqrt(tokens)
    if side * side != tokens or side < 2:
        raise UsageError(
            f"objective.patches: the {tokens} patch tokens of {whose} are no grid that another can be matched to"
        )
    return side


def _classifier(source: str) -> nn.Linear:
    """The last layer of a timm model, by name or in a folder.

    Raises:
        UsageError: it has none, as our own exports have none.
    """
    local = (Path(source) / "config.json").is_file()
    if local or timm.is_model(source.split(".")[0]):
        model: Any = timm.create_model(f"local-dir:{Path(source).resolve()}" if local else source, pretrained=True)
        classifier: nn.Module = model.get_classifier()
        if isinstance(classifier, nn.Linear):
            return classifier
    raise UsageError(f"objective.logits: {source} has no classifier; distil its embedding, patches or similarity")


class StoredTeacher:
    """A teacher's outputs by row."""

    def __init__(self, folder: Path, config: DistillConfig) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "teacher.json").read_text())
            self.of: dict[str, Any] = manifest["of"]
            self.weights: str = manifest["weights"]
            self.widths: dict[str, int] = manifest["widths"]
            if strange := set(manifest["outputs"]) - _OUTPUTS:
                raise ValueError(f"outputs that are none: {', '.join(map(repr, sorted(strange, key=str)))}")
            self.arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in manifest["outputs"]
            }
            if others := [name for name, array in self.arrays.items() if not _is_output(name, array)]:
                raise ValueError(f"{', '.join(others)}: of another kind")
        # NumPy reads a header as Python's literals, and lets pass whatever goes wrong in that.
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            RecursionError,
            TokenError,
        ) as error:
            advice = "name a new folder" if folder.exists() else "`selfsight teacher RECIPE` writes it"
            raise UsageError(f"objective.stored: {folder}: holds no stored teacher ({error}); {advice}") from None
        needed: set[str] = set()
        for weight, outputs in _NEEDS.items():
            if getattr(config, weight):
                needed |= set(outputs)
                if outputs[0] not in self.arrays:
                    raise UsageError(f"objective.{weight}: {folder}: holds {', '.join(self.arrays)}, no {outputs[0]}")
        self.arrays = {name: array for name, array in self.arrays.items() if name in needed}

    def __deepcopy__(self, memo: dict[int, object]) -> "StoredTeacher":
        """It never changes: a copy of its student shares it."""
        return self

    def __call__(self, rows: Tensor, device: torch.device) -> Outputs:
        """The outputs at rows (B,)."""
        found = {name: torch.from_numpy(array[rows.numpy()]) for name, array in self.arrays.items()}
        return {
            name: without_waiting(value, device).to(torch.long if name == "classes" else torch.float32)
            for name, value in found.items()
        }

    def require(self, wanted: dict[str, Any]) -> None:
        """Raise UsageError, naming every difference, if the outputs are of other data, augmentation or teacher."""
        found, wanted = LATER | self.of, LATER | wanted
        if other := differences({key: value for key, value in found.items() if key in wanted}, wanted):
            raise UsageError(
                f"objective.stored: {self.folder}: holds outputs for another recipe: {'; '.join(other.values())}\n"
                "write them again with `selfsight teacher RECIPE`, or give the recipe as it was"
            )


def _is_output(name: str, array: Any) -> bool:
    wanted = _TYPES.get(name, np.float16)
    return isinstance(array, np.ndarray) and array.dtype == wanted and array.ndim == (3 if name == "patches" else 2)


def write_outputs(
    folder: Path, of: dict[str, Any], about: dict[str, Any], rows: int, outputs: Iterable[Outputs]
) -> None:
    """Store a teacher's outputs, batch by batch in the order of their rows; the folder appears when it is whole.

    Args:
        of: what they are the outputs of; compared when they are used.
        about: `weights`, a hash of the teacher's, and `widths` of its outputs.

    Raises:
        NumericError: outputs that are not finite, or too large for float16.
        StorageError: the disk is full or cannot be written.
    """
    draft = folder.with_name(f".draft-{folder.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        manifest = {"of": of, **about, "outputs": _write_arrays(draft, rows, outputs)}
        (draft / "teacher.json").write_text(json.dumps(manifest, indent=1))
        draft.rename(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_arrays(draft: Path, rows: int, outputs: Iterable[Outputs]) -> list[str]:
    arrays: dict[str, Any] = {}
    first = 0
    for made in outputs:
        for name, value in made.items():
            with np.errstate(over="ignore"):  # it is looked for below
                stored = value.cpu().numpy().astype(_TYPES.get(name, np.float16))
            if not np.isfinite(stored).all():
                raise NumericError(f"the teacher's {name} are not finite in float16 (row {first:,})")
            if name not in arrays:
                shape = (rows, *stored.shape[1:])
                arrays[name] = np.lib.format.open_memmap(draft / f"{name}.npy", "w+", stored.dtype, shape)
            arrays[name][first : first + len(stored)] = stored
        first += len(next(iter(made.values())))
    for array in arrays.values():
        array.flush()
    return sorted(arrays)
