"""How does a published record become an example?

Readers of the annotations of VQAv2, GQA, NLVR2 and COCO, in the layout of VL-T5 (arXiv 2102.02779),
which both papers train on, and in the benchmarks' own; and of clips with their subtitles, in the
files of the VALUE benchmark (arXiv 2106.04632), one JSON record a line.

A reader takes (split, the paths of its files) and yields the fields of data.Example but the task,
in the files' order. In a split "submit" nothing has an answer. `find_files` finds a task's files;
`records` reads each record inside one gate, so that a complaint names file, record and field.

    python -m pytest tests/test_readers.py
"""
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.gate import Number, check, fits, read_text, reading
from support.metrics import normalize_answer, vqa_accuracy

BIG = 20_000_000                   # characters of a file that gets a bar
BLANK = re.compile(r"[ \t\r\n]*")  # what JSON calls white space
DECODE = json.JSONDecoder().raw_decode                # (text, start) -> (value, end)
SIGNS = {"[": (",", "]"), "{": (",", "}"), "": ("", "")}    # opening: (between, closing)

ID = (int, str)
LABELS = {0: "false", 1: "true", "False": "false", "True": "true"}                      # of nlvr
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
SOFT_SCORES = {1: 0.3, 2: 0.6, 3: 0.9}                # for so many annotators; 1 for more
SPAN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*-\s*(\d+(?:\.\d*)?|\.\d+)\s*")
NO_SPAN = (None, "", "NaN-NaN")                       # TVQA knows no time for a few questions


# ----------------------------------------------------------------------------------------- files

class Layout(NamedTuple):
    """One way in which a task's files are published, and who reads them: "GQA/{}.json" and, of each
    split, the names that stand in it, a space between; "" where there is no such split."""
    name: str
    read: Callable[[str, list[Path]], Iterable[dict]]
    pattern: str                                      # may be of several files, a space between
    train: str = ""
    val: str = ""
    test: str = ""
    submit: str = ""
    note: str = ""                                    # what its user should know


def find_files(layouts: Iterable[Layout], split: str, folder: Path) -> tuple[Layout, list[Path]]:
    """The layout in which a task's files are there, and the paths of a split.

    It is the first that is complete, else the one that lacks fewest files; the same for train, val
    and test, as the training split of one can hold the test split of another.
    """
    def paths(layout: Layout, *splits: str) -> list[Path]:
        names = " ".join(getattr(layout, split, "") for split in splits).split()
        files = " ".join(layout.pattern.format(name) for name in names).split()
        return [locate(folder / file) for file in dict.fromkeys(files)]

    def lost(layout: Layout, *splits: str) -> list[str]:
        return [f"{path.relative_to(folder)}" for path in paths(layout, *splits)
                if not path.exists()]

    def rank(layout: Layout) -> tuple[int, int]:
        lacks = len(lost(layout, *together))
        return lacks, -len(paths(layout, *together)) if lacks else 0

    assert folder.is_dir(), f"{folder} is not a folder: name the one that holds the data"
    together = (split,) if split == "submit" else ("train", "val", "test")
    layouts = sorted((one for one in layouts if paths(one, split)), key=rank)
    assert layouts, "there is no such split: the answers of its test are published"
    ways = [f"{' and '.join(lost(one, split) or lost(one, *together))} ({one.name})"
            for one in layouts]
    assert not lost(layouts[0], split), f"{folder} lacks {', or '.join(ways)}, or see --tasks."
    return layouts[0], paths(layouts[0], split)


def locate(path: Path) -> Path:
    """Where a file is, or should be: COCO's archives unpack into a folder named annotations."""
    unpacked = path.parent / "annotations" / path.name
    return unpacked if unpacked.exists() and not path.exists() else path


# -------------------------------------------------------------------------------------- records

def records(paths: list[Path], read: Callable[[dict], object], key: str | None = None,
            lines: bool = False) -> Iterator:
    """What `read` makes (if not None) of each record of these files: of a file's list or object or,
    with `key`, of the list at `key` of its object. With `lines`: of records one behind the other,
    if the file begins with one, as an object of records does. The text is held, its records not."""
    for path in paths:
        text = read_text(path)
        bar = tqdm(total=len(text), desc=f"read {path.name}", unit="char", unit_scale=True,
                   leave=False, disable=len(text) < BIG)
        with reading(path), bar:
            for made, end in members(path, text, skip(text, 0), read, key, lines):
                bar.update(end - bar.n)
                if made is not None:
                    yield made
            assert skip(text, end) == len(text), f"broken JSON: more than one value, from {end} on"


def members(path: Path, text: str, at: int, read: Callable[[dict], object], key: str | None = None,
            lines: bool = False) -> Iterator[tuple]:
    """(what `read` makes of a member or None, how far the text is read) for the value at `at`."""
    opening = text[at:at + 1]
    assert opening in ("[", "{"), f"a list or object should stand at character {at}"
    if lines and opening == "{":
        opening = ""
    between, closing = SIGNS[opening]
    at = skip(text, at, opening)
    number, found = 0, False
    while text[at:at + 1] != closing:                 # "" at the end of the text
        if number > 0:
            at = skip(text, at, between)
        name = number
        if opening == "{":
            name, at = DECODE(text, at)
            assert isinstance(name, str), f"broken JSON: the name {name!r:.60} is no text"
            at = skip(text, skip(text, at), ":")
        if name == key:
            assert not found, f"field {key!r} is there twice"
            found = True
            for inner in members(path, text, at, read):
                yield inner
                at = inner[1]
        else:
            with reading(path, name):
                value, at = DECODE(text, at)
                if opening == "{" and isinstance(value, dict):
                    value["question_id"] = name       # GQA's own files: {question id: record}
                made = read(value) if key is None else None
            yield made, at
        at = skip(text, at)
        number += 1
    assert found or key is None, f"field {key!r} is missing"
    yield None, at + len(closing)


def skip(text: str, at: int, sign: str = "") -> int:
    """Where the next value or sign begins, behind this sign and white space."""
    assert text.startswith(sign, at), f"broken JSON: {sign!r} should stand at character {at}"
    return BLANK.match(text, at + len(sign)).end()


def texts(record: dict, field: str, name: str) -> list[str]:
    """The text `name` of every object in the list `field`."""
    (listed,) = check(record, {field: [dict]})
    found = [member[name] for member in listed]
    assert fits(found, [str]), f"{name!r} in {field!r} should be text, not {found!r:.60}"
    return found


@lru_cache(maxsize=1 << 18)
def share(kind: type, items: tuple):
    """kind(items), the same object for equal items: of a million answers most are "yes" or "no"."""
    return kind(items)


# ---------------------------------------------------------------------- questions: vqa, gqa, nlvr

def read_label(record: dict) -> dict[str, float]:
    """`label` {answer: soft score}, without the answers that score 0; or `answer`, a sure one."""
    (label,) = check(record, {"label|answer": (dict, str)})
    if isinstance(label, str):
        label = {label: 1}
    for answer, soft in label.items():
        fine = fits(answer, str) and fits(soft, Number(0, 1))
        assert fine, f"'label' should score {answer!r} from 0 to 1, not {soft!r:.60}"
    return share(dict, tuple((answer, float(soft)) for answer, soft in label.items() if soft > 0))


def read_questions(split: str, paths: list[Path]) -> Iterator[dict]:
    """VL-T5's lists of {question_id, img_id, sent, label}, and GQA's objects
    {question id: {imageId, question, answer}}."""
    fields = {"question_id": ID, "sent|question": str, "img_id|imageId": str}

    def example(record: dict) -> dict:
        name, text, image = check(record, fields)
        targets = {} if split == "submit" else read_label(record)
        return dict(id=name, text=text, images=share(tuple, (image,)), targets=targets)
    return records(paths, example)


def read_people(path: Path, split: str, field: str, wanted: set | None) -> Iterator[tuple]:
    """(question id, its ten annotators' answers) of VQA's annotations whose `field`, an id, is
    wanted (None: of all)."""
    def people(record: dict) -> tuple | None:
        question = check(record, {"question_id": ID, field: ID})[0]
        if wanted is not None and record[field] not in wanted:
            return None
        found = [sys.intern(answer) for answer in texts(record, "answers", "answer")]
        assert split == "train" or len(found) not in (1, 2, 3), (
            f"question {question} has {len(found)} answers, and three other people must agree to "
            "make one right: take VL-T5's layout and its 'label' alone")
        return question, found
    return records([path], people, "annotations")


def read_vqa(split: str, paths: list[Path]) -> Iterator[dict]:
    """Questions, and for testing the ten annotators' raw answers that the official metric needs.

    Karpathy's val and test pictures both come from COCO's val2014, hence one file of answers.
    Without it the metric falls back on the soft scores of `label`, which is a little generous.
    """
    if split not in ("val", "test"):
        return read_questions(split, paths)
    examples = list(read_questions(split, paths))
    ids = {example["id"] for example in examples}
    path = paths[0].parent / "v2_mscoco_val2014_annotations.json"
    people = {}
    if path.exists():
        people = dict(read_people(path, split, "question_id", ids))
    if len(people) < len(ids):
        print(f"vqa {split}: {len(ids) - len(people)} of {len(ids)} questions are scored by their "
              f"'label', for want of raw answers (VQAv2's {path.name})")
    return (example | {"references": people.get(example["id"])} for example in examples)


spell = lru_cache(maxsize=1 << 18)(normalize_answer)


def soft_scores(people: list[str]) -> dict[str, float]:
    """{answer: 0.3, 0.6, 0.9 or 1 for 1, 2, 3 or more annotators}, the commonest first, spelled as
    the metric compares it ("The Dog." is "dog").

    Answers that earn nothing are left out. The metric reads a predicted "none" as "0" and lets an
    annotator's "none" stand, so that neither is ever right.
    """
    scores = []
    for answer, count in Counter(map(spell, people)).most_common():
        if answer and (answer in people or vqa_accuracy(answer, people) > 0):
            scores.append((answer, SOFT_SCORES.get(count, 1.0)))
    return share(dict, tuple(scores))


def read_vqa2(split: str, paths: list[Path]) -> Iterator[dict]:
    """VQAv2's own questions and annotations, file by file in turn; behind them, perhaps, Karpathy's
    file, in whose splits they then are. To submit, questions alone."""
    paths, images, answers = list(paths), None, {}
    if paths[-1].name == "dataset_coco.json":
        images = {name for name, *_ in read_pictures(split, paths.pop())}
    for path in paths[1::2]:
        for question, people in read_people(path, split, "image_id", images):
            answers[question] = soft_scores(people), None if split == "train" else people

    def example(year: str, record: dict) -> dict | None:
        question, image, text = check(record, fields)
        if images is not None and image not in images:
            return None
        known = split == "submit" or question in answers
        assert known, f"no record of 'annotations' has its 'question_id', {question}"
        targets, references = answers.get(question, ({}, None))
        shown = share(tuple, (f"COCO_{year}_{image:012d}",))
        return dict(id=question, text=text, images=shown, targets=targets, references=references)

    fields = {"question_id": int, "image_id": int, "question": str}
    for path in paths[::2]:
        year = path.name.split("_")[3].replace("-dev", "")          # train2014, test2015
        yield from records([path], partial(example, year), "questions")


def read_nlvr(split: str, paths: list[Path]) -> Iterator[dict]:
    """VL-T5's lists of statements about pictures img0 and img1; and NLVR2's own lines, where those
    of "dev-850-0-1" are "dev-850-0-img0" and "dev-850-0-img1"."""
    fields = {"identifier": str, "sent|sentence": str, "label": set(LABELS)}

    def example(record: dict) -> dict:
        name, text, label = check(record, fields)
        pair = name.rpartition("-")[0]
        shown = {"img0": f"{pair}-img0", "img1": f"{pair}-img1"} | record
        images = tuple(check(shown, {"img0": str, "img1": str}))
        return dict(id=name, text=text, images=images, targets={LABELS[label]: 1.0})
    return records(paths, example, lines=True)


# ------------------------------------------------------------ snli: does the picture entail a text?

def read_snli(split: str, paths: list[Path]) -> Iterator[dict]:
    """SNLI-VE's own lines: a hypothesis about a picture of Flickr30k."""
    fields = {"pairID?": (int, str), "Flickr30K_ID": str, "sentence2": str,
              "gold_label": {"contradiction", "entailment", "neutral"}}

    def example(record: dict) -> dict:
        name, image, text, label = check(record, fields)
        name = name or f"{image}: {text}"                # no two hypotheses about one are the same
        return dict(id=name, text=text.lower(), images=(image,), targets={label: 1.0})
    return records(paths, example, lines=True)


# --------------------------------------------------------------------------------------- captions

def captioned(split: str, captions: list[str], **fields) -> Iterator[dict]:
    """An example a caption for training; else one with all captions, which the metric needs."""
    if split != "train":
        yield fields | {"targets": dict.fromkeys(captions, 1.0), "references": captions or None}
    else:
        for number, caption in enumerate(captions):
            yield fields | {"id": f"{fields['id']}#{number}", "targets": {caption: 1.0},
                            "references": [caption]}


def read_pictures(split: str, path: Path) -> Iterator[tuple]:
    """(cocoid, picture id, captions) of each picture of a split of Karpathy's dataset_coco.json."""
    def picture(record: dict) -> tuple | None:
        part, name, file = check(record, {"split": set(KARPATHY), "cocoid": ID, "filename": str})
        if KARPATHY[part] != split:
            return None
        captions = [text.strip() for text in texts(record, "sentences", "raw")]
        assert captions, "'sentences' is empty; a picture needs a caption"
        return name, Path(file).stem, captions
    return records([path], picture, "images")


def read_karpathy(split: str, paths: list[Path]) -> Iterator[dict]:
    for name, image, captions in read_pictures(split, *paths):
        yield from captioned(split, captions, id=name, text="", images=(image,))


def read_coco(split: str, paths: list[Path]) -> Iterator[dict]:
    """COCO's own captions_*.json; to submit, image_info_*.json, which has pictures only."""
    captions = defaultdict(list)
    if split != "submit":
        caption = partial(check, table={"image_id": int, "caption": str})
        for image, text in records(paths, caption, "annotations"):
            captions[image].append(text.strip())

    def picture(record: dict) -> tuple:
        name, file = check(record, {"id": int, "file_name": str})
        known = split == "submit" or name in captions
        assert known, f"no record of 'annotations' has its 'id', {name}"
        return name, Path(file).stem
    for name, image in records(paths, picture, "images"):
        yield from captioned(split, captions.get(name, []), id=name, text="", images=(image,))


# ------------------------------------------------------------------------------------------ clips

def read_span(record: dict) -> tuple[float, float] | None:
    """`ts`, "1.5-20" or [1.5, 20], in seconds; None where there is none.

    It is the part of the video that is asked about or described. The frames are those of the whole
    video, and so are the subtitles (by default), so the span also stands in the text.
    """
    (ts,) = check(record, {"ts?": (str, list)})
    if ts in NO_SPAN:
        return None
    times = ts
    if isinstance(ts, str):
        found = SPAN.fullmatch(ts)
        times = list(map(float, found.groups())) if found else []
    fine = fits(times, [Number(0)]) and len(times) == 2 and times[0] <= times[1]
    assert fine, f"'ts' should be \"start-end\" in seconds, such as \"1.5-20\", not {ts!r:.60}"
    return float(times[0]), float(times[1])


def span_text(span: tuple[float, float] | None) -> str:
    return "" if span is None else f"({span[0]:.10g}, {span[1]:.10g})"


def answered(split: str, record: dict, field: str) -> bool:
    """A test split may keep its answers, a record's or all of them."""
    return split != "submit" and not (split == "test" and record.get(field) in (None, []))


def with_subtitles(clips: Iterable[dict], path: Path, subtitles: str) -> Iterator[dict]:
    """Examples without their `span` and, as `context`, what is said in the whole video, as the
    papers show it; of subtitles "span", what is said while the span lasts, if only in part."""
    fields = {"text": str, "start": Number(), "end": Number()}

    def video(record: dict) -> tuple[str, list[tuple]]:
        name, listed = check(record, {"vid_name": str, "sub": list})
        said = []
        for subtitle in listed:
            text, start, end = check(subtitle, fields)
            said.append((min(start, end), max(start, end), " ".join(text.split())))
        return name, said

    clips = list(clips)
    spoken = {clip["images"]: [] for clip in clips}
    for name, said in records([path], video, lines=True):
        if (name,) in spoken:
            spoken[name,] += said
    for said in spoken.values():
        said.sort(key=itemgetter(0))
    for clip in clips:
        span = clip.pop("span")
        first, last = -math.inf, math.inf
        if subtitles == "span" and span is not None:
            first, last = span
        said = [text for start, end, text in spoken[clip["images"]]
                if text and start < last and end > first]
        yield clip | {"context": " ".join(said)}


def read_choices(split: str, paths: list[Path], choices: int = 5,
                 subtitles: str = "all") -> Iterator[dict]:
    """Questions about clips, {vid_name, qid, q, a0, ... a4 (how2qa: a3), ts, answer_idx}. The
    answer is the right choice's name, "a0" or another."""
    names = [f"a{number}" for number in range(choices)]
    fields = {"vid_name": str, "qid": ID, "q": str} | dict.fromkeys(names, str)

    def clip(record: dict) -> dict:
        video, question, text, *answers = check(record, fields)
        span = read_span(record)
        parts = [text.strip()]
        if span is not None:
            parts.append(span_text(span))
        # One full stop, as the papers write it, whatever ends the published answer.
        parts += [f"{name}: {answer.strip('. ')}." for name, answer in zip(names, answers)]
        targets = {}
        if answered(split, record, "answer_idx"):
            (right,) = check(record, {"answer_idx": Number(0, choices - 1, whole=True)})
            targets = {names[right]: 1.0}
        return dict(id=question, text=" ".join(parts), images=(video,), targets=targets, span=span)
    return with_subtitles(records(paths[:-1], clip, lines=True), paths[-1], subtitles)


def read_clip_captions(split: str, paths: list[Path], spans: bool = False,
                       subtitles: str = "all") -> Iterator[dict]:
    """Clips to describe, {vid_name, ts, descs [{desc, desc_id}], clip_id}, with their span as text
    if `spans`. For training an example a caption; else an example a clip with all its captions,
    from whatever records they come."""
    def clip(record: dict) -> tuple[tuple, list[str]]:
        video, name = check(record, {"vid_name": str, "clip_id?": ID})
        span = read_span(record)
        if name is None:                              # "friends_s01e03_seg02_clip_19:1.5-20"
            name = video if span is None else f"{video}:{span[0]:.10g}-{span[1]:.10g}"
        captions = []
        if answered(split, record, "descs"):
            captions = [text.strip() for text in texts(record, "descs", "desc")]
            fine = captions and all(captions)
            assert fine, "'descs' should hold one caption or more, none without words"
        return (name, video, span), captions

    found, clips = defaultdict(list), []
    for key, captions in records(paths[:-1], clip, lines=True):
        found[key] += captions
    for (name, video, span), captions in found.items():
        text = span_text(span) if spans else ""
        clips += captioned(split, captions, id=name, text=text, images=(video,), span=span)
    return with_subtitles(clips, paths[-1], subtitles)
