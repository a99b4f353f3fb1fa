"""What is the built-in data set?

A small world of drawn shapes. A scene holds one to five objects on a 3 x 3 grid; an object is
(kind, color, size, place). From a scene we draw a picture (`render`), say what it holds
(`describe`, `captions`) and ask about it (`example`), in four tasks shaped like VQA v2, GQA, NLVR2
and COCO captions. `write` puts it all on disk in exactly the published formats, so the built-in run
and a run on the real data go through the same readers.

Two rules give its scores a meaning:

* Balance, the lesson of VQA v2 (arXiv:1612.00837). The question and the wanted answer are drawn
  first and independently, then a scene is searched that gives this answer: the text alone says
  nothing. On disk every question stands beside two pictures with different answers, every
  statement beside two true and two false pairs.
* Held-out pairs. Six (color, kind) pairs are in no training picture, question or caption; test
  pictures hold them at their natural rate. Who cannot read color and kind apart fails there.

    python -m world.scenes --out DIR        write the data set, say what is in it
    python -m world.scenes --show 5         print a few examples of each task
    python -m pytest tests/test_world.py
"""
import argparse
import json
import math
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

VERSION = 2                                   # raise it when the written bytes change
TASKS = ("vqa", "gqa", "nlvr", "caption")
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
YES_NO, TRUE_FALSE = ("yes", "no"), ("true", "false")

XY = {place: (i % 3, i // 3) for i, place in enumerate(PLACES)}     # column, row
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
PX, CELL = 96, 32                             # widths of a picture and of a grid cell in pixels
RGB = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (40, 90, 220),
       "yellow": (240, 205, 30), "purple": (125, 50, 180), "pink": (250, 135, 195),
       "brown": (135, 85, 45), "black": (25, 25, 25)}

Obj = tuple[str, str, str, str]               # kind, color, size, place
Noun = tuple[str | None, str | None, str | None, str | None]    # an object; None: not said
Scene = tuple[Obj, ...]                       # in reading order, at most one object a place


# ---- scenes --------------------------------------------------------------------------------------
def pick(r: Random, words):
    """One of `words`; Random.choice takes three times as long."""
    return words[int(r.random() * len(words))]


def scene(r: Random, held_out: bool, most: int = 5, planted: Iterable[Noun] = ()) -> Scene | None:
    """A random scene that holds the planted nouns, and held-out pairs if `held_out`; None where the
    planted do not fit. Some scenes have a theme, a shared kind or color, so that counts vary."""
    nouns = list(planted)
    count = max(1 + int(r.random() * most), len(nouns))
    taken = [noun[PLACE] for noun in nouns if noun[PLACE]]
    if count > most or len(set(taken)) < len(taken):
        return None
    free = iter(r.sample([p for p in PLACES if p not in taken], count - len(taken)))
    field, strength = int(r.random() * 5), pick(r, (0.6, 1.0))
    theme = [None] * 4
    if field in (KIND, COLOR):
        theme[field] = pick(r, FIELDS[field])
    while len(nouns) < count:
        nouns.append(tuple(theme) if r.random() < strength else (None,) * 4)
    objects = []
    for kind, color, size, place in nouns:
        if (color, kind) in HELD_OUT and not held_out:
            return None
        while True:
            pair = color or pick(r, COLORS), kind or pick(r, KINDS)
            if held_out or pair not in HELD_OUT:
                break
        objects.append((pair[1], pair[0], size or pick(r, SIZES), place or next(free)))
    return tuple(sorted(objects, key=lambda o: PLACES.index(o[PLACE])))


def describe(s: Scene) -> list[str]:
    """One fixed phrase an object, in reading order: "top left large red circle"."""
    return [f"{place} {size} {color} {kind}" for kind, color, size, place in s]


def put(noun: Noun, field: int, word: str | None) -> Noun:
    return noun[:field] + (word,) + noun[field + 1:]


def say(noun: Noun) -> str:
    """A noun in words: "large red star", "blue thing at the top left"."""
    kind, color, size, place = noun
    at = {None: None, "center": "in the center", "left": "on the left", "right": "on the right"}
    words = size, color, kind or "thing", at.get(place, f"at the {place}")
    return " ".join(word for word in words if word)


def plural(noun: Noun) -> str:
    return say(noun) + ("es" if noun[KIND] == "cross" else "s")


def captions(s: Scene, r: Random) -> list[str]:
    """Five captions in five wordings. The salient objects come first, large before small, then in
    reading order. None is longer than 18 words, so that it fits a decoder of 20 tokens."""
    o = sorted(s, key=lambda o: o[SIZE] != "large")
    full = [f"a {say(x)}" for x in o]
    sized = [f"a {say(put(x, PLACE, None))}" for x in o]
    placed = [f"a {say(put(x, SIZE, None))}" for x in o]
    short = [f"a {x[COLOR]} {x[KIND]}" for x in o]
    if len(s) == 1:
        return [full[0], f"there is {full[0]}", f"a picture of {sized[0]}",
                f"only one object, {full[0]}", placed[0]]
    many, named = NUMBERS[len(s)], short if len(s) < 5 else short[:3]
    return [f"{full[0]} and {full[1]}", f"{many} objects with {full[0]}",
            f"{', '.join(named[:-1])} and {named[-1]}", f"a picture of {sized[0]} and {sized[1]}",
            pick(r, (f"{many} shapes, {placed[0]}, {placed[1]}",
                     f"there is {placed[0]} and {placed[1]}"))]


# ---- pictures ------------------------------------------------------------------------------------
@cache
def stamp(kind: str, radius: int, turn: int) -> Image.Image:
    """A shape as a mask with soft edges: drawn eight times larger, then reduced."""
    corners = {"circle": [(0.9, 3 * i) for i in range(120)],             # (radius, degrees)
               "square": [(1.1, 45 + 90 * i) for i in range(4)],
               "triangle": [(1.1, 120 * i) for i in range(3)],
               "star": [((1.1, 0.45)[i % 2], 36 * i) for i in range(10)],
               "cross": [xy for i in range(0, 360, 90)
                         for xy in ((1.05, i - 18), (1.05, i + 18), (0.46, i + 45))]}[kind]
    side = 8 * (2 * radius + 2)
    mask = Image.new("L", (side, side))
    angles = [(side / 2, 8 * radius * rho, math.radians(turn + a - 90)) for rho, a in corners]
    ImageDraw.Draw(mask).polygon(
        [(c + rho * math.cos(a), c + rho * math.sin(a)) for c, rho, a in angles], fill=255)
    return mask.resize((side // 8, side // 8), Image.Resampling.BOX)


@cache
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 5, (16, PX, PX, 3)).astype(np.int16)


def draw(shapes: list[tuple], ground: tuple[int, int, int], r: Random) -> Image.Image:
    """A 96 x 96 RGB picture with light noise. A shape: (kind, color, shade, radius in pixels, its
    center (x, y), turn in degrees)."""
    picture = Image.new("RGB", (PX, PX), ground)
    for kind, color, shade, radius, at, turn in shapes:
        picture.paste(tuple(min(255, int(v * shade)) for v in RGB[color]),
                      tuple(v - radius - 1 for v in at), stamp(kind, radius, turn))
    noisy = np.asarray(picture, np.int16) + pick(r, noise())
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def render(s: Scene, r: Random) -> Image.Image:
    """The picture of a scene: light tinted ground, shapes with jitter."""
    ground, shapes = tuple(225 + int(r.random() * 26) for _ in range(3)), []
    for kind, color, size, place in s:
        radius, jitter = (13, 2) if size == "large" else (7, 5)
        radius += int(r.random() * 2)
        at = tuple(CELL * i + CELL // 2 + int((2 * r.random() - 1) * jitter) for i in XY[place])
        shade = 0.9 + 0.2 * r.random()
        shapes.append((kind, color, shade, radius, at, pick(r, (-12, -6, 0, 6, 12))))
    return draw(shapes, ground, r)


# ---- questions: functions of words, never of pixels ----------------------------------------------
class Question(NamedTuple):
    """`answer` takes a scene (nlvr: two) and gives None where the question does not apply.
    `plant` takes a wanted answer and gives, for each scene, nouns that make it likely."""
    text: str
    wants: tuple[str, ...]                    # the answers it may get; repeats weigh more
    answer: Callable[..., str | None]
    plant: Callable[[str], tuple[list[Noun], ...]]


def find(s: Scene, noun: Noun) -> list[Obj]:
    k, c, z, p = noun
    return [o for o in s if (k is None or o[0] == k) and (c is None or o[1] == c)
            and (z is None or o[2] == z) and (p is None or o[3] == p)]


def holds(a: Obj, relation: str, b: Obj) -> bool:
    """Is a left of (right of, above, below) b? By grid column or row, so never a close call."""
    axis, sign = RELATIONS[relation]
    return (XY[a[PLACE]][axis] - XY[b[PLACE]][axis]) * sign > 0


def related(s: Scene, target: Noun, relation: str | None, anchor: Noun) -> list[Obj] | None:
    """The targets (in that relation to the one anchor); None if there is not one anchor."""
    found = find(s, target)
    if relation is None:
        return found
    anchors = find(s, anchor)
    if len(anchors) == 1:
        return [o for o in found if holds(o, relation, anchors[0])]


def draw_noun(r: Random, held_out: bool, forms: tuple[str, ...]) -> Noun:
    """A noun of one of the forms: letters of k c s p for kind, color, size, place."""
    form = pick(r, forms)
    while True:
        noun = tuple(pick(r, FIELDS[i]) if "kcsp"[i] in form else None for i in range(4))
        if held_out or (noun[COLOR], noun[KIND]) not in HELD_OUT:
            return noun


def draw_two(r, held_out, forms) -> tuple[Noun, Noun]:
    """Two different nouns of one form, so that no object is both."""
    form = (pick(r, forms),)
    a = b = draw_noun(r, held_out, form)
    while a == b:
        b = draw_noun(r, held_out, form)
    return a, b


def draw_relation(r: Random) -> tuple[str, str]:
    relation = pick(r, tuple(RELATIONS))
    return relation, pick(r, ("", "to the ")) * relation.endswith("of") + relation


def near_miss(r: Random, noun: Noun) -> list[Noun]:
    """The noun with one word left free: what a careless reader takes for it."""
    said = [i for i in range(4) if noun[i]]
    return [put(noun, pick(r, said), None)] if len(said) > 1 else []


ASK = {KIND: ("what is the {}?", "what shape is the {}?"),
       COLOR: ("what color is the {}?", "what is the color of the {}?"),
       SIZE: ("is the {} small or large?", "what size is the {}?"),
       PLACE: ("where is the {}?", "in what place is the {}?")}


def ask_field(field, forms, hop, choose, r, held_out) -> Question:
    """What color is the star? With `hop`: the star left of the red thing? (find the anchor, step,
    look again). With `choose`: is the star red or blue?"""
    target, anchor = draw_noun(r, held_out, forms), draw_noun(r, held_out, ("k", "c", "kc"))
    relation, words = draw_relation(r) if hop else (None, "")
    text, wants = pick(r, ASK[field]), FIELDS[field]
    if choose:
        wants = tuple(r.sample(wants, 2))
        text = "is the {} " + (" or " if field == COLOR else " or a ").join(wants) + "?"
        text = text if field == COLOR else text.replace("{} ", "{} a ")

    def answer(s):
        found = related(s, target, relation, anchor)
        return found[0][field] if found and len(found) == 1 else None
    named = f"{say(target)} {words} the {say(anchor)}" if hop else say(target)
    return Question(text.format(named), wants, answer,
                    lambda want: ([put(target, field, want)] + [anchor] * hop,))


def ask_count(r, held_out) -> Question:
    n = draw_noun(r, held_out, ("k", "c", "k", "c", ""))
    text = pick(r, ("how many {} are there?", "what number of {} can be seen?"))
    wants = ("0", "1", "1", "1", "2", "2", "2", "3", "3", "4", "5")[n == (None,) * 4:]
    return Question(text.format(plural(n)), wants, lambda s: str(len(find(s, n))),
                    lambda want: ([n] * int(want),))


def ask_relation(r, held_out) -> Question:
    a, b = draw_two(r, held_out, ("k", "c", "kc"))
    relation, words = draw_relation(r)

    def answer(s):
        found = find(s, a), find(s, b)
        if len(found[0]) == len(found[1]) == 1:
            (x,), (y,) = found
            return "yes" if holds(x, relation, y) else "no" if holds(y, relation, x) else None
    return Question(f"is the {say(a)} {words} the {say(b)}?", YES_NO, answer,
                    lambda want: ([a, b],))


def ask_exist_relation(r, held_out) -> Question:
    forms = ("k", "c", "kc")
    target, anchor = draw_noun(r, held_out, forms), draw_noun(r, held_out, forms)
    relation, words = draw_relation(r)

    def answer(s):
        found = related(s, target, relation, anchor)
        return None if found is None else YES_NO[not found]

    def plant(want):                          # most often "no" means: there, but on another side
        return ([anchor] + [target] * (want == "yes" or r.random() < 0.7),)
    return Question(f"is there a {say(target)} {words} the {say(anchor)}?", YES_NO, answer, plant)


def ask_same(field, form, word, r, held_out) -> Question:
    a, b = draw_two(r, held_out, (form,))

    def answer(s):
        found = find(s, a), find(s, b)
        if len(found[0]) == len(found[1]) == 1:
            return YES_NO[found[0][0][field] != found[1][0][field]]

    def plant(want):
        shared = pick(r, FIELDS[field]) if want == "yes" else None
        return ([put(a, field, shared), put(b, field, shared)],)
    return Question(f"are the {say(a)} and the {say(b)} the same {word}?", YES_NO, answer, plant)


def ask_counts(rows, forms, pictures, top, r, held_out) -> Question:
    """Whatever two counts x and y decide. One picture: x of the noun a, y of the noun b. Two: x and
    y of the noun a, left and right. A row is (text, test of x, y and a number n drawn for it)."""
    text, test = pick(r, rows)
    a, b = draw_two(r, held_out, forms)
    n = 1 + int(r.random() * 3)
    spots = ((a, 0), (b, 0)) if pictures == 1 else ((a, 0), (a, 1))
    wants = YES_NO if pictures == 1 else TRUE_FALSE

    def answer(*scenes):
        x, y = (len(find(scenes[i], noun)) for noun, i in spots)
        return wants[not test(x, y, n)]

    def plant(want):
        while True:
            counts = int(r.random() * (top + 1)), int(r.random() * (top + 1))
            if wants[not test(*counts, n)] == want:
                break
        nouns = [[] for _ in range(pictures)]
        for (noun, i), count in zip(spots, counts):
            nouns[i] += [noun] * count or near_miss(r, noun)
        return tuple(nouns)
    number = f"{NUMBERS[n]} {say(a) if n == 1 else plural(a)}"
    return Question(text.format(a=say(a), b=say(b), A=plural(a), B=plural(b), n=number),
                    wants, answer, plant)


EXIST = [(text, lambda x, y, n: x > 0) for text in
         ("is there a {a}?", "can you see a {a}?", "does the picture show a {a}?")]
LOGIC = [("is there a {a} and a {b}?", lambda x, y, n: x > 0 and y > 0),
         ("is there a {a} or a {b}?", lambda x, y, n: x > 0 or y > 0)]
MORE = [("are there more {A} than {B}?", lambda x, y, n: x > y),
        ("are there fewer {A} than {B}?", lambda x, y, n: x < y)]
HAS = [("both pictures have a {a}", lambda x, y, n: x > 0 and y > 0),
       ("each picture shows a {a}", lambda x, y, n: x > 0 and y > 0),
       ("exactly one picture has a {a}", lambda x, y, n: (x > 0) != (y > 0)),
       ("only one picture shows a {a}", lambda x, y, n: (x > 0) != (y > 0)),
       ("at least one picture has a {a}", lambda x, y, n: x + y > 0),
       ("neither picture shows a {a}", lambda x, y, n: x + y == 0)]
SIDE = [("the left picture has a {a}", lambda x, y, n: x > 0),
        ("the right picture has a {a}", lambda x, y, n: y > 0)]
TOTAL = [("the two pictures have {n} in total", lambda x, y, n: x + y == n),
         ("together the pictures show exactly {n}", lambda x, y, n: x + y == n)]
COUNT = [("the left picture has exactly {n}", lambda x, y, n: x == n),
         ("the right picture has exactly {n}", lambda x, y, n: y == n)]
COMPARE = [("the left picture has more {A} than the right picture", lambda x, y, n: x > y),
           ("the left picture has fewer {A} than the right picture", lambda x, y, n: x < y),
           ("the right picture has more {A} than the left picture", lambda x, y, n: y > x),
           ("both pictures have the same number of {A}", lambda x, y, n: x == y)]

# task -> question type -> (what draws it, the fewest objects a scene that allow every answer, its
# share on disk). Four of five gqa questions on disk are yes/no and none names its possible answers:
# so the best blind strategy gains but three points on always giving the same answer.
TYPES: dict[str, dict[str, tuple[Callable[[Random, bool], Question], int, int]]] = {
    "vqa": {"color": (partial(ask_field, COLOR, ("k", "ks", "p"), 0, 0), 1, 1),
            "kind": (partial(ask_field, KIND, ("c", "cs", "p"), 0, 0), 1, 1),
            "size": (partial(ask_field, SIZE, ("k", "c", "kc"), 0, 0), 1, 1),
            "where": (partial(ask_field, PLACE, ("k", "c", "kc", "ks"), 0, 0), 1, 1),
            "exist": (partial(ask_counts, EXIST, ("kc", "kc", "k", "c", "ks"), 1, 1), 1, 1),
            "count": (ask_count, 1, 1)},
    "gqa": {"choose color": (partial(ask_field, COLOR, ("k", "ks", "p"), 0, 1), 1, 0),
            "choose kind": (partial(ask_field, KIND, ("c", "cs", "p"), 0, 1), 1, 0),
            "hop color": (partial(ask_field, COLOR, ("", "k", "s", "ks"), 1, 0), 2, 3),
            "hop kind": (partial(ask_field, KIND, ("", "c", "s", "cs"), 1, 0), 2, 3),
            "hop size": (partial(ask_field, SIZE, ("", "k", "c", "kc"), 1, 0), 2, 0),
            "relation": (ask_relation, 2, 4),
            "exist relation": (ask_exist_relation, 2, 4),
            "same color": (partial(ask_same, COLOR, "k", "color"), 2, 4),
            "same kind": (partial(ask_same, KIND, "c", "shape"), 2, 4),
            "logic": (partial(ask_counts, LOGIC, ("k", "c", "kc"), 1, 1), 2, 4),
            "compare": (partial(ask_counts, MORE, ("k", "c"), 1, 2), 2, 4)},
    "nlvr": {"has": (partial(ask_counts, HAS, ("k", "c", "kc", "kc", "ks"), 2, 1), 1, 1),
             "place": (partial(ask_counts, SIDE, ("kp", "cp"), 2, 1), 1, 1),
             "total": (partial(ask_counts, TOTAL, ("k", "c"), 2, 3), 3, 1),
             "count": (partial(ask_counts, COUNT, ("k", "c"), 2, 3), 3, 1),
             "compare": (partial(ask_counts, COMPARE, ("k", "c"), 2, 3), 2, 1)},
    "caption": {"caption": (None, 1, 1)}}


# ---- examples ------------------------------------------------------------------------------------
class Item(NamedTuple):
    scenes: tuple[Scene, ...]                 # two in nlvr, else one
    text: str                                 # "" for a caption
    answer: str
    type: str                                 # a key of TYPES[task]


def find_scenes(q: Question, want: str, draw: Callable[[list[Noun]], Scene | None], tries: int):
    """Scenes that give the question the wanted answer; None if `tries` draws do not find them."""
    for _ in range(tries):
        scenes = tuple(map(draw, q.plant(want)))
        if None not in scenes and q.answer(*scenes) == want:
            return scenes


def example(task: str, r: Random, held_out: bool, most: int = 5) -> Item:
    """One balanced item on fresh scenes of at most `most` objects, as words only (no picture).
    `held_out` lets scenes and questions hold the held-out pairs."""
    draw = partial(scene, r, held_out, most)
    if task == "caption":
        s = draw()
        return Item((s,), "", pick(r, captions(s, r)), task)
    types = [(name, make) for name, (make, least, _) in TYPES[task].items()
             if least <= most]
    while True:
        name, make = pick(r, types)
        q = make(r, held_out)
        want = pick(r, q.wants)
        scenes = find_scenes(q, want, draw, 60)
        if scenes:
            return Item(scenes, q.text, want, name)


class Pool:
    """Different scenes of one split, found by the nouns they hold."""

    def __init__(self, r: Random, held_out: bool, count: int, prefix: str, names: dict[Scene, str]):
        """`names` (scene -> picture) grows: no scene is in it twice, so none is in two splits."""
        self.r, self.scenes, self.index = r, [], defaultdict(list)
        while len(self.scenes) < count:
            s = scene(r, held_out)
            if s in names:
                continue
            names[s] = f"{prefix}_{len(names) + 1:012d}"
            self.scenes.append(s)
            held = Counter((k, c, z) for o in s for k in (o[0], None)
                           for c in (o[1], None) for z in (o[2], None))
            for noun, number in held.items():
                for least in range(1, number + 1):
                    self.index[noun, least].append(s)

    def draw(self, nouns: list[Noun]) -> Scene | None:
        keys = Counter(noun[:PLACE] for noun in nouns).items()
        fitting = min((self.index.get(key, ()) for key in keys), key=len, default=self.scenes)
        return pick(self.r, fitting) if fitting else None


def ask_all(task: str, r: Random, held_out: bool, pool: Pool, count: int, bar) -> list[list[Item]]:
    """At least `count` items on the pool's scenes, in groups of one text: two answers a question,
    two true and two false pairs to a statement. A group is found whole or dropped."""
    groups, types = [], [(name, make) for name, (make, _, share) in TYPES[task].items()
                         for _ in range(share)]
    size, tries = 4 if task == "nlvr" else 2, min(200, 20 + 2 * len(pool.scenes))
    while len(groups) * size < count:
        name, make = types[len(groups) % len(types)]
        q = make(r, held_out)
        wants = r.sample(q.wants * (size // 2), size)
        if len(set(wants)) < 2:
            continue
        found = [find_scenes(q, want, pool.draw, tries) for want in wants]
        if None not in found:
            groups.append([Item(s, q.text, w, name) for s, w in zip(found, wants)])
            bar.update(size)
    return groups


# ---- the ten annotators of vqa -------------------------------------------------------------------
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


def annotators(truth: str, r: Random) -> list[str]:
    """Ten people who mostly agree: the truth, else a synonym or a near miss."""
    clear = pick(r, (1.0, 0.95, 0.9, 0.8))
    return [truth if r.random() < clear else pick(r, NEAR[truth]) for _ in range(10)]


# ---- on disk -------------------------------------------------------------------------------------
def question_records(groups: list[list[Item]], names: dict[Scene, str], first: int) -> list[dict]:
    return [{"question_id": n, "img_id": names[item.scenes[0]], "sent": item.text,
             "label": {item.answer: 1.0}, "question_type": item.type}
            for n, item in enumerate((item for group in groups for item in group), first)]


def annotate(records: list[dict], r: Random) -> list[dict]:
    """The official VQA annotations of the records, whose labels become soft scores: 0.3, 0.6, 0.9,
    1.0 for 1, 2, 3, more of the ten annotators."""
    official = []
    for record in records:
        (truth,) = record["label"]
        answers = annotators(truth, r)
        record["label"] = {a: (0.3, 0.6, 0.9, 1.0)[min(n, 4) - 1]
                           for a, n in Counter(answers).most_common()}
        official.append({
            "question_id": record["question_id"], "image_id": int(record["img_id"][-12:]),
            "question_type": record["question_type"], "multiple_choice_answer": truth,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i}
                        for i, a in enumerate(answers, 1)]})
    return official


def nlvr_records(groups: list[list[Item]], names: dict[Scene, str], split: str) -> list[dict]:
    """Identifiers as NLVR2's own, split-set-pair-sentence: a statement's pairs differ in `pair`."""
    return [{"identifier": f"{split}-{n}-{pair}-0", "uid": f"nlvr2_{split}_{4 * n + pair}",
             "img0": names[item.scenes[0]], "img1": names[item.scenes[1]], "sent": item.text,
             "label": int(item.answer == "true"), "question_type": item.type}
            for n, group in enumerate(groups) for pair, item in enumerate(group)]


def coco_image(s: Scene, r: Random, name: str, split: str) -> dict:
    n = int(name[-12:])
    sentences = [{"raw": raw, "tokens": raw.replace(",", "").split(), "imgid": n,
                  "sentid": 5 * n + i} for i, raw in enumerate(captions(s, r))]
    return {"filepath": "images", "filename": f"{name}.jpg", "imgid": n, "cocoid": n,
            "split": split, "sentids": [x["sentid"] for x in sentences], "sentences": sentences}


def build(folder: Path, pictures: int, items: int, seed: int, progress: bool) -> None:
    """Fill an empty folder. As published, gqa trains on train + valid and is tested on testdev, so
    valid is a part of the training questions; submit (on the val pictures) has no answers."""
    splits = (("test", "test", "test1", "testdev", pictures // 10, items // 15),
              ("val", "valid", "dev", "submit", pictures // 20, items // 40),
              ("train", "train", "train", "train", pictures, items))
    names: dict[Scene, str] = {}
    files, official, coco = {}, [], []
    bar = tqdm(total=sum(3 * asked + count for *_, count, asked in splits), unit="",
               desc="writing the built-in data set", disable=not progress)
    (folder / "images").mkdir()
    for split, nlvr_file, nlvr_name, gqa_file, count, asked in splits:
        r, held_out = Random(f"{seed} {split}"), split != "train"
        pool = Pool(r, held_out, count, f"COCO_{'val' if held_out else 'train'}2014", names)
        vqa, gqa, nlvr = (ask_all(task, r, held_out, pool, asked, bar) for task in TASKS[:3])
        first = 1000 * len(names)             # question ids differ between splits
        files[f"vqa/karpathy_{split}"] = question_records(vqa, names, first)
        raw = annotate(files[f"vqa/karpathy_{split}"], r)
        files[f"GQA/{gqa_file}"] = question_records(gqa, names, first)
        files[f"nlvr/{nlvr_file}"] = nlvr_records(nlvr, names, nlvr_name)
        if held_out:
            official += raw
        for s in pool.scenes:
            coco.append(coco_image(s, r, names[s], split))
            render(s, r).save(folder / "images" / f"{names[s]}.jpg", quality=90)
            bar.update()
    bar.close()
    for record in files["GQA/submit"]:
        record["label"] = {}
    cut = items // 10
    files["GQA/valid"], files["GQA/train"] = files["GQA/train"][:cut], files["GQA/train"][cut:]
    files["vqa/v2_mscoco_val2014_annotations"] = {"annotations": official}
    files["COCO/dataset_coco"] = {"dataset": "coco", "images": coco}
    files["scenes"] = {name: describe(s) for s, name in names.items()}
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def write(folder: str | Path, pictures: int = 6000, items: int = 12000, seed: int = 0,
          progress: bool = True) -> Path:
    """Write the data set and return its folder, which appears complete or not at all.

    `pictures` are the training pictures (a tenth more for test, a twentieth for val), `items` the
    training examples of each of vqa, gqa and nlvr. The same arguments write the same bytes; a
    folder written with the same arguments is left as it is. `scenes.json` says what every picture
    holds. ValueError for numbers that are too small and for a folder that holds anything else."""
    if pictures < 100 or items < 100:
        raise ValueError(f"pictures is {pictures} and items {items}: both must be at least 100.")
    settings = {"version": VERSION, "pictures": pictures, "items": items, "seed": seed}
    return complete(Path(folder), settings,
                    lambda unfinished: build(unfinished, pictures, items, seed, progress))


def complete(folder: Path, settings: dict, fill: Callable[[Path], None]) -> Path:
    """A folder that appears whole or not at all, with its settings in world.json; one that was
    filled with the same settings is left as it is. ValueError if it holds anything else."""
    if folder.is_dir() and any(folder.iterdir()):
        found = folder / "world.json"
        if not found.is_file():
            raise ValueError(f"{folder} holds files but no world.json: name an empty folder.")
        if json.loads(found.read_text()) != settings:
            raise ValueError(f"{folder} was written with {found.read_text()}, not with "
                             f"{json.dumps(settings)}: delete it or name another folder.")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    fill(unfinished)
    (unfinished / "world.json").write_text(json.dumps(settings), encoding="utf-8")
    unfinished.replace(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="The built-in data set.")
    parser.add_argument("--out", help="folder to write it to")
    parser.add_argument("--pictures", type=int, default=6000, help="training pictures")
    parser.add_argument("--items", type=int, default=12000, help="training examples a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N items a task")
    args = parser.parse_args()
    if not args.out and not args.show:
        parser.error("say --out DIR or --show N")
    r = Random(args.seed)
    for task in TASKS:
        for _ in range(args.show):
            item = example(task, r, True)
            told = " | ".join(", ".join(describe(s)) for s in item.scenes)
            print(f"{task:8} {item.type:14} {item.text} -> {item.answer}   [{told}]")
    if args.out:
        try:
            folder = write(args.out, args.pictures, args.items, args.seed)
        except (OSError, ValueError) as error:
            sys.exit(f"world.py: {error}")
        for path in sorted(folder.rglob("*.json")):
            print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")


if __name__ == "__main__":
    main()
