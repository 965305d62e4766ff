"""Two sets of one: every patient, slide or scene lies in one of them, never in both.

The side of a group is a pure function of the seed and the group's name in `groups.json`, so that data which are added
later move nobody, though a new build numbers the groups anew. A group without a name is known by its number.
"""

import json
import mmap
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsight import keyed
from selfsight.data.build import drafted, names_beside
from selfsight.data.index import build_index, read_index
from selfsight.data.samples import LISTED, NONE, pair
from selfsight.data.shards import Shards
from selfsight.data.spec import find_shards
from selfsight.data.tar import BLOCK
from selfsight.errors import DataError, UsageError


class Halves(NamedTuple):
    """What was written to a side."""

    samples: int
    groups: int
    lists: int = 0
    """Samples whose labels are a list."""
    masks: int = 0


def in_test(groups: NDArray[np.int32], share: float, seed: int, names: Sequence[str] = ()) -> NDArray[np.bool_]:
    """Whether samples of these groups (N,) are test samples: (N,).

    Args:
        names: of the groups, by number; groups beyond them have none.
    """
    keys = groups.astype(np.uint64)
    named = (groups >= 0) & (groups < len(names))
    keys[named] = np.array([_key(name) for name in names], np.uint64)[groups[named]] if named.any() else 0
    return keyed.uniform(seed, "split", keys, 1)[:, 0] < share


def _key(name: str) -> int:
    """A name as 64 bits."""
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def split(source: str | list[str], train: Path, test: Path, share: float, seed: int = 0) -> tuple[Halves, Halves]:
    """Copy the samples of `source`, with all their members, into two new folders of indexed shards.

    Args:
        share: of the groups that become test groups, about.

    Returns:
        what the folders `train` and `test` hold.

    Raises:
        UsageError: a share out of bounds, a side without a group, a target in use, or shards that cannot lie in one folder.
        DataError: samples that have no group, or shards that cannot be read.
    """
    if not 0 < share < 1:
        raise UsageError(f"--test: {share} is no share between 0 and 1")
    paths = [path for path in find_shards(source) if isinstance(path, Path)]
    shards = Shards(source)
    if len(paths) < len(shards.paths):
        raise UsageError(f"{shards.spec}: is split on a disk only; copy the shards to one first")
    beside = _beside(paths)
    names = beside.get("groups", [])
    groups = shards.groups
    if (groups == NONE).any():
        raise DataError(
            f"{shards.spec}: {(groups == NONE).sum():,} of {len(groups):,} samples have no group; pack them with "
            "shards build --group-by, or give each a member KEY.group"
        )
    tested = in_test(groups, share, seed, names)
    for side, chosen in (("test", tested), ("training", ~tested)):
        if not chosen.any():
            raise UsageError(
                f"--test: no group of {len(set(groups.tolist())):,} is a {side} group; another share or --seed"
            )
    with drafted(train) as one, drafted(test) as other:
        for path in paths:
            _copy(path, one, other, share, seed, names)
        return _finished(one, beside), _finished(other, beside)


def _beside(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The names that stand beside the shards, the same in every folder.

    Raises:
        UsageError: shards of one name, of which one would overwrite the other, or folders that number other names.
    """
    name, count = Counter(path.name for path in paths).most_common(1)[0]
    if count > 1:
        raise UsageError(
            f"{count} shards of the name {name}, which would lie in one folder; rename them, or split one by one"
        )
    first, *others = dict.fromkeys(path.parent for path in paths)
    names = names_beside(first)
    for folder in others:
        if names_beside(folder) != names:
            raise UsageError(
                f"{first}, {folder}: number other classes or groups (classes.json, groups.json); split one by one"
            )
    return names


def _finished(folder: Path, beside: dict[str, list[str]]) -> Halves:
    """Add names and indexes, and count what they hold."""
    for kind, names in beside.items():
        (folder / f"{kind}.json").write_text(json.dumps(names, indent=1))
    for path in sorted(folder.glob("*.tar")):
        build_index(path)
    made = Shards(str(folder))
    groups = len(set(made.groups.tolist()))
    return Halves(len(made), groups, int((made.labels == LISTED).sum()), int(made.masks.sum()))


def _copy(path: Path, train: Path, test: Path, share: float, seed: int, names: Sequence[str]) -> None:
    """The members of each sample, with their headers as they are, to its side; a side without any has no such shard."""
    with path.open("rb") as file:
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    samples, _ = pair(str(path), buffer, "exclude")
    tested = in_test(read_index(path)["group"], share, seed, names)
    if len(samples) != len(tested):
        raise DataError(f"{path}: the index is another tar's; selfsight shards index {path}")
    for folder, side in ((train, False), (test, True)):
        own = [fields for fields, chosen in zip(samples.values(), tested, strict=True) if chosen == side]
        if not own:
            continue
        with (folder / path.name).open("wb") as out:
            for member in (member for fields in own for member in fields.values()):
                end = member.offset + -(-member.size // BLOCK) * BLOCK
                out.write(buffer[member.start : end])
            out.write(bytes(2 * BLOCK))
