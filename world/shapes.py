"""What is in a scene of the built-in world, how is it said, and how is it drawn?

A scene holds one to five objects on a 3 x 3 grid. An object is (kind, color, size, place): a large
red star at the top left. Questions about scenes, and the data set, are in world/scenes.py; clips
in world/moving.py draw with the same shapes.

    python -m pytest tests/test_world.py
"""
import math
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "pink", "brown", "black")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right",
          "bottom left", "bottom", "bottom right")
KIND, COLOR, SIZE, PLACE = range(4)           # the fields of an object
FIELDS = (KINDS, COLORS, SIZES, PLACES)
HELD_OUT = frozenset({("red", "star"), ("green", "triangle"), ("blue", "cross"),
                      ("yellow", "circle"), ("purple", "square"), ("black", "circle")})
NUMBERS = ("no", "one", "two", "three", "four", "five")

XY = {place: (i % 3, i // 3) for i, place in enumerate(PLACES)}     # column, row
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
WIDTH, CELL = 96, 32                          # of a picture and of a cell of the grid, in pixels
RGB = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (40, 90, 220),
       "yellow": (240, 205, 30), "purple": (125, 50, 180), "pink": (250, 135, 195),
       "brown": (135, 85, 45), "black": (25, 25, 25)}

# What an annotator of vqa says instead of the answer: a synonym or a near miss.
NEAR = {"circle": ("ball", "round"), "square": ("box", "block"), "triangle": ("pyramid",),
        "star": ("stars",), "cross": ("plus", "x"), "red": ("pink", "dark red"),
        "green": ("dark green",), "blue": ("purple", "dark blue"), "yellow": ("gold",),
        "purple": ("violet", "blue"), "pink": ("rose", "purple"), "brown": ("tan",),
        "black": ("dark",), "small": ("little", "tiny"), "large": ("big",), "yes": ("no",),
        "no": ("yes",), "center": ("middle",), "left": ("left side",), "right": ("right side",),
        "top": ("above", "up"), "bottom": ("below", "down"), "top left": ("left", "upper left"),
        "top right": ("right", "upper right"), "bottom left": ("left", "lower left"),
        "bottom right": ("right", "lower right"),
        **{str(n): (str(abs(n - 1)), str(n + 1)) for n in range(6)}}

Obj = tuple[str, str, str, str]               # kind, color, size, place
Noun = tuple[str | None, str | None, str | None, str | None]    # an object; None: not said
Scene = tuple[Obj, ...]                       # in reading order, at most one object a place


# ---- scenes --------------------------------------------------------------------------------------
def pick(rng: Random, words):
    """One of `words`; Random.choice takes three times as long."""
    return words[int(rng.random() * len(words))]


def random_scene(rng: Random, held_out: bool, most: int = 5, planted=()) -> Scene | None:
    """A scene that holds the planted nouns, and held-out pairs if `held_out`; None where the
    planted do not fit. Some scenes have a theme, a shared kind or color, so that counts vary."""
    nouns = list(planted)
    count = max(1 + int(rng.random() * most), len(nouns))
    taken = [noun[PLACE] for noun in nouns if noun[PLACE]]
    if count > most or len(set(taken)) < len(taken):
        return None
    free = iter(rng.sample([place for place in PLACES if place not in taken], count - len(taken)))
    field, strength = int(rng.random() * 5), pick(rng, (0.6, 1.0))
    theme = (None,) * 4
    if field in (KIND, COLOR):
        theme = put(theme, field, pick(rng, FIELDS[field]))
    while len(nouns) < count:
        nouns.append(theme if rng.random() < strength else (None,) * 4)
    objects = []
    for kind, color, size, place in nouns:
        if (color, kind) in HELD_OUT and not held_out:
            return None
        while True:                           # what is left open is drawn
            pair = color or pick(rng, COLORS), kind or pick(rng, KINDS)
            if held_out or pair not in HELD_OUT:
                break
        objects.append((pair[1], pair[0], size or pick(rng, SIZES), place or next(free)))
    return tuple(sorted(objects, key=lambda obj: PLACES.index(obj[PLACE])))


def describe(scene: Scene) -> list[str]:
    """One fixed phrase an object, in reading order: "top left large red circle"."""
    return [f"{place} {size} {color} {kind}" for kind, color, size, place in scene]


def put(noun: Noun, field: int, word: str | None) -> Noun:
    """The noun with another word in one field."""
    return noun[:field] + (word,) + noun[field + 1:]


def say(noun: Noun) -> str:
    """A noun in words: "large red star", "blue thing at the top left"."""
    kind, color, size, place = noun
    at = {None: None, "center": "in the center", "left": "on the left", "right": "on the right"}
    return " ".join(filter(None, (size, color, kind or "thing", at.get(place, f"at the {place}"))))


def plural(noun: Noun) -> str:
    return say(noun) + ("es" if noun[KIND] == "cross" else "s")


def captions(scene: Scene, rng: Random) -> list[str]:
    """Five captions in five wordings. The salient objects come first, large before small, then in
    reading order. None is longer than 18 words, so that it fits a decoder of 20 tokens."""
    objects = sorted(scene, key=lambda obj: obj[SIZE] != "large")
    full = [f"a {say(obj)}" for obj in objects]
    sized = [f"a {say(put(obj, PLACE, None))}" for obj in objects]
    placed = [f"a {say(put(obj, SIZE, None))}" for obj in objects]
    if len(scene) == 1:
        return [full[0], f"there is {full[0]}", f"a picture of {sized[0]}",
                f"only one object, {full[0]}", placed[0]]
    *short, last = [f"a {obj[COLOR]} {obj[KIND]}" for obj in objects[:4 if len(scene) < 5 else 3]]
    many = NUMBERS[len(scene)]
    return [f"{full[0]} and {full[1]}", f"{many} objects with {full[0]}",
            f"{', '.join(short)} and {last}", f"a picture of {sized[0]} and {sized[1]}",
            pick(rng, (f"{many} shapes, {placed[0]}, {placed[1]}",
                       f"there is {placed[0]} and {placed[1]}"))]


def find(scene: Scene, noun: Noun) -> list[Obj]:
    kind, color, size, place = noun
    return [obj for obj in scene
            if (kind is None or obj[0] == kind) and (color is None or obj[1] == color)
            and (size is None or obj[2] == size) and (place is None or obj[3] == place)]


def find_one(scene: Scene, noun: Noun) -> Obj | None:
    """The only object that is called so."""
    found = find(scene, noun)
    return found[0] if len(found) == 1 else None


def holds(first: Obj, relation: str, second: Obj) -> bool:
    """Is the first left of (right of, above, below) the second? By the grid's column or row, so
    never a close call."""
    axis, sign = RELATIONS[relation]
    return (XY[first[PLACE]][axis] - XY[second[PLACE]][axis]) * sign > 0


def related(scene: Scene, target: Noun, relation: str, anchor: Noun) -> list[Obj] | None:
    """The targets in that relation to the one anchor; None if there is not one anchor."""
    one = find_one(scene, anchor)
    return one and [obj for obj in find(scene, target) if holds(obj, relation, one)]


# ---- pictures ------------------------------------------------------------------------------------
NOISE = np.random.default_rng(0).normal(0, 5, (16, WIDTH, WIDTH, 3)).astype(np.int16)
CORNERS = {                                   # of a shape: (distance from its middle, degrees)
    "circle": [(0.9, 3 * i) for i in range(120)],
    "square": [(1.1, 45 + 90 * i) for i in range(4)],
    "triangle": [(1.1, 120 * i) for i in range(3)],
    "star": list(zip((1.1, 0.45) * 5, range(0, 360, 36))),
    "cross": list(zip((1.05, 1.05, 0.46) * 4, (-18, 18, 45, 72, 108, 135, 162, 198, 225,
                                               252, 288, 315)))}


@cache
def stamp(kind: str, radius: int, turn: int) -> Image.Image:
    """A shape as a mask with soft edges: drawn eight times larger, then reduced."""
    side = 8 * (2 * radius + 2)
    points = []
    for distance, degrees in CORNERS[kind]:
        length, angle = 8 * radius * distance, math.radians(turn + degrees - 90)
        points.append((side / 2 + length * math.cos(angle), side / 2 + length * math.sin(angle)))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.resize((side // 8, side // 8), Image.Resampling.BOX)


def draw(shapes: list[tuple], ground: tuple[int, int, int], rng: Random) -> Image.Image:
    """A 96 x 96 RGB picture with light noise. A shape: (kind, color, shade, radius in pixels, its
    center (x, y), turn in degrees)."""
    picture = Image.new("RGB", (WIDTH, WIDTH), ground)
    for kind, color, shade, radius, (x, y), turn in shapes:
        shaded = tuple(min(255, int(value * shade)) for value in RGB[color])
        picture.paste(shaded, (x - radius - 1, y - radius - 1), stamp(kind, radius, turn))
    noisy = np.asarray(picture, np.int16) + pick(rng, NOISE)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def render(scene: Scene, rng: Random) -> Image.Image:
    """The picture of a scene: light tinted ground, shapes with jitter."""
    ground = tuple(225 + int(rng.random() * 26) for _ in range(3))
    shapes = []
    for kind, color, size, place in scene:
        radius, jitter = (13, 2) if size == "large" else (7, 5)
        radius += int(rng.random() * 2)
        center = [CELL * i + CELL // 2 + int((2 * rng.random() - 1) * jitter) for i in XY[place]]
        shade = 0.9 + 0.2 * rng.random()
        shapes.append((kind, color, shade, radius, center, pick(rng, (-12, -6, 0, 6, 12))))
    return draw(shapes, ground, rng)
