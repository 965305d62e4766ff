"""Continuing from somebody's weights: every tensor is loaded, adapted in a way that is said, or named in an error."""

import json
import os
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from selfsight import checkpoint
from selfsight.encoder import PLANE_TABLES, Encoder, resample_positions
from selfsight.errors import StorageError, UsageError
from selfsight.stem import adapt_channels, resample_depth

PICKLES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar", ".npz"}  # what others keep weights in
MAX_CONFIG = 10**6  # bytes of a config.json
STEM, POSITIONS = "patch_embed.proj.weight", "pos_embed"
PLANES = "planes.safetensors"  # of an export: the tensors that are the encoder's own and not timm's
_TRAINED = ("encoder.", "")  # where an encoder's tensors lie in a checkpoint, and in its average


class Source(NamedTuple):
    """An encoder's tensors, wherever they lay."""

    backbone: dict[str, Tensor]
    """By timm's names."""
    own: dict[str, Tensor]
    """Tables over depth or channels."""
    tube: int | None = 1
    """Planes that its stem takes in a patch; None: not known, as many as it is loaded for."""


def load_weights(encoder: Encoder, source: str, architecture: str) -> list[str]:
    """Load `source` into the encoder's backbone; the answer says what was done, line by line.

    Args:
        source: "timm" (the default weights of `architecture`) or a timm tag, which downloads; a .safetensors file; or a
            folder with model.safetensors (an export of ours or timm's, or a training checkpoint).
        architecture: the timm model that the encoder is.

    Raises:
        UsageError: no such file, or tensors that are missing, unexpected or of another shape; all are named.
    """
    return adopt(encoder, _read(source, architecture), source)


def adopt(encoder: Encoder, read: Source, source: str) -> list[str]:
    """Load tensors that were read from `source`; as `load_weights`."""
    found, lines, wanted = read.backbone, [], encoder.backbone.state_dict()
    tube, old_tube = encoder.config.tube, read.tube or encoder.config.tube
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
        other = name == STEM and tube != old_tube  # the shape may be the same: three channels, or three planes of one
        if name in found and name in wanted and (found[name].shape != wanted[name].shape or other):
            adapted = _adapt(name, found[name], wanted[name], encoder, old_tube)
            told = f", for patches of {tube} planes in place of {old_tube}" if other else ""
            lines.append(f"{name}: {_shape(found[name])} resampled to {_shape(wanted[name])}{told}")
            found = found | {name: adapted}
    _refuse_mismatch(source, found, wanted)
    encoder.backbone.load_state_dict(found, strict=True)
    return [f"loaded all {len(wanted)} tensors from {source}", *lines, *_adopt_planes(encoder, read.own)]


def _adopt_planes(encoder: Encoder, own: dict[str, Tensor]) -> list[str]:
    """Load the tables over depth or channels; what is said of them."""
    lines = []
    for name in PLANE_TABLES:
        table, given = getattr(encoder, name), own.get(name)
        fits = given is not None and given.is_floating_point() and given.ndim == 3 and len(given) == 1
        if table is None:
            lines += [f"{name} left out: the encoder has none"] if given is not None else []
        elif given is None:
            lines.append(f"{name} {_shape(table)}: fresh, the weights have none")
        elif not fits or given.shape[2] != table.shape[2] or (name == "channel_embed" and given.shape != table.shape):
            lines.append(f"{name} {_shape(table)}: fresh, that of the weights is {_shape(given)}")
        else:
            if given.shape != table.shape:
                lines.append(f"{name}: {_shape(given)} resampled to {_shape(table)}")
            table.data.copy_(resample_depth(given, table.shape[1]) if given.shape != table.shape else given)
    return lines


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


def read_checkpoint(folder: Path, weights: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The recipe and the encoder's tensors of a training checkpoint; `weights` as for `checkpoint.encoder_tensors`.

    Raises:
        UsageError: a teacher is asked for that it does not have.
        StorageError: it does not verify, or holds something else than its manifest's maker should have written.
    """
    try:
        saved = checkpoint.load(folder)
        return dict(saved.state["recipe"]), checkpoint.encoder_tensors(saved, weights)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{folder}: is no checkpoint of selfsight's ({type(error).__name__}: {error})") from None


def require_whole(folder: Path) -> None:
    """Raise StorageError if an exported folder has a manifest and is not what it says."""
    if os.path.lexists(folder / checkpoint.MANIFEST):
        problem = checkpoint.manifest_problem(folder, {"config.json", "model.safetensors"})
        if problem:
            raise StorageError(f"{folder}: {problem}; copy or export it again")


def _read(source: str, architecture: str) -> Source:
    folder = Path(source)
    if is_file(folder / "state.json"):
        recipe, trained = read_checkpoint(folder)
        return _split(trained, _tube_of(recipe.get("encoder")))
    if is_file(folder / "model.safetensors"):
        require_whole(folder)
        return read_export(folder)
    if folder.suffix in PICKLES and is_file(folder):
        advice = f"selfsight import-weights {folder} {folder.with_suffix('.safetensors')}"
        raise UsageError(f"encoder.weights: {folder}: may hold code, so it is not read here; import it first: {advice}")
    if is_file(folder):
        tensors = read_tensors(folder)
        for prefix in _TRAINED:
            if any(name.startswith(f"{prefix}backbone.") for name in tensors):
                trained = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
                return _split(trained, None if "depth_embed" in trained else 1)
        return Source(tensors, {})
    name = architecture if source == "timm" else source
    if folder.suffix or not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"encoder.weights: {source}: neither a .safetensors file, nor a folder with one, nor a timm tag"
        )
    try:
        return Source(timm.create_model(name, pretrained=True, num_classes=0).state_dict(), {})
    except (OSError, RuntimeError, ValueError) as error:  # the hub's many ways of saying no
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"encoder.weights: {name}: could not be fetched by timm ({type(error).__name__}: {reason})"
        ) from None


def read_export(folder: Path) -> Source:
    """The tensors of an exported folder, ours or timm's.

    Raises:
        UsageError: a file that is no safetensors.
    """
    own = read_tensors(folder / PLANES) if is_file(folder / PLANES) else {}
    try:
        encoder = read_config(folder)["selfsight"]["encoder"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # timm's own, or none
        encoder = None
    return Source(read_tensors(folder / "model.safetensors"), own, _tube_of(encoder))


def read_config(folder: Path) -> Any:
    """The config.json of an exported folder, as it is; raises OSError, ValueError or RecursionError."""
    if (folder / "config.json").stat().st_size > MAX_CONFIG:
        raise ValueError("too large")
    return json.loads((folder / "config.json").read_text())


def _split(trained: dict[str, Tensor], tube: int | None) -> Source:
    """An encoder's state as that of its backbone and what is its own."""
    start = "backbone."
    backbone = {name.removeprefix(start): tensor for name, tensor in trained.items() if name.startswith(start)}
    return Source(backbone, {name: tensor for name, tensor in trained.items() if name in PLANE_TABLES}, tube)


def _tube_of(encoder: Any) -> int:
    """What the fields of an encoder say of its stem, if they are such."""
    tube = encoder.get("tube", 1) if isinstance(encoder, dict) else 1
    return tube if type(tube) is int and tube > 0 else 1


def is_file(path: Path) -> bool:
    """Path.is_file, which is no answer but an error for a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def _adapt(name: str, tensor: Tensor, wanted: Tensor, encoder: Encoder, old_tube: int) -> Tensor:
    """A stem for other channels or patches, or a position table for another grid; what cannot be adapted comes back as it is."""
    try:
        if name == STEM and tensor.ndim == 4 and tensor.shape[0] == wanted.shape[0]:
            tensor = resample_patch_embed(tensor, list(wanted.shape[-2:]))
            tube = encoder.config.tube
            return adapt_channels(tensor, wanted.shape[1] // tube, tube, old_tube)
        if name == POSITIONS and tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]:
            prefix = wanted.shape[1] - prod(encoder.plane_grid)
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
