"""How are the figures of docs/ drawn?

    python docs/figures.py               # writes docs/*.svg
    python -m pytest tests/test_docs.py  # draws them again and compares

Every figure is a function that returns the text of an SVG file. Shapes, counts and numbers in it
come from the modules of the code, not from memory. Figures are 440 units wide and letters 12 high,
so that they can be read on a phone; each has a background of its own, for light and dark pages.

Lengths are in SVG units; x goes right, y goes down.
"""
import sys
from html import escape
from pathlib import Path

import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))             # python docs/figures.py finds the code, too

import adapters  # noqa: E402
import t5  # noqa: E402

WIDTH = 440
INK, LINE, PAPER = "#1f2328", "#57606a", "#fcfcfa"
FROZEN, TRAINED, SITE = ("#e4e7eb", "#98a1ab"), ("#ffdfb3", "#d9822b"), "#c92a2a"
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, monospace"


# ------------------------------------------------------------------------- small drawing functions

def svg(height: float, title: str, *shapes: str) -> str:
    """A whole file: the card, an arrow's head, and what lies on it."""
    head = ('<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>", f"<defs>{head}</defs>",
        rect(1, 1, WIDTH - 2, height - 2, (PAPER, "#d0d7de"), 8), *shapes, "</svg>", ""])


def rect(x, y, width, height, colours: tuple[str, str], corner=4, dashed=False) -> str:
    dash = ' stroke-dasharray="3 2"' if dashed else ""
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" '
            f'fill="{colours[0]}" stroke="{colours[1]}"{dash}/>')


def text(x, y, words: str, size=12, anchor="middle", font=SANS, bold=False, upwards=False) -> str:
    more = ' font-weight="bold"' if bold else ""
    if upwards:
        more += f' transform="rotate(-90 {x} {y})"'
    return (f'<text x="{x}" y="{y}" font-family="{font}" font-size="{size}" fill="{INK}" '
            f'text-anchor="{anchor}"{more}>{escape(words)}</text>')


def box(x, y, width, height, colours: tuple[str, str], *lines: str) -> str:
    """A box with lines of text in its middle, the first one bold."""
    top = y + height / 2 + 4 - 7.5 * (len(lines) - 1)
    words = [text(x + width / 2, top + 15 * i, line, bold=i == 0) for i, line in enumerate(lines)]
    return "\n".join([rect(x, y, width, height, colours), *words])


def path(*points: tuple[float, float], head=True, colour=LINE) -> str:
    """A line through points, with an arrow's head at its end."""
    through = " L".join(f"{x},{y}" for x, y in points)
    end = ' marker-end="url(#head)"' if head else ""
    return f'<path d="M{through}" fill="none" stroke="{colour}" stroke-width="1.5"{end}/>'


def polygon(points: list[tuple[float, float]], colours: tuple[str, str]) -> str:
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polygon points="{corners}" fill="{colours[0]}" stroke="{colours[1]}"/>'


def circle(x, y, radius, colours: tuple[str, str]) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colours[0]}" stroke="{colours[1]}"/>'


def site(x, y, name: str) -> str:
    """A dot, and its name as rows of methods.py write it."""
    return circle(x, y, 5, (SITE, PAPER)) + "\n" + text(x + 11, y + 4, name, 11, "start", MONO)


# ---------------------------------------------------------------------------------------- the map

def drawn_map() -> str:
    """Picture -> CLIP -> 36 tokens -> [prompt | text | picture] -> encoder -> decoder -> answer."""
    plain = ("#ffffff", LINE)
    star = [(36, 36), (39, 44), (48, 44), (41, 50), (44, 59), (36, 54), (28, 59), (31, 50),
            (24, 44), (33, 44)]
    shapes = [rect(20, 20, 84, 84, plain, 0), polygon(star, ("#e03131", "#e03131")),
              circle(80, 78, 15, ("#1c7ed6", "#1c7ed6"))]
    for i in range(1, 6):                        # 6 x 6 cells
        shapes.append(path((20 + 14 * i, 20), (20 + 14 * i, 104), head=False, colour="#ced4da"))
        shapes.append(path((20, 20 + 14 * i), (104, 20 + 14 * i), head=False, colour="#ced4da"))
    shapes += [text(62, 120, "picture"), path((106, 62), (128, 62)),
               box(130, 38, 84, 48, FROZEN, "CLIP", "6 x 6 cells"), path((216, 62), (238, 62))]
    for i in range(36):
        shapes.append(rect(240 + 14 * (i % 6), 21 + 14 * (i // 6), 11, 11, FROZEN, 2))
    shapes += [text(281, 120, "36 features"), path((326, 62), (342, 62)),
               box(344, 38, 80, 48, TRAINED, "visual", "embedding"), path((384, 88), (384, 168))]

    # What the encoder reads: one row of tokens. The first few are there in the prompt rows alone.
    shapes += [text(93, 160, '"vqa: what color is the star?"', anchor="start")]
    for first, count, colours in ((20, 3, (PAPER, SITE)), (93, 6, FROZEN), (229, 9, TRAINED)):
        for i in range(count):
            shapes.append(rect(first + 21 * i, 172, 18, 18, colours, 2, dashed=first == 20))
    shapes += [site(26, 205, "encoder.prompt"), text(186, 209, "text"), text(321, 209, "picture")]

    # The two stacks. A sub-layer's site is behind it; cross_attn.v is inside.
    blocks = t5.PRESETS["bart-base"].layers
    for x, stack, height, count in ((20, "encoder", 174, blocks[0]), (232, "decoder", 262,
                                                                      blocks[1])):
        shapes += [rect(x, 250, 188, height, (PAPER, LINE), 8),
                   text(x + 94, 270, f"{stack}, {count} blocks", bold=True)]
    shapes += [path((20, 218), (416, 218), head=False), path((50, 218), (50, 286)),
               box(32, 288, 164, 34, FROZEN, "self-attention"),
               path((50, 322), (50, 356)), site(50, 338, "encoder.self_attn"),
               box(32, 358, 164, 34, FROZEN, "feed-forward"),
               path((50, 392), (50, 440), head=False), site(50, 408, "encoder.ffn")]
    shapes += [text(276, 240, "answer so far", anchor="start"), path((262, 228), (262, 286)),
               box(244, 288, 164, 34, FROZEN, "self-attention"),
               path((262, 322), (262, 356)), site(262, 338, "decoder.self_attn"),
               rect(244, 358, 164, 54, FROZEN), text(326, 377, "cross-attention", bold=True),
               path((50, 440), (220, 440), (220, 397), (256, 397)),
               site(262, 397, "decoder.cross_attn.v"),
               path((262, 412), (262, 446)), site(262, 428, "decoder.cross_attn"),
               box(244, 448, 164, 34, FROZEN, "feed-forward"),
               path((262, 482), (262, 534)), site(262, 498, "decoder.ffn"),
               box(232, 536, 60, 28, plain, "red"), text(300, 554, "the answer", anchor="start")]

    # The legend, where nothing else stands.
    shapes += [rect(20, 474, 14, 14, FROZEN, 2), text(42, 485, "frozen", anchor="start"),
               rect(20, 498, 14, 14, TRAINED, 2),
               text(42, 509, "trained in every row", anchor="start"),
               circle(27, 529, 5, (SITE, PAPER)),
               text(42, 533, "site: a row may put", anchor="start"),
               text(42, 548, "h' = f(h, x) there", anchor="start")]
    return svg(580, "The map: from a picture and a question to an answer, with all sites", *shapes)


# ------------------------------------------------------------------------------------ an adapter

def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def drawn_adapter() -> str:
    """An adapter behind BART-base's feed-forward: widths to scale, 768 -> 96 -> 768."""
    c = t5.PRESETS["bart-base"]
    with torch.device("meta"):                                   # shapes without numbers
        net = adapters.Adapter(adapters.Add(), adapters.Site("", c.d, c.d)).net
    d, r = net.down.in_features, net.down.out_features
    frozen = 2 * c.d * c.ffn + c.ffn + c.d                       # W_1, b_1, W_2, b_2
    middle, wide, thin = 250, 120, 120 * r / d                   # half widths, to scale

    def bar(y, half, words: str) -> str:
        return rect(middle - half, y, 2 * half, 16, ("#ffffff", LINE), 2) + "\n" + text(
            middle, y + 12, words, 11)

    shapes = [
        bar(16, wide, f"x:  B, S, {d}"), path((middle, 34), (middle, 48)),
        box(middle - wide, 50, 2 * wide, 42, FROZEN, "frozen sub-layer",
            f"feed-forward: {frozen:,} numbers"),
        path((middle, 92), (middle, 106)), bar(108, wide, f"h:  B, S, {d}"),
        path((middle, 124), (middle, 140)),
        polygon([(middle - wide, 142), (middle + wide, 142), (middle + thin, 190),
                 (middle - thin, 190)], TRAINED),
        text(middle, 160, f"D: {d} -> {r}", bold=True),
        text(middle + 50, 188, f"{numbers(net.down):,} numbers", anchor="start"),
        bar(196, thin, str(r)), text(middle + 50, 208, f"gelu:  B, S, {r}", anchor="start"),
        polygon([(middle - thin, 218), (middle + thin, 218), (middle + wide, 266),
                 (middle - wide, 266)], TRAINED),
        text(middle, 258, f"U: {r} -> {d}", bold=True),
        text(middle + 50, 228, f"{numbers(net.up):,} numbers", anchor="start"),
        path((middle, 266), (middle, 284)),
        path((middle - wide, 116), (70, 116), (70, 296), (middle - 13, 296)),
        text(78, 206, "h", 14, "start", bold=True), text(middle + 8, 281, "dh", anchor="start"),
        circle(middle, 296, 11, ("#ffffff", LINE)), text(middle, 301, "+", 16),
        path((middle, 307), (middle, 322)), bar(324, wide, f"h':  B, S, {d}"),
        text(middle, 355, "(then the residual sum: x + h')", 11),
        text(WIDTH / 2, 380, "h' = h + U gelu(D h + b_D) + b_U", 14, font=MONO),
        text(WIDTH / 2, 404, f"{numbers(net):,} trained behind {frozen:,} frozen numbers: "
                             f"{100 * numbers(net) / frozen:.1f} %")]
    return svg(420, "An adapter: 768 to 96 to 768 behind a frozen sub-layer", *shapes)


# -------------------------------------------------------------------------- a Kronecker product

SHADES = ("#ffdfb3", "#d3e8ff", "#d8f0d2", "#f3d9f5")            # of the four blocks


def matrix(x, y, rows: Tensor, shade, cell=30) -> str:
    """A matrix of whole numbers; shade(i, j) is the colour of a cell."""
    shapes = []
    for i, row in enumerate(rows.tolist()):
        for j, value in enumerate(row):
            left, top = x + cell * j, y + cell * i
            shapes.append(rect(left, top, cell, cell, (shade(i, j), LINE), 0))
            number = f"{value + 0:g}"                            # + 0: not -0
            shapes.append(text(left + cell / 2, top + cell / 2 + 5, number, 14))
    return "\n".join(shapes)


def drawn_kronecker() -> str:
    """M = R_1 (x) W_1 + R_2 (x) W_2, as the module computes it, with numbers to check by hand."""
    module = adapters.Kronecker(4, 4, adapters.Add(n=2), bias=False)
    R = torch.tensor([[[1.0, 2], [0, -1]], [[2, 0], [1, 1]]])                # n, n, n
    W = torch.tensor([[[1.0, 0], [2, 1]], [[0, 1], [1, -1]]])                # n, in/n, out/n
    with torch.no_grad():
        module.R.copy_(R)
        module.W.copy_(W)
        M = module.matrix().T                                                # in, out

    def blocks(i: int, j: int) -> str:
        return SHADES[2 * (i // 2) + j // 2]

    shapes = []
    for k in range(2):
        y = 40 + 152 * k
        shapes += [text(50, y + 16, f"R{k + 1}", 14, bold=True),
                   matrix(20, y + 28, R[k], lambda i, j: SHADES[2 * i + j]),
                   text(98, y + 64, "(x)", 16), text(152, y + 16, f"W{k + 1}", 14, bold=True),
                   matrix(122, y + 28, W[k], lambda i, j: "#ffffff"), text(206, y + 64, "=", 16),
                   matrix(228, y, torch.kron(R[k], W[k]), blocks),
                   text(390, y + 64, ("+", "=")[k], 16)]
    shapes += [text(206, 408, "M =", 14, bold=True), matrix(228, 344, M, blocks),
               text(20, 26, "Each number of R becomes a block: that number times W.",
                    anchor="start"),
               text(20, 366, "Their sum is the matrix", anchor="start"),
               text(20, 382, "of a Linear: y = x M.", anchor="start"),
               text(20, 490, "128 -> 16 as one matrix: 128 * 16 = 2,048 numbers.", anchor="start"),
               text(20, 508, "As n = 2 products: W 2 * 64 * 8 = 1,024, R 2 * 2 * 2 = 8.",
                    anchor="start")]
    return svg(526, "A sum of two Kronecker products of 2 x 2 matrices is a 4 x 4 matrix", *shapes)


# -------------------------------------------------------------------------- granularity matrices

def gate_colour(g: float) -> str:
    """Dark blue at 0, white at 1, orange at 2: what is damped, kept, made louder."""
    g = min(max(round(g, 2), 0.0), 2.0)
    end = (23, 78, 166) if g < 1 else (217, 72, 15)
    return "#" + "".join(f"{round(255 + (c - 255) * abs(g - 1)):02x}" for c in end)


def drawn_gates(S: int = 8, D: int = 12) -> str:
    """G of the four sizes, from the modules of adapters.py with random weights, for one example."""
    told = {"small": ("one number an example", 1), "middleX": ("one a token", S),
            "middleY": ("one a channel", D), "large": ("one a token and channel", S * D)}
    generator = torch.Generator().manual_seed(1)
    x, h = torch.randn(2, 1, S, D, generator=generator, dtype=torch.float64)
    torch.manual_seed(2)
    shapes, cell = [], 15
    for i, (size, (words, count)) in enumerate(told.items()):
        gate = adapters.GATES[size](D, D, adapters.Add(std=0.4, r=6)).double()
        with torch.no_grad():
            G = gate(x, h, adapters.Context()).expand(1, S, D)[0]            # S, D
        left, top = 38 + 206 * (i % 2), 54 + 188 * (i // 2)
        shapes += [text(left, top - 24, size, 14, "start", bold=True),
                   text(left, top - 9, f"{words}: {count}", 12, "start")]
        for s, row in enumerate(G.tolist()):
            for d, g in enumerate(row):
                shapes.append(rect(left + cell * d, top + cell * s, cell, cell,
                                   (gate_colour(g), "#adb5bd"), 0))
    shapes += [text(26, 114, "tokens", upwards=True), text(26, 302, "tokens", upwards=True),
               text(128, 380, "channels"), text(334, 380, "channels")]
    for i in range(9):
        shapes.append(rect(80 + 20 * i, 400, 20, 14, (gate_colour(i / 4), "#adb5bd"), 0))
    shapes += [text(90, 430, "0"), text(170, 430, "1"), text(250, 430, "2"),
               text(276, 412, "h' = s G (.) H", 13, "start", MONO)]
    return svg(446, "The granularity matrix G in its four sizes", *shapes)


FIGURES = {"map": drawn_map, "adapter": drawn_adapter, "kronecker": drawn_kronecker,
           "gates": drawn_gates}


def main() -> None:
    for name, draw in FIGURES.items():
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(DOCS / f"{name}.svg")


if __name__ == "__main__":
    main()
