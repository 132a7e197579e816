"""A flame graph from folded stacks, as a picture without scripts.

    py-spy record -f raw -F -r 1000 -d 10 --pid PID -o stacks.txt
    .venv/bin/python -m bench.flame stacks.txt --title TITLE --without _worker -o picture.svg

Width is the share of samples, names show on hover; what is thinner than `--least` is left out.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, ROW, TOP = 1200, 16, 30
LETTER_WIDTH = 6.2
_STACK = re.compile(r"(?P<frames>.*) (?P<count>\d+)")


@dataclass
class Frame:
    """A function under its callers, and the samples in it."""

    name: str = "all"
    samples: int = 0
    inside: dict[str, Frame] = field(default_factory=dict)

    def add(self, names: list[str], samples: int) -> None:
        """Samples of one stack, outermost first."""
        frame = self
        frame.samples += samples
        for name in names:
            frame = frame.inside.setdefault(name, Frame(name))
            frame.samples += samples

    def depth(self, least: int) -> int:
        """Rows, of frames with so many samples."""
        thick = [f.depth(least) for f in self.inside.values() if f.samples >= least]
        return 1 + max(thick, default=0)


def folded(lines: Iterable[str], without: Iterable[str]) -> Frame:
    """The stacks of `lines`, but those with a function of `without` in them."""
    root = Frame()
    for line in lines:
        match = _STACK.fullmatch(line.strip())
        if match is None:
            continue
        names = match["frames"].split(";")
        if not any(name.partition(" ")[0] in without for name in names):
            root.add(names, int(match["count"]))
    return root


def drawn(frame: Frame, left: float, row: int, scale: float, least: int) -> Iterator[str]:
    """The frame and all in it, as SVG. Lengths in pixels."""
    width, top = frame.samples * scale, TOP + row * ROW
    hue = zlib.crc32(frame.name.partition(" ")[0].encode()) % 40 + 15
    letters = int(width / LETTER_WIDTH)
    shown = frame.name if len(frame.name) <= letters else frame.name[: max(0, letters - 1)] + "…"
    share = 100 * width / WIDTH
    yield (
        f"<g><title>{escape(frame.name)}: {share:.1f} %</title>"
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 1}" '
        f'fill="hsl({hue},80%,65%)"/>'
        + (f'<text x="{left + 2:.1f}" y="{top + 11}">{escape(shown)}</text>' if letters > 3 else "")
        + "</g>"
    )
    for inner in sorted(frame.inside.values(), key=lambda inner: inner.name):
        if inner.samples >= least:
            yield from drawn(inner, left, row + 1, scale, least)
        left += inner.samples * scale


def picture(root: Frame, title: str, least_share: float) -> str:
    """The graph, callers above. Raises ValueError if there is no sample."""
    if not root.samples:
        raise ValueError("there are no stacks")
    least = max(1, round(root.samples * least_share))
    height = TOP + ROW * root.depth(least) + 4
    body = "\n".join(drawn(root, 0.0, 0, WIDTH / root.samples, least))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="monospace" font-size="10">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
        f'<text x="4" y="18" font-size="13">{escape(title)}</text>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stacks", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--without", nargs="*", default=[], help="functions whose stacks are not")
    parser.add_argument("--least", type=float, default=0.004, help="share of all samples")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.stacks.open() as lines:
        root = folded(lines, arguments.without)
    arguments.out.write_text(picture(root, arguments.title, arguments.least))


if __name__ == "__main__":
    main()
