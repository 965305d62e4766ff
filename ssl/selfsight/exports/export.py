"""Encoders leave as files that others load without us: written, checked in a clean process, and only then there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from selfsight import checkpoint
from selfsight.encoder import Encoder, evaluating
from selfsight.errors import NumericError, StorageError, UsageError
from selfsight.exports import clean
from selfsight.exports.card import CARD, Facts, license_of, write_card
from selfsight.exports.format import HALVES, SIZES
from selfsight.exports.formats import FORMATS
from selfsight.exports.transformers_format import pool_of
from selfsight.loading import load_encoder
from selfsight.redact import redact_tree, without_home
from selfsight.run_folder import sync
from selfsight.weights import PLANES, read_config

__all__ = ["export", "seal", "timm_line", "verify_export"]
HALF_TOLERANCE = {"fp16": 0.01, "bf16": 0.08}  # of the largest feature, that rounding of the weights may move one
_CLEAN = clean.script(FORMATS["timm"].clean)


def export(
    encoder: Encoder,
    folder: Path | str,
    provenance: dict[str, Any] | None = None,
    to: str = "timm",
    half: str | None = None,
    facts: Facts | None = None,
) -> float:
    """Write `folder` in a format; it appears only after a clean process, without us, gave the same features.

    Args:
        provenance: where the weights come from; stored in config.json under "selfsight".
        to: of `FORMATS`: timm, transformers, onnx or torch.
        half: fp16 or bf16: store weights so, for timm and transformers.
        facts: what the card tells beside the provenance.

    Returns:
        The largest absolute difference of a feature, rounding of the weights included.

    Raises:
        UsageError: a folder that holds something else, or an encoder that the format cannot hold; what does not fit is named.
        NumericError: weights that overflow in 16 bits, or that lose too much.
        StorageError: a difference above the format's tolerance, or a folder that cannot be written.
    """
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    _require(to, half)
    facts = facts or Facts()
    told = {**without_home(provenance or {}), **_claimed(facts)}
    draft = folder.with_name(f".draft-{folder.name}")
    with evaluating(encoder, torch.device("cpu")), torch.no_grad():
        FORMATS[to].require(encoder)
        if half:
            _refuse_overflow(encoder, half)
        try:
            _put_back(folder)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            ours = _write(encoder, draft, told, to, half)
            stored = load_encoder(draft) if half else encoder
            difference = verify_export(stored, draft) + (_lost(encoder, stored, half) if half else 0.0)
            write_card(draft, encoder, ours, FORMATS[to].code(encoder), facts)
            seal(draft)
            _replace(folder, draft)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"{folder}: the export could not be written ({reason})") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return difference


def _refuse_foreign(folder: Path) -> None:
    """Raise UsageError if something lies there that is not wholly an export of ours, for it would be replaced."""
    if not os.path.lexists(folder):
        return
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {"no folder"}
    ours: set[str] = set()
    try:
        if read_config(folder)["selfsight"]:
            ours = {*json.loads((folder / checkpoint.MANIFEST).read_text()), CARD, checkpoint.MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = set()
    if strange := sorted(there - ours):
        raise UsageError(f"{folder}: exists and is no export ({', '.join(strange[:6])}); name a new folder")


def _claimed(facts: Facts) -> dict[str, Any]:
    """Facts that stay with the weights when they are exported again."""
    rows = [{key: value for key, value in row.items() if key != "detail"} for row in facts.scores]
    license = license_of(facts.license)
    claimed = {"license": license if license != "unknown" else None, "device_hours": facts.hours, "scores": rows}
    return {key: value for key, value in claimed.items() if value}


def write_card_again(encoder: Encoder, folder: Path, facts: Facts) -> None:
    """The card of a finished export of this encoder once more, with what has become known since, such as its scores."""
    ours = read_config(folder)["selfsight"]
    write_card(folder, encoder, ours, FORMATS[ours["format"]].code(encoder), facts)


def _require(to: str, half: str | None) -> None:
    if to not in FORMATS:
        raise UsageError(f"export: no format {to!r}; there are {', '.join(FORMATS)}")
    if half and (half not in HALVES or not FORMATS[to].half):
        also = ", ".join(name for name, form in FORMATS.items() if form.half)
        raise UsageError(f"export: half {half} of {to}: there are {', '.join(HALVES)}, for {also}")


def _refuse_overflow(encoder: Encoder, half: str) -> None:
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point() and not tensor.to(HALVES[half]).isfinite().all():
            largest = tensor.abs().max().item()
            raise NumericError(
                f"export: {name} has {largest:.3g}, which {half} cannot hold; take bf16, or leave half out"
            )


def _lost(encoder: Encoder, stored: Encoder, half: str) -> float:
    """How far a feature moves by rounding the weights; raises NumericError where it is too far."""
    images = clean.batches_of(encoder.preprocessing.shape, (8,))["8"]
    ours, theirs = encoder.embed(images), stored.embed(images)
    lost, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not lost <= HALF_TOLERANCE[half] * largest:
        limit = f"{HALF_TOLERANCE[half]:.0%} may be lost"
        raise NumericError(f"export: weights in {half} move features by {lost:.2g} of {largest:.2g}; {limit}")
    return lost


def _write(
    encoder: Encoder, folder: Path, provenance: dict[str, Any], to: str = "timm", half: str | None = None
) -> dict[str, Any]:
    """Weights and config.json; the answer is what stands there under "selfsight"."""
    dtype = HALVES[half] if half else torch.float32
    ours = {
        **redact_tree(provenance),  # an export is made to be given away
        "format": to,
        "dtype": str(dtype).removeprefix("torch."),
        "pool": {"name": pool_of(encoder), "prefix": encoder.prefix_tokens},
        "encoder": encoder.config.model_dump(mode="json"),
        "preprocessing": encoder.preprocessing._asdict(),
    }
    FORMATS[to].write(encoder, folder, ours, dtype)
    return ours


def verify_export(encoder: Encoder, folder: Path) -> float:
    """Load `folder` in a process that does not import selfsight, and compare features on random images in several batches.

    Of volumes and of channel tokens timm has the backbone, which takes one plane of patches; the rest is loaded here.

    Raises:
        StorageError: it does not load, or differs by more than the format's tolerance.
    """
    to = read_config(folder)["selfsight"]["format"]
    form = FORMATS[to]
    batches = clean.batches_of(form.shape(encoder), SIZES)
    theirs = clean.outputs_of(folder, form.clean, batches)
    with evaluating(encoder, torch.device("cpu")), torch.no_grad():
        live = {f"{n} {size}": t for size, images in batches.items() for n, t in form.expected(encoder, images).items()}
        pairs = [(tensor, theirs[name]) for name, tensor in live.items()]
        if to == "timm" and encoder.volumetric:  # not timm's, but what is loaded
            volumes = torch.randn(2, *encoder.preprocessing.shape, generator=torch.Generator().manual_seed(1))
            pairs.append((encoder.embed(volumes), load_encoder(folder).embed(volumes)))
    return _compare(pairs, folder, to, form.tolerance)


def _compare(pairs: list[tuple[Tensor, Tensor]], folder: Path, to: str, tolerance: float) -> float:
    if wrong := [f"{tuple(other.shape)} for {tuple(ours.shape)}" for ours, other in pairs if ours.shape != other.shape]:
        raise StorageError(f"{folder}: {to}'s features have another shape than the live encoder's: {wrong[0]}")
    # Of tensors, for Python's max passes over what is not a number.
    difference = torch.stack([(ours - other).abs().max() for ours, other in pairs]).max().item()
    largest = torch.stack([other.abs().max() for _, other in pairs]).max().item()  # rounding grows with the features
    if not difference < tolerance * max(1.0, largest):
        raise StorageError(
            f"{folder}: {to}'s features differ from the live encoder's by {difference:.1e}, features up to {largest:.1e}"
        )
    return difference


def seal(folder: Path) -> None:
    """Write manifest.json, last, and have everything reach the disk: the folder is whole from here on.

    The card is not in it: people write on cards, and scores are added to it later.
    """
    manifest = {name: entry for name, entry in checkpoint.manifest_of(folder).items() if name != CARD}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():  # safetensors writes for the owner alone; an export is made to be given away
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


def timm_line(folder: Path) -> str:
    """The one line that loads an export; where that is the backbone of one plane, it says so."""
    line = f'timm.create_model("local-dir:{folder.resolve()}", pretrained=True, num_classes=0)'
    if (folder / PLANES).is_file():
        line += f'  # one plane of patches; all of it: selfsight.load_encoder("{folder.resolve()}")'
    return line
