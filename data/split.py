"""Two sets of one: every patient, slide or scene lies in one of them, never in both.

The side of a group is a pure function of the seed and the group's number: data that are added later move nobody.
"""

import json
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsight import keyed
from selfsight.data.build import drafted, names_beside
from selfsight.data.index import build_index, read_index
from selfsight.data.samples import NONE, pair
from selfsight.data.shards import Shards
from selfsight.data.spec import find_shards
from selfsight.data.tar import BLOCK
from selfsight.errors import DataError, UsageError


class Halves(NamedTuple):
    """What was written to a side."""

    samples: int
    groups: int


def in_test(groups: NDArray[np.int32], share: float, seed: int) -> NDArray[np.bool_]:
    """Whether samples of these groups (N,) are test samples: (N,)."""
    return keyed.uniform(seed, "split", groups, 1)[:, 0] < share


def split(source: str | list[str], train: Path, test: Path, share: float, seed: int = 0) -> tuple[Halves, Halves]:
    """Copy the samples of `source`, with all their members, into two new folders of indexed shards.

    Args:
        share: of the groups that become test groups, about.

    Returns:
        what the folders `train` and `test` hold.

    Raises:
        UsageError: a share out of bounds, a side without a group, or a target in use.
        DataError: samples that have no group, or shards that cannot be read.
    """
    if not 0 < share < 1:
        raise UsageError(f"--test: {share} is no share between 0 and 1")
    paths = [path for path in find_shards(source) if isinstance(path, Path)]
    shards = Shards(source)
    if len(paths) < len(shards.paths):
        raise UsageError(f"{shards.spec}: is split on a disk only; copy the shards to one first")
    groups = shards.groups
    if (groups == NONE).any():
        raise DataError(
            f"{shards.spec}: {(groups == NONE).sum():,} of {len(groups):,} samples have no group; pack them with "
            "shards build --group-by, or give each a member KEY.group"
        )
    tested = in_test(groups, share, seed)
    for side, chosen in (("test", tested), ("training", ~tested)):
        if not chosen.any():
            raise UsageError(
                f"--test: no group of {len(set(groups.tolist())):,} is a {side} group; another share or --seed"
            )
    with drafted(train) as one, drafted(test) as other:
        for path in paths:
            _copy(path, one, other, share, seed)
        for folder in (one, other):
            for kind, names in names_beside(paths[0].parent).items():
                (folder / f"{kind}.json").write_text(json.dumps(names, indent=1))
            for made in sorted(folder.glob("*.tar")):
                build_index(made)
    return _half(groups[~tested]), _half(groups[tested])


def _half(groups: NDArray[np.int32]) -> Halves:
    return Halves(len(groups), len(set(groups.tolist())))


def _copy(path: Path, train: Path, test: Path, share: float, seed: int) -> None:
    """The members of each sample, with their headers as they are, to its side; a side without any has no such shard."""
    with path.open("rb") as file:
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    samples, _ = pair(str(path), buffer, "exclude")
    tested = in_test(read_index(path)["group"], share, seed)
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
