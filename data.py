"""What is an example of each task?

TASKS is the whole answer for the eye: what each task reads, how its text and its answer look, how
long they may be, how many examples share a batch, how an answer is decoded. Below it: readers of
the published files (the layout of VL-T5, arXiv 2102.02779, which both papers train on), collation
into tensors, and the sampler that mixes the tasks.

    examples = load("vqa", "train", "data")          # reads data/vqa/karpathy_train.json
    for task, indices in batches({"vqa": examples}, b=64, epoch=0, seed=42): ...

The built-in data set (world.py) writes the same files, so it goes through the same code.

    python -m pytest tests/test_data.py

Axes: B batch, P pictures an example, N visual tokens a picture, F feature width,
L encoder tokens, T target tokens.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Example:
    """One question, statement or picture, whatever the task."""

    task: str
    id: int | str  # as published: question_id, nlvr's identifier, cocoid
    text: str  # the question or sentence; "" for captions
    images: tuple[str, ...]  # picture ids: two for nlvr, else one
    targets: dict[str, float]  # answer -> soft score in (0, 1]; may be empty in a test split
    references: list[str] | None = None  # what the metric compares with: raw answers or captions


# ----------------------------------------------------------------------------------------- reading
# A reader takes (path, split) and yields Examples. Every complaint names file, record and field.


def read_json(path: Path) -> list | dict:
    """The contents of a JSON file; ValueError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the data folder needs this file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch or write it again.") from None


def records(path: Path, key: str | None = None) -> Iterator[tuple[str, dict]]:
    """(where, record) of a file that is a list of records, or an object with that list at key."""
    content = read_json(path)
    if key is not None:
        content = take(content, (key,), list, str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} should hold a list of records, not a {type(content).__name__}.")
    for number, record in enumerate(content):
        yield f"{path}, record {number}", record


def take(record: dict, names: tuple[str, ...], kind: type | tuple[type, ...], where: str):
    """The first of these fields that the record has, checked to be of this kind."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} should be an object with fields, not {record!r:.60}.")
    for name in names:
        if name in record:
            if isinstance(record[name], kind):
                return record[name]
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: {name!r} should be {kinds}, not {record[name]!r:.60}.")
    raise ValueError(f"{where}: field {' or '.join(map(repr, names))} is missing.")


def take_label(record: dict, where: str) -> dict[str, float]:
    """The field `label` {answer: soft score}, without the answers that score 0."""
    label = take(record, ("label",), dict, where)
    for answer, soft in label.items():
        if not isinstance(soft, (int, float)) or not 0 <= soft <= 1:
            raise ValueError(f"{where}: 'label' should score {answer!r} in 0..1, not {soft!r:.60}.")
    return {answer: float(soft) for answer, soft in label.items() if soft > 0}


def read_questions(task: str, path: Path) -> Iterator[Example]:
    """VL-T5's lists of questions: question_id, img_id, sent, label."""
    for where, record in records(path):
        yield Example(
            task,
            take(record, ("question_id",), (int, str), where),
            take(record, ("sent", "question"), str, where),
            (take(record, ("img_id",), str, where),),
            take_label(record, where),
        )


def read_gqa(path: Path, split: str) -> Iterable[Example]:
    return read_questions("gqa", path)


def read_vqa(path: Path, split: str) -> Iterable[Example]:
    """Questions, and for testing the ten annotators' raw answers that the official metric needs.

    Karpathy's val and test pictures both come from COCO's val2014, hence one file of answers.
    Without it the metric falls back on the soft scores of `label`, which is a little generous.
    """
    examples = list(read_questions("vqa", path))
    answers_path = path.parent / "v2_mscoco_val2014_annotations.json"
    if split == "train":
        return examples
    wanted, raw = {ex.id for ex in examples}, {}
    for where, record in records(answers_path, "annotations") if answers_path.exists() else ():
        question = take(record, ("question_id",), (int, str), where)
        if question in wanted:
            answers = take(record, ("answers",), list, where)
            raw[question] = [take(a, ("answer",), str, f"{where}, 'answers'") for a in answers]
    if len(raw) < len(wanted):
        print(
            f"vqa {split}: {answers_path} is missing or lacks {len(wanted) - len(raw)} of "
            f"{len(wanted)} questions, which are scored by the soft scores of their 'label'"
        )
    return [replace(ex, references=raw.get(ex.id)) for ex in examples]


def read_nlvr(path: Path, split: str) -> Iterator[Example]:
    """VL-T5's lists of statements about two pictures; the label is 0 or 1."""
    for where, record in records(path):
        label = take(record, ("label",), int, where)
        if label not in (0, 1):
            raise ValueError(f"{where}: 'label' should be 0 or 1, not {label!r}.")
        yield Example(
            "nlvr",
            take(record, ("identifier",), str, where),
            take(record, ("sent",), str, where),
            (take(record, ("img0",), str, where), take(record, ("img1",), str, where)),
            {CHOICES[label]: 1.0},
        )


def read_coco(path: Path, split: str) -> Iterator[Example]:
    """Karpathy's dataset_coco.json: an example a caption for training, a picture for testing."""
    for where, record in records(path, "images"):
        part = take(record, ("split",), str, where)
        if part not in KARPATHY:
            raise ValueError(f"{where}: 'split' should be one of {list(KARPATHY)}, not {part!r}.")
        if KARPATHY[part] != split:
            continue
        number = take(record, ("cocoid",), (int, str), where)
        images = (Path(take(record, ("filename",), str, where)).stem,)
        sentences = take(record, ("sentences",), list, where)
        captions = [take(s, ("raw",), str, f"{where}, 'sentences'").strip() for s in sentences]
        if not captions:
            raise ValueError(f"{where}: 'sentences' is empty; a picture needs a caption.")
        if split == "train":
            for i, text in enumerate(captions):
                yield Example("caption", f"{number}#{i}", "", images, {text: 1.0}, [text])
        else:
            yield Example("caption", number, "", images, dict.fromkeys(captions, 1.0), captions)


CHOICES = ("false", "true")  # nlvr's answers, at their label's place
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
SPLITS = ("train", "val", "test")


# ----------------------------------------------------------------------------------------- a table


@dataclass(frozen=True)
class Task:
    """How one task is read, written as text, batched, trained and answered."""

    prefix: str  # the task's name in the encoder text
    text_tokens: int | None  # longest encoder text and target, special tokens included
    target_tokens: int
    share: tuple[int, int]  # batch size as a fraction of vqa's
    loss: str  # mean over "examples", over "tokens" of the batch, or over examples times "score"
    decode: str  # "greedy", "beam" (5 beams) or "choice" (compare the logits of CHOICES)
    read: Callable[[Path, str], Iterable[Example]]
    files: dict[str, tuple[str, ...]]  # of each split, under the data folder


TASKS = {
    "vqa": Task(
        "vqa: ", 20, 10, (60, 60), "score", "greedy", read_vqa,
        {split: (f"vqa/karpathy_{split}.json",) for split in SPLITS},
    ),
    "gqa": Task(
        "gqa: ", 20, 10, (100, 60), "examples", "greedy", read_gqa,
        {  # GQA keeps its test answers to itself, so papers report test-dev and train on valid
            "train": ("GQA/train.json", "GQA/valid.json"),
            "val": ("GQA/testdev.json",),
            "test": ("GQA/testdev.json",),
        },
    ),
    "nlvr": Task(
        "nlvr: ", None, 10, (20, 60), "examples", "choice", read_nlvr,
        {"train": ("nlvr/train.json",), "val": ("nlvr/valid.json",), "test": ("nlvr/test.json",)},
    ),
    "caption": Task(
        "caption: ", 40, 20, (50, 60), "tokens", "beam", read_coco,
        {split: ("COCO/dataset_coco.json",) for split in SPLITS},
    ),
}  # fmt: skip


def load(task: str, split: str, folder: str | Path) -> list[Example]:
    """The examples of one split ("train", "val", "test"), in the files' order.

    Training examples without any scored answer are left out (their number is printed); in the
    other splits they stay, as the metric counts them. Raises ValueError naming file, record and
    field for whatever is missing, broken or empty.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; the tasks are {list(TASKS)}.")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; the splits are {list(SPLITS)}.")
    names = TASKS[task].files[split]
    found = [ex for name in names for ex in TASKS[task].read(Path(folder) / name, split)]
    examples = found if split != "train" else [ex for ex in found if ex.targets]
    if not examples:
        raise ValueError(
            f"{task} {split}: {' and '.join(str(Path(folder) / name) for name in names)} "
            f"has no {'answered ' if found else ''}example of this split."
        )
    if len(examples) < len(found):
        missing = len(found) - len(examples)
        print(f"{task} {split}: {missing} of {len(found)} examples have no answer and are left out")
    return examples


# ------------------------------------------------------------------------------------- to tensors


@dataclass(frozen=True)
class Batch:
    """Examples as tensors. Visual axis: P pictures x N tokens, row-major each."""

    tasks: tuple[str, ...]  # B: the task of each example
    input_ids: Tensor  # B, L long, padded on the right
    feats: Tensor  # B, P*N, F float32
    boxes: Tensor  # B, P*N, 4 float32: x1, x2, y1, y2 in 0..1 (zeros if so wished)
    image_ids: Tensor  # B, P*N long: 0 for the first picture, 1 for the second
    order_ids: Tensor  # B, P*N long: 0..N-1, again for each picture
    seen: Tensor | None  # B, P*N bool: False on padding (where some have two pictures); None: all
    labels: Tensor  # B, T long, -100 on padding
    weights: Tensor  # B float32: of the cross-entropy of each of the example's target tokens

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def draw_answer(example: Example, seed_key: tuple | None) -> tuple[str, float]:
    """(answer, soft score): one answer drawn in proportion to its soft score.

    The draw depends on (seed_key, example.id) and nothing else: not on workers, batch or order.
    Without a key it is the best answer, and ("", 0) if there is none.
    """
    if len(example.targets) <= 1 or seed_key is None:
        return max(example.targets.items(), key=lambda item: item[1], default=("", 0.0))
    digest = hashlib.blake2b(repr((seed_key, example.id)).encode(), digest_size=7).digest()
    left = int.from_bytes(digest, "big") / 2**56 * sum(example.targets.values())  # in [0, total)
    for answer, soft in example.targets.items():
        if left < soft:
            return answer, soft
        left -= soft
    return answer, soft  # rounding can leave a crumb: it is the last answer's


@lru_cache(maxsize=1 << 18)
def token_ids(tokenizer, text: str, max_length: int | None) -> list[int]:
    """A text is tokenised once: questions and answers come back every epoch."""
    return tokenizer.encode(text, max_length=max_length)


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Lists of ids, filled up on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


@lru_cache
def grid_boxes(tokens: int) -> Tensor:
    """(N, 4) boxes x1, x2, y1, y2 of a square grid's cells, row by row: the first is left-most."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"{tokens} visual tokens are not a square grid and have no boxes: use boxes='zero'."
        )
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    boxes = torch.stack([x, x + 1, y, y + 1], dim=-1) / side  # side, side, 4
    return boxes.reshape(tokens, 4)


def loss_weights(kinds: list[str], scores: Tensor, labels: Tensor) -> Tensor:
    """Weights w (B,) with which a batch's loss is sum_i w_i sum_t CE_it, as the papers train:

    "examples": the mean over examples of the mean over their tokens; "score": the same, times the
    soft score of the drawn answer; "tokens": the mean over all tokens of these examples. Where
    kinds meet in one batch, each counts by its share of the examples.
    """
    count = (labels != -100).sum(1).float()
    by_token = torch.tensor([kind == "tokens" for kind in kinds])
    mean = torch.where(by_token, (count * by_token).sum() / by_token.sum().clamp(min=1), count)
    scored = torch.tensor([kind == "score" for kind in kinds])
    return torch.where(scored, scores, 1.0) / mean / len(kinds)


def collate(
    examples: list[Example],
    tokenizer,
    features,
    *,
    task_names: bool = True,
    boxes: str = "grid",
    seed_key: tuple | None = None,
) -> Batch:
    """Examples -> Batch; they may belong to different tasks.

    tokenizer: has encode(text, max_length=None) -> ids with special tokens, and pad_id.
    features: has stack(picture ids) -> (pictures, N, F) float32.
    task_names: put the task's name ("vqa: ") before the text.
    boxes: "grid" gives each visual token its cell's box; "zero" is what the papers' code feeds.
    seed_key: (seed, epoch) when training, which draws the answers; None takes the best ones.
    """
    if boxes not in ("grid", "zero"):
        raise ValueError(f"boxes is {boxes!r}; it may be 'grid' or 'zero'.")
    tasks = [TASKS[ex.task] for ex in examples]
    texts = [
        token_ids(tokenizer, (task.prefix if task_names else "") + ex.text, task.text_tokens)
        for ex, task in zip(examples, tasks)
    ]
    drawn = [draw_answer(ex, seed_key) for ex in examples]
    answers = [
        token_ids(tokenizer, answer, task.target_tokens)
        for (answer, _), task in zip(drawn, tasks)
    ]
    labels, scores = pad(answers, -100), torch.tensor([soft for _, soft in drawn])

    feats = torch.as_tensor(features.stack([i for ex in examples for i in ex.images]))  # B*P, N, F
    size, pictures, tokens = len(examples), [len(ex.images) for ex in examples], feats.shape[1]
    most = max(pictures)
    seen = None
    if min(pictures) == most:
        feats = feats.reshape(size, most * tokens, feats.shape[2])
    else:
        feats = pad_sequence([f.flatten(0, 1) for f in feats.split(pictures)], batch_first=True)
        seen = torch.arange(most * tokens) < torch.tensor(pictures)[:, None] * tokens
    corners = grid_boxes(tokens) if boxes == "grid" else torch.zeros(tokens, 4)
    return Batch(
        tasks=tuple(ex.task for ex in examples),
        input_ids=pad(texts, tokenizer.pad_id),
        feats=feats,
        boxes=corners.repeat(most, 1).expand(size, most * tokens, 4),
        image_ids=torch.arange(most).repeat_interleave(tokens).expand(size, most * tokens),
        order_ids=torch.arange(tokens).repeat(most).expand(size, most * tokens),
        seen=seen,
        labels=labels,
        weights=loss_weights([task.loss for task in tasks], scores, labels),
    )


# ------------------------------------------------------------------------------------- the sampler


def batch_size(task: str, b: int) -> int:
    """Examples a batch of this task: b = 500 gives vqa 500, gqa 833, nlvr 166, caption 416."""
    part, whole = TASKS[task].share
    return max(1, b * part // whole)


def steps_per_epoch(datasets: dict[str, list[Example]], b: int) -> int:
    """How many batches `batches` yields."""
    return sum(math.ceil(len(examples) / batch_size(t, b)) for t, examples in datasets.items())


def batches(
    datasets: dict[str, list[Example]], b: int, epoch: int, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """(task, indices into its examples): every batch of every task exactly once, shuffled.

    A task so appears in proportion to its size. The order depends on (seed, epoch) alone: to
    resume within an epoch, skip the batches already done.
    """
    plan = []
    for task, examples in datasets.items():
        order = list(range(len(examples)))
        random.Random(f"{seed} {epoch} {task}").shuffle(order)
        size = batch_size(task, b)
        plan += [(task, order[i : i + size]) for i in range(0, len(order), size)]
    random.Random(f"{seed} {epoch}").shuffle(plan)
    yield from plan
