"""What a page shows of patches, neighbours and pictures, held to slow references; and of every kind of encoder and image."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from selfsight.assemble import assemble
from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError
from selfsight.maps import attention_strips, grid_of, last_attention, overlay, principal_colours, token_strips
from selfsight.neighbours import (
    FEWEST,
    MAPPED,
    MOST,
    Bank,
    agreement,
    bank_of,
    how_many,
    legend,
    map_charts,
    nearest,
    neighbours,
)
from selfsight.pictures import EXACT, SHOWN, array, crops, picture
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.report import what_it_sees

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"name": "vit_tiny_patch16_224", "image_size": 8, "patch": 4, "width": 24, "depth": 2, "heads": 2, "channels": 1}  # fmt: skip


def make(**fields: Any) -> Encoder:
    config = EncoderConfig(**TINY | {"pool": "mean"} | fields)
    return build_encoder(config, preprocessing_of(DataConfig(train="none"), config), 0).eval()


def inputs(encoder: Encoder, count: int = 2) -> Tensor:
    return torch.randn(count, *encoder.preprocessing.shape, generator=torch.Generator().manual_seed(0))


def opened(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition("base64,")[2])))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_is_the_last_blocks_from_what_the_feature_is_made_of(pool: str) -> None:
    encoder = make(pool=pool, class_token=True)
    images = inputs(encoder)
    with torch.no_grad():
        x = encoder.begin(images)[0]
        block: Any = encoder.blocks[1]
        x = encoder.blocks[0](x)
        q, k, _ = rearrange(block.attn.qkv(block.norm1(x)), "b t (three h d) -> three b h t d", three=3, h=2)
        full = (q @ k.transpose(-1, -2) / 12**0.5).softmax(-1)
    wanted = full[:, :, 0, 1:] if pool == "cls" else full[:, :, 1:, 1:].mean(2)
    torch.testing.assert_close(last_attention(encoder, images), wanted, atol=1e-5, rtol=1e-4)
    rows = attention_strips(encoder, images)
    assert [row.detail for row in rows] == [False, True, True]
    assert ("class token" in rows[0].caption) == (pool == "cls")
    assert all(len(row.pictures) == 2 for row in rows)
    # The picture is that map: its brightest place is where most attention goes.
    heat = rearrange(wanted.mean(1)[0], "(h w) -> h w", h=2).numpy()
    shown = overlay(np.zeros((8, 8), np.uint8), heat).sum(-1)
    assert divmod(int(shown.argmax()), 8) == tuple(4 * v for v in divmod(int(heat.argmax()), 2))
    assert divmod(int(shown.argmin()), 8) == tuple(4 * v for v in divmod(int(heat.argmin()), 2))


def test_a_flat_map_is_drawn() -> None:
    assert overlay(np.full((4, 4, 3), 255, np.uint8), np.ones((2, 2))).shape == (4, 4, 3)


def test_colours_are_scikit_learns_components() -> None:
    patches = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) ** 2
    colours = principal_colours(patches).flatten(0, 1).numpy()
    wanted = PCA(3).fit_transform(patches.flatten(0, 1).double().numpy())
    for axis in range(3):
        low, high = np.quantile(wanted[:, axis], [0.02, 0.98])
        scaled = ((wanted[:, axis] - low) / (high - low)).clip(0, 1)
        assert min(abs(colours[:, axis] - scaled).max(), abs(colours[:, axis] - (1 - scaled)).max()) < 1e-6
    torch.testing.assert_close(principal_colours(patches + 100.0).numpy(), colours.reshape(3, 16, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("patches", [torch.ones(2, 4, 8), torch.randn(1, 1, 2), torch.zeros(2, 9, 1)])
def test_tokens_without_variance_have_colours(patches: Tensor) -> None:
    colours = principal_colours(patches)
    assert colours.shape == (*patches.shape[:2], 3)
    assert bool(((colours >= 0) & (colours <= 1)).all())


def test_places_of_planes() -> None:
    volume = make(frames=6, tube=2)  # three planes of 2 x 2
    values = torch.arange(12.0)[:, None]
    np.testing.assert_array_equal(grid_of(volume, values)[..., 0], [[4, 5], [6, 7]])
    tokens = make(channels=3, channel_tokens=True)
    np.testing.assert_array_equal(grid_of(tokens, values)[..., 0], [[4, 5], [6, 7]])  # the mean of 0, 4, 8
    np.testing.assert_array_equal(grid_of(make(), values[:4])[..., 0], [[0, 1], [2, 3]])


SHAPES: dict[str, dict[str, Any]] = {
    "volume": {"frames": 6, "tube": 2},
    "channel tokens": {"channels": 5, "channel_tokens": True},
    "two channels": {"channels": 2},
    "registers": {"registers": 2, "class_token": False},
    "swin": {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "patch": None, "width": None, "depth": None, "heads": None, "channels": 3, "pool": "head"},
    "convnext": {"name": "convnext_atto", "image_size": 64, "patch": None, "width": None, "depth": None, "heads": None, "channels": 3, "pool": "head"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_encoder_shows_what_it_has(kind: str) -> None:
    encoder = make(**SHAPES[kind])
    images = inputs(encoder)
    assert len(attention_strips(encoder, images)) == (3 if encoder.plain else 0)
    (row,) = token_strips(encoder, images)
    sides = {opened(p.url).size for p in row.pictures}
    assert sides == ({(2, 2)})
    assert not encoder.training


def test_attention_that_would_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.maps.MOST_BYTES", 100)
    assert attention_strips(make(), inputs(make())) == []


def test_tokens_that_are_not_finite_are_left_out() -> None:
    encoder = make()
    encoder.backbone.norm.weight.data.fill_(float("nan"))
    assert token_strips(encoder, inputs(encoder)) == []


MADE = Preprocessing(4, 1, (0.5,), (0.25,))


@pytest.mark.parametrize(
    ("made", "shape", "shown"),
    [
        (MADE, (1, 4, 4), (4, 4)),
        (MADE._replace(channels=3, mean=(0.5,) * 3, std=(0.25,) * 3), (3, 4, 4), (4, 4, 3)),
        (MADE._replace(channels=5, mean=(0.5,) * 5, std=(0.25,) * 5), (5, 4, 4), (4, 4, 3)),
        (MADE._replace(channels=2, mean=(0.5,) * 2, std=(0.25,) * 2), (2, 4, 4), (4, 4)),
        (MADE._replace(depth=16), (1, 4, 4), (4, 4)),
        (MADE._replace(frames=3), (1, 3, 4, 4), (4, 4)),
    ],
)
def test_any_image_has_a_picture(made: Preprocessing, shape: tuple[int, ...], shown: tuple[int, ...]) -> None:
    image = torch.zeros(shape)
    image[..., 0, 0], image[..., 0, 1], image[..., 0, 2] = 100.0, -100.0, float("nan")
    if len(shape) == 4:
        image[:, 1, 3, 3] = 100.0  # the middle plane
    pixels = array(image, made)
    assert pixels.shape == shown
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    assert (grey[0, 0], grey[0, 1], grey[1, 1], grey[3, 3]) == (255, 0, 128, 255 if len(shape) == 4 else 128)


@given(st.integers(1, 400), st.booleans())
def test_pictures_are_small_and_small_ones_exact(side: int, colour: bool) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3) if colour else (side, side)).astype(np.uint8)
    made = picture(pixels, "noise")
    back = np.asarray(opened(made.url))
    assert made.exact == (side <= EXACT)
    assert back.shape[:2] == (min(side, SHOWN) if side > EXACT else side,) * 2
    assert len(made.url) < 45_000  # noise, the worst: the page has about a hundred of them
    if made.exact:
        np.testing.assert_array_equal(back, pixels)


def test_the_nearest_are_scikit_learns_and_never_oneself() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    found, cosines = nearest(vectors, [0, 7, 49], 5)
    away, wanted = NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors).kneighbors(vectors[[0, 7, 49]])
    np.testing.assert_array_equal(found, wanted[:, 1:])
    np.testing.assert_allclose(cosines, 1 - away[:, 1:], atol=1e-5)
    assert nearest(vectors[:3], [0], 6)[0].shape == (1, 2)


def bank(count: int, classes: int, width: int = 6) -> Bank:
    labels = np.arange(count) % classes if classes else np.full(count, -1)
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    if classes:
        vectors += 20 * torch.eye(width)[labels % width]
    return Bank(np.arange(count), torch.nn.functional.normalize(vectors, dim=1), labels)


def test_agreement_is_that_of_the_nearest_neighbour() -> None:
    assert agreement(bank(60, 3)) == "Of 60 training images 100.0 % have a nearest neighbour of their own class."
    assert agreement(bank(60, 0)) == agreement(bank(60, 1)) == agreement(bank(1, 1)) == ""
    assert legend(bank(60, 3)) == [(str(i), f"--c:var(--c{i})") for i in range(3)]
    assert legend(bank(60, 0)) == legend(bank(60, 30)) == []


@pytest.mark.parametrize("classes", [0, 3, 12])
def test_maps_hold_every_point_in_its_classes_colour(classes: int) -> None:
    made = {chart.title: chart for chart in map_charts(bank(40, classes))}
    assert set(made) == {"PCA", "t-SNE"}
    for chart in made.values():
        assert chart.svg.count("<circle") == 40
        assert chart.svg.count("<title>class 0</title>") == (40 // classes + (40 % classes > 0) if classes else 0)
        assert len({part.split('"')[0] for part in chart.svg.split('style="')[1:]}) == max(1, classes)
        assert all(0 <= float(v.split('"')[0]) <= 360 for v in chart.svg.split('cx="')[1:])
    assert made["t-SNE"].svg == map_charts(bank(40, classes))[1].svg  # the same again
    assert map_charts(bank(7, 2)) == []


def test_collapsed_features_have_no_map(small_shards: Path, small_fields: dict[str, Any]) -> None:
    parts = assemble(load("digits/mae", small_fields), CPU)
    parts.encoder.backbone.norm.weight.data.zero_()
    parts.encoder.backbone.norm.bias.data.fill_(1.0)
    seen = what_it_sees(parts, CPU)
    assert seen.maps == []
    assert seen.left_out == ["maps: there are too few images, or all have the same features"]
    assert len(seen.neighbours) == 6
    parts.encoder.backbone.norm.bias.data.zero_()
    assert what_it_sees(parts, CPU).left_out == ["neighbours: the encoder's features are not finite, or all zero"]


def test_maps_are_bounded() -> None:
    assert map_charts(bank(MAPPED + 1, 0, 2))[0].svg.count("<circle") <= MAPPED


def test_the_choice_of_images_is_bounded_by_the_encoders_cost(small_shards: Path) -> None:
    assert how_many(make(), CPU) == MOST
    large = make(width=384, depth=2, heads=6, image_size=112, patch=4)
    weights = sum(parameter.numel() for parameter in large.parameters())
    assert FEWEST < how_many(large, CPU) == int(3e11 / (2 * weights * 28 * 28)) < 100
    assert how_many(large, torch.device("cuda")) == MOST
    assert how_many(make(width=768, depth=2, heads=6, image_size=224, patch=4), CPU) == FEWEST
    chosen = bank_of(make(), Shards(str(small_shards)), CPU, 0)
    assert chosen is not None
    np.testing.assert_array_equal(chosen.ids, np.arange(120))
    np.testing.assert_array_equal(chosen.labels, np.arange(120) % 2)


def test_neighbours_show_the_images_themselves_and_whether_labels_agree(small_shards: Path) -> None:
    shards, encoder = Shards(str(small_shards)), make()
    known = bank_of(encoder, shards, CPU, 0)
    assert known is not None
    rows = neighbours(known, encoder, shards)
    assert len(rows) == 6
    found, cosines = nearest(known.vectors, [0], 6)
    wanted = array(crops(shards, known.ids[found[0][:1]], encoder.preprocessing, CPU)[1][0], encoder.preprocessing)
    np.testing.assert_array_equal(np.asarray(opened(rows[0].found[0][0].url)), wanted)
    agrees = known.labels[found[0][0]] == known.labels[0]
    assert rows[0].found[0][1] == f"{cosines[0][0]:.3f} {'✓' if agrees else '✗'}"
    without = Bank(known.ids, known.vectors, np.full(120, -1))
    assert neighbours(without, encoder, shards)[0].found[0][1] == f"{cosines[0][0]:.3f}"
    assert neighbours(Bank(known.ids[:1], known.vectors[:1], known.labels[:1]), encoder, shards) == []


def test_features_that_say_nothing_have_no_neighbours(small_shards: Path) -> None:
    encoder = make()
    for value in (0.0, float("nan")):
        encoder.backbone.norm.weight.data.fill_(value)
        encoder.backbone.norm.bias.data.fill_(value)
        assert bank_of(encoder, Shards(str(small_shards)), CPU, 0) is None


def test_images_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    write_shards(iter(pictures(20)), tmp_path, "rotten", per_shard=50)
    tar = next(tmp_path.glob("*.tar"))
    body = bytearray(tar.read_bytes())
    place = body.find(b"\x89PNG", 3000)
    body[place + 20 : place + 60] = bytes(40)
    tar.write_bytes(body)
    shards = Shards(str(tmp_path))
    good, images = crops(shards, np.arange(20), make().preprocessing, CPU)
    assert len(good) == len(images) == 19
    bad = next(iter(set(range(20)) - set(good.tolist())))
    with pytest.raises(DataError, match="none of 1 images"):
        crops(shards, np.array([bad]), make().preprocessing, CPU)


def test_the_sets_of_a_mixture_are_told_apart_and_their_classes_not(
    small_fields: dict[str, Any], small_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    write_shards(iter(pictures(40, seed=1)), tmp_path / "other", "other", per_shard=50)
    mix = [{"train": str(small_shards)}, {"train": str(tmp_path / "other")}]
    recipe = load("digits/mae", small_fields | {"data.train": None, "data.mix": mix})
    seen = what_it_sees(assemble(recipe, CPU), CPU)
    assert seen.left_out == []
    assert seen.agreement.endswith("neighbour of their own set.")
    assert [name for name, _ in seen.legend] == ["0", "1"]
    assert len(seen.strips) == 4 + 3 + 1
    assert len(seen.neighbours) == 6
