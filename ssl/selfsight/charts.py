"""Line charts as plain SVG: no script, no font, nothing to load; colours come from the page's style."""

from html import escape
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 28
MOST_POINTS = 400


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: list[tuple[float, float]]
    """(x, y), x ascending; values that are not finite are left out."""
    dashed: bool = False


def line_chart(series: list[Series], unit: str = "", label: str = "") -> str:
    """An SVG of one or several lines over the training steps; each point tells its value when hovered."""
    series = [s._replace(points=_thin([p for p in s.points if isfinite(p[1])])) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs, ys = [[p[axis] for s in series for p in s.points] for axis in (0, 1)]
    y_ticks, x_ticks = ticks(min(ys), max(ys)), ticks(min(xs), max(xs), inside=True)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in y_ticks:
        _, down = at(x_low, y)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        drawn.append(f'<text class="tick" x="{LEFT - 6}" y="{down + 3.5}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        across, _ = at(x, y_low)
        drawn.append(f'<text class="tick" x="{across}" y="{HEIGHT - 9}" text-anchor="middle">{number(x)}</text>')
    for i, line in enumerate(series):
        path = " ".join(f"{'ML'[j > 0]}{x} {y}" for j, (x, y) in enumerate(at(*p) for p in line.points))
        drawn.append(f'<path class="line c{i % 4}{" dashed" if line.dashed else ""}" d="{path}"/>')
        if not line.dashed:
            for x, y in line.points:
                across, down = at(x, y)
                told = f"{line.name} {number(y)}{unit} at step {x:,.0f}"
                drawn.append(
                    f'<circle class="dot c{i % 4}" cx="{across}" cy="{down}" r="4"><title>{escape(told)}</title></circle>'
                )
    return "".join([*drawn, "</svg>"])


def ticks(low: float, high: float, count: int = 4, inside: bool = False) -> list[float]:
    """About `count` round numbers that span [low, high], or that lie inside it."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
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
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.4g}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of its neighbours; the last point is kept as it is."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]
    return [*means, points[-1]]
