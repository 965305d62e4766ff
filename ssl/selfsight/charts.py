"""Line charts as plain SVG: no script, no font, nothing to load; colours come from the page's style."""

from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 26
MOST_POINTS = 400  # of a line
MOST_TOLD = 60  # points of a line that tell their value
FEW = 12  # points that are drawn as dots beside their line
COLOURS = 8
HUGE, TINY = 1e300, 1e-300  # beyond which differences of numbers are no numbers any more


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    """(x, y), x ascending; values that are not finite, or beyond 1e300, are left out."""
    dashed: bool = False
    colour: int | None = None
    """Which of the page's colours; None: by its place among the series."""


def line_chart(series: list[Series], unit: str = "", label: str = "", x: str = "step") -> str:
    """An SVG of one or several lines over the training steps, or over `x`; points tell their value when hovered."""
    finite = [[p for p in s.points if all(abs(value) < HUGE for value in p)] for s in series]
    most = max(MOST_TOLD, MOST_POINTS * 2 // max(1, len(series)))
    series = [
        s._replace(points=_thin(points, min(MOST_POINTS, most)), colour=i if s.colour is None else s.colour)
        for i, (s, points) in enumerate(zip(series, finite, strict=True))
    ]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs, ys = [[p[axis] for s in series for p in s.points] for axis in (0, 1)]
    y_ticks, x_ticks = ticks(min(ys), max(ys)), ticks(min(xs), max(xs), inside=True)
    frame = Frame(min(xs), max(xs), y_ticks[0], y_ticks[-1])
    drawn = [*frame.grid(x_ticks, y_ticks, x), *(mark for s in series for mark in _marks(s, frame, unit, x))]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


class Frame(NamedTuple):
    """What of the plane a chart shows."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the picture; one alone in the middle."""
        wide = self.x_high - self.x_low
        across = ((x - self.x_low) / wide if wide > 1e-9 else 0.5) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def grid(self, x_ticks: list[float], y_ticks: list[float], x_name: str) -> list[str]:
        """Lines across, and the numbers at them."""
        drawn = [f'<text class="tick" x="{LEFT - 7}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_name)}</text>']
        for y in y_ticks:
            _, down = self.at(self.x_low, y)
            drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
            drawn.append(f'<text class="tick" x="{LEFT - 7}" y="{down + 3.5}" text-anchor="end">{number(y)}</text>')
        for x in x_ticks:
            across, _ = self.at(x, self.y_low)
            anchor = "end" if across > WIDTH - RIGHT - 12 else "start" if across < LEFT + 12 else "middle"
            drawn.append(f'<text class="tick" x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(x)}</text>')
        return drawn


def _marks(line: Series, frame: Frame, unit: str, x: str) -> list[str]:
    """The line itself, and dots that tell their value: seen where there are few, else only when hovered."""
    colour = f"c{(line.colour or 0) % COLOURS}"
    path = " ".join(f"{'ML'[j > 0]}{x} {y}" for j, (x, y) in enumerate(frame.at(*p) for p in line.points))
    drawn = [f'<path class="line {colour}{" dashed" if line.dashed else ""}" d="{path}"/>']
    if line.dashed and len(line.points) > 1:
        return drawn
    shown = " shown" if len(line.points) <= FEW else ""
    every = -(-len(line.points) // MOST_TOLD)
    for at, y in [*line.points[:-1:every], line.points[-1]]:
        across, down = frame.at(at, y)
        told = escape(f"{line.name} {number(y)}{unit} at {x} {at:,.10g}")
        size = 2.6 if shown else 5
        drawn.append(
            f'<circle class="dot {colour}{shown}" cx="{across}" cy="{down}" r="{size}"><title>{told}</title></circle>'
        )
    return drawn


def ticks(low: float, high: float, count: int = 4, inside: bool = False) -> list[float]:
    """About `count` round numbers that span [low, high], or that lie inside it."""
    if high - low <= max(TINY, 1e-9 * max(abs(low), abs(high))):
        if inside:
            return [low]
        room = abs(low) * 0.1 if abs(low) > TINY else 1.0
        low, high = low - room, high + room
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = (
        (ceil(low / step - 1e-9), floor(high / step + 1e-9))
        if inside
        else (floor(low / step + 1e-9), ceil(high / step - 1e-9))
    )
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short number: 12k, 0.25, 3e-04."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 10_000:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def _thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many and the last, each the mean of its neighbours; the last point is kept as it is."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]
    return [*means, points[-1]]
