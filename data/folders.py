"""A folder of images as samples: classes from its folders, groups from names, frames as clips, large images as tiles."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from selfsight.console import say
from selfsight.data.classes import FILE, numbered, read_names
from selfsight.data.decode import open_image
from selfsight.data.formats import suffix_of
from selfsight.data.labels import Label, find_masks, read_labels
from selfsight.data.packing import Sample, seen_size
from selfsight.data.samples import IMAGE_SUFFIXES, is_image
from selfsight.data.targets import decode_mask
from selfsight.data.tiles import Cut, Left, cut_tiles
from selfsight.errors import DataError, UsageError


class Reading(NamedTuple):
    """How a folder becomes samples."""

    unlabelled: bool = False
    """Ignore class folders."""
    group_by: str | None = None
    """What names the whole that an image is a part of: "folder" (in which it lies), "stem" (its name to the first dot), or a
    regular expression, of which the first group counts."""
    clips: bool = False
    """The images of each folder are the frames of one clip, by their names in order."""
    cut: Cut | None = None
    """Tiles to cut images into; without `group_by` the tiles of an image are a group."""
    labels: Path | None = None
    """A file of labels, which count instead of class folders: see `labels.read_labels`."""
    masks: Path | None = None
    """A folder of masks: see `labels.find_masks`."""
    classes: Path | None = None
    """A classes.json, or shards with one, whose numbers class folders get; else they are numbered in the order of their names."""


class Folder(NamedTuple):
    """What a folder holds."""

    classes: list[str]
    groups: list[str]
    samples: Iterator[Sample]


def read_folder(source: Path, how: Reading) -> Folder:
    """The images below a folder; its subfolders are classes unless images (or clips) lie beside them.

    Raises:
        UsageError: an expression that is none, clips to be cut into tiles, or masks of either.
        DataError: no image, a name that tells no group, and labels or masks that are not those of the images.
    """
    if how.clips and how.cut:
        raise UsageError("--clips and --tile: a clip is not cut into tiles")
    if how.masks and (how.clips or how.cut):
        raise UsageError("--masks: are of whole images; leave out --clips and --tile")
    if how.labels and how.unlabelled:
        raise UsageError("--labels and --unlabelled: one says the contrary of the other")
    files = [path for path in source.rglob("*") if is_image(path.name) and path.is_file()]
    files.sort(key=_by_number if how.clips else None)
    if not files:
        raise DataError(f"{source}: no images below this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    wholes = (
        [list(frames) for _, frames in groupby(files, lambda path: path.parent)]
        if how.clips
        else [[path] for path in files]
    )
    classes, labels = _labels(source, wholes, how)
    names = [frames[0].relative_to(source).as_posix() for frames in wholes]
    masks = find_masks(how.masks, names) if how.masks else [None] * len(wholes)
    by = how.group_by or ("image" if how.cut else None)
    groups, numbers = _groups(source, wholes, by) if by else ([], [None] * len(wholes))
    return Folder(classes, groups, _samples(source, wholes, labels, numbers, masks, how))


def _labels(source: Path, wholes: list[list[Path]], how: Reading) -> tuple[list[str], Sequence[Label | None]]:
    """Names of the classes, if they have names, and the label of each whole, if it has one."""
    if how.unlabelled:
        return [], [None] * len(wholes)
    if not how.labels:
        return _classes(source, wholes, how)
    names = [(frames[0].parent if how.clips else frames[0]).relative_to(source).as_posix() for frames in wholes]
    return [], read_labels(how.labels, names)


def _by_number(path: Path) -> tuple[Path, list[tuple[int, str]]]:
    """Folder by folder; in it frame 10 after frame 9, however they are padded."""
    words = re.findall(r"\d+|\D+", path.name)
    return path.parent, [(int(word), "") if word.isdecimal() else (-1, word) for word in words]


def _classes(source: Path, wholes: list[list[Path]], how: Reading) -> tuple[list[str], Sequence[int | None]]:
    """Names of the classes, and the number of each whole's; none where any lies in `source` itself."""
    places = [(frames[0].parent if how.clips else frames[0]).relative_to(source).parts for frames in wholes]
    if min(map(len, places)) < 2:
        return [], [None] * len(wholes)
    own = [parts[0] for parts in places]
    names = sorted(set(own))
    if how.classes:
        names = read_names(how.classes / FILE if how.classes.is_dir() else how.classes)
    return names, numbered(own, names, source)


def _groups(source: Path, wholes: list[list[Path]], by: str) -> tuple[list[str], list[int | None]]:
    """Names of the groups, and the number of each whole's."""
    own = [_group(frames[0].relative_to(source), by) for frames in wholes]
    names = sorted(set(own))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[name] for name in own]


def _group(path: Path, by: str) -> str:
    if by == "image":
        return str(path)
    if by == "folder":
        return str(path.parent)
    if by == "stem":
        return path.name.partition(".")[0]
    try:
        found = re.search(by, str(path))
    except re.error as error:
        raise UsageError(
            f"--group-by: {by!r} is neither folder, nor stem, nor a regular expression ({error})"
        ) from None
    if not found:
        raise DataError(f"{path}: --group-by {by!r} does not match its name; every image needs a group")
    return found[1] or "" if found.re.groups else found[0]


def _samples(
    source: Path,
    wholes: list[list[Path]],
    labels: Sequence[Label | None],
    groups: Sequence[int | None],
    masks: Sequence[Path | None],
    how: Reading,
) -> Iterator[Sample]:
    left = Left()
    for frames, label, group, mask in zip(wholes, labels, groups, masks, strict=True):
        if how.clips:
            yield Sample([_checked(path) for path in frames], label, group)
        elif how.cut:
            name = str(frames[0].relative_to(source))
            for tile in cut_tiles(frames[0], how.cut, left):
                yield Sample(tile.image, label, group, {"source": name, "left": tile.left, "top": tile.top})
        else:
            image = _checked(frames[0])
            yield Sample(image, label, group, mask=_read(mask, image) if mask else None)
    if how.cut and (told := left.text(how.cut.size)):
        say(f"{source}: {told}; left out")


def _read(mask: Path, image: bytes) -> bytes:
    try:
        body = mask.read_bytes()
        decode_mask(body, seen_size(image))
    except (DataError, OSError) as error:
        raise DataError(f"{mask}: {error}; remove or repair it") from None
    return body


def _checked(path: Path) -> bytes:
    """The bytes of a file of a known kind."""
    try:
        body = path.read_bytes()
        if not suffix_of(body):
            open_image(body)
    except (DataError, OSError) as error:
        raise DataError(f"{path}: {error}; remove or repair it") from None
    return body
