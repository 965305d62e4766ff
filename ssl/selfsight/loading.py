"""Every way of getting an encoder back: a run, an export, a checkpoint, a timm model."""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from torch import Tensor

from selfsight import checkpoint
from selfsight.backbone import OPTIONS
from selfsight.encoder import PLANE_TABLES, Encoder, build_encoder, preprocessing_of
from selfsight.errors import StorageError, UsageError
from selfsight.exports.transformers_names import tensors_from
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.section import explain
from selfsight.weights import (
    PLANES,
    Source,
    adopt,
    is_file,
    load_weights,
    read_checkpoint,
    read_config,
    read_export,
    read_tensors,
    require_whole,
)


def load_encoder(source: str | Path, weights: str | None = None) -> Encoder:
    """An encoder from a run folder, an exported folder, a checkpoint, or the name of a timm model (which may download).

    Args:
        weights: of a run or checkpoint, "student" or "teacher" (a running average); None: the one that is scored.

    Raises:
        UsageError: nothing of the kind, or weights with a tensor missing, unexpected or of another shape.
        StorageError: a file that is not what its manifest says.
    """
    path = Path(source)
    if is_file(path / "state.json"):
        return _from_checkpoint(path, weights)
    if weights and (path / "checkpoints").is_dir():
        return _from_newest(path, weights)
    if is_file(path / "encoder" / "config.json"):
        path = path / "encoder"
    if weights:
        raise UsageError(f"{source}: --weights {weights} chooses in a run or a checkpoint, and this is neither")
    if is_file(path / "config.json"):
        return _from_export(path)
    if not os.path.lexists(path):
        return _from_timm(str(source))
    return _from_newest(path, weights)


def _from_newest(path: Path, weights: str | None) -> Encoder:
    newest = checkpoint.newest(path / "checkpoints")[0] if (path / "checkpoints").is_dir() else None
    if newest:
        return _from_checkpoint(newest, weights)
    raise UsageError(f"{path}: holds neither an export (config.json) nor a checkpoint (state.json)")


def _from_export(path: Path) -> Encoder:
    for graph in ("model.onnx", "model.pt2"):
        if is_file(path / graph) and not is_file(path / "model.safetensors"):
            raise UsageError(
                f"{path}: {graph} is a graph, of which no encoder can be made; export it --to timm as well"
            )
    require_whole(path)
    file = path / "model.safetensors"
    try:
        written = read_config(path)
        if "selfsight" not in written:
            return _as_timm(
                written["architecture"], written["pretrained_cfg"], written.get("model_args", {}), str(file)
            )
        ours = written["selfsight"]
        config = EncoderConfig.model_validate(ours["encoder"])
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in ours["preprocessing"].items()}
        made = _as_preprocessing(fields, path)
    except ValidationError as error:
        raise UsageError(f"{path}: config.json: {'; '.join(explain(error, 'encoder.', EncoderConfig))}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path}: config.json is neither selfsight's nor timm's") from None
    stored = read_export(path)
    refuse_bomb(config, made, stored.backbone | stored.own, path)
    encoder = build_encoder(config, made, seed=0)
    wanted = {name: table.shape for name, table in encoder.named_parameters() if name in PLANE_TABLES}
    if wanted != {name: table.shape for name, table in stored.own.items()}:
        raise UsageError(f"{path}: {PLANES} is not what its config.json describes ({', '.join(wanted) or 'nothing'})")
    if ours.get("format") == "transformers":
        stored = _as_timm_names(encoder, stored, file)
    adopt(encoder, stored, str(file))
    return encoder.eval()


def _as_timm_names(encoder: Encoder, stored: Source, file: Path) -> Source:
    try:
        return Source(tensors_from(encoder, stored.backbone), {})
    except (RuntimeError, KeyError, IndexError, TypeError) as error:  # shapes that do not fit each other
        raise UsageError(f"{file}: is not what its config.json describes ({str(error).splitlines()[0]})") from None


def _as_preprocessing(fields: dict[str, Any], path: Path) -> Preprocessing:
    """What config.json says of it, held to what a recipe may say; raises TypeError, ValueError, or UsageError with the field."""
    made = Preprocessing(**fields)
    told = {name: getattr(made, name) for name in ("mean", "std", "interpolation", "crop_pct", "depth", "range")}
    try:
        DataConfig.model_validate(told | {"train": "", "frame_step": made.step}, strict=True)
    except ValidationError as error:
        raise UsageError(f"{path}: config.json: {'; '.join(explain(error, 'preprocessing.', DataConfig))}") from None
    if any(type(count) is not int for count in (made.image_size, made.channels, made.frames)):  # bool and 1.0 equal 1
        raise TypeError(made)
    if not len(made.mean) == len(made.std) == made.channels or min(made.std) <= 0:
        raise ValueError(made)
    if made.depth == 32 and made.range is None:
        raise UsageError(f"{path}: config.json: preprocessing.range: is missing; a depth of 32 needs it")
    return made


def refuse_bomb(config: EncoderConfig, made: Preprocessing, stored: dict[str, Tensor], path: Path | str) -> None:
    """Look at the described encoder before memory is taken for it: it must fit the tensors that lie beside it.

    Raises:
        UsageError: it does not.
    """
    bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    table = (config.image_size // (config.patch or 16)) ** 2 * (config.width or 1)
    if table > 8 * max(bytes_held, 2**20) or made.image_size != config.image_size:
        raise UsageError(f"{path}: describes an encoder that its weights do not fit (image_size)")
    if (made.channels, made.frames) != (config.channels, config.frames):
        raise UsageError(f"{path}: describes inputs that its encoder does not take (channels, frames)")
    try:
        with torch.device("meta"):
            described = sum(p.numel() for p in build_encoder(config, made, seed=0).parameters())
    except (RuntimeError, OverflowError, AssertionError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: describes an encoder that cannot be built ({str(error).splitlines()[0]})") from None
    if described > max(bytes_held, 2**20):  # a parameter takes a byte at the very least
        raise UsageError(
            f"{path}: describes an encoder of {described:,} parameters, its weights have {bytes_held:,} bytes"
        )


def _from_checkpoint(path: Path, weights: str | None = None) -> Encoder:
    recipe, tensors = read_checkpoint(path, weights)  # the recipe's objective may come from a package that is not here
    try:
        config = EncoderConfig.model_validate(recipe["encoder"])
        made = preprocessing_of(DataConfig.model_validate(recipe["data"]), config)
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path}: its recipe describes no encoder; it is no checkpoint of selfsight's") from None
    refuse_bomb(config, made, tensors, path)
    encoder = build_encoder(config, made, seed=0)
    try:
        encoder.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    return encoder.eval()


def _from_timm(name: str) -> Encoder:
    if not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"{name}: neither a run, nor an exported encoder, nor a checkpoint, nor a model that timm knows"
        )
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that this model does not have
        known = None
    if known is None or not known.has_weights:
        raise UsageError(f"{name}: timm has no pretrained weights under this name")
    return _as_timm(name.split(".")[0], known.to_dict(), {}, name)


def _as_timm(architecture: str, known: dict[str, Any], arguments: dict[str, Any], weights: str) -> Encoder:
    """A timm model as timm describes it: its `pretrained_cfg` and the arguments that it was created with."""
    ours = {spelling: field for field, spellings in OPTIONS.items() for spelling in spellings}
    # A square is written as two equal sides.
    arguments = {k: v[0] if isinstance(v, list) and len(set(v)) == 1 else v for k, v in arguments.items()}
    changed = {ours[name]: value for name, value in arguments.items() if name in ours}
    if other := set(arguments) - set(ours) - {"num_classes", "in_chans", "global_pool", "pretrained"}:
        raise UsageError(
            f"{weights}: was made with options of timm that have no field here: {', '.join(sorted(other))}"
        )
    channels, size, _ = known["input_size"]
    fields = {"name": architecture, "image_size": size, "channels": channels} | changed
    try:
        config = EncoderConfig(**fields, positions="learned", init="timm", pool="head", weights=weights)
    except ValidationError as error:
        raise UsageError(f"{weights}: {'; '.join(explain(error, 'encoder.', EncoderConfig))}") from None
    interpolation = known["interpolation"] if known["interpolation"] in {"bicubic", "bilinear"} else "bicubic"
    statistics = tuple(known["mean"]), tuple(known["std"])
    made = Preprocessing(config.image_size, channels, *statistics, interpolation, known["crop_pct"])
    if is_file(Path(weights)):
        refuse_bomb(config, made, read_tensors(Path(weights)), Path(weights))
    encoder = build_encoder(config, made, seed=0)
    load_weights(encoder, weights, config.name)
    return encoder.eval()
