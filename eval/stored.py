"""Features in files: what `selfsight embed` writes, and what anybody else may have written, without a model.

`.safetensors` and `.npz` hold `features` (N, D), or `features.cls`, `features.mean`, ... (the first is the encoder's own), and
as they are known `labels` (N,) or (N, C), `groups` (N,), `prints` (N,) and `hashes` (N, 72). `.npy` is features alone; its labels
stand beside it: `train.npy`, `train.labels.npy`. Nothing is unpickled.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfsight.errors import DataError, StorageError, UsageError
from selfsight.eval.features import Features, require_finite

FEATURES = "features"
SUFFIXES = (".safetensors", ".npz", ".npy")


class Stored(NamedTuple):
    """What a file of features holds."""

    features: Features
    prints: NDArray[np.uint64] | None
    """(N,) fingerprints of the images, to find test images that are in train."""
    about: dict[str, Any]
    """Where they are from: encoder, pool, data."""

    @property
    def pool(self) -> str:
        """The encoder's own."""
        return next(iter(self.features.vectors))


def is_stored(spec: str | Sequence[str]) -> bool:
    """Whether a SPEC names a file of features rather than shards."""
    return isinstance(spec, str | Path) and Path(spec).suffix.lower() in SUFFIXES


def write(path: Path, stored: Stored) -> None:
    """Write features as .safetensors or .npz, as the name ends.

    Raises:
        UsageError: another ending.
        StorageError: it cannot be written.
    """
    if path.suffix not in SUFFIXES[:2]:
        raise UsageError(f"{path}: features are written as .safetensors or .npz")
    features = stored.features
    tensors = {f"{FEATURES}.{pool}": vectors for pool, vectors in features.vectors.items()}
    tensors |= {"labels": features.labels, "groups": features.groups}
    tensors |= {"hashes": features.hashes} if features.hashes is not None else {}
    if stored.prints is not None:
        tensors["prints"] = torch.from_numpy(stored.prints.view(np.int64).copy())
    about = json.dumps({**stored.about, "pools": list(features.vectors)})
    draft = path.with_name(f".draft-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(draft, allow_pickle=False, about=np.array(about), **{k: v.numpy() for k, v in tensors.items()})
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, {"about": about})
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        draft.unlink(missing_ok=True)


def read(path: str | Path) -> Stored:
    """Features of a file, looked through.

    Raises:
        DataError: a file that is none, or damaged; arrays of objects, of other lengths or of other forms than they should be.
        NumericError: features that are not finite.
    """
    path = Path(path)
    try:
        arrays, about = {".safetensors": _safetensors, ".npz": _npz, ".npy": _npy}[path.suffix.lower()](path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RecursionError,
        SafetensorError,
        zipfile.BadZipFile,
    ) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = "it holds Python objects, which are never unpickled" if "allow_pickle" in told else told
        raise DataError(f"{path}: cannot be read as stored features ({why})") from None
    vectors = _vectors(path, arrays, about)
    count = len(next(iter(vectors.values())))
    labels = _labels(path, arrays.get("labels"), count)
    groups = _whole(path, "groups", arrays.get("groups"), count)
    require_finite(vectors, str(path))
    hashes, prints = arrays.get("hashes"), arrays.get("prints")
    if hashes is not None and (hashes.dtype != torch.uint8 or hashes.shape != (count, 72)):
        raise DataError(f"{path}: hashes are {_form(hashes)}; they are made by `selfsight embed`, leave them out")
    if prints is not None and (prints.dtype != torch.int64 or prints.shape != (count,)):
        raise DataError(f"{path}: prints are {_form(prints)}; they are made by `selfsight embed`, leave them out")
    known = None if prints is None else prints.numpy().view(np.uint64)
    return Stored(Features(vectors, labels, groups, hashes), known, about)


Read = tuple[dict[str, Tensor], dict[str, Any]]


def _safetensors(path: Path) -> Read:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, _about((file.metadata() or {}).get("about"))


def _npz(path: Path) -> Read:
    with path.open("rb") as body:
        file = np.load(body, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is one array; name it .npy")
        with file:
            arrays = {name: file[name] for name in file.files}
    about = arrays.pop("about", None)
    return {name: _tensor(array) for name, array in arrays.items()}, _about(None if about is None else str(about))


def _npy(path: Path) -> Read:
    arrays = {FEATURES: _array(path)}
    beside = path.with_suffix(".labels.npy")
    if beside.exists():
        arrays["labels"] = _array(beside)
    return arrays, {}


def _array(path: Path) -> Tensor:
    with path.open("rb") as body:
        found = np.load(body, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays; name it .npz")
        return _tensor(found)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _about(text: str | None) -> dict[str, Any]:
    found: Any = json.loads(text) if text else {}
    if not isinstance(found, dict):
        raise ValueError("what is told about it is no object")
    pools = found.get("pools", [])
    if not isinstance(pools, list) or not all(isinstance(pool, str) for pool in pools):
        raise ValueError("what is told about it has pools that are no list of names")
    return found


def _vectors(path: Path, arrays: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in arrays.items() if name == FEATURES or name.startswith(f"{FEATURES}.")}
    if not found:
        names = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise DataError(f"{path}: holds {names}, but no `features`")
    for name, tensor in found.items():
        if tensor.ndim != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            raise DataError(f"{path}: {name} are {_form(tensor)}; they must be floating point, (samples, width)")
    if len(lengths := {len(tensor) for tensor in found.values()}) > 1:
        raise DataError(f"{path}: pools of different lengths, {', '.join(map(str, sorted(lengths)))}")
    vectors = {name.partition(".")[2] or FEATURES: tensor.float() for name, tensor in found.items()}
    first = [pool for pool in about.get("pools", ()) if pool in vectors]
    return {pool: vectors[pool] for pool in [*first, *(pool for pool in vectors if pool not in first)]}


def _labels(path: Path, labels: Tensor | None, count: int) -> Tensor:
    if labels is None:
        return torch.full((count,), -1, dtype=torch.int64)
    if labels.ndim == 2:
        if len(labels) != count or labels.shape[1] < 2 or not bool(((labels == 0) | (labels == 1)).all()):
            raise DataError(
                f"{path}: labels are {_form(labels)}; lists of labels are (samples, classes) of 0 and 1, of two "
                "classes at least; single labels are (samples,)"
            )
        return labels.bool()
    labels = _whole(path, "labels", labels, count)
    if (labels < -1).any():
        raise DataError(f"{path}: label {int(labels.min())} is below 0 (-1: none)")
    return labels


def _whole(path: Path, name: str, values: Tensor | None, count: int) -> Tensor:
    if values is None:
        return torch.full((count,), -1, dtype=torch.int64)
    if values.shape != (count,):
        raise DataError(f"{path}: {name} are {_form(values)}, but there are {count:,} features")
    if values.is_floating_point() and not bool((values == values.round()).all()):
        raise DataError(f"{path}: {name} are not whole numbers")
    if values.is_complex():
        raise DataError(f"{path}: {name} are complex numbers")
    return values.to(torch.int64)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
