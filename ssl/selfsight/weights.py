"""Continuing from somebody's weights: every tensor is loaded, adapted in a way that is said, or named in an error."""

import os
from math import isqrt
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from selfsight import checkpoint
from selfsight.encoder import Encoder, resample_positions
from selfsight.errors import StorageError, UsageError

PICKLES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar", ".npz"}  # what others keep weights in
STEM, POSITIONS = "patch_embed.proj.weight", "pos_embed"
_TRAINED = ("encoder.backbone.", "backbone.")  # where an encoder's tensors lie in a checkpoint, and in its average


def load_weights(encoder: Encoder, source: str, architecture: str) -> list[str]:
    """Load `source` into the encoder's backbone; the answer says what was done, line by line.

    Args:
        source: "timm" (the default weights of `architecture`) or a timm tag, which downloads; a .safetensors file; or a
            folder with model.safetensors (an export of ours or timm's, or a training checkpoint).
        architecture: the timm model that the encoder is.

    Raises:
        UsageError: no such file, or tensors that are missing, unexpected or of another shape; all are named.
    """
    found, lines, wanted = _read(source, architecture), [], encoder.backbone.state_dict()
    classifiers = encoder.backbone.pretrained_cfg.get("classifier") or "head"
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for what, modules in (("classifier", heads), ("attention pool", ("attn_pool",))):
        starts = tuple(f"{module}." for module in modules)
        dropped = sorted(name for name in found if name.startswith(starts) and name not in wanted)
        if dropped:
            lines.append(f"{what} left out: {', '.join(dropped)}")
        found = {name: tensor for name, tensor in found.items() if name not in dropped}
    if "fc_norm.weight" in found and "norm.weight" in wanted and "norm.weight" not in found:
        found = {name.replace("fc_norm.", "norm."): tensor for name, tensor in found.items()}
        lines.append("fc_norm loaded as norm: the last norm stands before the pool, not after it")
    for name in (STEM, POSITIONS):
        if name in found and name in wanted and found[name].shape != wanted[name].shape:
            adapted = _adapt(name, found[name], wanted[name], encoder)
            lines.append(f"{name}: {_shape(found[name])} resampled to {_shape(wanted[name])}")
            found[name] = adapted
    _refuse_mismatch(source, found, wanted)
    encoder.backbone.load_state_dict(found, strict=True)
    return [f"loaded all {len(wanted)} tensors from {source}", *lines]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A .safetensors file.

    Raises:
        UsageError: it is something else, or damaged.
    """
    try:
        return load_file(path)
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:  # types that torch lacks: the last two
        raise UsageError(f"encoder.weights: {path}: not a safetensors file ({error})") from None


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The recipe and the encoder's tensors of a training checkpoint.

    Raises:
        StorageError: it does not verify, or holds something else than its manifest's maker should have written.
    """
    try:
        saved = checkpoint.load(folder)
        return dict(saved.state["recipe"]), checkpoint.encoder_tensors(saved)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{folder}: is no checkpoint of selfsight's ({type(error).__name__}: {error})") from None


def require_whole(folder: Path) -> None:
    """Raise StorageError if an exported folder has a manifest and is not what it says."""
    if os.path.lexists(folder / checkpoint.MANIFEST):
        problem = checkpoint.manifest_problem(folder, {"config.json", "model.safetensors"})
        if problem:
            raise StorageError(f"{folder}: {problem}; copy or export it again")


def _read(source: str, architecture: str) -> dict[str, Tensor]:
    folder = Path(source)
    if is_file(folder / "state.json"):
        _, trained = read_checkpoint(folder)
        return {name.removeprefix("backbone."): tensor for name, tensor in trained.items()}
    path = folder
    if is_file(folder / "model.safetensors"):
        require_whole(folder)
        path = folder / "model.safetensors"
    if path.suffix in PICKLES and is_file(path):
        advice = f"selfsight import-weights {path} {path.with_suffix('.safetensors')}"
        raise UsageError(f"encoder.weights: {path}: may hold code, so it is not read here; import it first: {advice}")
    if is_file(path):
        tensors = read_tensors(path)
        for prefix in _TRAINED:
            if trained := {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}:
                return trained
        return tensors
    name = architecture if source == "timm" else source
    if path.suffix or not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"encoder.weights: {source}: neither a .safetensors file, nor a folder with one, nor a timm tag"
        )
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # the hub's many ways of saying no
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"encoder.weights: {name}: could not be fetched by timm ({type(error).__name__}: {reason})"
        ) from None


def is_file(path: Path) -> bool:
    """Path.is_file, which is no answer but an error for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _adapt(name: str, tensor: Tensor, wanted: Tensor, encoder: Encoder) -> Tensor:
    """A stem for other channels or patches, or a position table for another grid; what cannot be adapted comes back as it is."""
    try:
        if name == STEM and tensor.ndim == 4 and tensor.shape[0] == wanted.shape[0]:
            tensor = resample_patch_embed(tensor, list(wanted.shape[-2:]))
            return adapt_input_conv(wanted.shape[1], tensor, tensor.shape[1])
        if name == POSITIONS and tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]:
            prefix = wanted.shape[1] - encoder.grid[0] * encoder.grid[1]
            patches = tensor.shape[1] - prefix
            if patches > 0 and isqrt(patches) ** 2 == patches:
                return resample_positions(encoder, tensor, (isqrt(patches),) * 2)
    except (
        NotImplementedError,
        AssertionError,
        RuntimeError,
        ValueError,
    ):  # timm's and torch's, of shapes that make no sense
        return tensor
    return tensor


def _refuse_mismatch(source: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    shapes = [
        f"{n} {_shape(found[n])} for {_shape(wanted[n])}"
        for n in wanted
        if n in found and found[n].shape != wanted[n].shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": shapes,
        "that are no real numbers": [
            name
            for name, tensor in found.items()
            if name in wanted and wanted[name].is_floating_point() and not tensor.is_floating_point()
        ],
    }
    told = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if told:
        raise UsageError(f"encoder.weights: {source} is of another architecture; tensors {'; '.join(told)}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
