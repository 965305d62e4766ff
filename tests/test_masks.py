"""Masks against slow loops over sorted draws, and the squares of SimMIM.

Mutations that these tests caught when they were tried: keep and hidden swapped, a hidden patch lost, the highest
draws first, hidden patches in grid order (a part of them is not uniform then), one argsort instead of two, one patch
more, the mask inverted, the mask tiled or stretched along one side, the count cut off, rounded or of one side, each
check of size and ratio left out or loosened.
"""

from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives.masks import cells_of, enlarge, mask_lowest, random_masking
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 48, "patch": 4, "width": 24, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = EncoderConfig(**ENCODER)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(2, 40), st.data())
def test_random_masks_split_the_patches_by_their_draws(images: int, patches: int, data: st.DataObject) -> None:
    visible = data.draw(st.integers(1, patches - 1))
    draws = torch.rand(images, patches, dtype=torch.float64)
    keep, hidden = random_masking(draws, visible)
    for image in range(images):
        assert sorted([*keep[image].tolist(), *hidden[image].tolist()]) == list(range(patches))
        assert draws[image, keep[image]].max() <= draws[image, hidden[image]].min()
    assert keep.shape == (images, visible)


def test_random_masks_are_uniform_over_patches_and_follow_the_position() -> None:
    batch = Batch((torch.zeros(4000, 1, 1, 1),), torch.arange(4000), seed=0)
    keep, hidden = random_masking(batch.uniform("mask", 16), 4)
    for index, share in ((keep, 4 / 16), (hidden[:, :3], 3 / 16)):  # a part of the hidden ones is uniform, too
        counts = torch.bincount(index.flatten(), minlength=16).double() / 4000
        assert (counts - share).abs().max() < 0.03
    alone = Batch((torch.zeros(1, 1, 1, 1),), torch.tensor([1234]), seed=0)
    assert torch.equal(random_masking(alone.uniform("mask", 16), 4)[0][0], keep[1234])


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 30), st.booleans(), st.data())
def test_the_patches_with_the_lowest_draws_are_masked(
    images: int, patches: int, same: bool, data: st.DataObject
) -> None:
    counts = [data.draw(st.integers(0, patches)) for _ in range(images)]
    if same:
        counts = counts[:1] * images
    draws = torch.rand(images, patches, dtype=torch.float64)
    mask = mask_lowest(draws, counts[0] if same else torch.tensor(counts)[:, None])
    assert mask.dtype == torch.bool
    for image, count in enumerate(counts):
        lowest = sorted(range(patches), key=draws[image].tolist().__getitem__)[:count]
        assert mask[image].nonzero().flatten().tolist() == sorted(lowest)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_every_cell_becomes_a_square(images: int, rows: int, columns: int, factor: int) -> None:
    mask = torch.rand(images, rows, columns) < 0.5
    large = enlarge(mask, factor)
    assert large.shape == (images, factor * rows, factor * columns)
    for image in range(images):
        for row in range(factor * rows):
            for column in range(factor * columns):
                assert large[image, row, column] == mask[image, row // factor, column // factor]


@pytest.mark.parametrize(
    ("size", "ratio", "side", "masked"),
    [(4, 0.6, 12, 87), (8, 0.6, 6, 22), (16, 0.6, 3, 6), (24, 0.6, 2, 3), (24, 0.75, 2, 3), (24, 0.5, 2, 2), (8, 0.001, 6, 1)],
)  # fmt: skip
def test_squares_are_counted_and_the_masked_ones_rounded_up(
    encoder: Encoder, size: int, ratio: float, side: int, masked: int
) -> None:
    assert masked == ceil(ratio * (48 // size) ** 2)
    assert cells_of(encoder, size, ratio) == (side, masked)


@pytest.mark.parametrize(
    ("size", "ratio", "message"),
    [
        (6, 0.6, "objective.mask_size: 6 must be a multiple of the patch of 4 pixels and a divisor of the image's 48"),
        (2, 0.6, "objective.mask_size: 2 must be a multiple of the patch of 4"),
        (
            20,
            0.6,
            "objective.mask_size: 20 must be a multiple of the patch of 4 pixels and a divisor of the image's 48",
        ),
        (96, 0.6, "objective.mask_size: 96 must be"),
        (24, 0.76, "objective.mask_ratio: 0.76 of 4 squares of 24 pixels masks 4; at least one must be masked"),
        (48, 0.5, "objective.mask_ratio: 0.5 of 1 squares of 48 pixels masks 1"),
        (24, 0.0, "objective.mask_ratio: 0.0 of 4 squares of 24 pixels masks 0"),
    ],
)
def test_squares_that_do_not_fit_are_refused(encoder: Encoder, size: int, ratio: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cells_of(encoder, size, ratio)
