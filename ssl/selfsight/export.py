"""Weights that timm loads without us, and every way of getting an encoder back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from selfsight import checkpoint
from selfsight.backbone import OPTIONS
from selfsight.encoder import PLANE_TABLES, Encoder, build_encoder, preprocessing_of
from selfsight.errors import StorageError, UsageError
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.redact import redact_tree
from selfsight.run_folder import sync
from selfsight.section import explain
from selfsight.weights import (
    PLANES,
    adopt,
    is_file,
    load_weights,
    read_checkpoint,
    read_config,
    read_export,
    read_tensors,
    require_whole,
)

TOLERANCE = (
    1e-5  # of a feature, fp32, between the live encoder and timm on the export; of the largest where it is above 1
)
CHECK_DEADLINE = 600  # seconds; timm starts in 5, but a disk may be asleep
_TIMM_POOL = {"cls": "token", "mean": "avg"}
# Runs in a process of its own that never sees this package.
_CLEAN = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
folder, sample = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True, num_classes=0).eval()
images = load_file(sample)["images"]
with torch.inference_mode():
    tokens = model.forward_features(images)
    found = {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
assert "selfsight" not in sys.modules
save_file({name: value.contiguous() for name, value in found.items()}, sample + ".out")
"""


def export(encoder: Encoder, folder: Path, provenance: dict[str, Any]) -> float:
    """Write `folder` in timm's local-dir format; it appears only after timm, in a clean process, gave the same features.

    Args:
        provenance: where the weights come from; stored in config.json under "selfsight".

    Returns:
        The largest absolute difference of a feature.

    Raises:
        UsageError: a folder that holds something else.
        StorageError: a difference above 1e-5, or a folder that cannot be written.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise UsageError(f"{folder}: exists and is no export; name a new folder")
    draft = folder.with_name(f".draft-{folder.name}")
    try:
        _put_back(folder)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(encoder, draft, provenance)
        difference = verify_export(encoder, draft)
        seal(draft)
        _replace(folder, draft)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the export could not be written ({getattr(error, 'strerror', error)})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return difference


def seal(folder: Path) -> None:
    """Write manifest.json, last, and have everything reach the disk: the folder is whole from here on."""
    (folder / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.manifest_of(folder), indent=1))
    for path in folder.glob("*.safetensors"):  # written for the owner alone; an export is made to be given away
        path.chmod((folder / checkpoint.MANIFEST).stat().st_mode)
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _replace(folder: Path, draft: Path) -> None:
    old = _aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        _put_back(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Undo the first half of a replacement that was killed between its two renames."""
    if _aside(folder).exists() and not folder.exists():
        _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _write(encoder: Encoder, folder: Path, provenance: dict[str, Any]) -> None:
    made = encoder.preprocessing
    ours = {
        "encoder": encoder.config.model_dump(mode="json"),
        "preprocessing": made._asdict(),
        **redact_tree(provenance),  # an export is made to be given away
    }
    mean, std = _of_plane(encoder, made.mean), _of_plane(encoder, made.std)
    data_config = {
        "input_size": (len(mean), made.image_size, made.image_size),
        "mean": mean,
        "std": std,
        "interpolation": made.interpolation,
        "crop_pct": made.crop_pct,
        "crop_mode": "center",
    }
    # Without these, timm would claim the tag and licence of the architecture's default weights.
    claims = {"pretrained_cfg": {"tag": "selfsight", "license": "unknown"}, "selfsight": ours}
    save_for_hf(encoder.backbone, str(folder), model_config=claims, safe_serialization=True, data_config=data_config)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # given twice, it breaks transformers' AutoModel
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    own = {name: table.detach().cpu() for name, table in encoder.named_parameters() if name in PLANE_TABLES}
    if own:
        save_file(own, folder / PLANES)


def _of_plane(encoder: Encoder, values: tuple[float, ...]) -> tuple[float, ...]:
    """A value for each channel that the backbone's stem takes: of one plane of patches, as timm sees it."""
    if encoder.config.channel_tokens:
        return (sum(values) / len(values),)
    return tuple(value for value in values for _ in range(encoder.config.tube))


@torch.inference_mode()
def verify_export(encoder: Encoder, folder: Path) -> float:
    """Load `folder` with timm in a process that does not import selfsight, and compare features on random images.

    Of volumes and of channel tokens timm has the backbone, which takes one plane of patches; the rest is loaded here.

    Raises:
        StorageError: it does not load, or differs by more than 1e-5.
    """
    made, random = encoder.preprocessing, torch.Generator().manual_seed(0)
    channels = len(_of_plane(encoder, made.mean))
    images = torch.randn(4, channels, made.image_size, made.image_size, generator=random)
    sample = folder / "check.safetensors"
    save_file({"images": images}, sample)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", _CLEAN, str(folder.resolve()), str(sample.resolve())]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHECK_DEADLINE)
    except subprocess.TimeoutExpired:
        raise StorageError(f"{folder}: timm did not load the export within {CHECK_DEADLINE} seconds") from None
    if done.returncode:
        raise StorageError(
            f"{folder}: timm could not load the export: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
        )
    theirs = load_file(str(sample) + ".out")
    sample.unlink()
    Path(str(sample) + ".out").unlink()
    live, training = next(encoder.parameters()).device, encoder.training
    encoder.eval().cpu()
    alone = not encoder.plain or encoder.volumetric
    tokens = encoder.backbone.forward_features(images) if alone else torch.cat(encoder(images), dim=1)
    pairs = [(tokens, theirs["tokens"])]
    if encoder.volumetric:
        volumes = torch.randn(2, *made.shape, generator=random)
        pairs.append((encoder.embed(volumes), _from_export(folder).embed(volumes)))  # not timm's, but what is loaded
    elif encoder.pool in {*_TIMM_POOL, "head"}:
        pairs.append((encoder.embed(images), theirs["pooled"]))
    encoder.to(live).train(training)
    difference = max((ours - other).abs().max().item() for ours, other in pairs)
    largest = max(other.abs().max().item() for _, other in pairs)  # rounding grows with the features
    if not difference < TOLERANCE * max(1.0, largest):
        raise StorageError(
            f"{folder}: timm's features differ from the live encoder's by {difference:.1e}, features up to {largest:.1e}"
        )
    return difference


def timm_line(folder: Path) -> str:
    """The one line that loads an export; where that is the backbone of one plane, it says so."""
    line = f'timm.create_model("local-dir:{folder.resolve()}", pretrained=True, num_classes=0)'
    if (folder / PLANES).is_file():
        line += f'  # one plane of patches; all of it: selfsight.load_encoder("{folder.resolve()}")'
    return line


def load_encoder(source: str | Path) -> Encoder:
    """An encoder from a run folder, an exported folder, a checkpoint, or the name of a timm model (which may download).

    Raises:
        UsageError: nothing of the kind, or weights with a tensor missing, unexpected or of another shape.
        StorageError: a file that is not what its manifest says.
    """
    path = Path(source)
    if is_file(path / "encoder" / "config.json"):
        path = path / "encoder"
    if is_file(path / "config.json"):
        return _from_export(path)
    if is_file(path / "state.json"):
        return _from_checkpoint(path)
    if not os.path.lexists(path):
        return _from_timm(str(source))
    if (path / "checkpoints").is_dir():
        newest, _ = checkpoint.newest(path / "checkpoints")
        if newest:
            return _from_checkpoint(newest)
    raise UsageError(f"{source}: holds neither an export (config.json) nor a checkpoint (state.json)")


def _from_export(path: Path) -> Encoder:
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
    _refuse_bomb(config, made, stored.backbone | stored.own, path)
    encoder = build_encoder(config, made, seed=0)
    wanted = {name: table.shape for name, table in encoder.named_parameters() if name in PLANE_TABLES}
    if wanted != {name: table.shape for name, table in stored.own.items()}:
        raise UsageError(f"{path}: {PLANES} is not what its config.json describes ({', '.join(wanted) or 'nothing'})")
    adopt(encoder, stored, str(file))
    return encoder.eval()


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


def _refuse_bomb(config: EncoderConfig, made: Preprocessing, stored: dict[str, Tensor], path: Path) -> None:
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


def _from_checkpoint(path: Path) -> Encoder:
    recipe, tensors = read_checkpoint(path)  # the recipe's objective may come from a package that is not here
    try:
        config = EncoderConfig.model_validate(recipe["encoder"])
        made = preprocessing_of(DataConfig.model_validate(recipe["data"]), config)
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path}: its recipe describes no encoder; it is no checkpoint of selfsight's") from None
    _refuse_bomb(config, made, tensors, path)
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
        _refuse_bomb(config, made, read_tensors(Path(weights)), Path(weights))
    encoder = build_encoder(config, made, seed=0)
    load_weights(encoder, weights, config.name)
    return encoder.eval()
