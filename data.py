"""What is an example of each task?

TASKS is the whole answer for the eye: what each task reads, how its text and its answer look, how
long they may be, how many examples share a batch, how an answer is decoded and scored, which files
are read (by support/readers.py) and which are submitted. Below it: examples as tensors, and the
sampler that mixes the tasks.

    examples = load_examples("vqa", "train", "datasets/mine")     # .../vqa/karpathy_train.json
    for task, indices in batches({"vqa": examples}, b=64, epoch=0, seed=42): ...

The built-in data set (world/) writes the same files, so it goes through the same code. A task of
one's own is a row more.

    python -m pytest tests/test_data.py

Axes: B batch, P pictures an example, N visual tokens a picture, F feature width, L encoder tokens,
T target tokens.
"""
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import metrics, readers, submit
from support.gate import BadInput, reading
from support.submit import Form

SPLITS = ("train", "val", "test")  # and "submit": the questions whose answers only a server knows
ANSWERS = ("false", "true")        # nlvr's


@dataclass(frozen=True, slots=True)
class Example:
    """One question, statement or picture, whatever the task. Equal fields share their objects."""
    task: str
    id: int | str                  # as published: question_id, nlvr's identifier, cocoid
    text: str                      # the question or sentence; "" for captions
    images: tuple[str, ...]        # picture ids: two for nlvr, else one; a video task's: one video
    targets: dict[str, float]      # answer -> soft score in (0, 1]; may be empty in a test split
    references: list[str] | None = None    # what the metric compares with: raw answers or captions
    context: str = ""              # a clip's subtitles, before the text; cut to the room it leaves


# ----------------------------------------------------------------------------------- the table

@dataclass(frozen=True)
class Layout:
    """One way in which a task's files are published, and who reads them."""
    name: str
    read: Callable[[str, list[Path]], Iterable[dict]]     # (split, files) -> fields of Examples
    files: dict[str, str]          # of each split: names under the data folder, a space between
    note: str = ""                 # what its user should know


@dataclass(frozen=True)
class Task:
    """How one task is read, written as text, batched, trained, answered, scored and submitted."""
    prefix: str                    # the task's name in the encoder text
    layouts: tuple[Layout, ...]
    metric: Callable[[list[str], list[Example]], dict]    # scores x100, the headline first
    text_tokens: int | None = 20   # longest encoder text and target, special tokens included
    target_tokens: int = 10
    share: tuple[int, int] = (60, 60)    # batch size as a fraction of the base b, which is vqa's
    loss: str = "examples"         # mean over "examples", over "tokens" of the batch, or over
    #                                examples times the "score" of the drawn answer
    decode: str = "greedy"         # or "beam", or "choice" (compare the logits of ANSWERS)
    submit: Form | None = None     # what the benchmark's server takes
    clips: bool = False            # an example shows a clip: frames with subtitles; then the
    #                                task's name ends a text


def published(name: str, read: Callable, note: str = "", **files: str) -> Layout:
    """The row published("VL-T5's files", reader, train="a.json", val="b.json c.json")."""
    return Layout(name, read, files, note)


def video_task(task: str, spoken: str, read: Callable, metric: Callable, form: Form,
               *names: str) -> Task:
    """A task of VALUE. spoken: the subtitles' file. names: its files of train, val and test, if
    they are not called as How2QA's; the answers of a test split may be there or not."""
    layouts = []
    for three in (*names, f"{task}_train_release {task}_val_release {task}_test_public_release"):
        train, val, test = (f"video/ann/{task}/{name}.jsonl video/ann/{spoken}_subtitles.jsonl"
                            for name in three.split())
        layouts.append(published("VALUE's files", read, train=train, val=val, test=test,
                                 submit=test))
    return Task(f"{task}: ", tuple(layouts), metric, text_tokens=600, target_tokens=20,
                decode="beam", submit=form, clips=True)


QUESTIONS = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
VQA_TRAIN = f"{QUESTIONS.format('train2014')} vqa/v2_mscoco_train2014_annotations.json"
VQA_VAL = f"{QUESTIONS.format('val2014')} vqa/v2_mscoco_val2014_annotations.json"
KARPATHY = "COCO/dataset_coco.json"
NO_SPLIT = f"without {KARPATHY}, train2014 trains and val2014 tests, unlike in the papers"
CLIP_IDS = Form((int, str), ".jsonl", submit.descriptions, name=submit.value_name)

TASKS = {
    "vqa": Task(
        "vqa: ", loss="score", metric=metrics.vqa,
        submit=Form(int, ".json", submit.json_list("question_id", "answer")),
        layouts=(
            published("VL-T5's files", readers.read_vqa, train="vqa/karpathy_train.json",
                      val="vqa/karpathy_val.json", test="vqa/karpathy_test.json",
                      submit="vqa/test.json"),
            published("VQAv2's files in Karpathy's splits", readers.read_vqa2_karpathy,
                      train=f"{VQA_TRAIN} {VQA_VAL} {KARPATHY}", val=f"{VQA_VAL} {KARPATHY}",
                      test=f"{VQA_VAL} {KARPATHY}"),
            published("VQAv2's files", readers.read_vqa2, NO_SPLIT, train=VQA_TRAIN, val=VQA_VAL,
                      test=VQA_VAL, submit=QUESTIONS.format("test2015")),
            published("VQAv2's test-dev", readers.read_vqa2,
                      submit=QUESTIONS.format("test-dev2015")))),
    "gqa": Task(
        "gqa: ", share=(100, 60), metric=metrics.exact_match,
        submit=Form(str, ".json", submit.json_list("questionId", "prediction")),
        # GQA keeps its test answers to itself: papers train on train + val and report test-dev.
        layouts=(
            published("VL-T5's files", readers.read_questions,
                      train="GQA/train.json GQA/valid.json", val="GQA/testdev.json",
                      test="GQA/testdev.json", submit="GQA/submit.json"),
            published("GQA's files", readers.read_questions,
                      train="GQA/train_balanced_questions.json GQA/val_balanced_questions.json",
                      val="GQA/testdev_balanced_questions.json",
                      test="GQA/testdev_balanced_questions.json",
                      submit="GQA/submission_all_questions.json"))),
    "nlvr": Task(
        "nlvr: ", text_tokens=None, share=(20, 60), decode="choice", metric=metrics.nlvr,
        submit=Form(str, ".csv", submit.lines, ANSWERS),
        layouts=(
            published("VL-T5's files", readers.read_nlvr, train="nlvr/train.json",
                      val="nlvr/valid.json", test="nlvr/test.json"),
            published("NLVR2's files", readers.read_nlvr, train="nlvr/train.json",
                      val="nlvr/dev.json", test="nlvr/test1.json"))),
    "caption": Task(
        "caption: ", text_tokens=40, target_tokens=20, share=(50, 60), loss="tokens",
        decode="beam", metric=metrics.caption,
        submit=Form(int, ".json", submit.json_list("image_id", "caption")),
        layouts=(
            published("Karpathy's file", readers.read_karpathy, train=KARPATHY, val=KARPATHY,
                      test=KARPATHY),
            published("COCO's files", readers.read_coco, NO_SPLIT,
                      train="COCO/captions_train2014.json", val="COCO/captions_val2014.json",
                      test="COCO/captions_val2014.json",
                      submit="COCO/image_info_test2014.json"))),
    # VALUE's test questions contain TVQA's own: where both lie there, VALUE's are read.
    "tvqa": video_task("tvqa", "tv", partial(readers.read_choices, choices=5), metrics.exact_match,
                       Form(str, ".json", submit.indices(5), name=submit.value_name),
                       "tvqa_train tvqa_val tvqa_test_release",
                       "tvqa_train tvqa_val tvqa_test_public"),
    "how2qa": video_task("how2qa", "how2", partial(readers.read_choices, choices=4),
                         metrics.exact_match,
                         Form(str, ".json", submit.indices(4), name=submit.value_name)),
    "tvc": video_task("tvc", "tv", partial(readers.read_clip_captions, spans=True),
                      metrics.clip_caption, CLIP_IDS,
                      "tvc_train_release tvc_val_release tvc_test_release"),
    "yc2c": video_task("yc2c", "yc2", readers.read_clip_captions, metrics.clip_caption, CLIP_IDS,
                       "yc2c_train_release yc2c_val_release yc2c_test_release"),
}


# ----------------------------------------------------------------------------- finding, loading

class Unanswered(BadInput):
    """The answers of a test split are not public."""


def load_examples(task: str, split: str, folder: str | Path,
                  subtitles: str = "all") -> list[Example]:
    """The examples of one split ("train", "val", "test", "submit"), in the files' order.

    subtitles: of clips, "all" of the video's, as the papers show, or those of the time "span".

    "submit" has no targets. Training examples without any scored answer are left out (their number
    is printed); in the other splits they stay, as the metric counts them. BadInput names file,
    record and field of what is missing, broken or empty.
    """
    with reading(f"{task} {split}"):
        layout, paths = find_files(task, split, Path(folder))
    if layout.note:
        print(f"{task} {split}: {layout.name} are read; {layout.note}")
    more = {"subtitles": subtitles} if TASKS[task].clips else {}
    examples = [Example(task, **found) for found in layout.read(split, paths, **more)]
    answered = [ex for ex in examples if ex.targets or ex.references]
    where = " and ".join(map(str, paths))
    if split == "test" and examples and not answered:
        raise Unanswered(f"{task} test: {where} has no answered example of this split.")
    with reading(where):
        kind = "example" if split == "submit" else "answered example"
        assert examples if split == "submit" else answered, f"there is no {kind} of split {split}"
        if split != "train":
            ids = Counter(ex.id for ex in examples)
            twice = [name for name in ids if ids[name] > 1]
            assert not twice, (f"id {twice[0]!r} is there more than once and would be scored so: "
                               "take the others out")
            return examples
    if len(answered) < len(examples):
        print(f"{task} train: {len(examples) - len(answered)} of {len(examples)} examples have no "
              "answer and are left out")
    return answered


def find_files(task: str, split: str, folder: Path) -> tuple[Layout, list[Path]]:
    """The layout in which a task's files are there, and the paths of a split.

    It is the first that is complete, else the one that lacks fewest files; the same for train, val
    and test, as the training split of one can hold the test split of another.
    """
    def names(layout: Layout, splits: tuple[str, ...]) -> list[str]:
        every = " ".join(layout.files[split] for split in splits)
        return list(dict.fromkeys(every.split()))

    def lost(layout: Layout, splits: tuple[str, ...]) -> list[str]:
        return [name for name in names(layout, splits) if not locate(folder, name).exists()]

    def rank(layout: Layout) -> tuple[int, int]:
        lacks = len(lost(layout, together))
        there = len(names(layout, together)) - lacks
        return lacks, -there if lacks else 0

    assert folder.is_dir(), f"{folder} is not a folder: name the one that holds the data"
    together = SPLITS if split in SPLITS else (split,)
    layouts = [layout for layout in TASKS[task].layouts if split in layout.files]
    assert layouts, "there is no such split: the answers of its test are published"
    best = min(layouts, key=rank)
    if lost(best, (split,)):
        ways = []
        for layout in sorted(layouts, key=rank):
            missing = lost(layout, (split,)) or lost(layout, together)
            ways.append(f"{' and '.join(missing)} ({layout.name})")
        raise BadInput(f"{task} {split}: {folder} lacks {', or '.join(ways)}.")
    return best, [locate(folder, name) for name in names(best, (split,))]


def locate(folder: Path, name: str) -> Path:
    """Where a file is, or should be: COCO's archives unpack into a folder named annotations."""
    path = folder / name
    unpacked = path.parent / "annotations" / path.name
    return unpacked if unpacked.exists() and not path.exists() else path


# ---------------------------------------------------------------------------------- to tensors

@dataclass(frozen=True)
class Batch:
    """Examples as tensors. Visual axis: P pictures x N tokens, row-major each; or N frames."""
    tasks: tuple[str, ...]         # B: the task of each example
    input_ids: Tensor              # B, L long, padded on the right
    feats: Tensor                  # B, P*N, F float32; or pixels of all pictures: ., 3, H, W
    boxes: Tensor                  # B, P*N, 4 float32: x1, x2, y1, y2 in 0..1 (zeros if so wished)
    image_ids: Tensor              # B, P*N long: 0 for the first picture, 1 for the second
    order_ids: Tensor              # B, P*N long: 0..N-1, again for each picture
    seen: Tensor | None            # B, P*N bool: False on what fills up; None: all is real
    labels: Tensor                 # B, T long, -100 on padding
    weights: Tensor                # B float32: of the cross-entropy of each of its target tokens

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def draw_answer(example: Example, seed_key: tuple | None) -> tuple[str, float]:
    """(answer, soft score): one answer drawn in proportion to its soft score.

    The draw depends on (seed_key, example.id) and nothing else: not on workers, batch or order.
    Without a key it is the best answer, and ("", 0) if there is none.
    """
    if len(example.targets) <= 1 or seed_key is None:
        return max(example.targets.items(), key=lambda item: item[1], default=("", 0.0))
    digest = hashlib.blake2b(repr((seed_key, example.id)).encode(), digest_size=7).digest()
    left = int.from_bytes(digest, "big") / 2**56 * sum(example.targets.values())   # in [0, total)
    for answer, soft in example.targets.items():
        if left < soft:
            return answer, soft
        left -= soft
    return answer, soft            # rounding can leave a crumb: it is the last answer's


@lru_cache(maxsize=1 << 18)
def token_ids(tokenizer, text: str, max_length: int | None) -> list[int]:
    """A text is tokenised once: questions and answers come back every epoch."""
    return tokenizer.encode(text, max_length=max_length)


def text_ids(example: Example, tokenizer, task_names: bool = True) -> list[int]:
    """The encoder's text. Of a clip: subtitles, question and choices, task name, where only the
    subtitles are ever cut; AssertionError where the rest alone is longer than allowed."""
    task = TASKS[example.task]
    name, most = task.prefix if task_names else "", task.text_tokens
    if not task.clips:
        return token_ids(tokenizer, name + example.text, most)
    # One space ties the parts, for BART tells " Who" from "Who"; T5 does not.
    text = f"{example.text} {name}".strip()
    if example.context and text:
        text = f" {text}"
    ids = token_ids(tokenizer, text, None)
    assert len(ids) <= most, (f"its question and choices take {len(ids)} tokens, and {most} fit: "
                              "shorten them")
    if not example.context:
        return ids
    first = len(token_ids(tokenizer, "", None)) - 1      # BART begins with <s>; both end with </s>
    said = tokenizer.encode(example.context)[first:-1]   # not cached: it may be long
    return ids[:first] + said[:most - len(ids)] + ids[first:]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Lists of ids, filled up on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


@lru_cache
def grid_boxes(tokens: int, clips: bool = False) -> Tensor:
    """(N, 4) boxes x1, x2, y1, y2 of a square grid's cells, row by row: the first is left-most. Of
    clips: of a film's frames side by side, so that x is the time; the order table tells it,
    too, but its rows are small beside the features and frozen in every row but `full`."""
    rows, columns = math.isqrt(tokens), math.isqrt(tokens)
    if clips:
        rows, columns = 1, tokens
    assert rows * columns == tokens, f"{tokens} visual tokens are no square grid: use --boxes zero"
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    boxes = [x / columns, (x + 1) / columns, y / rows, (y + 1) / rows]     # each: rows, columns
    return torch.stack(boxes, dim=-1).reshape(tokens, 4)


def loss_weights(kinds: list[str], scores: Tensor, labels: Tensor) -> Tensor:
    """Weights w (B,) with which a batch's loss is sum_i w_i sum_t CE_it, as the papers train:

    "examples": the mean over examples of the mean over their tokens; "score": the same, times the
    soft score of the drawn answer; "tokens": the mean over all tokens of these examples. Where
    kinds meet in one batch, each counts by its share of the examples.
    """
    count = (labels != -100).sum(1).float()                                # B
    by_token = torch.tensor([kind == "tokens" for kind in kinds])
    scored = torch.tensor([kind == "score" for kind in kinds])
    tokens = (count * by_token).sum() / by_token.sum().clamp(min=1)        # mean tokens a caption
    mean = torch.where(by_token, tokens, count)
    return torch.where(scored, scores, 1.0) / mean / len(kinds)


def show(examples: list[Example], features, boxes: str, frames: str) -> dict[str, Tensor | None]:
    """The fields of a Batch that say what there is to see."""
    clips = TASKS[examples[0].task].clips
    assert all(TASKS[ex.task].clips == clips for ex in examples), \
        "a batch holds pictures or clips, not both"
    ids = []
    for example in examples:
        ids += example.images
    feats = torch.as_tensor(features.stack(ids))                           # B*P, N, F; or pixels
    packed = feats.dim() == 3
    size, pictures = len(examples), [len(ex.images) for ex in examples]
    tokens, most, seen = features.tokens, max(pictures), None
    corners = grid_boxes(tokens, clips) if boxes == "grid" else torch.zeros(tokens, 4)
    if clips and frames == "real":
        real = features.frames(ids)                                        # frames of each clip
        assert real is not None, f"the features of {ids[0]!r} are of pictures, not of a clip"
        # Frames behind the longest clip of the batch are cut: they would be masked anyway.
        tokens = min(tokens, max(1, *real))
        seen = torch.arange(tokens) < torch.tensor(real)[:, None]          # B, N
        feats, corners = feats[:, :tokens], corners[:tokens]
    elif min(pictures) < most:                           # in a mixed batch nlvr alone has two
        seen = torch.arange(most * tokens) < torch.tensor(pictures)[:, None] * tokens
    if packed and min(pictures) == most:
        feats = feats.reshape(size, most * tokens, feats.shape[2])         # B, P*N, F
    elif packed:
        parts = [part.flatten(0, 1) for part in feats.split(pictures)]
        feats = pad_sequence(parts, batch_first=True)
    image_ids, order_ids = torch.arange(most).repeat_interleave(tokens), torch.arange(tokens)
    return dict(
        feats=feats, seen=seen,
        boxes=corners.repeat(most, 1).expand(size, most * tokens, 4),
        image_ids=image_ids.expand(size, most * tokens),
        order_ids=order_ids.repeat(most).expand(size, most * tokens))


def collate(examples: list[Example], tokenizer, features, *, task_names: bool = True,
            boxes: str = "grid", frames: str = "real", seed_key: tuple | None = None) -> Batch:
    """Examples -> Batch; they may belong to different tasks, all of pictures or all of clips.

    tokenizer: has encode(text, max_length=None) -> ids with special tokens, and pad_id.
    features: has stack(picture ids) -> (pictures, N, F) float32, or their pixels (pictures, 3, H,
    W); tokens, the N of each; and frames(video ids): how many of a clip's N tokens are real.
    task_names: put the task's name ("vqa: ") before the text.
    boxes: "grid" gives each visual token its cell's box, a frame its place in a film; "zero" is
    what the papers' code feeds.
    frames: "real" hides what fills a short clip up, and the batch is as long as its longest clip;
    "all" shows it, 64 frames of every clip, as the papers' code does.
    seed_key: (seed, epoch) when training, which draws the answers; None takes the best ones.
    """
    tasks = [TASKS[ex.task] for ex in examples]
    texts = [text_ids(ex, tokenizer, task_names) for ex in examples]
    answers, scores = zip(*(draw_answer(ex, seed_key) for ex in examples))
    targets = [token_ids(tokenizer, answer, task.target_tokens)
               for answer, task in zip(answers, tasks)]
    labels = pad(targets, -100)                                            # B, T
    return Batch(
        tasks=tuple(ex.task for ex in examples), input_ids=pad(texts, tokenizer.pad_id),
        **show(examples, features, boxes, frames), labels=labels,
        weights=loss_weights([task.loss for task in tasks], torch.tensor(scores), labels))


# --------------------------------------------------------------------------------- the sampler

def batch_size(task: str, b: int) -> int:
    """Examples a batch of this task: b = 500 gives vqa 500, gqa 833, nlvr 166, caption 416; each
    video task b."""
    part, whole = TASKS[task].share
    return max(1, b * part // whole)


def steps_per_epoch(datasets: dict[str, list[Example]], b: int) -> int:
    """How many batches `batches` yields."""
    return sum(math.ceil(len(examples) / batch_size(task, b))
               for task, examples in datasets.items())


# Clips are sorted by length within slices of so many batches. Where subtitles are log-normal about
# 250 tokens, 52 % of what batches of 50 hold is padding if drawn at random, 17 % with slices of 16,
# 15.4 % with 32, and 14.6 % if all is sorted (then only the shuffle's ties would ever change who
# meets whom in a batch).
SLICE = 32


def length(example: Example) -> int:
    """How long an example's text is, in characters: near enough to tokens to sort by, and free.
    No cap: texts that will be cut to what fits are the longest with or without one."""
    return len(example.context) + len(example.text)


def batches(datasets: dict[str, list[Example]], b: int, epoch: int,
            seed: int) -> Iterator[tuple[str, list[int]]]:
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
            slice_size = size * min(SLICE, max(1, len(order) // size // 4))
            for i in range(0, len(order), slice_size):
                part = order[i:i + slice_size]      # sorted stably: equal lengths stay shuffled
                order[i:i + slice_size] = sorted(part, key=lambda k: length(examples[k]))
        plan += [(task, order[i:i + size]) for i in range(0, len(order), size)]
    random.Random(f"{seed} {epoch}").shuffle(plan)
    yield from plan
