"""Where tiles lie in their slides, and pictures of what attention says of them."""

import json
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfsight.data.samples import notes_of
from selfsight.data.shards import Shards

if TYPE_CHECKING:  # bags.py asks here
    from selfsight.eval.bags import BagsResult


def places_of(shards: Shards) -> Tensor | None:
    """Left and top of every sample (N, 2), pixels of its slide, as `shards build --tile` wrote them to `KEY.json`; -1 where nothing did.

    Returns:
        None where no sample has a place, and of remote shards, of which only images are read.

    Raises:
        OSError, DataError: a shard that cannot be read.
    """
    if not all(isinstance(path, Path) for path in shards.paths):
        return None
    notes = [note for path in shards.paths if isinstance(path, Path) for note in notes_of(path)]
    places = torch.tensor([_place(note) for note in notes])
    return places if bool((places >= 0).any()) else None


def _place(note: bytes | None) -> tuple[int, int]:
    try:
        told: Any = json.loads(note or b"{}")
        left, top = told["left"], told["top"]
    except (ValueError, KeyError, TypeError, RecursionError):  # a note of somebody else's
        return -1, -1
    return (left, top) if type(left) is type(top) is int and left >= 0 and top >= 0 else (-1, -1)


def heat_maps(found: "BagsResult", places: Tensor) -> dict[int, Tensor]:
    """Of each group of test a picture of its attention, as `heat_map` makes it, the stride of the tiles found from their places.

    Args:
        places: (M, 2) of the test samples from `places_of`; those without one are left out.
    """
    known = (places >= 0).all(1)
    stride = gcd(*places[known].flatten().tolist()) or 1
    pictures = {}
    for bag, group in enumerate(found.bags.groups.tolist()):
        rows = known & (found.bags.of == bag)
        if group >= 0 and bool(rows.any()):
            pictures[group] = heat_map(places[rows, 0], places[rows, 1], stride, found.attention[rows])
    return pictures


def heat_map(left: Tensor, top: Tensor, size: int, weights: Tensor) -> Tensor:
    """A picture of a slide, one pixel a tile: weights (n,) by the largest of them, NaN where there is no tile, (rows, columns).

    Args:
        left, top: (n,) pixels.
        size: the stride of the tiles, pixels.
    """
    rows, columns = top // size, left // size
    picture = torch.full((int(rows.max()) + 1, int(columns.max()) + 1), torch.nan)
    picture[rows, columns] = (weights / weights.max()).float()
    return picture
