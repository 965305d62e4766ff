"""Reading a whole set again: what is in it, and is every byte still what was indexed?"""

from collections import Counter, defaultdict
from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from selfsight.console import say, table
from selfsight.data.decode import open_image, pillow_image
from selfsight.data.formats import Array, read_array, shape_text, suffix_of
from selfsight.data.index import Records, label_histogram, read_index, scan
from selfsight.data.samples import NONE
from selfsight.data.shards import Shards
from selfsight.data.stats import HIGH, LOW, Statistics, write_stats
from selfsight.data.targets import IGNORED, checksum, decode_mask
from selfsight.errors import DataError

AHEAD = 256  # samples of remote shards that are asked for together


class Measure(NamedTuple):
    """What statistics are made of."""

    samples: int | None = None
    """So many of them, evenly spaced; None: all."""
    volumes: bool = False
    """An axis that a file does not name is planes, not channels."""


def check(shards: Shards, advance: Callable[[], None] = lambda: None, measure: Measure | None = None) -> dict[str, Any]:
    """Read, verify and decode every sample; `advance` is called after each.

    Args:
        measure: also make the statistics of every channel, and write them beside the index of each shard.

    Returns:
        counts, bytes, label histogram, formats, dtypes and channels, sizes, groups of identical images, every bad sample,
        and the statistics.
    """
    kinds: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    bad: list[dict[str, str]] = []
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    volume, first, total = 0, 0, Statistics()
    masked, painted = shards.masks, set[int]()
    measured = _chosen(len(shards), measure)
    for shard, size in enumerate(shards.sizes):
        found = Statistics(of=size)
        for i in range(first, first + size):
            if i % AHEAD == 0:
                shards.prefetch(range(i, min(i + 2 * AHEAD, len(shards))))
            try:
                body = shards.read(i)
                how = bool(measure and measure.volumes), i not in measured
                images = [own_pixels(image, *how) for image in shards.images(i, body)]
                kinds[images[0][0] + (f", clips of {len(images)}" if len(images) > 1 else "")] += 1
                sizes.append((images[0][1].shape[-1], images[0][1].shape[-2]))
                same[sha256(body).digest()].append(i)
                volume += len(body)
                if masked[i]:
                    height, width = images[0][1].shape[-2:]
                    painted |= set(np.unique(decode_mask(shards.read_mask(i), (height, width))).tolist())
                if i in measured:
                    found.add_sample([pixels for _, pixels in images])
            except DataError as error:
                bad.append({"sample": shards.describe(i), "reason": str(error)})
            advance()
        if measure:
            write_stats(shards, shard, found)
            total.add(found)
        first += size
    bad += _stale(shards)
    labels, groups = shards.labels, shards.groups
    clones = [ids for ids in same.values() if len(ids) > 1]
    sides = np.array(sizes or [(0, 0)]).min(1)
    return {
        "shards": len(shards.paths),
        "samples": len(shards),
        "id": shards.id,
        "image_bytes": volume,
        "unlabelled": int((labels == NONE).sum()),
        "labels": label_histogram(labels),
        "lists": shards.lists._asdict(),
        "masks": {"samples": int(masked.sum()), "classes": sorted(painted - {IGNORED})},
        "groups": len(set(groups.tolist()) - {NONE}),
        "ungrouped": int((groups == NONE).sum()),
        "kinds": dict(kinds.most_common()),
        "short_side": {"least": int(sides.min()), "median": float(np.median(sides)), "most": int(sides.max())},
        "sizes": {f"{w}x{h}": n for (w, h), n in Counter(sizes).most_common(5)},
        "duplicates": sum(len(ids) - 1 for ids in clones),
        "duplicate_groups": [[shards.describe(i) for i in ids] for ids in clones[:20]],
        "bad": bad,
    } | ({"stats": _told(total)} if measure else {})


def own_pixels(body: bytes, volumes: bool = False, eight: bool = False) -> tuple[str, Array]:
    """What a stored image is, in words, and its pixels in its own dtype; of what Pillow reads, 8 bits, grey or RGB.

    Args:
        volumes: as `read_array`.
        eight: as `read_array`.

    Raises:
        BadSample, MissingLibrary: as `decode`.
    """
    pixels = read_array(body, volumes, eight)
    if pixels is not None:
        return f"{suffix_of(body) or 'png'} {shape_text(pixels)}", pixels
    image = open_image(body)
    pixels = np.asarray(pillow_image(body, "L" if image.mode in {"1", "L"} else "RGB"))
    return f"{image.format} {image.mode}", pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _chosen(samples: int, measure: Measure | None) -> range | set[int]:
    """The samples that are measured."""
    if not measure or measure.samples is None or measure.samples >= samples:
        return range(samples if measure else 0)
    return set(np.linspace(0, samples - 1, measure.samples).astype(int).tolist())


def _stale(shards: Shards) -> list[dict[str, str]]:
    """Shards whose index, by which samples are read, is not what the tar holds now."""
    bad = []
    for path, crc in zip(shards.paths, shards.targets_crcs, strict=True):
        try:
            found = scan(path, missing="exclude")
            if _same(found.records, read_index(path)) and checksum(found.targets) == crc:
                continue
            reason = f"the index is another tar's; selfsight shards index {path}"
        except DataError as error:
            reason = str(error)
        bad.append({"sample": path.name, "reason": reason})
    return bad


def _same(now: Records, known: Records) -> bool:
    """Whether an index is that of its tar; one from before there were fingerprints has 0 in their place."""
    now = now.copy()
    if len(now) == len(known):
        now["print"][known["print"] == 0] = 0
    return np.array_equal(now, known)


def _told(found: Statistics) -> dict[str, Any]:
    """Statistics for people and scripts, without the histograms."""
    kinds = []
    for kind, moments in found.kinds.items():
        numbers = {"mean": moments.mean, "std": moments.std, "least": moments.least, "most": moments.most}
        numbers |= {f"p{percent}": moments.percentile(percent) for percent in (LOW, HIGH)}
        told = {name: values.tolist() for name, values in numbers.items()}
        kinds.append({**kind._asdict(), "samples": moments.samples, "pixels": moments.pixels, **told})
    return {"samples": found.samples, "planes": dict(found.planes), "mixed": found.mixed, "kinds": kinds}


def check_table(found: dict[str, Any]) -> None:
    """Print what `check` found."""
    labels, lists, masks = found["labels"], found["lists"], found["masks"]
    side = found["short_side"]
    rows = [
        ["shards", found["shards"]],
        ["samples", f"{found['samples']:,}"],
        ["image bytes", f"{found['image_bytes']:,}"],
        ["data id", found["id"]],
        ["labels", _told_counts(labels) if labels else "none"],
        ["unlabelled", f"{found['unlabelled']:,}"],
        *(
            [["lists of labels", f"{lists['samples']:,}, {lists['empty']:,} empty; {_told_counts(lists['labels'])}"]]
            if lists["samples"]
            else []
        ),
        *([["masks", f"{masks['samples']:,}; {len(masks['classes'])} classes"]] if masks["samples"] else []),
        ["groups", f"{found['groups']:,}; {found['ungrouped']:,} samples in none" if found["groups"] else "none"],
        ["formats and modes", ", ".join(f"{kind}: {count:,}" for kind, count in found["kinds"].items())],
        ["shorter side, pixels", f"{side['least']} to {side['most']}, median {side['median']:g}"],
        ["commonest sizes", ", ".join(f"{size}: {count:,}" for size, count in found["sizes"].items())],
        ["exact duplicates", f"{found['duplicates']:,}"],
        ["bad samples", f"{len(found['bad']):,}"],
    ]
    table(["", "found"], rows)
    for kind in found.get("stats", {}).get("kinds", []):
        _kind_table(kind)
    if mixed := found.get("stats", {}).get("mixed"):
        say(f"mixed channels or dtypes, of which a run takes one number of channels: {'; '.join(mixed)}")
    for problem in found["bad"][:20]:
        say(f"bad: {problem['sample']}: {problem['reason']}")
    for group in found["duplicate_groups"][:5]:
        say(f"identical: {', '.join(group[:6])}")


def _told_counts(labels: dict[int, int]) -> str:
    shown = ", ".join(f"{label}: {count:,}" for label, count in list(labels.items())[:12])
    return f"{len(labels)} classes ({shown}{' ...' if len(labels) > 12 else ''})"


def _kind_table(kind: dict[str, Any]) -> None:
    names = ["mean", "std", "least", f"p{LOW}", f"p{HIGH}", "most"]
    rows = [[str(i), *(f"{kind[name][i]:.6g}" for name in names)] for i in range(kind["channels"])]
    shown = ["mean", "std", "least", f"{LOW} %", f"{HIGH} %", "most"]
    table(["channel", *shown], rows, f"{kind['dtype']}, {kind['samples']:,} samples, in the files' own units")
