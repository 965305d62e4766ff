"""One sample as views see it: a plain image, or planes (frames of a clip, slices of a volume) of which a view takes some."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from selfsight.data.decode import BadSample, Form, Pixels, decode
from selfsight.data.jpeg import Need, Needs

Shown = tuple[Pixels, tuple[int, int] | None]  # with the stored width and height, if they may be others
MOMENTS = 3  # in order, that views of a clip may share


class Picture:
    """The image of a sample, decoded when its pixels are asked for; of a clip only the frames that a view shows.

    Args:
        bodies: one encoded image, which may have planes itself, or the encoded frames of a clip in order.
        form: what is to come out.
        step: planes from one plane of a window to the next; less where there are not as many.
        needs: which rows views will look at, if not all.
    """

    def __init__(self, bodies: Sequence[bytes], form: Form, step: int = 1, needs: Needs | None = None) -> None:
        self.bodies, self.form, self.step, self.needs = bodies, form, step, needs
        self._size: tuple[int, int] | None = None
        self._frames: dict[int, tuple[Pixels, tuple[int, int] | None]] = {}

    @classmethod
    def of(cls, pixels: Pixels, form: Form) -> "Picture":
        """An image that is decoded already."""
        picture = cls([b""], form)
        picture.whole = pixels
        return picture

    @cached_property
    def whole(self) -> Pixels:
        """The one stored image: (C, H, W), or (C, D, H, W)."""
        return decode(self.bodies[0], self.form, self._asked if self.needs else None)

    def _asked(self, width: int, height: int) -> Need:
        assert self.needs is not None
        self._size = width, height
        return self.needs(width, height)

    @property
    def planes(self) -> int:
        """How many there are; a plain image has one.

        Raises:
            BadSample: as `decode`.
        """
        if len(self.bodies) > 1:
            return len(self.bodies)
        return self.whole.shape[1] if self.whole.ndim == 4 else 1

    def window(self, place: float, moment: int | None = None) -> Pixels:
        """`shown` without the stored size."""
        return self.shown(place, moment)[0]

    def shown(self, place: float, moment: int | None = None) -> Shown:
        """The planes of a view, which starts at `place` (0 the first, 1 the last possible): (C, H, W) for an encoder of
        one plane, else (C, frames, H, W); and width and height as stored, where the pixels may be fewer by what was needed.

        Args:
            moment: it is the first, second or third of three, which never start at the same plane: no one could tell
                their order.

        Raises:
            BadSample: as `decode`; fewer planes than the encoder or three moments take, or frames of different sizes.
        """
        wanted, planes = self.form.frames, self.planes
        if planes < wanted:
            raise BadSample(
                f"{planes} plane{'s' * (planes > 1)}, fewer than the {wanted} that the encoder takes (encoder.frames)"
            )
        step = min(self.step, (planes - 1) // (wanted - 1)) if wanted > 1 else 1
        starts = planes - (wanted - 1) * step
        if moment is not None and starts < MOMENTS:
            raise BadSample(f"{planes} plane{'s' * (planes > 1)}, too few for {MOMENTS} moments in order")
        starts, shift = (starts, 0) if moment is None else (starts - MOMENTS + 1, moment)
        first = min(int(place * starts), starts - 1) + shift
        return self._take(range(first, first + wanted * step, step))

    def _take(self, planes: range) -> Shown:
        if len(self.bodies) == 1:
            whole = self.whole
            if whole.ndim == 4:
                whole = (
                    whole[:, planes[0]] if self.form.frames == 1 else whole[:, planes.start : planes.stop : planes.step]
                )
            return whole, self._size
        frames, sizes = zip(*(self._frame(plane) for plane in planes), strict=True)
        shapes = [frame.shape for frame in frames]
        if len({*zip(shapes, sizes, strict=True)}) > 1:
            raise BadSample(f"frames of different sizes: {', '.join(map(str, shapes[:4]))}")
        return frames[0] if self.form.frames == 1 else np.stack(frames, axis=1), sizes[0]

    def _frame(self, plane: int) -> tuple[Pixels, tuple[int, int] | None]:
        if plane not in self._frames:
            self._size = None
            frame = decode(self.bodies[plane], self.form, self._asked if self.needs else None)
            if frame.ndim != 3:
                raise BadSample(f"frame {plane} of the clip is itself a stack of {frame.shape[1]} planes")
            self._frames[plane] = frame, self._size
        return self._frames[plane]
