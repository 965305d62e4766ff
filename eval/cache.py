"""Features on the disk, so that the same encoder on the same images is not run twice.

A file is named by a hash of all that decides its numbers: weights, encoder, preprocessing, extraction, pools, images, program
and precision. Labels and groups are not in it; they come from the index every time.
"""

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfsight.console import say
from selfsight.data.index import cache_folder
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.processes import sources

BOUND = 10.0  # GiB, unless $SELFSIGHT_FEATURES_GB says otherwise
ABANDONED = 3600.0  # seconds after which nobody writes a draft any more


def default_folder() -> Path:
    """Where the command keeps features."""
    return cache_folder() / "features"


def bound_in_bytes() -> int:
    """What the folder may hold.

    Raises:
        UsageError: $SELFSIGHT_FEATURES_GB is no number.
    """
    told = os.environ.get("SELFSIGHT_FEATURES_GB") or str(BOUND)
    try:
        return int(float(told) * 2**30)
    except (ValueError, OverflowError):
        raise UsageError(f"SELFSIGHT_FEATURES_GB: {told!r} is not a number of GiB, such as 10") from None


def key_of(source: Mapping[str, Any]) -> str:
    """The name of what was made of `source`, JSON values."""
    program = {"selfsight": sources(), "torch": torch.__version__, "dtype": "float32"}
    return sha256(json.dumps({**source, **program}, sort_keys=True, default=str).encode()).hexdigest()


def weights_of(encoder: Encoder) -> str:
    """A hash of every tensor of an encoder, and of what it is."""
    digest = sha256(encoder.config.model_dump_json().encode() + repr(encoder.preprocessing).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of features, the ones not used for longest removed when they are too many.

    Args:
        folder: None: nothing is kept.
    """

    folder: Path | None = None
    bound: int = int(BOUND * 2**30)
    """Bytes."""

    def get(self, key: str, rows: int) -> dict[str, Tensor] | None:
        """The tensors of a key, of so many rows each; None if there are none that are whole."""
        if self.folder is None:
            return None
        path = self._path(self.folder, key)
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if told.get("key") != key or told.get("crc") != _checksum(tensors):
                return None
            if not tensors or any(len(tensor) != rows for tensor in tensors.values()):
                return None
            os.utime(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None  # made again, and written over
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors; a disk that is full or not ours is told, and no reason to end."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.folder is None or size > self.bound:
            return
        path = self._path(self.folder, key)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), draft, {"key": key, "crc": _checksum(tensors)})
            draft.replace(path)
            self._prune()
        except (OSError, SafetensorError) as error:
            say(f"warning: features are not kept in {self.folder} ({getattr(error, 'strerror', None) or error})")
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Remove what was not used for longest until the rest fits, and drafts of processes that were killed.

        Of what another process removes meanwhile nothing is said.
        """
        assert self.folder is not None
        for draft in self.folder.glob(".*.tmp"):
            with suppress(OSError):
                if time() - draft.stat().st_mtime > ABANDONED:
                    draft.unlink()
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self.bound:
                return
            with suppress(OSError):
                path.unlink()
            left -= size

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key[:32]}.safetensors"


NOWHERE = Cache()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def opened(cache: "Cache | Path | str | bool | None") -> Cache:
    """What a caller means: a folder, True for the command's own, nothing for none.

    Raises:
        UsageError: $SELFSIGHT_FEATURES_GB is no number; asked here, before any feature is taken.
    """
    if isinstance(cache, Cache):
        return cache
    if not cache:
        return NOWHERE
    return Cache(default_folder() if cache is True else Path(cache), bound_in_bytes())


def source_of(weights: str, extraction: Any, pools: tuple[str, ...], contents: str, **more: Any) -> dict[str, Any]:
    """What decides features, for `key_of`."""
    return {"weights": weights, "extraction": asdict(extraction), "pools": pools, "contents": contents, **more}
