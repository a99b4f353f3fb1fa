"""How does a published record become an example?

Readers of the files of VQAv2, GQA, NLVR2 and COCO, in the layout of VL-T5 (arXiv 2102.02779), which
both papers train on, and in the benchmarks' own. A reader takes (split, the paths of its files) and
yields Examples. Every complaint names file, record and field. A split "submit" has questions
without answers. Which reader reads which files: data.py's TASKS.

    python -m pytest tests/test_data.py
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from support.metrics import normalize_answer
from support.records import records, take

CHOICES = ("false", "true")  # nlvr's answers
LABELS = {0: "false", 1: "true", "False": "false", "True": "true"}
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class Example:
    """One question, statement or picture, whatever the task. Equal fields share their objects."""

    task: str
    id: int | str  # as published: question_id, nlvr's identifier, cocoid
    text: str  # the question or sentence; "" for captions
    images: tuple[str, ...]  # picture ids: two for nlvr, else one; a video task's: one video
    targets: dict[str, float]  # answer -> soft score in (0, 1]; may be empty in a test split
    references: list[str] | None = None  # what the metric compares with: raw answers or captions
    context: str = ""  # a clip's subtitles: they stand before the text, cut to the room it leaves


@lru_cache(maxsize=1 << 18)
def share(kind: type, items: tuple):
    """kind(items), the same object for equal items: of a million answers most are "yes" or "no"."""
    return kind(items)


def take_label(record: dict, where: str) -> dict[str, float]:
    """`label` {answer: soft score}, without the answers that score 0; or `answer`, a sure one."""
    label = take(record, ("label", "answer"), (dict, str), where)
    label = {label: 1} if isinstance(label, str) else label
    for answer, soft in label.items():
        if not isinstance(soft, (int, float)) or not 0 <= soft <= 1:
            raise ValueError(f"{where}: 'label' should score {answer!r} in 0..1, not {soft!r:.60}.")
    return share(dict, tuple((answer, float(soft)) for answer, soft in label.items() if soft > 0))


def read_questions(task: str, split: str, paths: list[Path]) -> Iterator[Example]:
    """VL-T5's lists of {question_id, img_id, sent, label}, and GQA's objects
    {question id: {imageId, question, answer}}."""
    for path in paths:
        for where, name, record in records(path):
            if isinstance(name, int):
                name = take(record, ("question_id",), (int, str), where)
            text = take(record, ("sent", "question"), str, where)
            images = share(tuple, (take(record, ("img_id", "imageId"), str, where),))
            targets = {} if split == "submit" else take_label(record, where)
            yield Example(task, name, text, images, targets)


def read_people(path: Path, wanted: Callable[[dict, str], bool]) -> Iterator[tuple]:
    """(question id, its ten annotators' answers) of VQA's annotations, of the wanted records."""
    for where, _, record in records(path, "annotations"):
        question = take(record, ("question_id",), (int, str), where)
        if wanted(record, where):
            people, where = take(record, ("answers",), list, where), f"{where}, 'answers'"
            yield question, [sys.intern(take(a, ("answer",), str, where)) for a in people]


def read_vqa(split: str, paths: list[Path]) -> Iterable[Example]:
    """Questions, and for testing the ten annotators' raw answers that the official metric needs.

    Karpathy's val and test pictures both come from COCO's val2014, hence one file of answers.
    Without it the metric falls back on the soft scores of `label`, which is a little generous.
    """
    examples = list(read_questions("vqa", split, paths))
    if split not in ("val", "test"):
        return examples
    path, ids = paths[0].parent / "v2_mscoco_val2014_annotations.json", {ex.id for ex in examples}
    raw = dict(read_people(path, lambda r, _: r["question_id"] in ids)) if path.exists() else {}
    if lost := len(ids) - len(raw):
        print(f"vqa {split}: {lost} of {len(ids)} questions have no raw answers in {path}: scored "
              "by the soft scores of their 'label'")
    return [replace(ex, references=raw.get(ex.id)) for ex in examples]


spell = lru_cache(maxsize=1 << 18)(normalize_answer)


def soft_scores(people: list[str]) -> dict[str, float]:
    """{answer: 0.3, 0.6, 0.9 or 1 for 1, 2, 3 or more annotators}, the commonest first, spelled as
    the metric compares it ("The Dog." is "dog")."""
    counts = Counter(map(spell, people)).most_common()
    return share(dict, tuple((a, (0.3, 0.6, 0.9, 1.0)[min(n, 4) - 1]) for a, n in counts if a))


def read_vqa2(split: str, paths: list[Path], ids: set[int] | None = None) -> Iterator[Example]:
    """VQAv2's own questions and annotations, pair after pair; given ids, only of these pictures."""

    def wanted(record: dict, where: str) -> bool:
        return ids is None or take(record, ("image_id",), int, where) in ids

    for questions, annotations in zip(paths[::2], paths[1::2] or [None]):
        found = {}
        for question, people in read_people(annotations, wanted) if annotations else ():
            found[question] = soft_scores(people), None if split == "train" else people
        year = questions.name.split("_")[3].replace("-dev", "")  # train2014
        for where, _, record in records(questions, "questions"):
            if not wanted(record, where):
                continue
            question = take(record, ("question_id",), int, where)
            if annotations and question not in found:
                raise ValueError(f"{where}: 'question_id' {question} is not in {annotations}.")
            image = f"COCO_{year}_{take(record, ('image_id',), int, where):012d}"
            text, known = take(record, ("question",), str, where), found.get(question, ({}, None))
            yield Example("vqa", question, text, share(tuple, (image,)), *known)


def read_vqa2_karpathy(split: str, paths: list[Path]) -> Iterator[Example]:
    """VQAv2's own files, split by the pictures' split in Karpathy's file, which is the last."""
    *pairs, path = paths
    images = records(path, "images")
    ids = {take(r, ("cocoid",), int, w) for w, _, r in images if karpathy_split(r, w) == split}
    return read_vqa2(split, pairs, ids)


def read_nlvr(split: str, paths: list[Path]) -> Iterator[Example]:
    """VL-T5's lists of statements about pictures img0 and img1; and NLVR2's own lines, where those
    of "dev-850-0-1" are "dev-850-0-img0" and "dev-850-0-img1"."""
    for path in paths:
        for where, _, record in records(path, lines=True):
            name = take(record, ("identifier",), str, where)
            label = take(record, ("label",), (int, str), where)
            if label not in LABELS:
                raise ValueError(f"{where}: 'label' should be one of {[*LABELS]}, not {label!r}.")
            text, targets = take(record, ("sent", "sentence"), str, where), {LABELS[label]: 1.0}
            named = {img: f"{name.rpartition('-')[0]}-{img}" for img in ("img0", "img1")} | record
            images = tuple(take(named, (img,), str, where) for img in ("img0", "img1"))
            yield Example("nlvr", name, text, images, targets)


def captioned(split: str, number: int | str, image: str, captions: list[str]) -> Iterator[Example]:
    """An example a caption for training, a picture for testing."""
    images, captions = (image,), [caption.strip() for caption in captions]
    if split == "train":
        for i, text in enumerate(captions):
            yield Example("caption", f"{number}#{i}", "", images, {text: 1.0}, [text])
    else:
        yield Example("caption", number, "", images, dict.fromkeys(captions, 1.0), captions)


def karpathy_split(record: dict, where: str) -> str:
    part = take(record, ("split",), str, where)
    if part not in KARPATHY:
        raise ValueError(f"{where}: 'split' should be one of {[*KARPATHY]}, not {part!r}.")
    return KARPATHY[part]


def read_karpathy(split: str, paths: list[Path]) -> Iterator[Example]:
    """Karpathy's dataset_coco.json."""
    for where, _, record in records(paths[0], "images"):
        if karpathy_split(record, where) == split:
            number = take(record, ("cocoid",), (int, str), where)
            image = Path(take(record, ("filename",), str, where)).stem
            captions = take(record, ("sentences",), list, where)
            if not captions:
                raise ValueError(f"{where}: 'sentences' is empty; a picture needs a caption.")
            captions = [take(s, ("raw",), str, f"{where}, 'sentences'") for s in captions]
            yield from captioned(split, number, image, captions)


def read_coco(split: str, paths: list[Path]) -> Iterator[Example]:
    """COCO's own captions_*.json; to submit, image_info_*.json, which has pictures only."""
    captions = defaultdict(list)
    for where, _, record in records(paths[0], "annotations") if split != "submit" else ():
        number = take(record, ("image_id",), int, where)
        captions[number].append(take(record, ("caption",), str, where))
    for where, _, record in records(paths[0], "images"):
        number = take(record, ("id",), int, where)
        if split != "submit" and number not in captions:
            raise ValueError(f"{where}: no record of 'annotations' has its 'id', {number}.")
        image = Path(take(record, ("file_name",), str, where)).stem
        yield from captioned(split, number, image, captions.get(number, []))
