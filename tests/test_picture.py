"""Planes of clips: which a view shows, that all frames are of one kind, and that no more are decoded than are shown.

Mutations that these tests caught when they were tried: a step that is not shortened, a last start left out or one too many,
the middle of evaluation shifted, moments not sorted or not shared, a frame decoded twice, sizes not compared.
"""

from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfsight.data import picture as subject
from selfsight.data.crops import Drawn, ViewMaker, needed
from selfsight.data.decode import BadSample, Form
from selfsight.data.picture import Picture
from selfsight.data.views import View


def frame(value: int, size: int = 4) -> bytes:
    out = BytesIO()
    Image.new("L", (size, size), value).save(out, "PNG")
    return out.getvalue()


def clip(count: int) -> list[bytes]:
    """Frames whose pixels say their number."""
    return [frame(number) for number in range(count)]


def shown(pixels: Any) -> list[int]:
    """The numbers of the frames in (1, D, 4, 4) or (1, 4, 4)."""
    return pixels[0, ..., 0, 0].reshape(-1).tolist()


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.floats(0, 1))
def test_a_window_is_evenly_spaced_and_lies_inside(planes: int, frames: int, step: int, place: float) -> None:
    picture = Picture(clip(planes), Form(1, frames=frames), step)
    if planes < frames:
        with pytest.raises(BadSample, match=f"fewer than the {frames} that the encoder takes"):
            picture.window(place)
        return
    seen = shown(picture.window(place))
    used = min(step, (planes - 1) // (frames - 1)) if frames > 1 else 1
    assert used >= 1
    assert seen == list(range(seen[0], seen[0] + frames * used, used))
    assert seen[0] >= 0
    assert seen[-1] < planes


@pytest.mark.parametrize(("planes", "frames", "step"), [(9, 1, 1), (9, 3, 2), (10, 4, 1), (4, 4, 7)])
def test_every_start_is_as_likely_and_evaluation_takes_the_middle(planes: int, frames: int, step: int) -> None:
    picture = Picture(clip(planes), Form(1, frames=frames), step)
    places = (np.arange(1000) + 0.5) / 1000
    starts = [shown(picture.window(place))[0] for place in places]
    counts = np.bincount(starts)
    used = min(step, (planes - 1) // (frames - 1)) if frames > 1 else 1
    assert len(counts) == planes - (frames - 1) * used
    assert counts.max() - counts.min() <= 1
    middle = shown(picture.window(0.5))
    assert abs(middle[0] + middle[-1] - (planes - 1)) <= 1
    assert shown(picture.window(1.0)) == shown(picture.window(0.9999))


def test_only_what_is_shown_is_decoded_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    real = subject.decode
    monkeypatch.setattr(subject, "decode", lambda body, *a, **k: decoded.append(body) or real(body, *a, **k))
    bodies = clip(30)
    picture = Picture(bodies, Form(1, frames=3), 2)
    for _ in range(2):
        picture.window(0.0)
    assert decoded == [bodies[0], bodies[2], bodies[4]]


def test_frames_of_different_sizes_are_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="frames of different sizes"):
        Picture([frame(1), frame(2, 5)], Form(1, frames=2)).window(0.0)
    with pytest.raises(BadSample, match=r"damaged|not an image"):
        Picture([frame(1), b"no image at all"], Form(1, frames=2)).window(0.0)


def test_a_plain_image_is_its_own_window() -> None:
    assert Picture([frame(7)], Form(1)).window(0.9).shape == (1, 4, 4)
    with pytest.raises(BadSample, match="1 plane, fewer than the 2"):
        Picture([frame(7)], Form(1, frames=2)).window(0.9)


@given(st.integers(3, 12), st.integers(1, 3), st.integers(0, 10_000))
def test_three_moments_are_three_different_starts_in_order(planes: int, frames: int, key: int) -> None:
    picture = Picture(clip(planes), Form(1, frames=frames))
    if planes - frames < 2:
        with pytest.raises(BadSample, match="too few for 3 moments"):
            picture.window(0.5, 0)
        return
    makers = [ViewMaker(View(moment=m), number, 8, "bicubic", 3) for number, m in enumerate((0, 1, 2))]  # type: ignore[arg-type]
    starts = [shown(picture.window(float(maker.moments(np.array([key]))[0]), maker.view.moment))[0] for maker in makers]
    assert starts[0] < starts[1] < starts[2]
    assert starts[2] <= planes - frames


def places_of(maker: ViewMaker, count: int) -> Any:
    return maker.moments(np.arange(count))


def test_three_moments_are_in_order_and_shared_and_others_are_each_views_own() -> None:
    first, second, third = (
        places_of(ViewMaker(View(moment=moment), number, 8, "bicubic", 3), 2000)  # type: ignore[arg-type]
        for number, moment in enumerate((0, 1, 2))
    )
    assert (first < second).all()
    assert (second < third).all()
    # The mean of the k-th of three sorted uniform numbers is k / 4.
    for found, mean in ((first, 0.25), (second, 0.5), (third, 0.75)):
        assert found.mean() == pytest.approx(mean, abs=0.02)
    alone = [places_of(ViewMaker(View(), number, 8, "bicubic", 3), 2000) for number in (0, 1)]
    assert abs(np.corrcoef(*alone)[0, 1]) < 0.1
    assert places_of(ViewMaker(View(), 0, 8, "bicubic", 3), 5).tolist() == alone[0][:5].tolist()


def test_frames_of_clips_of_several_sizes_are_cropped_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views show different frames; each is decoded for the rows that crops of its size show."""
    rng = np.random.default_rng(0)
    bodies = []
    for height, width in ((200, 300), (80, 60), (150, 90)):
        out = BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).resize((width, height))
        small.save(out, "JPEG")
        bodies.append(out.getvalue())
    makers = [ViewMaker(View(moment=m, crop_scale=(0.1, 0.4)), m, 24, "bicubic", 3) for m in (0, 1, 2)]  # type: ignore[arg-type]
    for key in range(12):
        drawn = Drawn.of(makers, np.array([key]))
        needs = partial(needed, makers, drawn.crops, False)
        partly, whole = Picture(bodies, Form(3), 1, needs), Picture(bodies, Form(3))
        for _ in range(2):  # the second time all are decoded already, the last of another size
            shown = [partly.shown(places[0], m) for m, places in enumerate(drawn.moments)]
        for number, maker in enumerate(makers):
            row = drawn.crops[number][0]
            expected = maker(whole.window(drawn.moments[number][0], number), row)
            assert np.array_equal(maker(shown[number][0], row, shown[number][1]), expected)
