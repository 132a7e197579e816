"""Line charts as SVG: enough for the advisor's plots, and no plotting library to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50
COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9b9a97", "#dfab01")


@dataclass(frozen=True)
class Series:
    """A named line, or points without one."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """A label, and whether it is logarithmic: then only positive values are drawn."""

    label: str
    log: bool = False


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """The chart as one SVG document; values that are not finite are left out."""
    drawn = [
        Series(s.name, [p for p in s.points if _fits(p[0], x) and _fits(p[1], y)], s.line)
        for s in series
    ]
    everything = [p for s in drawn for p in s.points] or [(1.0, 1.0)]
    horizontal = _Scale(x, [p[0] for p in everything], LEFT, WIDTH - RIGHT)
    vertical = _Scale(y, [p[1] for p in everything], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, size=15),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x.label, anchor="middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">'
        + _text(16, HEIGHT / 2, y.label, anchor="middle")
        + "</g>",
    ]
    for tick in horizontal.ticks():
        at = horizontal(tick)
        parts.append(_rule(at, TOP, at, HEIGHT - BOTTOM))
        parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{tick:g}", anchor="middle"))
    for tick in vertical.ticks():
        at = vertical(tick)
        parts.append(_rule(LEFT, at, WIDTH - RIGHT, at))
        parts.append(_text(LEFT - 6, at + 4, f"{tick:g}", anchor="end"))
    for i, each in enumerate(drawn):
        colour = COLOURS[i % len(COLOURS)]
        places = [(horizontal(px), vertical(py)) for px, py in each.points]
        if each.line and places:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        dot = f'r="3" fill="{colour}"'
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" {dot}/>' for px, py in places]
        top = TOP + 8 + 18 * i
        left = WIDTH - RIGHT + 14
        parts.append(f'<rect x="{left}" y="{top - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + 16, top + 1, each.name))
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """Maps values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self._log = axis.log
        low, high = min(values), max(values)
        if not axis.log:
            low = min(0.0, low)
        if high <= low:
            high = low * 2 if low > 0 else low + 1.0
        self._low, self._high = self._of(low), self._of(high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            all_ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            inside = [t for t in all_ticks if self._low <= self._of(t) <= self._high + 1e-9]
            return inside[:: max(1, len(inside) // 8)]
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 4))
        while (self._high - self._low) / step > 8:
            step *= 2
        first = math.ceil(self._low / step)
        return [k * step for k in range(first, int(self._high / step + 1e-9) + 1)]

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e5e5e5"/>'
