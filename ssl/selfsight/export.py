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

from selfsight import checkpoint
from selfsight.encoder import OPTIONS, Encoder, Preprocessing, build_encoder, preprocessing_of
from selfsight.errors import StorageError, UsageError
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.weights import load_weights

TOLERANCE = (
    1e-5  # of a feature, fp32, between the live encoder and timm on the export; of the largest where it is above 1
)
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
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(encoder, draft, provenance)
        difference = verify_export(encoder, draft)
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the export could not be written ({getattr(error, 'strerror', error)})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return difference


def _write(encoder: Encoder, folder: Path, provenance: dict[str, Any]) -> None:
    made = encoder.preprocessing
    ours = {
        "encoder": encoder.config.model_dump(mode="json"),
        "preprocessing": made._asdict(),
        **provenance,
    }
    data_config = {
        "input_size": (made.channels, made.image_size, made.image_size),
        "mean": made.mean,
        "std": made.std,
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


@torch.inference_mode()
def verify_export(encoder: Encoder, folder: Path) -> float:
    """Load `folder` with timm in a process that does not import selfsight, and compare features on random images.

    Raises:
        StorageError: it does not load, or differs by more than 1e-5.
    """
    made = encoder.preprocessing
    images = torch.randn(4, made.channels, made.image_size, made.image_size, generator=torch.Generator().manual_seed(0))
    sample = folder / "check.safetensors"
    save_file({"images": images}, sample)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", _CLEAN, str(folder.resolve()), str(sample.resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise StorageError(
            f"{folder}: timm could not load the export: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
        )
    theirs = load_file(str(sample) + ".out")
    sample.unlink()
    Path(str(sample) + ".out").unlink()
    live, training = next(encoder.parameters()).device, encoder.training
    encoder.eval().cpu()
    pairs = [
        (
            encoder.backbone.forward_features(images) if not encoder.plain else torch.cat(encoder(images), dim=1),
            theirs["tokens"],
        )
    ]
    if encoder.pool in {*_TIMM_POOL, "head"}:
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
    """The one line that loads an export."""
    return f'timm.create_model("local-dir:{folder.resolve()}", pretrained=True, num_classes=0)'


def load_encoder(source: str | Path) -> Encoder:
    """An encoder from a run folder, an exported folder, a checkpoint, or the name of a timm model (which may download).

    Raises:
        UsageError: nothing of the kind, or weights with a tensor missing, unexpected or of another shape.
    """
    path = Path(source)
    if (path / "encoder" / "config.json").is_file():
        path = path / "encoder"
    if (path / "config.json").is_file():
        return _from_export(path)
    if (path / "checkpoints").is_dir():
        newest, _ = checkpoint.newest(path / "checkpoints")
        path = newest or path
    if (path / "state.json").is_file():
        return _from_checkpoint(path)
    if path.exists():
        raise UsageError(f"{source}: holds neither an export (config.json) nor a checkpoint (state.json)")
    return _from_timm(str(source))


def _from_export(path: Path) -> Encoder:
    try:
        written = json.loads((path / "config.json").read_text())
        if "selfsight" not in written:
            return _as_timm(
                written["architecture"], written["pretrained_cfg"], written.get("model_args", {}), str(path)
            )
        ours = written["selfsight"]
        config = EncoderConfig.model_validate(ours["encoder"])
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in ours["preprocessing"].items()}
        made = Preprocessing(**fields)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise UsageError(f"{path}: config.json is neither selfsight's nor timm's") from None
    encoder = build_encoder(config, made, seed=0)
    load_weights(encoder, str(path), config.name)
    return encoder.eval()


def _from_checkpoint(path: Path) -> Encoder:
    saved = checkpoint.load(path)
    recipe = saved.state["recipe"]  # its objective may come from a package that is not here
    config = EncoderConfig.model_validate(recipe["encoder"])
    encoder = build_encoder(config, preprocessing_of(DataConfig.model_validate(recipe["data"]), config), seed=0)
    try:
        encoder.load_state_dict(checkpoint.encoder_tensors(saved), strict=True)
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
    config = EncoderConfig(**fields, positions="learned", init="timm", pool="head", weights=weights)
    interpolation = known["interpolation"] if known["interpolation"] in {"bicubic", "bilinear"} else "bicubic"
    statistics = tuple(known["mean"]), tuple(known["std"])
    made = Preprocessing(config.image_size, channels, *statistics, interpolation, known["crop_pct"])
    encoder = build_encoder(config, made, seed=0)
    load_weights(encoder, weights, config.name)
    return encoder.eval()
