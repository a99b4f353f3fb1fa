"""What is the built-in data set?

A small world of drawn shapes (world/shapes.py) and questions about it (`example`), in four tasks
shaped like VQA v2, GQA, NLVR2 and COCO captions; `write` puts it on disk as these are published.

* Balance, the lesson of VQA v2 (arXiv 1612.00837). Question and wanted answer are drawn first, then
  a scene that gives it: the text alone says nothing. On disk every question stands beside two
  pictures with different answers, every statement beside two true and two false pairs.
* Held-out pairs. Six (color, kind) pairs are in no training picture, question or caption; test
  pictures hold them at their natural rate. Who cannot read color and kind apart fails there.

    python -m world.scenes --show 5         print a few examples of each task
    python -m world.scenes                  write the data set, datasets/world
    python -m pytest tests/test_world.py
"""
import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

from tqdm import tqdm

from support.gate import lock, program, read_json, reading
from world.shapes import (COLOR, FIELDS, HELD_OUT, KIND, NEAR, NUMBERS, PLACE, RELATIONS, SIZE,
                          Noun, Scene, captions, describe, find, find_one, holds, pick, plural, put,
                          random_scene, related, render, say)

FOLDER = Path("datasets/world")
VERSION = 2                                   # raise it when the written bytes change
TASKS = ("vqa", "gqa", "nlvr", "caption")
LETTERS = "kcsp"                              # a form of nouns is some of these: "kc" is "red star"
YES_NO = (True, False)
SPOKEN = {"vqa": ("no", "yes"), "gqa": ("no", "yes"), "nlvr": ("false", "true")}


# ---- questions: functions of words, never of pixels ----------------------------------------------
class Question(NamedTuple):
    """`answer` takes a scene (nlvr: two); None: the question does not apply. `plant` takes a
    wanted answer and gives, for each scene, nouns that make it likely."""
    text: str
    wants: tuple                              # words or YES_NO: its answers; repeats weigh more
    answer: Callable
    plant: Callable


def draw_noun(rng: Random, held_out: bool, forms: tuple[str, ...]) -> Noun:
    """A noun of one of the forms."""
    form = pick(rng, forms)
    while True:
        noun = tuple(pick(rng, words) if letter in form else None
                     for letter, words in zip(LETTERS, FIELDS))
        if held_out or (noun[COLOR], noun[KIND]) not in HELD_OUT:
            return noun


def draw_two(rng: Random, held_out: bool, forms: tuple[str, ...]) -> tuple[Noun, Noun]:
    """Two different nouns of one form, so that no object is both."""
    form = (pick(rng, forms),)
    first = second = draw_noun(rng, held_out, form)
    while first == second:
        second = draw_noun(rng, held_out, form)
    return first, second


def draw_relation(rng: Random) -> tuple[str, str]:
    """A relation and its words: "left of", and "left of" or "to the left of"."""
    relation = pick(rng, tuple(RELATIONS))
    before = pick(rng, ("", "to the "))
    return relation, before + relation if relation.endswith("of") else relation


ASK = {KIND: ("what is the {}?", "what shape is the {}?"),
       COLOR: ("what color is the {}?", "what is the color of the {}?"),
       SIZE: ("is the {} small or large?", "what size is the {}?"),
       PLACE: ("where is the {}?", "in what place is the {}?")}
OFFER = {KIND: "is the {} a %s or a %s?", COLOR: "is the {} %s or %s?"}


def ask_field(field, forms, rng, held_out, hop=False, choose=False) -> Question:
    """What color is the star? With `hop`: the star left of the red thing? (find the anchor, step,
    look again). With `choose`: is the star red or blue?"""
    target, anchor = draw_noun(rng, held_out, forms), draw_noun(rng, held_out, ("k", "c", "kc"))
    named = say(target)
    if hop:
        relation, words = draw_relation(rng)
        named += f" {words} the {say(anchor)}"
    text, wants = pick(rng, ASK[field]), FIELDS[field]
    if choose:
        wants = tuple(rng.sample(wants, 2))
        text = OFFER[field] % wants

    def answer(scene):
        found = related(scene, target, relation, anchor) if hop else find(scene, target)
        return found[0][field] if found and len(found) == 1 else None

    def plant(want):
        wanted = put(target, field, want)
        return [[wanted, anchor]] if hop else [[wanted]]
    return Question(text.format(named), wants, answer, plant)


def ask_count(rng, held_out) -> Question:
    noun = draw_noun(rng, held_out, ("k", "c", "k", "c", ""))
    text = pick(rng, ("how many {} are there?", "what number of {} can be seen?"))
    wants = tuple("01112223345")
    if not any(noun):                         # of "things" there is always one
        wants = wants[1:]
    return Question(text.format(plural(noun)), wants, lambda scene: str(len(find(scene, noun))),
                    lambda want: [[noun] * int(want)])


def ask_relation(rng, held_out) -> Question:
    first, second = draw_two(rng, held_out, ("k", "c", "kc"))
    relation, words = draw_relation(rng)

    def answer(scene):
        one, other = find_one(scene, first), find_one(scene, second)
        if one and other and (holds(one, relation, other) or holds(other, relation, one)):
            return holds(one, relation, other)
    return Question(f"is the {say(first)} {words} the {say(second)}?", YES_NO, answer,
                    lambda want: [[first, second]])


def ask_exist_relation(rng, held_out) -> Question:
    forms = ("k", "c", "kc")
    target, anchor = draw_noun(rng, held_out, forms), draw_noun(rng, held_out, forms)
    relation, words = draw_relation(rng)

    def answer(scene):
        found = related(scene, target, relation, anchor)
        return None if found is None else found != []

    def plant(want):                          # most often "no" means: there, but on another side
        there = want or rng.random() < 0.7
        return [[anchor, target]] if there else [[anchor]]
    return Question(f"is there a {say(target)} {words} the {say(anchor)}?", YES_NO, answer, plant)


def ask_same(field, form, word, rng, held_out) -> Question:
    first, second = draw_two(rng, held_out, (form,))

    def answer(scene):
        one, other = find_one(scene, first), find_one(scene, second)
        return one[field] == other[field] if one and other else None

    def plant(want):
        shared = pick(rng, FIELDS[field]) if want else None
        return [[put(first, field, shared), put(second, field, shared)]]
    return Question(f"are the {say(first)} and the {say(second)} the same {word}?", YES_NO, answer,
                    plant)


def ask_counts(rows, forms, pictures, top, rng, held_out) -> Question:
    """Whatever two counts x and y decide. One picture: x of the noun a, y of the noun b. Two: x and
    y of the noun a, left and right. A row is (text, test of x, y and a number n drawn for it)."""
    text, test = pick(rng, rows)
    a, b = draw_two(rng, held_out, forms)
    n = 1 + int(rng.random() * 3)
    spots = ((a, 0), (b, 0)) if pictures == 1 else ((a, 0), (a, 1))        # (noun, picture)

    def answer(*scenes):
        x, y = (len(find(scenes[i], noun)) for noun, i in spots)
        return test(x, y, n)

    def plant(want):
        while True:
            x, y = int(rng.random() * (top + 1)), int(rng.random() * (top + 1))
            if test(x, y, n) == want:
                break
        nouns = [[] for _ in range(pictures)]
        for (noun, i), count in zip(spots, (x, y)):
            said = [field for field in range(4) if noun[field]]
            nouns[i] += [noun] * count
            if count == 0 and len(said) > 1:  # what a careless reader takes for it: a word is free
                nouns[i].append(put(noun, pick(rng, said), None))
        return nouns
    number = f"{NUMBERS[n]} {say(a) if n == 1 else plural(a)}"
    return Question(text.format(a=say(a), b=say(b), A=plural(a), B=plural(b), n=number), YES_NO,
                    answer, plant)


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
    "vqa": {"color": (partial(ask_field, COLOR, ("k", "ks", "p")), 1, 1),
            "kind": (partial(ask_field, KIND, ("c", "cs", "p")), 1, 1),
            "size": (partial(ask_field, SIZE, ("k", "c", "kc")), 1, 1),
            "where": (partial(ask_field, PLACE, ("k", "c", "kc", "ks")), 1, 1),
            "exist": (partial(ask_counts, EXIST, ("kc", "kc", "k", "c", "ks"), 1, 1), 1, 1),
            "count": (ask_count, 1, 1)},
    "gqa": {"choose color": (partial(ask_field, COLOR, ("k", "ks", "p"), choose=True), 1, 0),
            "choose kind": (partial(ask_field, KIND, ("c", "cs", "p"), choose=True), 1, 0),
            "hop color": (partial(ask_field, COLOR, ("", "k", "s", "ks"), hop=True), 2, 3),
            "hop kind": (partial(ask_field, KIND, ("", "c", "s", "cs"), hop=True), 2, 3),
            "hop size": (partial(ask_field, SIZE, ("", "k", "c", "kc"), hop=True), 2, 0),
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
             "compare": (partial(ask_counts, COMPARE, ("k", "c"), 2, 3), 2, 1)}}


# ---- examples ------------------------------------------------------------------------------------
class Item(NamedTuple):
    scenes: tuple[Scene, ...]                 # two in nlvr, else one
    text: str                                 # "" for a caption
    answer: str
    type: str                                 # a key of TYPES[task], or "caption"


def find_item(task: str, name: str, question: Question, want, draw_scene: Callable, tries: int
              ) -> Item | None:
    """Scenes that give the question the wanted answer, unless `tries` draws do not find them.
    draw_scene: nouns -> a scene that holds them, or None."""
    for _ in range(tries):
        scenes = tuple(map(draw_scene, question.plant(want)))
        if None not in scenes and question.answer(*scenes) == want:
            answer = want if isinstance(want, str) else SPOKEN[task][want]
            return Item(scenes, question.text, answer, name)


def example(task: str, rng: Random, held_out: bool, most: int = 5) -> Item:
    """One balanced item on fresh scenes of at most `most` objects, as words only (no picture).
    `held_out` lets scenes and questions hold the held-out pairs."""
    draw_scene = partial(random_scene, rng, held_out, most)
    if task == "caption":
        scene = draw_scene()
        return Item((scene,), "", pick(rng, captions(scene, rng)), task)
    types = [(name, ask) for name, (ask, least, _) in TYPES[task].items() if least <= most]
    while True:
        name, ask = pick(rng, types)
        question = ask(rng=rng, held_out=held_out)
        item = find_item(task, name, question, pick(rng, question.wants), draw_scene, 60)
        if item:
            return item


class Pool:
    """Different scenes of one split, found by the nouns they hold."""

    def __init__(self, rng: Random, held_out: bool, count: int, prefix: str, names: dict):
        """`names` (scene -> picture) grows: no scene is in it twice, so none is in two splits."""
        self.rng, self.scenes = rng, []
        self.index = defaultdict(list)        # (noun without place, number): scenes with so many
        while len(self.scenes) < count:
            scene = random_scene(rng, held_out)
            if scene in names:
                continue
            names[scene] = f"{prefix}_{len(names) + 1:012d}"
            self.scenes.append(scene)
            nouns = Counter()
            for kind, color, size, _ in scene:
                nouns.update(product((kind, None), (color, None), (size, None)))
            for noun, number in nouns.items():
                for least in range(1, number + 1):
                    self.index[noun, least].append(scene)

    def draw(self, nouns: list[Noun]) -> Scene | None:
        """A scene that holds all of the nouns, of which it need not hold more than the rarest."""
        keys = Counter(noun[:PLACE] for noun in nouns).items()
        fitting = min((self.index.get(key, ()) for key in keys), key=len, default=self.scenes)
        return pick(self.rng, fitting) if fitting else None


def ask_all(task: str, rng: Random, held_out: bool, pool: Pool, count: int) -> list[Item]:
    """At least `count` items on the pool's scenes. A text comes twice (nlvr: four times) in a row,
    for all answers that it gets: half of a statement's pairs are true. Else it is dropped."""
    items, types = [], []
    for name, (ask, _, share) in TYPES[task].items():
        types += [(name, ask)] * share
    size, tries = 4 if task == "nlvr" else 2, min(200, 20 + 2 * len(pool.scenes))
    while len(items) < count:
        name, ask = types[len(items) // size % len(types)]
        question = ask(rng=rng, held_out=held_out)
        wants = rng.sample(question.wants * (size // 2), size)
        if len(set(wants)) > 1:
            found = [find_item(task, name, question, want, pool.draw, tries) for want in wants]
            if None not in found:
                items += found
    return items


# ---- on disk -------------------------------------------------------------------------------------
def question_records(items: list[Item], names: dict[Scene, str], first: int) -> list[dict]:
    return [{"question_id": number, "img_id": names[item.scenes[0]], "sent": item.text,
             "label": {item.answer: 1.0}, "question_type": item.type}
            for number, item in enumerate(items, first)]


def annotate(records: list[dict], rng: Random) -> list[dict]:
    """The official VQA annotations of the records, by ten people who mostly agree. The labels
    become soft scores: 0.3, 0.6, 0.9, 1.0 for 1, 2, 3, more of them."""
    official = []
    for record in records:
        (truth,) = record["label"]
        clear = pick(rng, (1.0, 0.95, 0.9, 0.8))
        answers = [truth if rng.random() < clear else pick(rng, NEAR[truth]) for _ in range(10)]
        record["label"] = {answer: (0.3, 0.6, 0.9, 1.0)[min(votes, 4) - 1]
                           for answer, votes in Counter(answers).most_common()}
        official.append({
            "question_id": record["question_id"], "image_id": int(record["img_id"][-12:]),
            "question_type": record["question_type"], "multiple_choice_answer": truth,
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i}
                        for i, answer in enumerate(answers, 1)]})
    return official


def nlvr_records(items: list[Item], names: dict[Scene, str], split: str) -> list[dict]:
    """Their names are split-set-pair-sentence: the four pairs of a statement differ in `pair`."""
    return [{"identifier": f"{split}-{i // 4}-{i % 4}-0", "uid": f"nlvr2_{split}_{i}",
             "img0": names[item.scenes[0]], "img1": names[item.scenes[1]], "sent": item.text,
             "label": int(item.answer == "true"), "question_type": item.type}
            for i, item in enumerate(items)]


def coco_image(scene: Scene, rng: Random, name: str, split: str) -> dict:
    number = int(name[-12:])
    sentences = [{"raw": raw, "tokens": raw.replace(",", "").split(), "imgid": number,
                  "sentid": 5 * number + i} for i, raw in enumerate(captions(scene, rng))]
    return {"filepath": "images", "filename": f"{name}.jpg", "imgid": number, "cocoid": number,
            "split": split, "sentids": [each["sentid"] for each in sentences],
            "sentences": sentences}


def build(folder: Path, pictures: int, items: int, seed: int, progress: bool) -> None:
    """Fill an empty folder. As published, gqa trains on train + valid and is tested on testdev, so
    valid is a part of the training questions; submit (on the val pictures) has no answers."""
    names: dict[Scene, str] = {}
    files, official, coco = {}, [], []
    (folder / "images").mkdir()
    for split, nlvr_file, nlvr_name, gqa_file, count, asked in (
            ("test", "test", "test1", "testdev", pictures // 10, items // 15),
            ("val", "valid", "dev", "submit", pictures // 20, items // 40),
            ("train", "train", "train", "train", pictures, items)):
        rng, held_out = Random(f"{seed} {split}"), split != "train"
        pool = Pool(rng, held_out, count, f"COCO_{'val' if held_out else 'train'}2014", names)
        vqa, gqa, nlvr = (ask_all(task, rng, held_out, pool, asked) for task in TYPES)
        first = 1000 * len(names)             # question ids differ between splits
        files[f"vqa/karpathy_{split}"] = question_records(vqa, names, first)
        annotations = annotate(files[f"vqa/karpathy_{split}"], rng)
        files[f"GQA/{gqa_file}"] = question_records(gqa, names, first)
        files[f"nlvr/{nlvr_file}"] = nlvr_records(nlvr, names, nlvr_name)
        if held_out:
            official += annotations
        for scene in tqdm(pool.scenes, f"writing {split} pictures", disable=not progress):
            coco.append(coco_image(scene, rng, names[scene], split))
            render(scene, rng).save(folder / "images" / f"{names[scene]}.jpg", quality=90)
    for record in files["GQA/submit"]:
        record["label"] = {}
    cut = items // 10
    files["GQA/valid"], files["GQA/train"] = files["GQA/train"][:cut], files["GQA/train"][cut:]
    files["vqa/v2_mscoco_val2014_annotations"] = {"annotations": official}
    files["COCO/dataset_coco"] = {"dataset": "coco", "images": coco}
    files["scenes"] = {name: describe(scene) for scene, name in names.items()}
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def write(folder: str | Path = FOLDER, pictures=6000, items=12000, seed=0, progress=True) -> Path:
    """The data set, written unless it is there, always the same bytes; scenes.json says what every
    picture holds. pictures: training pictures (a tenth more for test, a twentieth for val); items:
    training examples of each of vqa, gqa and nlvr."""
    with reading(folder):
        assert min(pictures, items) >= 100, \
            f"pictures is {pictures} and items {items}: both must be at least 100"
    settings = {"version": VERSION, "pictures": pictures, "items": items, "seed": seed}
    return complete(Path(folder), settings,
                    lambda unfinished: build(unfinished, pictures, items, seed, progress))


def complete(folder: Path, settings: dict, fill: Callable[[Path], None]) -> Path:
    """A folder that `fill` writes, once: it appears whole or not at all, with its settings in
    world.json. BadInput if it holds anything else."""
    done = folder / "world.json"
    with reading(folder):
        assert not folder.is_dir() or not any(folder.iterdir()) or done.is_file(), \
            "it holds files but no world.json: name an empty folder"
    if not done.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
            lock(file, wait=True)             # of several processes one writes, the others wait
            if not done.is_file():
                unfinished = folder.with_name(f"{folder.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)    # of a process that was killed
                unfinished.mkdir()
                fill(unfinished)
                (unfinished / "world.json").write_text(json.dumps(settings), encoding="utf-8")
                unfinished.replace(folder)
    with reading(folder):
        assert read_json(done) == settings, (f"it was written with {done.read_text()}, not with "
                                             f"{json.dumps(settings)}: delete it or name another")
    return folder


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m world.scenes", description="The built-in data set.")
    parser.add_argument("--out", default=FOLDER, help=f"folder to write it to ({FOLDER})")
    parser.add_argument("--show", type=int, metavar="N", help="print N items a task, write nothing")
    args, rng = parser.parse_args(argv), Random(0)
    if not args.show:
        print(write(args.out), "is there")
        return
    for task in TASKS:
        for _ in range(args.show):
            item = example(task, rng, True)
            held = " | ".join(", ".join(describe(scene)) for scene in item.scenes)
            print(f"{task:8} {item.type:14} {item.text} -> {item.answer}   [{held}]")


if __name__ == "__main__":
    main()
