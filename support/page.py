"""How is a page made that needs nothing but itself?

One file of HTML: style inside, drawings as SVG, pictures as text (base64), no script, nothing from
the network. It follows the reader's light or dark setting and fits a phone.

    drawing = chart({"adapter": [(0, 2.1, 0), (50, 1.3, 0)]}, "step", "loss")
    page("A title", "What it is about.", figure("Its loss", drawing, "It falls."))

    python -m pytest tests/test_report.py
"""
import base64
import math
from html import escape
from io import BytesIO
from itertools import product

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --soft: #5b6570; --line: #d5dae0;
  --bar: #cfe2f8; --right: #157a3c; --wrong: #b42318; --c0: #0b63c5; --c1: #c2410c; --c2: #157a3c;
  --c3: #7c3aed; --c4: #a16207; --c5: #be185d; --c6: #0e7490; --c7: #57534e }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e7eaee; --soft: #a0a9b4;
  --line: #373e47; --bar: #1f4468; --right: #5fd38a; --wrong: #ff8f85; --c0: #6cb0ff; --c1: #ff9a5c;
  --c2: #5fd38a; --c3: #b79bff; --c4: #e3b341; --c5: #ff8fc0; --c6: #5ccfe0; --c7: #b8b2ab } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem }
h3 { font-size: .95rem; margin: .8rem 0 .3rem } p { margin: .4rem 0 } .soft { color: var(--soft) }
.lesson { color: var(--soft); border-left: 3px solid var(--line); padding-left: .7rem;
  margin-top: 1rem } .right { color: var(--right) } .wrong { color: var(--wrong) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: break-word }
.cards { display: grid; gap: 1.2rem; --least: 17rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
.card { min-width: 0; font-size: .9rem } .plots { --least: 20rem } .small { --least: 13rem }
.four { --least: 8.5rem; gap: .8rem } .four .tiles img { width: 100%; max-width: 100% }
.tiles { display: flex; flex-wrap: wrap; gap: .3rem } .tiles img { width: 8.5rem; max-width: 48%;
  border-radius: 4px } .clip img { width: calc(33% - .3rem);
  max-width: 5rem }
.map { width: 100%; height: 6rem; image-rendering: pixelated; border-radius: 4px; display: block;
  margin-top: .3rem }
.bar { position: relative; display: flex; gap: .5rem; justify-content: space-between;
  margin: .2rem 0; padding: .1rem .4rem; border-radius: 3px;
  background: linear-gradient(var(--bar) 0 0) 0 0 / var(--part) 100% no-repeat }
.bar span { position: relative; z-index: 1 } .bar span + span { white-space: nowrap }
.bar i { position: absolute; top: 0; bottom: 0; border-left: 2px solid var(--wrong) }
.chip { display: inline-block; padding: 0 .35rem; margin: .1rem; border-radius: 3px }
.scale { display: flex; gap: .5rem; max-width: 22rem } .scale b { flex: 1; border-radius: 3px }
@media (max-width: 30rem) { table { font-size: .75rem } td, th { padding-right: .35rem } }
svg { display: block; width: 100%; max-width: 34rem; height: auto } svg text { fill: var(--soft);
  font: 11px system-ui, sans-serif } svg .name { fill: var(--ink); font-weight: 600 }
"""


# ------------------------------------------------------------------------- a page and its parts

def page(title: str, lead: str, *figures: str) -> str:
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>"
            f"<h1>{escape(title)}</h1>\n<p>{lead}</p>\n{''.join(figures)}</body></html>\n")


def figure(heading: str, content: str, lesson: str) -> str:
    """What is to be seen, and in one sentence what it teaches."""
    return f'<h2>{heading}</h2>\n{content}\n<p class="lesson">{lesson}</p>\n'


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for row in rows:
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in row))
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def cards(parts: list[str], kind: str = "") -> str:
    """Side by side, as many as there is room for. kind: plots, small or four says how wide."""
    inner = "".join(f'<div class="card">{part}</div>' for part in parts)
    return f'<div class="cards {kind}">{inner}</div>'


def bar(words: str, number: str, percent: float, mark: float | None = None) -> str:
    """Words and a number on a bar of so many percent; a mark at another percentage."""
    at = "" if mark is None else f'<i style="left:{min(mark, 99):.1f}%"></i>'
    return (f'<div class="bar" style="--part:{percent:.1f}%"><span>{escape(words)}</span>'
            f"<span>{number}</span>{at}</div>")


def legend(names: list[str]) -> str:
    """Whose colour is which, in the order of a chart's curves."""
    found = [f'<span class="chip" style="border-left:1rem solid var(--c{i % 8})">{escape(name)}'
             "</span>" for i, name in enumerate(names)]
    return f"<p>{''.join(found)}</p>" if len(names) > 1 else ""


# ------------------------------------------------------------------------- a drawing

LEFT, RIGHT, TOP, BOTTOM = 40, 350, 24, 178          # where a plot lies in a drawing of 360 x 210
Curve = list[tuple[float, float, float]]             # x, y, spread of y


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(words)}</text>")


def ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers."""
    part = (high - low) / 5
    power = 10 ** math.floor(math.log10(part))
    step = next(power * i for i in (1, 2, 5, 10) if power * i >= part)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(curves: dict[str, Curve], x_name: str, y_name: str, log: bool = False) -> str:
    """Points become a line, a point alone a dot with its name. log: of the x axis."""
    points = sum(curves.values(), [])
    low = min(y - spread for _, y, spread in points)
    high = max(y + spread for _, y, spread in points)
    room = 0.08 * (high - low) or 1.0                 # one dot has room, too
    low, high, along = low - room, high + room, float
    start, end = 0.0, max(x for x, _, _ in points)
    marks = ticks(start, end)
    if log:
        along, start, end = math.log10, 0.7 * min(x for x, _, _ in points), 1.3 * end
        marks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if start <= x <= end]

    def right(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (along(x) - along(start)) / (along(end) - along(start))

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)

    shapes = [text(2, 12, y_name, "start"), text(RIGHT, 206, x_name, "end")]
    for y in ticks(low, high):
        shapes += [f'<path d="M{LEFT},{up(y):.1f}H{RIGHT}" stroke="var(--line)"/>',
                   text(LEFT - 4, up(y) + 4, f"{y:g}", "end")]
    shapes += [text(right(x), BOTTOM + 14, f"{x:g}") for x in marks]
    taken = [(right(x) - 5, up(y) - 5, right(x) + 5, up(y) + 5) for x, y, _ in points]
    for i, (name, curve) in enumerate(curves.items()):
        colour, (x, y, spread) = f"var(--c{i % 8})", curve[-1]
        path = " ".join(f"{right(x):.1f},{up(y):.1f}" for x, y, _ in curve)
        if len(curve) == 1:
            path = f"{right(x):.1f},{up(y - spread):.1f} {right(x):.1f},{up(y + spread):.1f}"
            shapes.append(label(right(x), up(y), name, taken))
        dash = "4 3" if i >= 8 else "none"            # the ninth has the first one's colour
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                      f'stroke-dasharray="{dash}"/><circle cx="{right(x):.1f}" cy="{up(y):.1f}" '
                      f'r="4" fill="{colour}"/>')
    return (f'<svg viewBox="0 0 360 210" role="img" aria-label="{escape(y_name)} against '
            f'{escape(x_name)}">{"".join(shapes)}</svg>')


def label(x: float, y: float, name: str, taken: list[tuple]) -> str:
    """A name beside its dot, where it covers least of what is there; `taken` grows by it."""
    width, spots = 6.6 * len(name), []
    for far, dy, side in product((8, 20, 32), (0, -1, 1), (0, -1, -0.5)):
        # side 0: right of the dot, -1: left of it, -1/2: above or below
        left = x + side * width + (1 + 2 * side) * far
        top = y - 6 + dy * (far + 2)
        box = (left, top, left + width, top + 12)
        if box[0] >= LEFT + 2 and box[2] <= 358 and box[1] >= TOP - 8 and box[3] <= BOTTOM:
            covered = sum(box[0] < other[2] and other[0] < box[2] and box[1] < other[3]
                          and other[1] < box[3] for other in taken)
            spots.append((covered, far, box))
    if not spots:                                     # a name as wide as the drawing
        return ""
    _, _, box = min(spots)
    taken.append(box)
    return text(box[0], box[3] - 2, name, "start", "name")


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
    return (f'<p class="scale">{low:.2f} <b style="background:linear-gradient(90deg, {stops})"></b>'
            f" {high:.2f}</p>")


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
        ink = "#fff"
        if 2 * r + 5 * g + b > 1000:                  # a light ground; the eye sees green best
            ink = "#000"
        found.append(f'<span class="chip" style="background:rgb({r} {g} {b});color:{ink}">'
                     f"{escape(word)}</span>")
    return f"<p>{''.join(found)}</p>"


def matrix(x: np.ndarray) -> str:
    """Numbers (rows, columns) in colours of their own range, which stands below."""
    told = f"{x.min():.3f} to {x.max():.3f}, mean {x.mean():.3f}"
    if x.min() == x.max():
        told = f"{x.min():.3f} everywhere"
    image = Image.fromarray(colours(x, x.min(), x.max())).quantize(64)
    return inline(image, told, "PNG", "map") + f'<p class="soft">{told}</p>'
