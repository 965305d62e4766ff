"""Checkpoints that are whole or not there.

`checkpoints/step-00001234/` holds safetensors files, `state.json`, and `manifest.json` (size and SHA-256 of each file), written
last. All of it is written into a sibling that no reader takes for a checkpoint, fsynced, and renamed; only then are old
ones pruned. Reading takes the newest whose manifest verifies. Nothing is ever unpickled.
"""

import errno
import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfsight.errors import NumericError, StorageError, UsageError
from selfsight.faults import faultpoint
from selfsight.run_folder import sync
from selfsight.sharding import beside

FORMAT = 1
MANIFEST, MAX_MANIFEST = "manifest.json", 10**6
_DRAFT = ".draft-"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_NAME = re.compile(r"step-(\d{8,})")
Tensors = dict[str, Tensor]


class Checkpoint(NamedTuple):
    """What a run needs to go on."""

    state: dict[str, Any]
    tensors: dict[str, Tensors]
    """By file: "model", "optim", and "ema" where there is one."""


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Tensors],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `step` and prune all but the newest `keep` and those at multiples of `keep_every`.

    Raises:
        StorageError: the disk is full or cannot be written; what was there before is untouched.
        NumericError: a value that is not finite; likewise.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f"{_DRAFT}{final.name}"
    _refuse_nonfinite(tensors)
    try:
        _require_space(folder, sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _fill(draft, step, state, tensors)
        faultpoint("save.rename", step)
        aside = folder / f"{_DRAFT}old-{final.name}"
        if final.exists():  # a future that a crash damaged
            final.rename(aside)
        draft.rename(final)
        faultpoint("save.renamed", step)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{final}: the checkpoint could not be written ({reason}); older ones are untouched"
        ) from None
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)
    # What stands above this step is a future that a crash damaged: it must not count among the kept.
    for later in [other for other in steps(folder) if other > step]:
        shutil.rmtree(folder / f"step-{later:08d}", ignore_errors=True)
    prune(folder, keep, keep_every)
    faultpoint("save.done", step)
    return final


def _fill(draft: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensors]) -> None:
    """Every file of a checkpoint, on the disk."""
    for name, group in tensors.items():
        faultpoint("save.write", step)
        path = draft / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, path)
    faultpoint("save.state", step)
    (draft / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
    faultpoint("save.manifest", step)
    (draft / MANIFEST).write_text(json.dumps(manifest_of(draft), indent=1))
    for path in [*draft.iterdir(), draft]:
        faultpoint("save.sync", step)
        sync(path)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep` and those at multiples of `keep_every`."""
    for old in steps(folder)[:-keep]:
        if not keep_every or old % keep_every:
            faultpoint("save.prune", old)
            shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what saves that were cut off have left. For the owner of the run folder only."""
    for draft in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(draft, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first, by name and never by time of change."""
    return sorted(int(match[1]) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not.

    Raises:
        StorageError: there are checkpoints and none verifies.
    """
    told: list[str] = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:08d}"
        problem = verify(path)
        if problem is None:
            return path, told
        told.append(f"{path}: {problem}; going back one")
    if told:
        raise StorageError("no checkpoint can be trusted:\n" + "\n".join(told))
    return None, told


def verify(path: Path) -> str | None:
    """None if every file is what the manifest says, else what is wrong."""
    return manifest_problem(path, {"model.safetensors", "state.json"})


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder but the manifest."""
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    return {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in files}


def manifest_problem(folder: Path, required: set[str]) -> str | None:
    """What is wrong with a folder that has a manifest: a file that is damaged, strange or not among the required; else None.

    Raises:
        StorageError: nobody can say, for a file cannot be read.
    """
    try:
        if not (folder / MANIFEST).is_file() or (folder / MANIFEST).stat().st_size > MAX_MANIFEST:
            return f"incomplete or damaged (no {MANIFEST} of at most {MAX_MANIFEST:,} bytes)"
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():  # a path out of the folder, a pipe, a device
                return f"{name!r} of its manifest is no file in it"
            if file.stat().st_size != entry["size"] or digest(file) != entry["sha256"]:
                return f"{name} is damaged"
        missing = sorted(required - set(manifest))
    except OSError as error:
        if error.errno not in _NOT_THERE:  # a whole one must not be taken for damaged because a disk is away
            raise StorageError(f"{folder}: cannot be read ({error.strerror}); try again when it can") from None
        return f"incomplete or damaged ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"incomplete or damaged ({type(error).__name__})"
    return f"lacks {', '.join(missing)}" if missing else None


def load(path: Path, verified: bool = False) -> Checkpoint:
    """Read a checkpoint.

    Args:
        verified: it was, a moment ago.

    Raises:
        StorageError: one that does not verify, holds something else than `save` writes, or is of a newer format.
    """
    if not verified and (problem := verify(path)):
        raise StorageError(f"{path}: {problem}")
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] > FORMAT:
            raise StorageError(
                f"{path}: written by a newer release (format {state['format']}, this one reads {FORMAT})"
            )
        if type(state["step"]) is not int or state["step"] < 0:
            raise StorageError(f"{path}: state.json holds no step")
        files = sorted(name for name in json.loads((path / MANIFEST).read_text()) if name.endswith(".safetensors"))
        return Checkpoint(state, {name.removesuffix(".safetensors"): load_file(path / name) for name in files})
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise StorageError(f"{path}: is no checkpoint of selfsight's ({type(error).__name__}: {error})") from None


def encoder_tensors(saved: Checkpoint, weights: str | None = None) -> Tensors:
    """The encoder that is scored and exported: the running average, or whichever the checkpoint says.

    Args:
        weights: "student" for the one that was trained, "teacher" for its running average.

    Raises:
        UsageError: no teacher, or neither of the two.
    """
    if weights not in (None, "student", "teacher"):
        raise UsageError(f"weights {weights!r}: there are student and teacher; None is the one that is scored")
    scored = saved.state.get("scored", "encoder")
    if weights == "teacher" and "ema" not in saved.tensors and scored == "encoder":
        raise UsageError(f"step {saved.state['step']}: has no teacher and no running average; leave --weights out")
    if "ema" in saved.tensors and weights != "student":
        return saved.tensors["ema"]
    start = "encoder." if weights == "student" else scored + "."
    return {name.removeprefix(start): value for name, value in saved.tensors["model"].items() if name.startswith(start)}


def pack_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Tensors:
    """The optimizer's state as flat tensors `<parameter>/<moment>`; groups are rebuilt from the recipe."""
    return {
        f"{names[parameter]}/{moment}": value
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], packed: Tensors) -> None:
    """The inverse of `pack_optimizer`; moments that are there already keep their place in memory.

    Raises:
        StorageError: a tensor that no parameter of this run has, or of another shape.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in packed.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            raise StorageError(f"the checkpoint's optimizer knows {name!r}, which this run does not train")
        if not (parameter := parameters[name]).requires_grad:  # no longer, by a change that --allow-change accepted
            continue
        own, placed = optimizer.state[parameter], beside(value, parameter)
        if moment not in own:
            own[moment] = placed
        elif own[moment].shape == value.shape:  # else copying would spread it over the moments
            own[moment].copy_(placed)
        else:
            raise StorageError(
                f"the checkpoint's {key} has shape {[*value.shape]}, this run's has {[*own[moment].shape]}"
            )


def _refuse_nonfinite(tensors: dict[str, dict[str, Tensor]]) -> None:
    """Raise NumericError if a value that is about to be saved is not finite: what was saved before is better."""
    for group, members in tensors.items():
        for name, tensor in members.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NumericError(
                    f"{group}: {name} is not finite, so that nothing was saved; the checkpoint before is untouched"
                )


def _require_space(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + 2**20:
        raise StorageError(f"{folder}: a checkpoint needs {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
