"""Marks other than lines, as plain SVG: scores on a scale, points of a map, a confusion matrix, dots by layer."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from selfsight.charts import COLOURS, HEIGHT, HUGE, WIDTH, Frame, number, ticks

STRIP = 180  # width of a scale from 0 to 100
MAP = 360  # side of a map
MOST_CLASSES = 50  # that a matrix can show
COUNTED = 12  # classes whose cells have room for their count


class Mark(NamedTuple):
    """A value on a scale."""

    name: str
    value: float
    low: float
    high: float
    own: bool
    """Whether it is what the row is about; the others are floors."""


def strip(marks: Sequence[Mark]) -> str:
    """Values between 0 and 100 on one line: floors as ticks, one's own as dots with its interval."""

    def at(value: float) -> float:
        return round(4 + min(max(value, 0.0), 100.0) / 100 * (STRIP - 8), 1)

    drawn = [f'<line class="grid" x1="4" x2="{STRIP - 4}" y1="10" y2="10"/>']
    for mark in sorted(marks, key=lambda mark: mark.own):
        told = f"<title>{escape(mark.name)} {mark.value:.1f}</title>"
        if mark.own:
            drawn.append(f'<line class="whisker c0" x1="{at(mark.low)}" x2="{at(mark.high)}" y1="10" y2="10"/>')
            drawn.append(f'<circle class="dot c0 shown" cx="{at(mark.value)}" cy="10" r="4.5">{told}</circle>')
        else:
            drawn.append(
                f'<line class="floor" x1="{at(mark.value)}" x2="{at(mark.value)}" y1="4" y2="16">{told}</line>'
            )
    label = ", ".join(f"{mark.name} {mark.value:.1f}" for mark in marks)
    return f'<svg class="strip" viewBox="0 0 {STRIP} 20" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def colour(number: int, of: int) -> str:
    """A class's colour as a style: one of the page's where they suffice, else its place on the colour circle."""
    return f"--c:var(--c{number})" if of <= COLOURS else f"--c:hsl({round(360 * number / of)} 62% var(--light))"


def scatter(places: Sequence[tuple[float, float]], classes: Sequence[int], names: Sequence[str], label: str) -> str:
    """A map: points in their classes' colours, each telling its class.

    Args:
        classes: of each point its number among `names`; all 0 with no names: one colour.
    """
    lows, highs = ([pick(place[axis] for place in places) for axis in (0, 1)] for pick in (min, max))
    wide, tall = (high - low for low, high in zip(lows, highs, strict=True))
    size = max(wide, tall) or 1.0
    height = round(16 + (MAP - 16) * tall / size)
    drawn = []
    for place, own in zip(places, classes, strict=True):
        across, down = (
            round(side / 2 + (MAP - 16) * (v - (low + high) / 2) / size, 1)
            for v, low, high, side in zip(place, lows, highs, (MAP, height), strict=True)
        )
        told = f"<title>{escape(names[own])}</title>" if names else ""
        drawn.append(
            f'<circle class="point" style="{colour(own, len(names))}" cx="{across}" cy="{down}" r="2.6">{told}</circle>'
        )
    return f'<svg viewBox="0 0 {MAP} {height}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], label: str) -> str:
    """A confusion matrix, rows the truth: the darker, the larger the share of the row; each cell tells its count."""
    side, left, classes = 400, 46, len(names)
    cell = (side - left) / classes
    drawn = [f'<text class="tick" x="{left + (side - left) / 2:.0f}" y="11" text-anchor="middle">predicted</text>']
    every = -(-classes // 25)
    for row, line in enumerate(counts):
        middle = left + (row + 0.5) * cell
        if row % every == 0:
            name = escape(names[row][:6])
            drawn.append(f'<text class="tick" x="{left - 5}" y="{middle + 3.5:.1f}" text-anchor="end">{name}</text>')
            drawn.append(f'<text class="tick" x="{middle:.1f}" y="{left - 7}" text-anchor="middle">{name}</text>')
        for column, count in enumerate(line):
            share = count / max(1, sum(line))
            kind, x, y = "right" if row == column else "wrong", left + column * cell, left + row * cell
            told = escape(f"{names[row]} taken for {names[column]}: {count:,}")
            opacity = 0.05 if not count else 0.15 + 0.85 * share
            drawn.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill-opacity="{opacity:.2f}">{f"<title>{told}</title>" if count else ""}</rect>'
            )
            if count and classes <= COUNTED:
                drawn.append(
                    f'<text class="count{" dark" if opacity > 0.55 else ""}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
                    f'text-anchor="middle">{count:,}</text>'
                )
    return f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def dots(layers: Sequence[Sequence[float]], label: str, unit: str = "") -> str:
    """Values of the heads of each layer, and a line through their means."""
    kept = [[value for value in heads if abs(value) < HUGE] for heads in layers]
    if not any(kept):
        return ""
    scale = ticks(min(0.0, *(v for heads in kept for v in heads)), max(v for heads in kept for v in heads))
    frame = Frame(0.5, len(kept) + 0.5, scale[0], scale[-1])
    every = -(-len(kept) // 12)
    drawn = frame.grid([float(layer) for layer in range(1, len(kept) + 1, every)], scale, "block")
    means = [(layer, sum(heads) / len(heads)) for layer, heads in enumerate(kept, 1) if heads]
    path = " ".join(f"{'ML'[i > 0]}{x} {y}" for i, (x, y) in enumerate(frame.at(*mean) for mean in means))
    drawn.append(f'<path class="line c0" d="{path}"/>')
    for layer, heads in enumerate(kept, 1):
        for head, value in enumerate(heads, 1):
            x, y = frame.at(layer, value)
            told = escape(f"block {layer}, head {head}: {number(value)}{unit}")
            drawn.append(f'<circle class="dot c0 shown" cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'
