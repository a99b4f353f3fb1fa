"""How is a page made that needs nothing but itself?

One file of HTML: style inside, drawings as SVG, pictures as text (base64), no script, nothing from
the network. It follows the reader's light or dark setting and fits a phone.

    drawing = chart({"adapter": [(0, 2.1, 0), (50, 1.3, 0)]}, "step", "loss")
    page("A title", "What it is about.", [("Its loss", drawing, "It falls.")])

    python -m pytest tests/test_report.py
"""
import base64
import math
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

# The colours of curves, --c0 to --c7, are read on both papers.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --soft: #5b6570; --line: #d5dae0;
  --bar: #cfe2f8; --right: #157a3c; --wrong: #b42318; --c0: #2f74d0; --c1: #cc5a1d; --c2: #218a4c;
  --c3: #8560e8; --c4: #97700f; --c5: #cf4286; --c6: #12809a; --c7: #7a736c }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e7eaee; --soft: #a0a9b4;
  --line: #373e47; --bar: #1f4468; --right: #5fd38a; --wrong: #ff8f85 } }
body { margin: 0 auto; max-width: 58rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem }
h3 { font-size: .95rem; margin: .8rem 0 .3rem } p { margin: .4rem 0 } .soft { color: var(--soft) }
.lesson { color: var(--soft); border-left: 3px solid var(--line); padding-left: .7rem;
  margin-bottom: .8rem } .right { color: var(--right) } .wrong { color: var(--wrong) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: break-word }
@media (max-width: 30rem) { table { font-size: .75rem } td, th { padding-right: .3rem } }
.cards { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
.card { min-width: 0; font-size: .9rem } .tiles { display: flex; flex-wrap: wrap; gap: .3rem }
.tiles img { width: 8.5rem; max-width: 48%; border-radius: 4px } .clip img { max-width: 30% }
.tiles img:only-child { max-width: 100% } .name { display: inline-block; margin-right: .6rem }
.map { width: 100%; height: 6rem; image-rendering: pixelated; border-radius: 4px; display: block }
.bar { position: relative; display: flex; gap: .5rem; justify-content: space-between;
  margin: .2rem 0; padding: .1rem .4rem; border-radius: 3px;
  background: linear-gradient(var(--bar) 0 0) 0 0 / var(--part) 100% no-repeat }
.bar span + span { white-space: nowrap }
.bar i { position: absolute; bottom: 0; height: 30%; border-left: 3px solid var(--wrong) }
.chip { display: inline-block; padding: 0 .35rem; margin: .1rem; border-radius: 3px; color: #fff }
.scale { display: flex; gap: .5rem; max-width: 22rem } .scale b { flex: 1; border-radius: 3px }
svg { display: block; width: 100%; max-width: 27rem } svg text { fill: var(--soft);
  font: 13px system-ui, sans-serif } svg .dot { fill: #fff; font-size: 11px }
"""


# ------------------------------------------------------------------------- a page and its parts

def page(title: str, lead: str, sections: list[tuple[str, str, str]]) -> str:
    """sections: heading, content and how to read it; one without content is left out."""
    shown = [f'<h2>{heading}</h2>\n<p class="lesson">{lesson}</p>\n{content}\n'
             for heading, content, lesson in sections if content]
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>"
            f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n{''.join(shown)}</body></html>\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for row in rows:
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in row))
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def cards(parts: list[str], least: str) -> str:
    """Side by side, as many as there is room for, each at least so wide (a length of CSS)."""
    inner = "".join(f'<div class="card">{part}</div>' for part in parts)
    return f'<div class="cards" style="--least:{least}">{inner}</div>' if parts else ""


def bar(words: str, number: str, percent: float, mark: float | None = None) -> str:
    """Words and a number on a bar of so many percent; a mark at another percentage."""
    at = "" if mark is None else f'<i style="left:{min(mark, 99):.1f}%"></i>'
    return (f'<div class="bar" style="--part:{percent:.1f}%"><span>{escape(words)}</span>'
            f"<span>{number}</span>{at}</div>")


# ------------------------------------------------------------------------- a drawing

LEFT, RIGHT, TOP, BOTTOM = 46, 346, 28, 176          # where a plot lies in a drawing of 360 x 214


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(words)}</text>")


def ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers."""
    part = (high - low) / 5
    power = 10 ** math.floor(math.log10(part))
    step = next(power * i for i in (1, 2, 5, 10) if power * i >= part)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(curves: dict[str, list], x_name: str, y_name: str, log: bool = False) -> str:
    """Curves of (x, y, spread of y): lines that end in a dot with the curve's number, and at it
    the spread. log: equal steps of x are equal factors."""
    points = sum(curves.values(), [])
    if not points:
        return ""
    low = min(y - spread for _, y, spread in points)
    high = max(y + spread for _, y, spread in points)
    room = 0.08 * (high - low) or 1.0                 # one dot has room, too
    low, high = low - room, high + room
    along, ends = float, [0, max(x for x, _, _ in points)]
    marks = ticks(*ends)
    if log:
        along, ends = math.log10, [0.7 * min(x for x, _, _ in points), 1.4 * ends[1]]
        marks = [x for x in (0.1, 0.2, 0.3, 0.6, 1, 2, 3, 6, 10, 20, 30, 60, 100)
                 if ends[0] <= x <= ends[1]]

    def right(x: float) -> float:
        return np.interp(along(x), [*map(along, ends)], (LEFT, RIGHT))

    def up(y: float) -> float:
        return np.interp(y, (low, high), (BOTTOM, TOP))

    shapes = [text(2, 12, y_name, "start"), text(RIGHT, 210, x_name, "end")]
    for y in ticks(low, high):
        shapes += [f'<path d="M{LEFT},{up(y):.1f}H{RIGHT}" stroke="var(--line)"/>',
                   text(LEFT - 5, up(y) + 4, f"{y:g}", "end")]
    shapes += [text(right(x), BOTTOM + 16, f"{x:g}", "middle") for x in marks]
    for i, curve in enumerate(curves.values()):
        if curve:
            x, y, spread = curve[-1]
            line = " ".join(f"{right(x):.1f},{up(y):.1f}" for x, y, _ in curve)
            shapes.append(
                f'<g style="stroke:var(--c{i % 8});fill:none;stroke-width:2"><polyline '
                f'points="{line}"/><path d="M{right(x):.1f},{up(y - spread):.1f}'
                f'V{up(y + spread):.1f}"/></g><circle cx="{right(x):.1f}" cy="{up(y):.1f}" r="8" '
                f'fill="var(--c{i % 8})"/>')
            shapes.append(text(right(x), up(y) + 4, f"{i + 1}", "middle", "dot"))
    return (f'<svg viewBox="0 0 360 214" role="img" aria-label="{escape(y_name)} against '
            f'{escape(x_name)}">{"".join(shapes)}</svg>')


# ------------------------------------------------------------------------- pictures and colours

STOPS = np.array([(22, 26, 84), (27, 133, 143), (250, 232, 110)], float)     # low, middle, high


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers (...) -> their colours (..., 3)."""
    share = np.full(values.shape, 0.5)                # all the same: the middle
    if high - low > 1e-6:
        share = np.clip((values - low) / (high - low), 0, 1)
    return np.stack([np.interp(share, (0, 0.5, 1), stop) for stop in STOPS.T], -1).astype(np.uint8)


def scale(low: float, high: float) -> str:
    """What the colours mean."""
    stops = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in STOPS)
    return (f'<p class="scale">{low:.3f} <b style="background:linear-gradient(90deg, {stops})"></b>'
            f" {high:.3f}</p>")


def inline(image: Image.Image, told: str, kind: str = "JPEG", style: str = "") -> str:
    file = BytesIO()
    image.save(file, kind, quality=85)
    code = base64.b64encode(file.getvalue()).decode()
    return (f'<img class="{style}" alt="{escape(told)}" '
            f'src="data:image/{kind.lower()};base64,{code}">')


def strip(images: list[str]) -> str:
    """Pictures side by side; many are frames, and small: at most twelve, evenly."""
    kind = "tiles clip" if len(images) > 2 else "tiles"
    return f'<div class="{kind}">{"".join(images[::math.ceil(max(1, len(images)) / 12)])}</div>'


def heat(image: Image.Image | None, values: np.ndarray, low: float, high: float) -> str:
    """Numbers (rows, columns) as colours over a picture, which is then grey."""
    rows, columns = values.shape
    if image is None:
        image = Image.new("L", (24 * columns, 24 * rows), 128)
    cells = Image.fromarray(colours(values, low, high))
    cells = cells.resize(image.size, Image.Resampling.NEAREST)
    shown = Image.blend(image.convert("L").convert("RGB"), cells, 0.7)
    return inline(shown, f"{values.min():.2f} to {values.max():.2f}, over the picture")


def chips(words: list[str], values: np.ndarray, low: float, high: float) -> str:
    """Words on the colours of their numbers."""
    found = []
    for word, (r, g, b) in zip(words, colours(values, low, high).tolist()):
        ink = "#000" if 2 * r + 5 * g + b > 1000 else "#fff"       # the eye sees green best
        style = f"background:rgb({r} {g} {b});color:{ink}"
        found.append(f'<span class="chip" style="{style}">{escape(word)}</span>')
    return f"<p>{''.join(found)}</p>"


def matrix(x: np.ndarray) -> str:
    """Numbers (rows, columns) in colours of their own range, which stands below."""
    told = f"{x.min():.3f} to {x.max():.3f}, mean {x.mean():.3f}"
    image = Image.fromarray(colours(x, x.min(), x.max())).quantize(64)
    return inline(image, told, "PNG", "map") + f'<p class="soft">{told}</p>'
