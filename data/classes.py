"""What classes are called: `classes.json` beside the shards, in the order of their numbers."""

import json
from collections.abc import Sequence
from pathlib import Path

from selfsight.data.shards import Shards
from selfsight.errors import DataError, UsageError

FILE = "classes.json"


def read_names(file: Path) -> list[str]:
    """The names in a classes.json or groups.json.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        return [str(name) for name in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, RecursionError):
        raise DataError(f"{file}: is no list of names; remove or repair it") from None


def class_names(shards: Shards) -> list[str] | None:
    """The names of a set's classes, if its folders tell them and all the same."""
    folders = {path.parent for path in shards.paths if isinstance(path, Path)}
    if len(folders) != 1 or shards.remote or not (file := folders.pop() / FILE).is_file():
        return None
    return read_names(file)


def require_same_numbers(train: Shards, test: Shards) -> None:
    """Ask whether a number means the same class on both sides, as far as names tell: folders number their classes each for itself.

    Raises:
        UsageError: it does not, or test has classes that train lacks, by name.
    """
    ours, theirs = class_names(train), class_names(test)
    if not ours or not theirs or ours == theirs:
        return
    used = sorted({label for label in test.labels.tolist() if 0 <= label < len(theirs)})
    if lacking := [theirs[label] for label in used if theirs[label] not in ours]:
        raise UsageError(f"{test.spec}: has {len(lacking)} classes that train lacks: {', '.join(lacking[:10])}")
    for label in used:
        if ours.index(theirs[label]) != label:
            raise UsageError(
                f"{test.spec}: {theirs[label]!r} is class {label} there, but class {ours.index(theirs[label])} in {train.spec}; "
                f"build it again with: --classes {Path(str(train.paths[0])).parent}"
            )


def numbered(found: Sequence[str], names: Sequence[str], source: object) -> list[int]:
    """The numbers of classes by their names.

    Raises:
        UsageError: names that are not among them.
    """
    if unknown := sorted(set(found) - set(names)):
        raise UsageError(f"{source}: {', '.join(unknown[:10])} are not among the classes {', '.join(names[:20])}")
    return [names.index(name) for name in found]
