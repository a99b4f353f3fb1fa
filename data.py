"""What is an example of each task?

TASKS is the whole answer for the eye: what each task reads, how its text and its answer look, how
long they may be, how many examples share a batch, how an answer is decoded, which files are read
(by readers.py and, of clips, video.py). Below it: collation into tensors, the sampler that mixes
the tasks, and the files that the benchmarks' servers take.

    examples = load("vqa", "train", "data")          # reads data/vqa/karpathy_train.json
    for task, indices in batches({"vqa": examples}, b=64, epoch=0, seed=42): ...
    submission("vqa", answers, examples, "out/vqa")  # writes out/vqa.json

The built-in data set (world.py) writes the same files, so it goes through the same code.

    python -m tools.fetch vqa         # downloads published files (download.py)
    python -m pytest tests/test_data.py

Axes: B batch, P pictures an example, N visual tokens a picture, F feature width,
L encoder tokens, T target tokens.
"""

import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import video
from support.readers import (CHOICES, Example, read_coco, read_karpathy, read_nlvr, read_questions,
                     read_vqa, read_vqa2, read_vqa2_karpathy)


SPLITS = ("train", "val", "test")  # and "submit": the questions whose answers only a server knows


def read_video(task: str, split: str, paths: list[Path]) -> Iterator[Example]:
    """VALUE's lines about video clips."""
    return (Example(**found) for found in video.read(task, split, paths))


# ----------------------------------------------------------------------------------------- a table


@dataclass(frozen=True)
class Layout:
    """One way in which a task's files are published, and who reads them."""

    name: str
    read: Callable[[str, list[Path]], Iterable[Example]]
    files: dict[str, str]  # of each split: names under the data folder, a space between
    note: str = ""  # what its user should know


@dataclass(frozen=True)
class Task:
    """How one task is read, written as text, batched, trained, answered and submitted."""

    prefix: str  # the task's name in the encoder text
    text_tokens: int | None  # longest encoder text and target, special tokens included
    target_tokens: int
    share: tuple[int, int]  # batch size as a fraction of the base b, which is vqa's
    loss: str  # mean over "examples", over "tokens" of the batch, or over examples times "score"
    decode: str  # "greedy", "beam" (5 beams) or "choice" (compare the logits of CHOICES)
    submit: tuple[type, str, str]  # what the benchmark's ids are, its fields of ids and answers
    layouts: tuple[Layout, ...]
    clips: bool = False  # an example shows a clip: frames with subtitles; then its name ends a text


def video_task(task: str, subtitles: str, submit: tuple[type, str, str]) -> Task:
    """A task of VALUE; the answers of its test_public split may be there or not."""
    names = dict(train="train", val="val", test="test_public", submit="test_public")
    files = {split: f"video/ann/{task}/{task}_{name}_release.jsonl video/ann/{subtitles}"
             for split, name in names.items()}
    layouts = (Layout("VALUE's files", partial(read_video, task), files),)
    return Task(f"{task}: ", 600, 20, (1, 1), "examples", "beam", submit, layouts, clips=True)


# fmt: off
QUESTIONS = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
PEOPLE = "vqa/v2_mscoco_{}_annotations.json"
VQA_TRAIN, VQA_VAL = (f"{QUESTIONS} {PEOPLE}".replace("{}", x) for x in ("train2014", "val2014"))
SPLIT_FILE = "COCO/dataset_coco.json"
NO_SPLIT = f"without {SPLIT_FILE}, train2014 trains and val2014 tests, unlike in the papers"

TASKS = {
    "vqa": Task("vqa: ", 20, 10, (60, 60), "score", "greedy", (int, "question_id", "answer"), (
        Layout("VL-T5's files", read_vqa, dict(
            train="vqa/karpathy_train.json", val="vqa/karpathy_val.json",
            test="vqa/karpathy_test.json", submit="vqa/test.json")),
        Layout("VQAv2's files in Karpathy's splits", read_vqa2_karpathy, dict(
            train=f"{VQA_TRAIN} {VQA_VAL} {SPLIT_FILE}", val=f"{VQA_VAL} {SPLIT_FILE}",
            test=f"{VQA_VAL} {SPLIT_FILE}")),
        Layout("VQAv2's files", read_vqa2, dict(
            train=VQA_TRAIN, val=VQA_VAL, test=VQA_VAL, submit=QUESTIONS.format("test2015")),
            NO_SPLIT),
        Layout("VQAv2's test-dev", read_vqa2, dict(submit=QUESTIONS.format("test-dev2015"))))),
    # GQA keeps its test answers to itself, so papers train on train + val and report test-dev.
    "gqa": Task("gqa: ", 20, 10, (100, 60), "examples", "greedy",
                (str, "questionId", "prediction"), (
        Layout("VL-T5's files", partial(read_questions, "gqa"), dict(
            train="GQA/train.json GQA/valid.json", val="GQA/testdev.json",
            test="GQA/testdev.json", submit="GQA/submit.json")),
        Layout("GQA's files", partial(read_questions, "gqa"), dict(
            train="GQA/train_balanced_questions.json GQA/val_balanced_questions.json",
            val="GQA/testdev_balanced_questions.json", test="GQA/testdev_balanced_questions.json",
            submit="GQA/submission_all_questions.json")))),
    "nlvr": Task("nlvr: ", None, 10, (20, 60), "examples", "choice",
                 (str, "identifier", "label"), (
        Layout("VL-T5's files", read_nlvr, dict(
            train="nlvr/train.json", val="nlvr/valid.json", test="nlvr/test.json")),
        Layout("NLVR2's files", read_nlvr, dict(
            train="nlvr/train.json", val="nlvr/dev.json", test="nlvr/test1.json")))),
    "caption": Task("caption: ", 40, 20, (50, 60), "tokens", "beam",
                    (int, "image_id", "caption"), (
        Layout("Karpathy's file", read_karpathy, dict.fromkeys(SPLITS, SPLIT_FILE)),
        Layout("COCO's files", read_coco, dict(
            train="COCO/captions_train2014.json", val="COCO/captions_val2014.json",
            test="COCO/captions_val2014.json", submit="COCO/image_info_test2014.json"),
            NO_SPLIT))),
    "tvqa": video_task("tvqa", "tv_subtitles.jsonl", (str, "qid", "answer_idx")),
    "how2qa": video_task("how2qa", "how2_subtitles.jsonl", (str, "qid", "answer_idx")),
    "tvc": video_task("tvc", "tv_subtitles.jsonl", (int | str, "clip_id", "descs")),
    "yc2c": video_task("yc2c", "yc2_subtitles.jsonl", (int | str, "clip_id", "descs")),
}
# fmt: on


def locate(folder: Path, name: str) -> Path:
    """Where a file is, or should be: COCO's archives unpack into a folder named annotations."""
    path = folder / name
    unpacked = path.parent / "annotations" / path.name
    return unpacked if unpacked.exists() and not path.exists() else path


def find_files(task: str, split: str, folder: Path) -> tuple[Layout, list[Path]]:
    """The layout in which a task's files are there, and the paths of a split.

    It is the first that is complete, else the one that lacks fewest files (then: has most); the
    same for train, val and test, as the training split of one can hold the test split of another.
    """
    def files(layout: Layout, splits: tuple[str, ...]) -> list[str]:
        return list(dict.fromkeys(name for s in splits for name in layout.files[s].split()))

    def lost(layout: Layout, splits: tuple[str, ...]) -> list[str]:
        return [name for name in files(layout, splits) if not locate(folder, name).exists()]

    def rank(layout: Layout) -> tuple[int, int]:
        lacks = len(lost(layout, splits))
        return lacks, lacks - len(files(layout, splits)) if lacks else 0

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that holds the data.")
    splits = SPLITS if split in SPLITS else (split,)
    layouts = [layout for layout in TASKS[task].layouts if split in layout.files]
    if not layouts:
        raise ValueError(f"{task} has no split {split!r}: the answers of its test are published.")
    layouts.sort(key=rank)
    if lost(layouts[0], (split,)):
        ways = [f"{' and '.join(lost(layout, (split,)) or lost(layout, splits))} ({layout.name})"
                for layout in layouts]
        raise ValueError(f"{task} {split}: {folder} lacks {', or '.join(ways)}.")
    return layouts[0], [locate(folder, name) for name in files(layouts[0], (split,))]


class Unanswered(ValueError):
    """The answers of a test split are not public."""


def load(task: str, split: str, folder: str | Path) -> list[Example]:
    """The examples of one split ("train", "val", "test", "submit"), in the files' order.

    Large files show a bar, and of no file more than its examples is held: 1.5 M of GQA's training
    questions, 1.3 GB, in 630 MB (220 of them PyTorch's). "submit" has no targets. Training
    examples without any scored answer are left out (their number is printed); in the other splits
    they stay, as the metric counts them. ValueError names file, record and field of what is
    missing, broken or empty.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; the tasks are {list(TASKS)}.")
    if split not in (*SPLITS, "submit"):
        raise ValueError(f"there is no split {split!r}; the splits are {[*SPLITS, 'submit']}.")
    layout, paths = find_files(task, split, Path(folder))
    if layout.note:
        print(f"{task} {split}: {layout.name} are read; {layout.note}")
    found = list(layout.read(split, paths))
    answered = [ex for ex in found if ex.targets or ex.references]
    if not (found if split == "submit" else answered):
        raise (Unanswered if found and split == "test" else ValueError)(
            f"{task} {split}: {' and '.join(map(str, paths))} has no "
            f"{'answered ' if found else ''}example of this split.")
    if split != "train":
        people = {ex.id: ex.references for ex in found if task == "vqa" and ex.references}
        if few := [i for i, answers in people.items() if len(answers) < 4]:
            raise ValueError(f"vqa {split}: question {few[0]!r} has {len(people[few[0]])} answers, "
                             "and three other people must agree to make one right: take VL-T5's "
                             "layout and its 'label' alone.")
        if twice := [i for i, n in Counter(ex.id for ex in found).items() if n > 1]:
            raise ValueError(f"{task} {split}: {paths[0]} has id {twice[0]!r} more than once and "
                             "would score it so: take the others out.")
        return found
    if missing := len(found) - len(answered):
        print(f"{task} train: {missing} of {len(found)} examples have no answer and are left out")
    return answered


# ------------------------------------------------------------------------------------- to tensors


@dataclass(frozen=True)
class Batch:
    """Examples as tensors. Visual axis: P pictures x N tokens, row-major each; or N frames."""

    tasks: tuple[str, ...]  # B: the task of each example
    input_ids: Tensor  # B, L long, padded on the right
    feats: Tensor  # B, P*N, F float32; or pixels of all pictures, example by example: ., 3, H, W
    boxes: Tensor  # B, P*N, 4 float32: x1, x2, y1, y2 in 0..1 (zeros if so wished)
    image_ids: Tensor  # B, P*N long: 0 for the first picture, 1 for the second
    order_ids: Tensor  # B, P*N long: 0..N-1, again for each picture
    seen: Tensor | None  # B, P*N bool: False on what fills up (pictures, frames); None: all
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


def text_ids(example: Example, tokenizer, task_names: bool = True) -> list[int]:
    """The encoder's text. Of a clip: subtitles, question and choices, task name, where only the
    subtitles are ever cut; ValueError where the rest alone is longer than allowed."""
    task = TASKS[example.task]
    name, most = task.prefix if task_names else "", task.text_tokens
    if not task.clips:
        return token_ids(tokenizer, name + example.text, most)
    # One space ties the parts, for BART tells " Who" from "Who"; T5 does not.
    text = f"{example.text} {name}".strip()
    ids = token_ids(tokenizer, f" {text}" if example.context and text else text, None)
    if len(ids) > most:
        raise ValueError(f"{example.task} {example.id!r}: its question and choices take {len(ids)} "
                         f"tokens, and {most} fit: shorten them.")
    if not example.context:
        return ids
    first = len(token_ids(tokenizer, "", None)) - 1  # BART begins with <s>; both end with </s>
    said = tokenizer.encode(example.context)[first:-1]  # not cached: it may be long
    return ids[:first] + said[: most - len(ids)] + ids[first:]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Lists of ids, filled up on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def frames_seen(ids: list[str], features, tokens: int) -> Tensor:
    """(B, N): which of a clip's N frames are real; a shorter clip is filled up at its end."""
    real = features.frames(ids) if hasattr(features, "frames") else None
    if real is None:
        raise ValueError(f"the features of {ids[0]!r} are of pictures, and its task shows clips: "
                         "pack the frames of the videos.")
    return torch.arange(tokens) < torch.tensor(real)[:, None]


@lru_cache
def grid_boxes(tokens: int, clips: bool = False) -> Tensor:
    """(N, 4) boxes x1, x2, y1, y2 of a square grid's cells, row by row: the first is left-most. Of
    clips: of a film's frames side by side, so that x is the time; the order table tells it,
    too, but its rows are small beside the features and frozen in every row but `full`."""
    rows, columns = (1, tokens) if clips else (math.isqrt(tokens),) * 2
    if rows * columns != tokens:
        raise ValueError(
            f"{tokens} visual tokens are not a square grid and have no boxes: use boxes='zero'."
        )
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    boxes = [x / columns, (x + 1) / columns, y / rows, (y + 1) / rows]  # each: rows, columns
    return torch.stack(boxes, dim=-1).reshape(tokens, 4)


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


def look(examples: list[Example], features, boxes: str, frames: str) -> dict[str, Tensor | None]:
    """The fields of a Batch that say what there is to see."""
    clips = TASKS[examples[0].task].clips
    if any(TASKS[ex.task].clips != clips for ex in examples):
        names = ", ".join(dict.fromkeys(ex.task for ex in examples))
        raise ValueError(f"a batch holds pictures or clips, not both: {names}.")
    ids = [i for ex in examples for i in ex.images]
    feats = torch.as_tensor(features.stack(ids))  # B*P, N, F
    size, pictures = len(examples), [len(ex.images) for ex in examples]
    tokens = feats.shape[1] if feats.dim() == 3 else features.tokens
    most, seen = max(pictures), None
    corners = grid_boxes(tokens, clips) if boxes == "grid" else torch.zeros(tokens, 4)
    if clips and frames == "real":
        seen = frames_seen(ids, features, tokens)
        # Nobody sees what lies behind the longest clip: it would only take time.
        tokens = max(1, int(seen.sum(1).max()))
        feats, seen, corners = feats[:, :tokens], seen[:, :tokens], corners[:tokens]
    elif min(pictures) < most:
        seen = torch.arange(most * tokens) < torch.tensor(pictures)[:, None] * tokens
    if feats.dim() == 3 and min(pictures) == most:
        feats = feats.reshape(size, most * tokens, feats.shape[2])
    elif feats.dim() == 3:
        feats = pad_sequence([f.flatten(0, 1) for f in feats.split(pictures)], batch_first=True)
    return dict(
        feats=feats,
        boxes=corners.repeat(most, 1).expand(size, most * tokens, 4),
        image_ids=torch.arange(most).repeat_interleave(tokens).expand(size, most * tokens),
        order_ids=torch.arange(tokens).repeat(most).expand(size, most * tokens),
        seen=seen,
    )


def collate(
    examples: list[Example],
    tokenizer,
    features,
    *,
    task_names: bool = True,
    boxes: str = "grid",
    frames: str = "real",
    seed_key: tuple | None = None,
) -> Batch:
    """Examples -> Batch; they may belong to different tasks, all of pictures or all of clips.

    tokenizer: has encode(text, max_length=None) -> ids with special tokens, and pad_id.
    features: has stack(picture ids) -> (pictures, N, F) float32; or it gives their pixels
    (pictures, 3, H, W) and has `tokens`, the N that CLIP will make of each. Of clips: stack(video
    ids) -> (B, N, F), a token a frame, and frames(ids) says how many of the N are real.
    task_names: put the task's name ("vqa: ") before the text.
    boxes: "grid" gives each visual token its cell's box, a frame its place in a film; "zero" is
    what the papers' code feeds.
    frames: "real" hides what fills a short clip up, and the batch is as long as its longest clip;
    "all" shows it, 64 frames of every clip, as the papers' code does.
    seed_key: (seed, epoch) when training, which draws the answers; None takes the best ones.
    """
    if boxes not in ("grid", "zero"):
        raise ValueError(f"boxes is {boxes!r}; it may be 'grid' or 'zero'.")
    if frames not in ("real", "all"):
        raise ValueError(f"frames is {frames!r}; it may be 'real' or 'all'.")
    tasks = [TASKS[ex.task] for ex in examples]
    texts = [text_ids(ex, tokenizer, task_names) for ex in examples]
    drawn = [draw_answer(ex, seed_key) for ex in examples]
    answers = [
        token_ids(tokenizer, answer, task.target_tokens) for (answer, _), task in zip(drawn, tasks)
    ]
    labels, scores = pad(answers, -100), torch.tensor([soft for _, soft in drawn])
    return Batch(
        tasks=tuple(ex.task for ex in examples),
        input_ids=pad(texts, tokenizer.pad_id),
        **look(examples, features, boxes, frames),
        labels=labels,
        weights=loss_weights([task.loss for task in tasks], scores, labels),
    )


# ------------------------------------------------------------------------------------- the sampler


def batch_size(task: str, b: int) -> int:
    """Examples a batch of this task: b = 500 gives vqa 500, gqa 833, nlvr 166, caption 416; each
    video task b."""
    part, whole = TASKS[task].share
    return max(1, b * part // whole)


def steps_per_epoch(datasets: dict[str, list[Example]], b: int) -> int:
    """How many batches `batches` yields."""
    return sum(math.ceil(len(examples) / batch_size(t, b)) for t, examples in datasets.items())


# Clips are sorted by length within slices of so many batches. Where subtitles are log-normal about
# 250 tokens, 52 % of what batches of 50 hold is padding if drawn at random, 17 % with slices of 16,
# 15.4 % with 32, and 14.6 % if all is sorted (then only the shuffle's ties would ever change who
# meets whom in a batch).
SLICE = 32


def length(example: Example) -> int:
    """How long an example's text is, in characters: near enough to tokens to sort by, and free.
    No cap: texts that will be cut to what fits are the longest with or without one."""
    return len(example.context) + len(example.text)


def alike(order: list[int], examples: list[Example], size: int) -> list[int]:
    """A shuffled order, sorted by length within slices of `size`; equal lengths stay shuffled."""
    slices = (order[i : i + size] for i in range(0, len(order), size))
    return [i for some in slices for i in sorted(some, key=lambda i: length(examples[i]))]


def batches(
    datasets: dict[str, list[Example]], b: int, epoch: int, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """(task, indices into its examples): every batch of every task exactly once, shuffled.

    A task so appears in proportion to its size. The order depends on (seed, epoch) alone: to
    resume within an epoch, skip the batches already done. A batch is padded to its longest text,
    so one of clips, whose subtitles differ much, holds texts of similar length.
    """
    plan = []
    for task, examples in datasets.items():
        order = list(range(len(examples)))
        random.Random(f"{seed} {epoch} {task}").shuffle(order)
        size = batch_size(task, b)
        if TASKS[task].clips:
            order = alike(order, examples, size * min(SLICE, max(1, len(order) // size // 4)))
        plan += [(task, order[i : i + size]) for i in range(0, len(order), size)]
    random.Random(f"{seed} {epoch}").shuffle(plan)
    yield from plan


# ------------------------------------------------------------------------------------- submissions


# A form: (task, answers by id, examples) -> the file's ending and text.
def as_list(task: str, rows: dict, examples: list[Example]) -> tuple[str, str]:
    _, id_field, answer_field = TASKS[task].submit
    listed = [{id_field: name, answer_field: answer} for name, answer in rows.items()]
    return ".json", json.dumps(listed)


def as_lines(task: str, rows: dict, examples: list[Example]) -> tuple[str, str]:
    return ".csv", "".join(f"{name},{answer.capitalize()}\n" for name, answer in rows.items())


def as_indices(task: str, rows: dict, examples: list[Example]) -> tuple[str, str]:
    named = {f"a{k}": k for k in range(video.CHOICES[task])}
    if odd := sum(answer not in named for answer in rows.values()):
        print(f"{task} submission: {odd} of {len(rows)} answers are none of {', '.join(named)} and "
              "are sent as 0")
    return ".json", json.dumps({name: named.get(answer, 0) for name, answer in rows.items()})


def as_descs(task: str, rows: dict, examples: list[Example]) -> tuple[str, str]:
    lines = [{"vid_name": ex.images[0], "clip_id": ex.id, "descs": [{"desc": answer}]}
             for ex, answer in zip(examples, rows.values())]
    return ".jsonl", "".join(f"{json.dumps(line)}\n" for line in lines)


FORMS = {"identifier": as_lines, "qid": as_indices, "clip_id": as_descs}  # by the ids' field


def submission(task: str, answers: list[str], examples: list[Example], path: str | Path) -> Path:
    """Writes the file that the benchmark's server takes; returns its path, with the right ending.

    vqa, gqa, caption: a JSON list of {id, answer}; nlvr: lines "identifier,True"; tvqa, how2qa: a
    JSON object {qid: index}, where an answer that is none of the choices is sent as 0 (their number
    is printed); tvc, yc2c: a JSON object {vid_name, clip_id, descs} a line. The examples are a
    whole split. ValueError where the server would refuse: not one answer an example, an id that is
    there twice or of the wrong type, an answer that is none. Nothing is written then.
    """
    kind, id_field, answer_field = TASKS[task].submit
    if not examples or len(answers) != len(examples):
        raise ValueError(f"{task} submission: {len(answers)} answers for {len(examples)} examples; "
                         "it needs one for each, and at least one.")
    rows = {}
    for ex, answer in zip(examples, answers):
        where = f"{task} submission, {id_field} {ex.id!r}"
        name = str(ex.id) if kind is str else ex.id
        if ex.task != task or not isinstance(name, kind):
            named = getattr(kind, "__name__", kind)
            raise ValueError(f"{where}: it should be {named}, an id of {task}.")
        if name in rows:
            raise ValueError(f"{where}: it is there twice; the server takes one answer an id.")
        if not isinstance(answer, str) or task == "nlvr" and answer.strip() not in CHOICES:
            kinds = " or ".join(CHOICES) if task == "nlvr" else "text"
            raise ValueError(f"{where}: its answer should be {kinds}, not {answer!r:.60}.")
        rows[name] = answer.strip()
    ending, text = FORMS.get(id_field, as_list)(task, rows, examples)
    path = Path(path).with_suffix(ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(text, encoding="utf-8")
    os.replace(making, path)
    return path
