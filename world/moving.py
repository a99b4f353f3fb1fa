"""How does the built-in world move?

Clips of drawn shapes with subtitles, in the files of the VALUE benchmark (arXiv 2106.04632), for
its four video tasks. A clip is a story of one to four shots of three seconds and three frames
each. A shot shows one object that comes closer, goes away, stays near or stays far. While it lasts
somebody says something about a shot of the clip, often another. Three shows talk about each clip:

    tv (tvqa, tvc)   tom : i like the star .
    how2 (how2qa)    now paint the second one .
    yc2 (yc2c)       now cut the red one .

    what color is the thing that tom likes?      what does the thing to paint do?

Who reads only the text does not know what color the star has (the best guess is right for 24 % of
tvqa and 28 % of how2qa); who sees only the frames does not know which shot is meant (43 % of both).
"the second one" asks for order, and so does motion: "goes away" is "comes closer" backwards.

    python -m world.moving --show 3        print the stories of a few clips and their records
    python -m world.moving                 write the data set, datasets/world/video
    python -m pytest tests/test_moving.py
"""
import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from support.gate import program, reading
from world.scenes import FOLDER, complete
from world.shapes import COLORS, HELD_OUT, KINDS, draw, pick

TASKS = ("tvqa", "how2qa", "tvc", "yc2c")
VERSION = 1                                   # raise it when the written bytes change
ORDER = ("first", "second", "third", "fourth")
FRAMES, SECONDS = 3, 3                        # of a shot
NEAR, HALFWAY, FAR = 14, 10, 6                # an object's radius in pixels
MOTIONS = {"comes closer": (FAR, HALFWAY, NEAR), "goes away": (NEAR, HALFWAY, FAR),
           "stays near": (NEAR,) * FRAMES, "stays far": (FAR,) * FRAMES}
# "turns around" never happens: tvqa needs a fifth choice.
WORDS = {"kind": KINDS, "color": COLORS, "motion": (*MOTIONS, "turns around")}
ASKS = {"kind": "what shape is {}?", "color": "what color is {}?", "motion": "what does {} do?"}


class Shot(NamedTuple):
    kind: str
    color: str
    motion: str


Story = tuple[Shot, ...]


class Line(NamedTuple):
    who: str                                  # "" in how2 and yc2
    verb: str
    key: str                                  # what the object is called by: kind, color or order
    shot: int                                 # the number of the shot that is meant


class Show(NamedTuple):
    """Who talks about clips: which tasks it makes, what is said, how that is asked for and told."""
    asked: str                                # the task that asks; "": none
    choices: int                              # its answers to choose from
    told: str                                 # the task that describes; "": none
    links: tuple[tuple[str, str], ...]        # (who, verb): each at most once a clip
    line: str
    thing: str = ""
    captions: tuple[str, ...] = ()


TEACH = (("", "paint"), ("", "cut"), ("", "wash"), ("", "move"))
SHOWS = {
    "tv": Show("tvqa", 5, "tvc",
               (("tom", "like"), ("ann", "want"), ("bob", "need"), ("eve", "draw")),
               "{who} : i {verb} {noun} .", "the thing that {who} {verb}s",
               ("{who} {verb}s the {color} {kind} that {motion}",
                "the {color} {kind} that {who} {verb}s {motion}",
                "a {color} {kind} {motion} and {who} {verb}s it")),
    "how2": Show("how2qa", 4, "", TEACH, "now {verb} {noun} .", "the thing to {verb}"),
    "yc2": Show("", 0, "yc2c", TEACH, "now {verb} {noun} .",
                captions=("{verb} the {color} {kind} that {motion}",
                          "the {color} {kind} to {verb} {motion}",
                          "a {color} {kind} {motion} , {verb} it")),
}


# ---- stories -------------------------------------------------------------------------------------
def random_story(rng: Random, held_out: bool) -> Story:
    """Up to four shots of different kinds and colors. With `held_out`, for testing, there are
    held-out pairs, too, and no story of one shot, about which there is nothing to mix up."""
    count = pick(rng, (2, 3, 4) if held_out else (1, 2, 3, 4))
    while True:
        pairs = list(zip(rng.sample(COLORS, count), rng.sample(KINDS, count)))
        if held_out or HELD_OUT.isdisjoint(pairs):
            return tuple(Shot(kind, color, pick(rng, tuple(MOTIONS))) for color, kind in pairs)


def script(rng: Random, show: Show, shots: Story) -> list[Line]:
    """What is said, a line while each shot lasts; the shot that is meant is drawn evenly and need
    not be the one on screen."""
    return [Line(who, verb, pick(rng, ("kind", "color", "order")), pick(rng, range(len(shots))))
            for who, verb in rng.sample(show.links, len(shots))]


def say(text: str, shots: Story, line: Line) -> str:
    """A text of the show about a line, which calls the object "the star", "the red one" or "the
    second one"."""
    shot = shots[line.shot]
    nouns = {"kind": f"the {shot.kind}", "color": f"the {shot.color} one",
             "order": f"the {ORDER[line.shot]} one"}
    return text.format(noun=nouns[line.key], who=line.who, verb=line.verb, **shot._asdict())


def choices(rng: Random, shots: Story, right: str, field: str, count: int) -> list[str]:
    """The right answer among others of its field: first those that the clip shows, too, so that
    the frames alone do not rule them out."""
    shown = {getattr(shot, field) for shot in shots}
    wrong = [word for word in WORDS[field] if word != right]
    rng.shuffle(wrong)
    wrong.sort(key=lambda word: word not in shown)
    return rng.sample([right, *wrong[:count - 1]], count)


def render(shots: Story, rng: Random) -> Iterator[Image.Image]:
    """The frames, 96 x 96 RGB. Every object also moves along a 5 x 5 grid (the tiny CLIP reads
    kinds less well between the grid points), which nobody asks about: CLIP's one vector a frame
    does not tell places apart."""
    ground = tuple(pick(rng, range(225, 251)) for _ in range(3))
    for kind, color, motion in shots:
        x, y = pick(rng, range(1, 6)), pick(rng, range(1, 6))
        steps = [(dx, dy) for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))
                 if 0 < x + 2 * dx < 6 and 0 < y + 2 * dy < 6]
        dx, dy = pick(rng, steps)
        shade, turn = 0.9 + 0.2 * rng.random(), pick(rng, (-12, -6, 0, 6, 12))
        for i, radius in enumerate(MOTIONS[motion]):
            center = [16 * at + pick(rng, range(-2, 3)) for at in (x + i * dx, y + i * dy)]
            yield draw([(kind, color, shade, radius, center, turn)], ground, rng)


# ---- records -------------------------------------------------------------------------------------
def questions(rng: Random, show: Show, vid: str, shots: Story, lines: list[Line]):
    """Of each line, a question for each of the two or three fields that it does not name."""
    for (number, line), field in product(enumerate(lines), ASKS):
        if field != line.key:
            right = getattr(shots[line.shot], field)
            answers = choices(rng, shots, right, field, show.choices)
            # The seconds of the shot that is on screen, or also of the one before or behind it.
            neighbour = min(max(0, number + pick(rng, (-1, 0, 1))), len(shots) - 1)
            first, last = sorted((number, neighbour))
            yield {"vid_name": vid, "qid": f"{show.asked}_{vid}_{number}_{field}",
                   "q": ASKS[field].format(say(show.thing, shots, line)),
                   **{f"a{k}": answer for k, answer in enumerate(answers)},
                   "ts": f"{SECONDS * first}-{SECONDS * (last + 1)}",
                   "answer_idx": answers.index(right)}


def descriptions(rng: Random, show: Show, vid: str, shots: Story, lines: list[Line], split: str):
    """Of each line, its moment in three wordings; for training in one of them."""
    for number, line in enumerate(lines):
        texts = [say(text, shots, line) for text in show.captions]
        if split == "train":
            texts = [pick(rng, texts)]
        test = {"clip_id": f"{vid}_{number}"} if split == "test_public" else {}
        yield {"vid_name": vid, "duration": SECONDS * len(shots),
               "ts": [SECONDS * number, SECONDS * (number + 1)], **test,
               "descs": [{"desc": text, "desc_id": f"{vid}_{number}_{i}"}
                         for i, text in enumerate(texts)]}


def records(rng: Random, split: str, vid: str, shots: Story) -> Iterator[tuple[str, dict]]:
    """(file, a new record of it) of one clip, for each of the three shows."""
    for name, show in SHOWS.items():
        lines = script(rng, show, shots)
        subtitles = [{"text": say(show.line, shots, line), "start": SECONDS * i,
                      "end": SECONDS * (i + 1)} for i, line in enumerate(lines)]
        yield f"{name}_subtitles", {"vid_name": vid, "sub": subtitles}
        if show.asked:
            for record in questions(rng, show, vid, shots, lines):
                yield f"{show.asked}/{show.asked}_{split}_release", record
        if show.told:
            for record in descriptions(rng, show, vid, shots, lines, split):
                yield f"{show.told}/{show.told}_{split}_release", record


def build(folder: Path, clips: int, seed: int, drawn: bool = True, progress: bool = False) -> None:
    """Fills a folder; with the same annotations, but no pictures, unless `drawn`."""
    files: dict[str, list[str]] = defaultdict(list)
    stories: dict[str, Story] = {}
    (folder / "clips").mkdir(parents=True)
    for split, count in ("train", clips), ("val", clips // 10), ("test_public", clips // 5):
        rng = Random(f"{seed} {split}")
        for number in tqdm(range(count), f"writing {split} clips", disable=not progress):
            vid = f"{split.removesuffix('_public')}_{number + 1:05d}"
            stories[vid] = shots = random_story(rng, split != "train")
            for file, record in records(rng, split, vid, shots):
                files[file].append(json.dumps(record) + "\n")
            if drawn:
                first, *rest = render(shots, Random(f"{seed} {vid}"))
                first.save(folder / "clips" / f"{vid}.webp", save_all=True, append_images=rest,
                           duration=1000 * SECONDS // FRAMES, quality=90, method=0)
    for name, lines in files.items():
        path = folder / "ann" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    (folder / "stories.json").write_text(json.dumps(stories), encoding="utf-8")


def write(folder: str | Path = FOLDER, clips=1200, seed=0, progress=True) -> Path:
    """The data set in `folder`/video, written unless it is there, always the same bytes: ann/ as
    published, clips/ and stories.json, which says what every clip shows. clips: training clips (a
    tenth more for val, a fifth for test)."""
    with reading(folder):
        assert clips >= 20, f"clips is {clips}: it must be at least 20"
    settings = {"version": VERSION, "clips": clips, "seed": seed}
    return complete(Path(folder) / "video", settings,
                    lambda unfinished: build(unfinished, clips, seed, progress=progress))


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m world.moving", description="The built-in clips.")
    parser.add_argument("--out", default=FOLDER, help=f"data folder to write them to ({FOLDER})")
    parser.add_argument("--show", type=int, metavar="N", help="print N clips, write nothing")
    args, rng = parser.parse_args(argv), Random(0)
    if not args.show:
        print(write(args.out), "is there")
        return
    for _ in range(args.show):
        shots = random_story(rng, True)
        print(" | ".join(map(" ".join, shots)))
        for file, record in records(rng, "train", "clip", shots):
            print(f"  {file}: {json.dumps(record)}")


if __name__ == "__main__":
    main()
