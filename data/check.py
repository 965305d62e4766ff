"""Reading a whole set again: what is in it, and is every byte still what was indexed?"""

from collections import Counter, defaultdict
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np

from selfsight.console import say, table
from selfsight.data.decode import Form, decode, open_image
from selfsight.data.index import label_histogram, read_index, scan
from selfsight.data.shards import Shards
from selfsight.errors import DataError


def check(shards: Shards, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Read, verify and decode every sample; `advance` is called after each.

    Returns:
        counts, bytes, label histogram, image formats, modes, sizes, groups of identical images, and every bad sample.
    """
    kinds: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    bad: list[dict[str, str]] = []
    same: defaultdict[bytes, list[int]] = defaultdict(list)
    volume = 0
    for i in range(len(shards)):
        try:
            body = shards.read(i)
            image = open_image(body)
            decode(body, Form(3))
            kinds[f"{image.format} {image.mode}"] += 1
            sizes.append(image.size)
            same[sha256(body).digest()].append(i)
            volume += len(body)
        except DataError as error:
            bad.append({"sample": shards.describe(i), "reason": str(error)})
        advance()
    for path in shards.paths:  # the samples above are the index's; is it still this tar's?
        try:
            if not np.array_equal(scan(path, missing="exclude"), read_index(path)):
                bad.append(
                    {"sample": path.name, "reason": f"the index is another tar's; selfsight shards index {path}"}
                )
        except DataError as error:
            bad.append({"sample": path.name, "reason": str(error)})
    labels = shards.labels
    clones = [ids for ids in same.values() if len(ids) > 1]
    sides = np.array(sizes or [(0, 0)]).min(1)
    return {
        "shards": len(shards.paths),
        "samples": len(shards),
        "id": shards.id,
        "image_bytes": volume,
        "unlabelled": int((labels < 0).sum()),
        "labels": label_histogram(labels),
        "kinds": dict(kinds.most_common()),
        "short_side": {"least": int(sides.min()), "median": float(np.median(sides)), "most": int(sides.max())},
        "sizes": {f"{w}x{h}": n for (w, h), n in Counter(sizes).most_common(5)},
        "duplicates": sum(len(ids) - 1 for ids in clones),
        "duplicate_groups": [[shards.describe(i) for i in ids] for ids in clones[:20]],
        "bad": bad,
    }


def check_table(found: dict[str, Any]) -> None:
    """Print what `check` found."""
    labels = found["labels"]
    shown = ", ".join(f"{label}: {count:,}" for label, count in list(labels.items())[:12]) + (
        " ..." if len(labels) > 12 else ""
    )
    side = found["short_side"]
    rows = [
        ["shards", found["shards"]],
        ["samples", f"{found['samples']:,}"],
        ["image bytes", f"{found['image_bytes']:,}"],
        ["data id", found["id"]],
        ["labels", f"{len(labels)} classes ({shown})" if labels else "none"],
        ["unlabelled", f"{found['unlabelled']:,}"],
        ["formats and modes", ", ".join(f"{kind}: {count:,}" for kind, count in found["kinds"].items())],
        ["shorter side, pixels", f"{side['least']} to {side['most']}, median {side['median']:g}"],
        ["commonest sizes", ", ".join(f"{size}: {count:,}" for size, count in found["sizes"].items())],
        ["exact duplicates", f"{found['duplicates']:,}"],
        ["bad samples", f"{len(found['bad']):,}"],
    ]
    table(["", "found"], rows)
    for problem in found["bad"][:20]:
        say(f"bad: {problem['sample']}: {problem['reason']}")
    for group in found["duplicate_groups"][:5]:
        say(f"identical: {', '.join(group[:6])}")
