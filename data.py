"""What is an example of each task?

TASKS is the whole answer for the eye: which files each task reads (by support/readers.py), how its
text and its answer look, how long they may be, how many examples share a batch, how an answer is
decoded, scored and submitted. Below it: examples as tensors, and the sampler that mixes the tasks.

    examples = load_examples("vqa", "train", "datasets/mine")     # .../vqa/karpathy_train.json
    for task, indices in batches({"vqa": examples}, b=64, epoch=0, seed=42): ...

The built-in data set (world/) writes the same files. A task of one's own is a row more.

    python -m pytest tests/test_data.py

Axes: B batch, P pictures an example, N visual tokens a picture, F feature width, L text tokens,
T target tokens.
"""
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support import metrics, readers, submit
from support.gate import BadInput, reading
from support.readers import Layout
from support.submit import Form

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
    answers: str = ""              # how one is chosen instead of written (answers.py): "bce", each
    #                                by itself; "ce", one of them; "": there are too many to list
    clips: bool = False            # an example shows a clip: frames with subtitles; then the
    #                                task's name ends a text


def video_task(task: str, spoken: str, read: Callable, metric: Callable, form: Form,
               *published: str) -> Task:
    """A task of VALUE. spoken: the subtitles' file. published: how its files of train, val and test
    are called in each layout; the answers of a test split may be there or not."""
    files = f"video/ann/{task}/{task}_{{}}.jsonl video/ann/{spoken}_subtitles.jsonl"
    layouts = []
    for names in published:
        train, val, test = names.split()
        layouts.append(Layout("VALUE's files", read, files, train, val, test, submit=test))
    return Task(f"{task}: ", tuple(layouts), metric, text_tokens=600, target_tokens=20,
                decode="beam", submit=form, clips=True)


QUESTIONS = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
VQA_TRAIN = f"{QUESTIONS.format('train2014')} vqa/v2_mscoco_train2014_annotations.json"
VQA_VAL = f"{QUESTIONS.format('val2014')} vqa/v2_mscoco_val2014_annotations.json"
KARPATHY = "COCO/dataset_coco.json"
NO_SPLIT = f"without {KARPATHY}, train2014 trains and val2014 tests, unlike in the papers"
RELEASE = "train_release val_release test_release"
PUBLIC = "train_release val_release test_public_release"

# A layout: its name, its reader, the pattern of its files, and the names of train, val, test (and
# submit) in it. Where several lie in one folder, the first that is complete is read.
TASKS = {
    "vqa": Task(
        "vqa: ", loss="score", answers="bce", metric=metrics.vqa,
        submit=submit.json_list(int, "question_id", "answer"),
        layouts=(
            Layout("VL-T5's files", readers.read_vqa, "vqa/{}.json",
                   "karpathy_train", "karpathy_val", "karpathy_test", submit="test"),
            Layout("VQAv2's files in Karpathy's splits", readers.read_vqa2, "{}",
                   f"{VQA_TRAIN} {VQA_VAL} {KARPATHY}", *[f"{VQA_VAL} {KARPATHY}"] * 2),
            Layout("VQAv2's files", readers.read_vqa2, "{}", VQA_TRAIN, VQA_VAL, VQA_VAL,
                   submit=QUESTIONS.format("test2015"), note=NO_SPLIT),
            Layout("VQAv2's test-dev", readers.read_vqa2, QUESTIONS, submit="test-dev2015"),
            Layout("LXMERT's files", readers.read_vqa, "vqa/{}.json",
                   "train nominival", "minival", "minival"))),
    "gqa": Task(
        "gqa: ", share=(100, 60), answers="bce", metric=metrics.exact_match,
        submit=submit.json_list(str, "questionId", "prediction"),
        # GQA keeps its test answers to itself: papers train on train + val and report test-dev.
        layouts=(
            Layout("VL-T5's files", readers.read_questions, "GQA/{}.json",
                   "train valid", "testdev", "testdev", submit="submit"),
            Layout("GQA's files", readers.read_questions, "GQA/{}_questions.json",
                   "train_balanced val_balanced", "testdev_balanced", "testdev_balanced",
                   submit="submission_all"))),
    "nlvr": Task(
        "nlvr: ", text_tokens=None, share=(20, 60), decode="choice", answers="ce",
        metric=metrics.nlvr,
        submit=submit.lines(*ANSWERS),
        layouts=(
            Layout("VL-T5's files", readers.read_nlvr, "nlvr/{}.json", "train", "valid", "test"),
            Layout("NLVR2's files", readers.read_nlvr, "nlvr/{}.json", "train", "dev", "test1"))),
    "snli": Task(
        "snli: ", answers="ce", metric=metrics.exact_match,
        layouts=(Layout("SNLI-VE's files", readers.read_snli, "snli/snli_ve_{}.jsonl",
                        "train", "dev", "test"),)),
    "caption": Task(
        "caption: ", text_tokens=40, target_tokens=20, share=(50, 60), loss="tokens",
        decode="beam", metric=metrics.caption,
        submit=submit.json_list(int, "image_id", "caption"),
        layouts=(
            Layout("Karpathy's file", readers.read_karpathy, "{}", KARPATHY, KARPATHY, KARPATHY),
            Layout("COCO's files", readers.read_coco, "COCO/{}2014.json", "captions_train",
                   "captions_val", "captions_val", submit="image_info_test", note=NO_SPLIT))),
    # VALUE's test questions contain TVQA's own: where both lie there, VALUE's are read.
    "tvqa": video_task("tvqa", "tv", partial(readers.read_choices, choices=5), metrics.exact_match,
                       submit.indices(5), "train val test_release", "train val test_public",
                       PUBLIC),
    "how2qa": video_task("how2qa", "how2", partial(readers.read_choices, choices=4),
                         metrics.exact_match, submit.indices(4), PUBLIC),
    "tvc": video_task("tvc", "tv", partial(readers.read_clip_captions, spans=True),
                      metrics.clip_caption, submit.descriptions(), RELEASE, PUBLIC),
    "yc2c": video_task("yc2c", "yc2", readers.read_clip_captions, metrics.clip_caption,
                       submit.descriptions(), RELEASE, PUBLIC),
}


# ------------------------------------------------------------------------------------- loading

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
        layout, paths = readers.find_files(TASKS[task].layouts, split, Path(folder))
    if layout.note:
        print(f"{task} {split}: {layout.name} are read; {layout.note}")
    more = {"subtitles": subtitles} if TASKS[task].clips else {}
    examples = [Example(task, **found) for found in layout.read(split, paths, **more)]
    answered = [ex for ex in examples if ex.targets or ex.references]
    where = " and ".join(map(str, paths))
    if split == "test" and examples and not answered:
        raise Unanswered(f"{task} test: {where} has no answered example of this split.")
    with reading(where):
        needed = examples if split == "submit" else answered
        assert needed, f"it has no example of split {split}, or none is answered"
        if split != "train":
            name, times = Counter(ex.id for ex in examples).most_common(1)[0]
            assert times == 1, (f"id {name!r} is there more than once and would be scored so: take "
                                "the others out")
            return examples
    if len(answered) < len(examples):
        print(f"{task} train: {len(examples) - len(answered)} of {len(examples)} examples have no "
              "answer and are left out")
    return answered


# ---------------------------------------------------------------------------------- to tensors

@dataclass(frozen=True)
class Batch:
    """Examples as tensors. Visual axis: P pictures x N tokens, row-major each; or N frames."""
    tasks: tuple[str, ...]         # B: the task of each example
    input_ids: Tensor              # B, L long, padded on the right
    feats: Tensor                  # B, P*N, F float32; or pixels of all pictures: ., 3, H, W
    boxes: Tensor                  # B, P*N, 4 float32: x1, x2, y1, y2 in 0..1 (--boxes zero: zeros)
    image_ids: Tensor              # B, P*N long: 0 for the first picture, 1 for the second
    order_ids: Tensor              # B, P*N long: 0..N-1, again for each picture
    seen: Tensor | None            # B, P*N bool: False on what fills up; None: all is real
    labels: Tensor                 # B, T long, -100 on padding
    weights: Tensor                # B float32: of the cross-entropy of each of its target tokens,
                                   # or of its chosen answer's loss
    answers: Tensor | None = None  # B, A float32: soft scores of all answers, to choose one

    def to(self, device: torch.device | str) -> "Batch":
        moved = {}
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                if str(device) == "cuda" and not tensor.is_cuda:      # copied as the GPU computes
                    tensor = tensor.contiguous().pin_memory()
                moved[name] = tensor.to(device, non_blocking=True)
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
    return answer, soft            # rounding can leave a rest: it is the last answer's


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
def grid_boxes(rows: int, columns: int) -> Tensor:
    """(N, 4) boxes x1, x2, y1, y2 of a grid's cells, row by row from the top left. A film's
    frames stand side by side, so that x is the time; the order table tells it, too, but its rows
    are small beside the features and frozen in every row but `full`."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    boxes = [x / columns, (x + 1) / columns, y / rows, (y + 1) / rows]     # each: rows, columns
    return torch.stack(boxes, dim=-1).reshape(-1, 4)


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


def by_example(x: Tensor, pictures: list[int]) -> Tensor:
    """Rows of pictures (B*P, N, F) -> of examples (B, P*N, F); zeros fill up who has fewer."""
    parts = [part.flatten(0, 1) for part in x.split(pictures)]
    return pad_sequence(parts, batch_first=True)


def visual_fields(examples: list[Example], features, boxes: str,
                  frames: str) -> dict[str, Tensor | None]:
    """The fields of a Batch that say what there is to see."""
    clips = TASKS[examples[0].task].clips
    assert all(TASKS[ex.task].clips == clips for ex in examples), \
        "a batch holds pictures or clips, not both"
    ids = []
    for example in examples:
        ids += example.images
    feats = features.stack(ids)                                            # B*P, N, F; or pixels
    packed = feats.dim() == 3
    size, pictures = len(examples), [len(ex.images) for ex in examples]
    tokens, most, seen = features.tokens, max(pictures), None
    corners = torch.zeros(len(ids), tokens, 4)                             # B*P, N, 4
    if boxes == "grid":
        corners = torch.stack([grid_boxes(*grid) for grid in features.grids(ids)])
    if clips and frames == "real":
        real = features.frames(ids)                                        # frames of each clip
        assert real is not None, f"the features of {ids[0]!r} are of pictures, not of a clip"
        # Frames beyond the longest clip of the batch are cut: they would be masked anyway.
        tokens = min(tokens, max(1, *real))
        seen = torch.arange(tokens) < torch.tensor(real)[:, None]          # B, N
        feats, corners = feats[:, :tokens], corners[:, :tokens]
    elif min(pictures) < most:                           # in a mixed batch nlvr alone has two
        seen = torch.arange(most * tokens) < torch.tensor(pictures)[:, None] * tokens
    if packed:
        feats = by_example(feats, pictures)                                # B, P*N, F
    image_ids, order_ids = torch.arange(most).repeat_interleave(tokens), torch.arange(tokens)
    return dict(
        feats=feats, seen=seen,
        boxes=by_example(corners, pictures),
        image_ids=image_ids.expand(size, most * tokens),
        order_ids=order_ids.repeat(most).expand(size, most * tokens))


def collate(examples: list[Example], tokenizer, features, *, task_names: bool = True,
            boxes: str = "grid", frames: str = "real", seed_key: tuple | None = None,
            head=None, share: slice = slice(None)) -> Batch:
    """Examples -> Batch; they may belong to different tasks, all of pictures or all of clips.

    tokenizer: has encode(text, max_length=None) -> ids with special tokens, and pad_id.
    features: has stack(picture ids) -> (pictures, N, F) float32, or their pixels (pictures, 3, H,
    W); tokens, the N of each; grids, their rows and columns; frames, how many of a clip's are real.
    task_names: put the task's name ("vqa: ") before the text.
    boxes: "grid" gives each visual token its cell's box, a frame its place in a film; "zero" is
    what the papers' code feeds.
    frames: "real" hides what fills a short clip up, and the batch is as long as its longest clip;
    "all" shows it, 64 frames of every clip, as the papers' code does.
    seed_key: (seed, epoch) when training, which draws the answers; None takes the best ones.
    head: has targets(soft scores) -> (B, A), where answers are chosen.
    share: the examples to hold. Weights are those of the whole batch, so that losses and gradients
    of its shares add up to its own.
    """
    tasks = [TASKS[ex.task] for ex in examples]
    answers, scores = zip(*(draw_answer(ex, seed_key) for ex in examples))
    targets = [token_ids(tokenizer, answer, task.target_tokens)
               for answer, task in zip(answers, tasks)]
    labels = pad(targets, -100)                                            # B, T
    weights = loss_weights([task.loss for task in tasks], torch.tensor(scores), labels)
    if head is not None:                                 # the mean over examples
        weights = torch.full_like(weights, 1 / len(examples))
    own = list(range(len(examples)))[share]
    if not own:                      # more shares than examples: the first one, and it counts 0
        own, weights = [0], torch.zeros_like(weights)
    examples = [examples[i] for i in own]
    texts = [text_ids(ex, tokenizer, task_names) for ex in examples]
    chosen = None if head is None else head.targets([ex.targets for ex in examples])
    return Batch(
        tasks=tuple(ex.task for ex in examples), input_ids=pad(texts, tokenizer.pad_id),
        labels=labels[own], weights=weights[own], answers=chosen,
        **visual_fields(examples, features, boxes, frames))


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
