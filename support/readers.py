"""How does a published record become an example?

Readers of the annotations of VQAv2, GQA, NLVR2 and COCO, in the layout of VL-T5 (arXiv 2102.02779),
which both papers train on, and in the benchmarks' own; and of clips with their subtitles, in the
files of the VALUE benchmark (arXiv 2106.04632), one JSON record a line:

    tvqa, how2qa   {vid_name, qid, q, a0, ... a4 (how2qa: a3), ts, answer_idx}  answer "a<k>"
    tvc, yc2c      {vid_name, ts, descs [{desc, desc_id}], clip_id}             answer: a desc
    subtitles      {vid_name, sub [{text, start, end}]}                         times in seconds

A reader takes (split, the paths of its files) and yields the fields of data.Example but the task,
in the files' order. In a split "submit" nothing has an answer. Every complaint is a BadInput that
names file, record and field. Which reader reads which files: data.py's TASKS.

    python -m pytest tests/test_readers.py
"""
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from support.gate import Number, check, fits, read_text, reading
from support.metrics import normalize_answer, vqa_accuracy

BIG = 20_000_000                                      # characters of a file that gets a bar
BLANK = re.compile(r"[ \t\r\n]*")                     # what JSON calls white space
DECODE = json.JSONDecoder().raw_decode                # (text, start) -> (value, end)
CLOSING = {"[": "]", "{": "}"}

LABELS = {0: "false", 1: "true", "False": "false", "True": "true"}                      # of nlvr
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
SOFT_SCORES = {1: 0.3, 2: 0.6, 3: 0.9}                # for so many annotators; 1 for more

Span = tuple[float, float]                            # from, to, in seconds
Subtitles = list[tuple[float, float, str]]            # from, to, text
SPAN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*-\s*(\d+(?:\.\d*)?|\.\d+)\s*")
NO_SPAN = (None, "", "NaN-NaN")                       # TVQA knows no time for a few questions


# ---------------------------------------------------------------------------------- JSON records

class Document:
    """A JSON text and how far it is read: the whole text is in memory, its values need not be."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        self.at = BLANK.match(self.text, self.at).end()
        return self.text[self.at:self.at + 1]

    def skip(self, char: str) -> None:
        assert self.peek() == char, f"broken JSON: {char!r} should stand at character {self.at}"
        self.at += 1

    def value(self) -> object:
        self.peek()
        value, self.at = DECODE(self.text, self.at)
        return value

    def members(self) -> Iterator[int | str]:
        """The numbers or names of a list's or object's members; the caller reads their values."""
        opening = self.peek()
        assert opening in CLOSING, f"a list or object should stand at character {self.at}"
        self.at += 1
        number = 0
        while self.peek() != CLOSING[opening]:
            if number > 0:
                self.skip(",")
            name = number
            if opening == "{":
                name = self.value()
                assert isinstance(name, str), f"broken JSON: the name {name!r:.60} is no text"
                self.skip(":")
            yield name
            number += 1
        self.at += 1

    def members_of(self, key: str) -> Iterator[int | str]:
        """The same for the list at `key` of an object; all else in the object is passed over."""
        found = False
        for name in self.members():
            if name != key:
                self.value()
                continue
            assert not found, f"field {key!r} is there twice"
            found = True
            yield from self.members()
        assert found, f"field {key!r} is missing"

    def lines(self) -> Iterator[int]:
        """The numbers of values that stand one behind the other."""
        number = 0
        while self.peek():
            yield number
            number += 1


def records(path: Path, key: str | None = None, lines: bool = False) -> Iterator[tuple]:
    """(number or name, record) for each member of a file's list or object.

    With `key`: of the list at `key` of the file's object. With `lines`: of records one behind the
    other, if the file begins with one (only the caller knows: an object of records begins alike).
    """
    document = Document(read_text(path))
    size = len(document.text)
    bar = tqdm(total=size, desc=f"read {path.name}", unit="char", unit_scale=True, leave=False,
               disable=size < BIG)
    names = document.members()
    if key is not None:
        names = document.members_of(key)
    elif lines and document.peek() == "{":
        names = document.lines()
    with reading(path), bar:
        for name in names:
            with reading(path, name):
                record = document.value()
            bar.update(document.at - bar.n)
            yield name, record
        assert not document.peek(), f"broken JSON: more than one value, at character {document.at}"


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


# ------------------------------------------------------------------------------ vqa, gqa: questions

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
    for path in paths:
        for name, record in records(path):
            with reading(path, name):
                text, image = check(record, {"sent|question": str, "img_id|imageId": str})
                named = {"question_id": name} if isinstance(name, str) else record
                (question,) = check(named, {"question_id": (int, str)})
                targets = {}
                if split != "submit":
                    targets = read_label(record)
            yield dict(id=question, text=text, images=share(tuple, (image,)), targets=targets)


def read_people(path: Path, split: str, field: str, wanted: set | None) -> Iterator[tuple]:
    """(question id, its ten annotators' answers) of VQA's annotations whose `field`, an id, is
    wanted (None: of all)."""
    for number, record in records(path, "annotations"):
        with reading(path, number):
            (question,) = check(record, {"question_id": (int, str)})
            (about,) = check(record, {field: (int, str)})
            if wanted is not None and about not in wanted:
                continue
            people = [sys.intern(answer) for answer in texts(record, "answers", "answer")]
            fine = split == "train" or len(people) not in (1, 2, 3)
            assert fine, (f"question {question} has {len(people)} answers, and three other people "
                          "must agree to make one right: take VL-T5's layout and its 'label' alone")
        yield question, people


def read_vqa(split: str, paths: list[Path]) -> Iterator[dict]:
    """Questions, and for testing the ten annotators' raw answers that the official metric needs.

    Karpathy's val and test pictures both come from COCO's val2014, hence one file of answers.
    Without it the metric falls back on the soft scores of `label`, which is a little generous.
    """
    if split not in ("val", "test"):
        yield from read_questions(split, paths)
        return
    examples = list(read_questions(split, paths))
    ids = {example["id"] for example in examples}
    path = paths[0].parent / "v2_mscoco_val2014_annotations.json"
    people = {}
    if path.exists():
        people = dict(read_people(path, split, "question_id", ids))
    if len(people) < len(ids):
        print(f"vqa {split}: {len(ids) - len(people)} of {len(ids)} questions have no raw answers "
              f"in {path}: scored by the soft scores of their 'label'")
    for example in examples:
        yield example | {"references": people.get(example["id"])}


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


def read_vqa2(split: str, paths: list[Path], images: set[int] | None = None) -> Iterator[dict]:
    """VQAv2's own questions and annotations, pair after pair, of these pictures (None: of all); to
    submit, questions alone."""
    for questions, annotations in zip(paths[::2], paths[1::2] or [None]):
        answers = {}
        if annotations is not None:
            for question, people in read_people(annotations, split, "image_id", images):
                references = None if split == "train" else people
                answers[question] = soft_scores(people), references
        year = questions.name.split("_")[3].replace("-dev", "")     # train2014, test2015
        fields = {"question_id": int, "image_id": int, "question": str}
        for number, record in records(questions, "questions"):
            with reading(questions, number):
                question, image, text = check(record, fields)
                if images is not None and image not in images:
                    continue
                known = annotations is None or question in answers
                assert known, f"'question_id' {question} is not in {annotations}"
                targets, references = answers.get(question, ({}, None))
                shown = share(tuple, (f"COCO_{year}_{image:012d}",))
            yield dict(id=question, text=text, images=shown, targets=targets,
                       references=references)


def read_vqa2_karpathy(split: str, paths: list[Path]) -> Iterator[dict]:
    """VQAv2's own files, split by the pictures' split in Karpathy's file, which is the last."""
    *pairs, path = paths
    images = set()
    for number, record in records(path, "images"):
        with reading(path, number):
            image, part = check(record, {"cocoid": int, "split": set(KARPATHY)})
            if KARPATHY[part] == split:
                images.add(image)
    yield from read_vqa2(split, pairs, images)


# ------------------------------------------------------------------------- nlvr: pairs of pictures

def read_nlvr(split: str, paths: list[Path]) -> Iterator[dict]:
    """VL-T5's lists of statements about pictures img0 and img1; and NLVR2's own lines, where those
    of "dev-850-0-1" are "dev-850-0-img0" and "dev-850-0-img1"."""
    fields = {"identifier": str, "sent|sentence": str, "label": set(LABELS)}
    for path in paths:
        for number, record in records(path, lines=True):
            with reading(path, number):
                name, text, label = check(record, fields)
                pair = name.rpartition("-")[0]
                shown = {"img0": f"{pair}-img0", "img1": f"{pair}-img1"} | record
                images = tuple(check(shown, {"img0": str, "img1": str}))
            yield dict(id=name, text=text, images=images, targets={LABELS[label]: 1.0})


# ----------------------------------------------------------------------- caption: COCO's pictures

def captioned(split: str, captions: list[str], **fields) -> Iterator[dict]:
    """An example a caption for training; else one with all captions, which the metric needs."""
    if split != "train":
        known = {"targets": dict.fromkeys(captions, 1.0), "references": captions or None}
        yield fields | known
        return
    for number, caption in enumerate(captions):
        name = f"{fields['id']}#{number}"
        yield fields | {"id": name, "targets": {caption: 1.0}, "references": [caption]}


def read_karpathy(split: str, paths: list[Path]) -> Iterator[dict]:
    """Karpathy's dataset_coco.json."""
    (path,) = paths
    fields = {"split": set(KARPATHY), "cocoid": (int, str), "filename": str}
    for number, record in records(path, "images"):
        with reading(path, number):
            part, name, file = check(record, fields)
            if KARPATHY[part] != split:
                continue
            captions = [text.strip() for text in texts(record, "sentences", "raw")]
            assert captions, "'sentences' is empty; a picture needs a caption"
        yield from captioned(split, captions, id=name, text="", images=(Path(file).stem,))


def read_coco(split: str, paths: list[Path]) -> Iterator[dict]:
    """COCO's own captions_*.json; to submit, image_info_*.json, which has pictures only."""
    (path,) = paths
    captions = defaultdict(list)
    if split != "submit":
        for number, record in records(path, "annotations"):
            with reading(path, number):
                image, caption = check(record, {"image_id": int, "caption": str})
                captions[image].append(caption.strip())
    for number, record in records(path, "images"):
        with reading(path, number):
            image, file = check(record, {"id": int, "file_name": str})
            known = split == "submit" or image in captions
            assert known, f"no record of 'annotations' has its 'id', {image}"
        described = captions.get(image, [])
        yield from captioned(split, described, id=image, text="", images=(Path(file).stem,))


# ---------------------------------------------------------------------- clips: spans and subtitles

def read_span(record: dict) -> Span | None:
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


def span_text(span: Span | None) -> str:
    return "" if span is None else f"({span[0]:.10g}, {span[1]:.10g})"


def clip_id(video: str, span: Span | None) -> str:
    """A name for a span of a video: "friends_s01e03_seg02_clip_19:1.5-20"."""
    return video if span is None else f"{video}:{span[0]:.10g}-{span[1]:.10g}"


def read_subtitles(path: Path, wanted: set[str]) -> dict[str, Subtitles]:
    """The subtitles of the wanted videos, in the order of time; one that has none is not there."""
    found = defaultdict(list)
    for number, record in records(path, lines=True):
        with reading(path, number):
            video, listed = check(record, {"vid_name": str, "sub": list})
            for subtitle in listed:
                fields = {"text": str, "start": Number(), "end": Number()}
                text, start, end = check(subtitle, fields)
                if video in wanted:
                    text = " ".join(text.split())
                    found[video].append((min(start, end), max(start, end), text))
    for spoken in found.values():
        spoken.sort(key=lambda said: said[0])
    return found


def with_subtitles(clips: list[tuple[Span | None, dict]], path: Path,
                   subtitles: str) -> Iterator[dict]:
    """The fields of examples and, as `context`, what is said in the whole video, as the papers show
    it; of subtitles "span", what is said while the span of each lasts, if only in part."""
    spoken = read_subtitles(path, {fields["images"][0] for _, fields in clips})
    for span, fields in clips:
        first, last = -math.inf, math.inf
        if subtitles == "span" and span is not None:
            first, last = span
        (video,) = fields["images"]
        said = [text for start, end, text in spoken.get(video, [])
                if text and start < last and end > first]
        yield fields | {"context": " ".join(said)}


# ------------------------------------------------------------------------------- clips: examples

def read_choices(split: str, paths: list[Path], choices: int = 5,
                 subtitles: str = "all") -> Iterator[dict]:
    """Questions about clips; the answer is the name of the right choice, "a0" or another."""
    *annotations, spoken = paths
    names = [f"a{number}" for number in range(choices)]
    fields = {"vid_name": str, "qid": (int, str), "q": str} | dict.fromkeys(names, str)
    clips = []
    for path in annotations:
        for number, record in records(path, lines=True):
            with reading(path, number):
                video, question, text, *answers = check(record, fields)
                span = read_span(record)
                parts = [text.strip()]
                if span is not None:
                    parts.append(span_text(span))
                # One full stop, as the papers write it, whatever ends the published answer.
                parts += [f"{name}: {answer.strip('. ')}." for name, answer in zip(names, answers)]
                hidden = split == "test" and record.get("answer_idx") is None
                targets = {}
                if split != "submit" and not hidden:
                    right = {"answer_idx": Number(0, choices - 1, whole=True)}
                    (index,) = check(record, right)
                    targets = {names[index]: 1.0}
            clips.append((span, dict(id=question, text=" ".join(parts), images=(video,),
                                     targets=targets)))
    yield from with_subtitles(clips, spoken, subtitles)


def read_clip_captions(split: str, paths: list[Path], spans: bool = False,
                       subtitles: str = "all") -> Iterator[dict]:
    """Clips to describe, with their span as text if `spans`. For training an example a caption;
    else an example a clip with all its captions, from whatever records they come."""
    *annotations, spoken = paths
    found = defaultdict(list)                         # (name, video, span) -> captions
    for path in annotations:
        for number, record in records(path, lines=True):
            with reading(path, number):
                video, name = check(record, {"vid_name": str, "clip_id?": (int, str)})
                span = read_span(record)
                if name is None:
                    name = clip_id(video, span)
                captions = found[name, video, span]
                hidden = split == "test" and not record.get("descs")
                if split != "submit" and not hidden:
                    described = [text.strip() for text in texts(record, "descs", "desc")]
                    fine = described and all(described)
                    assert fine, "'descs' should hold one caption or more, none without words"
                    captions += described
    clips = []
    for (name, video, span), captions in found.items():
        text = span_text(span) if spans else ""
        for fields in captioned(split, captions, id=name, text=text, images=(video,)):
            clips.append((span, fields))
    yield from with_subtitles(clips, spoken, subtitles)
