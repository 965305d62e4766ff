"""JPEGs that the device decodes: the same views as the workers make, up to rounding; what it cannot take goes the usual way.

The device is the CPU here, whose decoder gives Pillow's pixels.

Mutations that these tests caught when they were tried: boxes of another view or image, flips of all, slots not moved with the
parts of a batch, pixels not rounded or not clamped, rotated images left to the device.
"""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.backward import part_of
from selfsight.data.build import Sample, write_shards
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import Form
from selfsight.data.device_jpeg import Encoded, fill, require_decoder, size_of
from selfsight.data.loader import Batches, HostBatch
from selfsight.data.placer import Placer
from selfsight.data.shards import Shards
from selfsight.data.views import View
from selfsight.errors import DataError, UsageError

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1)
VIEWS = View(), View(size=9, crop_scale=(0.1, 0.3), jitter=1.0)


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise: white noise would show the rounding of a resize more than any photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((60, 44), Image.Resampling.BICUBIC).convert(mode)


def body(image: Image.Image, form: str = "JPEG", **how: Any) -> bytes:
    out = BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return body(picture(seed), exif=exif)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Twelve JPEGs, four others: PNG, rotated, CMYK, grey."""
    folder = tmp_path_factory.mktemp("jpegs")
    bodies = [body(picture(number), quality=95) for number in range(12)]
    bodies += [body(picture(12), "PNG"), rotated(13), body(picture(14, "CMYK")), body(picture(15, "L"))]
    write_shards((Sample(one, None) for one in bodies), folder, "s")
    return Shards(str(folder))


def batches(shards: Shards, encode: bool, **more: Any) -> Batches:
    makers = tuple(ViewMaker(view, number, 24, "bicubic", 5) for number, view in enumerate(VIEWS))
    return Batches(shards, makers, 5, Form(3), 16, encode=encode, **more)


def placed(host: HostBatch) -> tuple[torch.Tensor, ...]:
    return Placer(VIEWS, MEAN, STD, 5)(host).views


def test_the_device_makes_the_views_that_workers_make(shards: Shards) -> None:
    ours, theirs = batches(shards, True)[0], batches(shards, False)[0]
    assert sorted(int(ours.ids[one.slot]) for one in ours.encoded) == list(range(12))
    assert torch.equal(ours.ids, theirs.ids)
    assert ours.bad == theirs.bad == []
    for one in ours.encoded:
        assert not any(view[one.slot].any() for view in ours.views)
    for a, b in zip(placed(ours), placed(theirs), strict=True):
        levels = (a - b).abs() * STD * 255
        assert levels.mean() < 0.5
        assert levels.max() < 8
    usual = [slot for slot in range(16) if slot not in {one.slot for one in ours.encoded}]
    assert torch.equal(ours.views[0][usual], theirs.views[0][usual])


def test_parts_of_a_batch_keep_their_own(shards: Shards) -> None:
    host = batches(shards, True)[0]
    whole = placed(host)[0]
    parts = [part_of(host, number, 4) for number in range(4)]
    assert sum(len(part.encoded) for part in parts) == 12
    found = torch.cat([Placer(VIEWS, MEAN, STD, 5)(part).views[0] for part in parts])
    assert torch.equal(found, whole)


@pytest.mark.parametrize(
    ("made", "form", "taken"),
    [
        (lambda: body(picture(0)), Form(3), True),
        (lambda: body(picture(0), progressive=True), Form(3), True),
        (lambda: body(picture(0, "L")), Form(1), True),
        (lambda: body(picture(0, "L")), Form(3), False),
        (lambda: body(picture(0, "CMYK")), Form(3), False),
        (lambda: body(picture(0), "PNG"), Form(3), False),
        (lambda: rotated(0), Form(3), False),
        (lambda: body(picture(0)), Form(3, depth=16), False),
        (lambda: body(picture(0)), Form(3, frames=2), False),
        (lambda: b"\xff\xd8\xff", Form(3), False),
    ],
)
def test_what_the_device_takes(made: Callable[[], bytes], form: Form, taken: bool) -> None:
    assert (size_of(made(), form) == (60, 44)) == taken


def test_views_without_a_box_of_their_own_go_the_usual_way(shards: Shards) -> None:
    with pytest.raises(DataError, match="too few for 3 moments"):
        replace(batches(shards, True), makers=(ViewMaker(View(moment=1), 0, 24, "bicubic", 5),))[0]
    for view in (View(crop_scale=None), View(shift=1)):
        plain = replace(batches(shards, True), makers=(ViewMaker(view, 0, 24, "bicubic", 5),))
        assert not plain[0].encoded


def test_a_damaged_image_ends_the_run_with_its_place(shards: Shards) -> None:
    cut = body(picture(1))[:700]
    fine = Encoded(0, body(picture(0)), [(0, 0, 60, 44)], [False], "a.tar@512")
    views = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
    with pytest.raises(DataError, match=r"b\.tar@1024: .*--data\.decode workers --allow-change data\.decode"):
        fill(views, [fine, Encoded(1, cut, [(0, 0, 60, 44)], [False], "b.tar@1024")], "bicubic")
    fill(views, [fine], "bicubic")
    assert views[0][0].any()


def test_a_neighbour_that_is_damaged_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decoded in another way, which on a GPU has other pixels; so are not those beside it."""

    def decoder(bodies: list[bytes], mode: str, device: torch.device) -> list[torch.Tensor]:
        if b"odd" in bodies:
            raise RuntimeError("damaged")
        return [torch.full((3, 44, 60), 77, dtype=torch.uint8)] * len(bodies)

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", decoder)
    monkeypatch.setattr("selfsight.data.device_jpeg.decode", lambda body, form: np.full((3, 44, 60), 99, np.uint8))
    some = [Encoded(slot, b"odd" if slot == 1 else b"", [(0, 0, 60, 44)], [False], "a") for slot in range(3)]
    views = [torch.zeros(3, 3, 8, 8, dtype=torch.uint8)]
    fill(views, some, "bicubic")
    assert [view.unique().tolist() for view in views[0]] == [[77], [99], [77]]


def test_memory_that_runs_out_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(bodies: list[bytes], mode: str, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        fill([torch.zeros(1, 3, 8, 8)], [Encoded(0, body(picture(0)), [(0, 0, 60, 44)], [False], "a")], "bicubic")


def test_a_library_that_does_not_load_is_not_to_be_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__

    def importing(name: str, *given: Any) -> Any:
        if name == "torchcodec.decoders":
            raise OSError("libnvjpeg.so.13: cannot open shared object file")
        return real(name, *given)

    monkeypatch.setattr("builtins.__import__", importing)
    with pytest.raises(
        UsageError, match=r"does not load beside torch \S+ \(CUDA \S+\): libnvjpeg.so.13.* workers"
    ) as told:
        require_decoder()
    assert "selfsight[fast]" not in told.value.told


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(UsageError, match=r"data\.decode: device needs torchcodec .*selfsight\[fast\]"):
        require_decoder()


def test_a_decoder_that_does_not_work_there_is_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bodies: list[bytes], mode: str, device: torch.device) -> None:
        raise RuntimeError(f"get_index, /__w/torchcodec/CUDACommon.h:42, no nvJPEG on {device}\nand more")

    assert callable(require_decoder(torch.device("cpu")))
    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", broken)
    with pytest.raises(
        UsageError, match=r"does not decode on cuda \(no nvJPEG on cuda\); leave data.decode at workers"
    ):
        require_decoder(torch.device("cuda"))
