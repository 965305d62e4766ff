"""Sources of shards: a folder of images, a torchvision dataset, other tars, or the built-in digits."""

import bz2
import gzip
import inspect
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from selfsight.data import digits
from selfsight.data.classes import read_names
from selfsight.data.folders import Reading, read_folder
from selfsight.data.index import build_index
from selfsight.data.packing import UNCHANGED, Encoding, Sample, write_shards
from selfsight.data.samples import LISTED, NONE, notes_of
from selfsight.data.shards import Shards, find_shards
from selfsight.data.stats import SUFFIX
from selfsight.data.targets import SUFFIX as TARGETS
from selfsight.errors import DataError, StorageError, UsageError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
AS_IT_LIES = Reading()
Pairs = Iterator[tuple[Image.Image | bytes, int | None]]


class Built(NamedTuple):
    """What was written."""

    folder: Path
    shards: int
    samples: int
    classes: int
    groups: int
    bytes: int
    masks: int = 0
    lists: int = 0
    """Samples whose labels are a list."""
    empty: int = 0
    """Of them those with none in it."""


def build(
    source: str,
    target: Path,
    *,
    root: Path | None = None,
    split: str = "train",
    download: bool = False,
    reading: Reading = AS_IT_LIES,
    encoding: Encoding = UNCHANGED,
    per_shard: int = 10_000,
) -> Built:
    """Write `source` as indexed shards into the folder `target`, which appears only when it is whole.

    Args:
        source: a folder of images (with class folders, or flat), the name of a torchvision dataset, tars (.tar, .tar.gz,
            .tar.xz, .tar.bz2; braces and globs too), or `digits:train`.
        root: where the torchvision dataset lies.
        split: which part of it.
        download: let torchvision fetch it.
        reading: labels, and of a folder also groups, clips and tiles.
        encoding: limit the shorter side, store in another format.
        per_shard: samples in a shard.

    Raises:
        UsageError: a source that is none of these, or a target in use.
        DataError: nothing to pack, or images that cannot be read.
    """
    with drafted(target) as draft:
        names = _fill(source, draft, root, split, download, reading, encoding, per_shard)
        for kind in (kind for kind in names if names[kind]):
            (draft / f"{kind}.json").write_text(json.dumps(names[kind], indent=1))
    shards = Shards(str(target))
    lists = shards.lists
    classes = len({*shards.labels.tolist(), *lists.labels} - {NONE, LISTED})
    groups = len(set(shards.groups.tolist()) - {NONE})
    size = sum(path.stat().st_size for path in target.glob("*.tar"))
    masks = int(shards.masks.sum())
    return Built(target, len(shards.paths), len(shards), classes, groups, size, masks, lists.samples, lists.empty)


@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and nothing when it does not.

    Raises:
        UsageError: a target in use.
        StorageError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: exists already; name a new folder, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise StorageError(f"{target.parent}: cannot be written ({error.strerror})") from None
    try:
        draft.chmod(0o755)
        yield draft
        draft.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: could not be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(
    source: str,
    draft: Path,
    root: Path | None,
    split: str,
    download: bool,
    reading: Reading,
    encoding: Encoding,
    per_shard: int,
) -> dict[str, list[str]]:
    """Write the shards; the answer is the names of the classes and of the groups, if they have names."""
    prefix = draft.name.strip(".").rpartition("-")[0]
    packed = Path(source).is_dir() and bool(_tars_in(Path(source)))
    if Path(source).is_dir() and not packed:
        classes, groups, samples = read_folder(Path(source), reading)
        write_shards(samples, draft, prefix, encoding, per_shard)
        return {"classes": classes, "groups": groups}
    if reading.clips or reading.cut or reading.group_by or reading.labels or reading.masks:
        raise UsageError(f"{source}: --clips, --tile, --group-by, --labels and --masks are for a folder of images")
    if packed or (".tar" in source and not source.startswith("digits:")):
        return _tars(source, draft, reading.unlabelled, encoding, per_shard, prefix)
    if source.startswith("digits:"):
        classes, pairs = [], digits.images(source.removeprefix("digits:"))
    else:
        classes, pairs = _torchvision(source, root, split, download)
    if reading.unlabelled:
        classes, pairs = [], ((image, None) for image, _ in pairs)
    write_shards(pairs, draft, prefix, encoding, per_shard)
    return {"classes": classes}


def _tars(
    source: str, draft: Path, unlabelled: bool, encoding: Encoding, per_shard: int, prefix: str
) -> dict[str, list[str]]:
    """Plain copies of (compressed) tars; rewritten only when their images are to change."""
    raw = draft / "raw"
    raw.mkdir()
    paths = _tars_in(Path(source)) if Path(source).is_dir() else _on_disk(source)
    for path in paths:
        plain = raw / (path.name if path.suffix == ".tar" else path.name.removesuffix(path.suffix))
        if plain.exists():
            raise UsageError(f"{path}: a second shard of the name {plain.name}; build the folders one by one")
        try:
            with OPENERS.get(path.suffix, open)(path, "rb") as packed, plain.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise DataError(f"{path}: cannot be unpacked ({error})") from None
        build_index(plain)
    if encoding.changes or unlabelled:
        write_shards(_again(Shards(str(raw)), unlabelled), draft, prefix, encoding, per_shard)
    else:
        for path in raw.iterdir():
            path.replace(draft / path.name)
    shutil.rmtree(raw)
    return names_beside(paths[0].parent, [] if unlabelled else ["classes"])


def _tars_in(folder: Path) -> list[Path]:
    """The tars in a folder, also compressed ones: what else begins with their names was made of them."""
    return sorted(path for suffix in ("", *OPENERS) for path in folder.glob(f"*.tar{suffix}"))


def names_beside(folder: Path, kinds: Sequence[str] = ("classes",)) -> dict[str, list[str]]:
    """The names of groups, and of classes, that stand beside shards."""
    files = {kind: folder / f"{kind}.json" for kind in (*kinds, "groups")}
    return {kind: read_names(file) for kind, file in files.items() if file.exists()}


def _on_disk(source: str) -> list[Path]:
    shards = find_shards(source)
    paths = [path for path in shards if isinstance(path, Path)]
    if len(paths) < len(shards):
        raise UsageError(f"{source}: is rewritten from a disk only; copy the shards to one first")
    return [path for path in paths if not path.name.endswith((".idx", SUFFIX, TARGETS))]  # a glob finds them, too


def _again(shards: Shards, unlabelled: bool) -> Iterator[Sample]:
    """The samples of shards, to be written in another form."""
    notes = (note for path in shards.paths if isinstance(path, Path) for note in notes_of(path))
    lists = shards.label_lists()
    columns = zip(shards.labels, shards.groups, shards.frames, shards.masks, notes, strict=True)
    for i, (label, group, frames, masked, note) in enumerate(columns):
        images: list[Image.Image | bytes] = [*shards.read_images(i)]
        image = images if frames else images[0]
        known: int | list[int] | None = None if unlabelled or label == NONE else int(label)
        if known == LISTED and lists is not None:
            known = np.flatnonzero(lists[i]).tolist()
        mask = shards.read_mask(i) if masked and not unlabelled else None
        yield Sample(image, known, None if group == NONE else int(group), note, mask)


def _torchvision(name: str, root: Path | None, split: str, download: bool) -> tuple[list[str], Pairs]:
    """A dataset of torchvision.datasets by its class name, whichever way it spells its splits."""
    import torchvision.datasets as known

    if name not in known.__all__:
        near = get_close_matches(name, known.__all__, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{name}: neither a folder, nor tars, nor a dataset of torchvision{hint}")
    kind = getattr(known, name)
    takes = inspect.signature(kind).parameters
    given: dict[str, Any] = {"root": root or Path(".")} if "root" in takes else {}
    given |= {"train": split == "train"} if "train" in takes else {"split": split} if "split" in takes else {}
    given |= {"download": download} if "download" in takes else {}
    try:
        dataset = kind(**given)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        advice = "" if download else " (--root says where it lies, --download lets torchvision fetch it)"
        raise DataError(f"{name}: {str(error).splitlines()[0]}{advice}") from None
    return list(map(str, getattr(dataset, "classes", None) or [])), _items(name, dataset)


def _items(name: str, dataset: Any) -> Pairs:
    for i in range(len(dataset)):
        image, label = dataset[i]
        if not isinstance(image, Image.Image) or not isinstance(label, int):
            raise DataError(
                f"{name}: its samples are not an image with one integer label; pack a folder of its images instead"
            )
        yield image, None if label < 0 else label
