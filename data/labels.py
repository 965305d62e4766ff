"""Labels in a file and masks in a folder, for the images of another folder: `shards build --labels --masks`."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from selfsight.data.samples import MASK_SUFFIXES
from selfsight.data.targets import parse_list
from selfsight.errors import DataError, UsageError

Label = int | list[int]
SHOWN = 3  # examples in a message


def read_labels(file: Path, names: Sequence[str]) -> list[Label]:
    """The labels of images, or clips, that a .csv or .json gives, in the order of their names.

    A .csv has lines of `path,label`, if need be under such a heading; a label is `3`, or a list as `0;3;7`; `;` is an empty
    one, and so is an empty field of a file that has lists elsewhere. A .json is {path: 3} or {path: [0, 3, 7]}. Where one label is a list all are, so that `3` becomes a list of one.

    Args:
        names: paths of the images relative to their folder.

    Raises:
        UsageError: a file of another kind, or none.
        DataError: labels that are no integers, or of a list above 65,535, empty fields among single labels, paths that stand twice, and images without a label or labels without an image.
    """
    readers = {".csv": _read_csv, ".json": _read_json}
    if file.suffix.lower() not in readers:
        raise UsageError(f"--labels: {file} is neither .csv (path,label) nor .json")
    try:
        found = readers[file.suffix.lower()](file)
    except OSError as error:
        raise UsageError(f"--labels: {file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, csv.Error) as error:  # of which UnicodeDecodeError and JSONDecodeError are some
        raise DataError(f"{file}: is no {file.suffix[1:]} of labels ({str(error)[:100]})") from None
    refuse_others(str(file), "label", names, found)
    own = [found[name] for name in names]
    lists = any(isinstance(label, list) for label in own)
    if not lists:
        return own
    return [
        label if isinstance(label, list) else parse_list(f"[{label}]".encode(), f"{file}: {name}")
        for name, label in zip(names, own, strict=True)
    ]


def find_masks(folder: Path, names: Sequence[str]) -> list[Path]:
    """The masks of images: of `a/b.jpg` the `a/b.png` (tif, tiff, npy) in `folder`.

    Raises:
        UsageError: no such folder.
        DataError: images without a mask, masks without an image, or several of either that have one stem.
    """
    if not folder.is_dir():
        raise UsageError(f"--masks: {folder} is no folder")
    suffixes = tuple(f".{suffix}" for suffix in MASK_SUFFIXES)
    files = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(suffixes) and path.is_file())
    stems = [_stem(name) for name in names]
    found = _once(str(folder), ((_stem(path.relative_to(folder).as_posix()), path) for path in files))
    _once("images", ((stem, None) for stem in stems))
    refuse_others(str(folder), "mask", stems, found)
    return [found[stem] for stem in stems]


def refuse_others(where: str, what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raises DataError where some of the wanted are not found, or others are."""
    wanted, found = set(wanted), set(found)
    lacking, unknown = sorted(wanted - found), sorted(found - wanted)
    told = [
        f"{len(names):,} of {len(own):,} {text}, such as {', '.join(names[:SHOWN])}"
        for names, own, text in (
            (lacking, wanted, f"images have no {what}"),
            (unknown, found, f"{what}s have no image"),
        )
        if names
    ]
    if told:
        raise DataError(f"{where}: {'; '.join(told)} (paths are relative to the images' folder)")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _once(where: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise DataError(f"{where}: {name} stands twice; which one counts?")
        made[name] = value
    return made


def _read_csv(file: Path) -> dict[str, Label]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = [(number, row) for number, row in enumerate(csv.reader(lines, strict=True), 1) if row]
    if rows and len(rows[0][1]) == 2 and rows[0][1][0].strip().lower() in {"path", "file", "filename", "image"}:
        rows = rows[1:]
    for number, row in rows:
        if len(row) != 2:
            raise DataError(f"{file}: line {number} has {len(row)} fields; wanted: path,label")
    empty = [number for number, (_, label) in rows if not label.strip()]
    if empty and not any(";" in label for _, (_, label) in rows):  # a slip, which would make lists of all labels
        raise DataError(f"{file}: line {empty[0]} has no label ({len(empty):,} lines have none); an empty list is `;`")
    return _once(str(file), ((_path(row[0]), _label(row[1].strip(), f"{file}: line {number}")) for number, row in rows))


def _label(text: str, where: str) -> Label:
    if text and ";" not in text:
        return _number(text, where)
    return parse_list(json.dumps([_number(part, where) for part in text.split(";") if part.strip()]).encode(), where)


def _number(text: str, where: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit()) or len(text) > 10 or int(text) >= 2**31:
        raise DataError(f"{where}: {text[:40]!r} is no label; wanted: an integer such as 3, or a list of them as 0;3;7")
    return int(text)


def _read_json(file: Path) -> dict[str, Label]:
    told = json.loads(file.read_bytes(), object_pairs_hook=lambda pairs: _once(str(file), pairs))
    if not isinstance(told, dict):
        raise DataError(f"{file}: holds no object of paths and labels: {{path: 3}} or {{path: [0, 3]}}")
    return _once(str(file), ((_path(name), _json_label(label, f"{file}: {name}")) for name, label in told.items()))


def _json_label(label: Any, where: str) -> Label:
    if isinstance(label, list):
        return parse_list(json.dumps(label).encode(), where)
    return _number(json.dumps(label), where)


def _path(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")
