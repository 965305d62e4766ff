"""Writing shards: from an image folder, a torchvision dataset, other tars, or the built-in digits."""

import bz2
import gzip
import inspect
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import webdataset as wds
from PIL import Image

from selfsight.data import digits
from selfsight.data.decode import open_image, pillow_image
from selfsight.data.index import UNLABELLED, build_index
from selfsight.data.samples import IMAGE_SUFFIXES, is_image
from selfsight.data.shards import Shards, find_shards
from selfsight.errors import DataError, StorageError, UsageError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
FORM_OF = {"MPO": "JPEG"}  # a JPEG with further pictures behind it, as many cameras write
SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif", "GIF": "gif"}

Samples = Iterator[tuple[Image.Image | bytes, int | None]]  # encoded, or pixels to be stored as PNG; label


class Encoding(NamedTuple):
    """How images are stored: unchanged unless one of these is set."""

    short_side: int | None = None  # pixels; larger images are reduced so that their shorter side has these
    format: str | None = None  # "jpeg", "png" or "webp"
    quality: int = 92  # of JPEG and WebP, 1-100

    @property
    def changes(self) -> bool:
        return self.short_side is not None or self.format is not None


UNCHANGED = Encoding()


class Built(NamedTuple):
    """What was written."""

    folder: Path
    shards: int
    samples: int
    classes: int
    bytes: int


def build(
    source: str,
    target: Path,
    *,
    root: Path | None = None,
    split: str = "train",
    download: bool = False,
    unlabelled: bool = False,
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
        unlabelled: ignore class folders and labels.
        encoding: limit the shorter side, store in another format.
        per_shard: samples in a shard.

    Raises:
        UsageError: a source that is none of these, or a target in use.
        DataError: nothing to pack, or images that cannot be read.
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
        classes = _fill(source, draft, root, split, download, unlabelled, encoding, per_shard)
        if classes:
            (draft / "classes.json").write_text(json.dumps(classes, indent=1))
        draft.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: could not be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shards = Shards(str(target))
    labels = shards.labels
    size = sum(path.stat().st_size for path in target.glob("*.tar"))
    return Built(target, len(shards.paths), len(shards), len(set(labels[labels >= 0].tolist())), size)


def _fill(
    source: str,
    draft: Path,
    root: Path | None,
    split: str,
    download: bool,
    unlabelled: bool,
    encoding: Encoding,
    per_shard: int,
) -> list[str]:
    """Write the shards; the answer is the names of the classes, if they have names."""
    prefix = draft.name.strip(".").rpartition("-")[0]
    if Path(source).is_dir() and not list(Path(source).glob("*.tar*")):
        classes, samples = _folder(Path(source), unlabelled)
    elif source.startswith("digits:"):
        classes, samples = [], digits.images(source.removeprefix("digits:"))
    elif ".tar" in source or Path(source).is_dir():
        return _tars(source, draft, unlabelled, encoding, per_shard, prefix)
    else:
        classes, samples = _torchvision(source, root, split, download)
    if unlabelled:
        classes, samples = [], ((image, None) for image, _ in samples)
    write_shards(samples, draft, prefix, encoding, per_shard)
    return classes


def write_shards(
    samples: Samples,
    folder: Path,
    prefix: str,
    encoding: Encoding = UNCHANGED,
    per_shard: int = 10_000,
) -> None:
    """Write images (encoded, or to be stored as PNG) and labels with webdataset's writer, and index them."""
    count = 0
    pattern = f"{folder}/{prefix}".replace("%", "%%") + "-%06d.tar"
    with wds.ShardWriter(pattern, maxcount=per_shard, maxsize=2**40, verbose=0, mtime=0) as writer:
        for image, label in samples:
            try:
                suffix, body = _encode(image, encoding)
            except DataError as error:
                raise DataError(f"image {count + 1} of the source: {error}") from None
            sample: dict[str, Any] = {"__key__": f"{count:09d}", suffix: body}
            if label is not None:
                sample["cls"] = str(label).encode()
            writer.write(sample)
            count += 1
    if not count:
        raise DataError("the source holds no image")
    for shard in sorted(folder.glob("*.tar")):
        build_index(shard)


def _encode(image: Image.Image | bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Suffix and bytes. Bytes that came encoded stay as they are unless a change is asked for; what is encoded anew has
    8 bits, grey or RGB, by the conversion that training uses (`pillow_image`)."""
    stored = "PNG"
    if isinstance(image, bytes):
        opened = open_image(image)
        stored = FORM_OF.get(opened.format or "", opened.format or "PNG")
        if not encoding.changes:
            return SUFFIX_OF[stored], image
        image = pillow_image(image, "L" if opened.mode in {"1", "L"} or opened.mode.startswith("I;16") else "RGB")
    if encoding.short_side and min(image.size) > encoding.short_side:
        scale = encoding.short_side / min(image.size)
        width, height = (max(encoding.short_side, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    form, out = (encoding.format or stored).upper(), BytesIO()
    image.save(out, form, **({} if form == "PNG" else {"quality": encoding.quality}))
    return SUFFIX_OF[form], out.getvalue()


def _folder(source: Path, unlabelled: bool) -> tuple[list[str], Samples]:
    """Images below a folder; its subfolders are classes unless images lie beside them."""
    files = sorted(path for path in source.rglob("*") if is_image(path.name) and path.is_file())
    if not files:
        raise DataError(f"{source}: no images below this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    tops = [path.relative_to(source).parts[0] for path in files]
    flat = unlabelled or any(path.parent == source for path in files)
    classes = [] if flat else sorted(set(tops))
    number = {name: i for i, name in enumerate(classes)}
    return classes, ((_checked(path), number.get(top)) for path, top in zip(files, tops, strict=True))


def _checked(path: Path) -> bytes:
    try:
        body = path.read_bytes()
        open_image(body)
    except (DataError, OSError) as error:
        raise DataError(f"{path}: {error}; remove or repair it") from None
    return body


def _tars(source: str, draft: Path, unlabelled: bool, encoding: Encoding, per_shard: int, prefix: str) -> list[str]:
    """Plain copies of (compressed) tars; rewritten only when their images are to change."""
    raw = draft / "raw"
    raw.mkdir()
    paths = sorted(Path(source).glob("*.tar*")) if Path(source).is_dir() else _on_disk(source)
    for path in (path for path in paths if path.suffix != ".idx"):
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
        shards = Shards(str(raw))
        labels = [None if unlabelled or label == UNLABELLED else int(label) for label in shards.labels]
        write_shards(((shards.read(i), labels[i]) for i in range(len(shards))), draft, prefix, encoding, per_shard)
    else:
        for path in raw.iterdir():
            path.replace(draft / path.name)
    shutil.rmtree(raw)
    names = paths[0].parent / "classes.json"
    return _class_names(names) if names.exists() and not unlabelled else []


def _on_disk(source: str) -> list[Path]:
    shards = find_shards(source)
    paths = [path for path in shards if isinstance(path, Path)]
    if len(paths) < len(shards):
        raise UsageError(f"{source}: is rewritten from a disk only; copy the shards to one first")
    return paths


def _class_names(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text())]
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{path}: is no list of names; remove or repair it") from None


def _torchvision(name: str, root: Path | None, split: str, download: bool) -> tuple[list[str], Samples]:
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


def _items(name: str, dataset: Any) -> Samples:
    for i in range(len(dataset)):
        image, label = dataset[i]
        if not isinstance(image, Image.Image) or not isinstance(label, int):
            raise DataError(
                f"{name}: its samples are not an image with one integer label; pack a folder of its images instead"
            )
        yield image, None if label < 0 else label
