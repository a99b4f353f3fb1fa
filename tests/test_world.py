"""Is the built-in data set what it says: true, balanced, in the published formats, repeatable?

Answers are checked by a second reader of the questions, written here with regular expressions on
`scenes.json`, which shares no code with scenes.py.
"""
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from support.gate import BadInput
from world import scenes, shapes

ROOT = Path(__file__).parent.parent
HAND = (("star", "red", "large", "top left"), ("circle", "blue", "small", "center"),
        ("circle", "red", "small", "bottom right"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scenes.write(tmp_path_factory.mktemp("data") / "world", 300, 600, 1, progress=False)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def every_question(folder):
    for name in ("vqa/karpathy_train", "vqa/karpathy_val", "vqa/karpathy_test", "GQA/train",
                 "GQA/valid", "GQA/testdev", "nlvr/train", "nlvr/valid", "nlvr/test"):
        for record in read(folder, name):
            yield name, record


# ---- a second reader -----------------------------------------------------------------------------
PLACE = {f"{row} {column}".strip() or "center": (x, y)
         for y, row in enumerate(("top", "", "bottom"))
         for x, column in enumerate(("left", "", "right"))}


def parse_scene(phrases):
    """"top left large red circle" -> {"words": {...}, "place": "top left"}"""
    found = [re.fullmatch(r"(.+) (small|large) (\w+) (\w+)", phrase).groups() for phrase in phrases]
    return [{"words": set(rest), "place": place} for place, *rest in found]


def select(scene, noun):
    place = re.search(r" (?:at|on|in) the ((?:top|bottom|left|right|center| )+)$", noun)
    if place:
        noun, scene = noun[:place.start()], [o for o in scene if o["place"] == place[1].strip()]
    words = {re.sub(r"^(circle|square|triangle|star|cross|thing)(e?s)$", r"\1", w)
             for w in noun.split()} - {"thing"}
    return [o for o in scene if words <= o["words"]]


def is_at(a, relation, b):
    (ax, ay), (bx, by) = PLACE[a["place"]], PLACE[b["place"]]
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


STEP = r"(?: (?:to the )?(left of|right of|above|below) the (.+))"
NUMBER = {"one": 1, "two": 2, "three": 3}


def step(scene, noun, relation, anchor):
    found = select(scene, noun)
    if relation:
        (anchor,) = select(scene, anchor)
        found = [o for o in found if is_at(o, relation, anchor)]
    return found


def reread(text, pair):
    """The answer to a question or statement; None for wordings this reader does not know."""
    s, t = pair[0], text.rstrip("?")
    if m := re.fullmatch(r"(?:how many|what number of) (.+?) (?:are there|can be seen)", t):
        return str(len(select(s, m[1])))
    if m := re.fullmatch(r"are there (more|fewer) (.+) than (.+)", t):
        x, y = len(select(s, m[2])), len(select(s, m[3]))
        return "yes" if (x > y if m[1] == "more" else x < y) else "no"
    if m := re.fullmatch(r"is there a (.+) (and|or) a (.+)", t):
        x, y = bool(select(s, m[1])), bool(select(s, m[3]))
        return "yes" if (x and y if m[2] == "and" else x or y) else "no"
    if m := re.fullmatch(r"(?:is there|can you see|does the picture show) a (.+?)" + STEP + "?", t):
        return "yes" if step(s, m[1], m[2], m[3]) else "no"
    if m := re.fullmatch(r"are the (.+) and the (.+) the same (color|shape)", t):
        (a,), (b,) = select(s, m[1]), select(s, m[2])
        names = set(shapes.COLORS if m[3] == "color" else shapes.KINDS)
        return "yes" if a["words"] & names == b["words"] & names else "no"
    if m := re.fullmatch(r"(?:where|in what place) is the (.+)", t):
        return select(s, m[1])[0]["place"]
    if m := re.fullmatch(r"what (?:color |size |shape )?is the (?:color of the )?(.+?)"
                         + STEP + "?", t):
        (only,) = step(s, m[1], m[2], m[3])
        field = 1 if "color" in t else 2 if "what size" in t else 0
        return (only["words"] & set(shapes.FIELDS[field])).pop()
    if m := re.fullmatch(r"is the (.+?)" + STEP + r"? (?:a )?(\w+) or (?:a )?(\w+)", t):
        (only,) = step(s, m[1], m[2], m[3])
        return (only["words"] & {m[4], m[5]}).pop()
    if m := re.fullmatch(r"is the (.+?)" + STEP, t):
        (a,), (b,) = select(s, m[1]), select(s, m[3])
        return "yes" if is_at(a, m[2], b) else "no"
    if len(pair) == 2:
        return reread_statement(t, *pair)


def reread_statement(t, left, right):
    if m := re.fullmatch(r"(both|each|exactly one|only one|at least one|neither) pictures? "
                         r"(?:have|has|shows?) a (.+)", t):
        shown = bool(select(left, m[2])) + bool(select(right, m[2]))
        good = {"both": [2], "each": [2], "exactly one": [1], "only one": [1],
                "at least one": [1, 2], "neither": [0]}[m[1]]
        return shown in good
    if m := re.fullmatch(r"the (left|right) picture has a (.+)", t):
        return bool(select(left if m[1] == "left" else right, m[2]))
    if m := re.fullmatch(r"the (left|right) picture has (more|fewer) (.+) than the \w+ picture", t):
        x, y = (len(select(s, m[3])) for s in (left, right))
        return (x > y) if (m[1] == "left") == (m[2] == "more") else (x < y)
    if m := re.fullmatch(r"both pictures have the same number of (.+)", t):
        return len(select(left, m[1])) == len(select(right, m[1]))
    if m := re.fullmatch(r"the (left|right) picture has exactly (\w+) (.+)", t):
        return len(select(left if m[1] == "left" else right, m[3])) == NUMBER[m[2]]
    if m := re.fullmatch(r"(?:the two pictures have|together the pictures show exactly) (\w+) (.+?)"
                         r"(?: in total)?", t):
        return len(select(left, m[2])) + len(select(right, m[2])) == NUMBER[m[1]]


def test_every_answer_is_true(folder):
    shown = {name: parse_scene(phrases) for name, phrases in read(folder, "scenes").items()}
    raw = {a["question_id"]: a["multiple_choice_answer"] for a in
           read(folder, "vqa/v2_mscoco_val2014_annotations")["annotations"]}
    for name, q in every_question(folder):
        pair = [shown[q[key]] for key in ("img_id", "img0", "img1") if key in q]
        said, label = reread(q["sent"], pair), q["label"]
        if name.startswith("vqa"):            # the annotators' scores are all that training has
            assert label.get(said, 0) == 1, (name, q, pair)
            label = raw.get(q["question_id"], said)
        elif name.startswith("GQA"):
            (label,) = label
        assert said == label, (name, q, pair)


# ---- words ---------------------------------------------------------------------------------------
def test_words_of_a_hand_made_scene():
    assert shapes.describe(HAND) == ["top left large red star", "center small blue circle",
                                    "bottom right small red circle"]
    assert shapes.captions(HAND, Random(0))[:4] == [
        "a large red star at the top left and a small blue circle in the center",
        "three objects with a large red star at the top left",
        "a red star, a blue circle and a red circle",
        "a picture of a large red star and a small blue circle"]
    assert shapes.plural(("cross", None, "small", None)) == "small crosses"
    assert shapes.say((None, "red", None, "left")) == "red thing on the left"
    assert [o[1] for o in shapes.find(HAND, ("circle", None, "small", None))] == ["blue", "red"]
    level = ("cross", "pink", "small", "right")
    found = [[way for way in shapes.RELATIONS if shapes.holds(obj, way, HAND[1])]
             for obj in (HAND[0], level)]
    assert found == [["left of", "above"], ["right of"]]


def test_captions_fit_a_decoder_of_20_tokens():
    r = Random(0)
    for _ in range(2000):
        for caption in shapes.captions(shapes.random_scene(r, True), r):
            assert len(re.findall(r"\w+|,", caption)) <= 18, caption


@pytest.mark.parametrize("task", scenes.TASKS)
def test_examples_keep_their_limits(task):
    r = Random(5)
    for _ in range(1000):
        item = scenes.example(task, r, False, most=3)
        assert len(item.scenes) == (2 if task == "nlvr" else 1)
        for s in item.scenes:
            assert 1 <= len(s) <= 3 and len({o[3] for o in s}) == len(s)
            assert not any((o[1], o[0]) in shapes.HELD_OUT for o in s)


def test_the_text_alone_does_not_tell_the_answer():
    """Guess the answer that a text had most often in 8,000 items, on 8,000 others."""
    for task, most in (("vqa", 5), ("gqa", 5), ("gqa", 3), ("nlvr", 5)):
        r, votes, right, asked = Random(6), defaultdict(Counter), 0, 0
        for i in range(16000):
            item = scenes.example(task, r, True, most)
            if item.answer in ("yes", "no", "true", "false"):
                if i < 8000:
                    votes[item.text][item.answer] += 1
                elif votes[item.text]:
                    right += votes[item.text].most_common(1)[0][0] == item.answer
                    asked += 1
        assert asked > 500 and abs(right / asked - 0.5) < 2 / asked ** 0.5, (task, right / asked)


def test_answers_are_uniform():
    r, answers = Random(7), defaultdict(Counter)
    for _ in range(8000):
        item = scenes.example("vqa", r, True)
        answers[item.type][item.answer] += 1
    for kind, words in (("color", shapes.COLORS), ("kind", shapes.KINDS), ("size", shapes.SIZES),
                        ("where", shapes.PLACES), ("exist", ("yes", "no"))):
        shares = np.array([answers[kind][w] for w in words]) / sum(answers[kind].values())
        assert abs(shares - 1 / len(words)).max() < 0.05, (kind, shares)


# ---- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", shapes.KINDS)
def test_a_picture_shows_its_scene(kind):
    r = Random(3)
    for color in shapes.COLORS:
        s = ((kind, color, "small", "top"), (kind, color, "large", "bottom left"))
        pixels = np.asarray(scenes.render(s, r)).astype(float)
        assert pixels.shape == (96, 96, 3)
        cells = pixels.reshape(3, 32, 3, 32, 3).transpose(0, 2, 1, 3, 4).reshape(9, 1024, 3)
        ground = np.median(pixels.reshape(-1, 3), 0)
        painted = (abs(cells - ground).sum(-1) > 60).sum(-1)     # pixels a cell
        assert set(np.flatnonzero(painted > 20)) == {1, 6}
        assert painted[6] > 2 * painted[1]
        shown = np.median(cells[6][abs(cells[6] - ground).sum(-1) > 60], 0)
        nearest = min(shapes.COLORS, key=lambda c: abs(np.array(shapes.RGB[c]) - shown).sum())
        assert nearest == color


# ---- on disk -------------------------------------------------------------------------------------
def test_formats(folder):
    names, ids = set(read(folder, "scenes")), []
    assert names == {p.stem for p in (folder / "images").iterdir()} and len(names) == 345
    for name, q in every_question(folder):
        if name.startswith("nlvr"):
            split = {"train": "train", "valid": "dev", "test": "test1"}[name.split("/")[1]]
            assert re.fullmatch(rf"{split}-\d+-[0-3]-0", q["identifier"])
        else:
            ids.append((name[:3], q["question_id"]))
    assert len(set(ids)) == len(ids)
    assert not any(q["label"] for q in read(folder, "GQA/submit"))
    images = read(folder, "COCO/dataset_coco")["images"]
    assert Counter(i["split"] for i in images) == {"train": 300, "test": 30, "val": 15}
    assert all(len(i["sentences"]) == 5 and i["filename"][:-4] in names for i in images)
    with Image.open(folder / "images" / images[0]["filename"]) as picture:
        assert picture.size == (96, 96) and picture.format == "JPEG"


def test_soft_labels_are_those_of_the_ten_annotators(folder):
    raw = {a["question_id"]: a for a in
           read(folder, "vqa/v2_mscoco_val2014_annotations")["annotations"]}
    disagree = 0
    for q in read(folder, "vqa/karpathy_val") + read(folder, "vqa/karpathy_test"):
        votes = Counter(a["answer"] for a in raw[q["question_id"]]["answers"])
        assert sum(votes.values()) == 10
        assert q["label"] == {a: {1: 0.3, 2: 0.6, 3: 0.9}.get(n, 1.0) for a, n in votes.items()}
        assert q["img_id"].endswith(f"{raw[q['question_id']]['image_id']:012d}")
        disagree += len(votes) > 1
    assert 0.2 < disagree / len(raw) < 0.9


def test_texts_stand_beside_different_answers(folder):
    pairs, votes = defaultdict(list), defaultdict(Counter)
    for q in read(folder, "nlvr/train"):
        pairs[re.sub(r"-\d-0$", "", q["identifier"])].append(q)
    for group in pairs.values():
        assert len(group) == 4 and len({q["sent"] for q in group}) == 1
        assert sum(q["label"] for q in group) == 2
    for q in read(folder, "GQA/train") + read(folder, "GQA/valid"):
        votes[q["sent"]].update(q["label"])
    for text, count in votes.items():
        assert len(count) > 1 and count["yes"] == count["no"], text


def test_held_out_pairs_and_scenes(folder):
    pairs = [f"{color} {kind}" for color, kind in shapes.HELD_OUT]
    described = read(folder, "scenes")
    held = {name for name, said in described.items() if any(p in x for p in pairs for x in said)}
    assert not any("train" in name for name in held)
    said = [q["sent"] for name, q in every_question(folder) if "train" in name or "GQA/va" in name]
    for image in read(folder, "COCO/dataset_coco")["images"]:
        said += [x["raw"] for x in image["sentences"] if image["split"] == "train"]
    assert not any(p in text for p in pairs for text in said)
    assert len(set(map(tuple, described.values()))) == len(described)        # no scene twice
    for name in ("vqa/karpathy_test", "GQA/testdev", "nlvr/test"):
        records = read(folder, name)
        share = sum(bool({q.get("img_id"), q.get("img0"), q.get("img1")} & held) for q in records)
        assert share / len(records) > 0.3, name


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def test_same_arguments_same_bytes(tmp_path):
    folder = scenes.write(tmp_path / "w", 100, 100, 3, progress=False)
    before = contents(folder)
    texts = b"".join(before[name] for name in before if name.endswith(".json"))
    assert hashlib.sha256(texts).hexdigest()[:16] == "e0eac4a67a1a1346"     # else raise VERSION
    other = scenes.write(tmp_path / "other", 100, 100, 4, progress=False)
    assert not before.items() & contents(other).items()

    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert scenes.write(folder, 100, 100, 3, progress=False) == folder      # is left alone
    assert times == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for where, items, said in ((folder, 101, "w: it was written with"), (folder, 5, "items 5"),
                               (tmp_path, 100, "no world.json")):
        with pytest.raises(BadInput, match=said):
            scenes.write(where, 100, items, 3)


def test_never_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "describe", lambda scene: 1 / 0)     # pictures are there already
    with pytest.raises(ZeroDivisionError):
        scenes.write(tmp_path / "w", 100, 100, progress=False)
    assert not (tmp_path / "w").exists()


def test_two_processes_at_once(tmp_path):
    """Where one was killed before, one writes the world and the other waits for it."""
    (tmp_path / "w.unfinished/images").mkdir(parents=True)
    program = f"from world import scenes; scenes.write({str(tmp_path / 'w')!r}, 100, 100)"
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("writing" in errors for errors in said) == 1
    assert contents(tmp_path / "w") == contents(scenes.write(tmp_path / "x", 100, 100, 0, False))
    assert not (tmp_path / "w.unfinished").exists()


def test_show(capsys):
    scenes.main(["--show", "2"])
    said = capsys.readouterr().out
    for task in scenes.TASKS:
        assert len(re.findall(rf"^{task} .* -> .*\[.+\]$", said, re.MULTILINE)) == 2
