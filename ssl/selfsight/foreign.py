"""The only place that reads somebody's pickle. Runs as a script in a process of its own, and imports nothing of ours.

torch's weights-only reader builds tensors and plain containers and refuses every other name in the file. Names that training
scripts leave beside their weights (argparse.Namespace, numpy's scalars, paths) become empty stand-ins: even these classes are not
called, since numpy's would take their sizes and flags from the file.
"""

import json
import os
import re
import resource
import sys
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import save_file
from torch import Tensor

WRAPPER_DEPTH = 2  # {"state": {"model": tensors}}
SPARE_MEMORY = 2 * 2**30  # above what torch itself takes and the file's own size, thrice
SHOWN = 8


class Refused(Exception):
    """What is wrong with the file, or with what was asked of it."""


class Dropped:
    """Stands for something that is no tensor: takes anything, does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


HARMLESS = (
    *("argparse.Namespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath"),
    *(f"{core}.multiarray.scalar" for core in ("numpy.core", "numpy._core")),
    "numpy.dtype",
)


def convert(source: Path, target: Path, key: str | None, prefix: str) -> list[str]:
    """Write the tensors of `source` to `target`; the answer says what was taken and what was not.

    Raises:
        Refused: no file of torch.save, code in it, more bytes claimed than it holds, no tensors, or several sets of them.
    """
    places = _places(_load(source))
    name = _choose(places, key)
    tensors, others = _split(places[name], prefix)
    claimed, held = sum(t.numel() * t.element_size() for t in tensors.values()), source.stat().st_size
    if claimed > 4 * held + 2**20:
        raise Refused(f"its tensors claim {claimed:,} bytes, the file has {held:,}")
    save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, target)
    lines = [f"{len(tensors)} tensors{f' of {name}' if name else ''}, {claimed:,} bytes"]
    if others:
        lines.append(f"{len(others)} left out: {_list(others)}")
    if all(n.startswith("module.") for n in tensors):
        lines.append("every name starts with module.; --prefix module. takes it off")
    return lines


def _load(source: Path) -> Any:
    stand_ins: list[Any] = [(Dropped, name) for name in HARMLESS]
    try:
        zipped = is_zipfile(source)  # torch's newer format, the one that can be mapped
        if zipped and _compressed(source):
            raise Refused("is compressed, as torch.save's files never are")
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of newer pickles and sparse tensors
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except Refused:
        raise
    except MemoryError:
        raise Refused("asks for more memory than a file of its size can need") from None
    except Exception as error:  # noqa: BLE001 - hostile bytes make the reader raise anything
        raise Refused(_reason(str(error))) from None


def _compressed(source: Path) -> bool:
    with ZipFile(source) as archive:
        return any(member.compress_type for member in archive.infolist())


def _reason(message: str) -> str:
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if found:
        return f"holds code ({found[1]}), not only tensors; ask its maker for a state_dict or a .safetensors"
    told = re.sub(r"\x1b\[[0-9;]*m", "", message.partition("WeightsUnpickler error: ")[2] or message)
    return f"is no file of weights that torch.save wrote ({' '.join(told.split())[:160]})"


def _places(tree: Any, name: str = "", depth: int = WRAPPER_DEPTH) -> dict[str, dict[Any, Any]]:
    """Every mapping that holds tensors, by its dotted name; the outermost has none."""
    if not isinstance(tree, dict):
        return {}
    found = {name: tree} if any(_is_weight(value) for value in tree.values()) else {}
    if depth:
        for key, value in tree.items():
            found |= _places(value, f"{name}.{key}".lstrip("."), depth - 1)
    return found


def _choose(places: dict[str, dict[Any, Any]], key: str | None) -> str:
    told = ", ".join(f"{name} ({sum(map(_is_weight, tree.values()))} tensors)" for name, tree in places.items() if name)
    if key is not None:
        if key not in places:
            raise Refused(f"holds no tensors under {key!r}; there is {told or 'one flat set: leave --key out'}")
        return key
    if not places:
        raise Refused("holds no mapping of names to tensors")
    if "" in places or len(places) == 1:
        return next(iter(places))
    raise Refused(f"holds several sets of tensors: {told[:600]}; choose with --key")


def _split(tree: dict[Any, Any], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by name without the prefix, and the names of everything else."""
    tensors = {n: t for n, t in tree.items() if isinstance(n, str) and n.startswith(prefix) and _is_weight(t)}
    if not tensors:
        raise Refused(f"no tensor's name starts with {prefix!r}; there are {_list([str(name) for name in tree])}")
    others = [str(name) for name in tree if name not in tensors]
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, others


def _is_weight(value: Any) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def _list(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")


def _limit_memory(size: int) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit, (_, most) = taken + 3 * size + SPARE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def main(given: dict[str, Any]) -> dict[str, Any]:
    """`convert` within the cap: {"lines": what it said}, or {"refused": why}."""
    source = Path(given["source"])
    torch.set_num_threads(1)  # each has a stack, which counts
    if sys.platform == "linux":
        _limit_memory(source.stat().st_size)
    try:
        return {"lines": convert(source, Path(given["target"]), given["key"], given["prefix"])}
    except Refused as refusal:
        return {"refused": str(refusal)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
