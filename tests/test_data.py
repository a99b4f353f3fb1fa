"""Where a task's files are found, what is loaded of them, collation, the sampler, and submissions.

python -m pytest tests/test_data.py
"""

import json
from collections import Counter

import data
import pytest
import torch

from data import Example
from support import submit
from support.gate import BadInput
from world import scenes


class Words:
    """A tokenizer of whole words: 0 begins, 2 ends, 1 pads, the rest count up as they come."""

    pad_id = 1

    def __init__(self):
        self.ids, self.calls = {}, 0

    def encode(self, text, max_length=None):
        self.calls += 1
        ids = [self.ids.setdefault(word, 3 + len(self.ids)) for word in text.split()]
        return [0, *ids[: None if max_length is None else max_length - 2], 2]


class Pictures:
    """Features of picture "p7" are all 7, plus the token's place / 100."""

    def __init__(self, tokens=36):
        self.tokens = tokens

    def stack(self, ids):
        values = torch.tensor([float(i[1:]) for i in ids])
        return (values[:, None, None] + torch.arange(self.tokens)[:, None] / 100).repeat(1, 1, 5)


VQA = [
    {
        "question_id": 3, "img_id": "COCO_a", "sent": "What?",
        "label": {"dog": 1, "cat": 0.3, "x": 0},
    },
    {"question_id": 4, "img_id": "COCO_b", "question": "Really?", "label": {}},
]  # fmt: skip
GQA = {"question_id": "07", "img_id": "n1", "sent": "Is it?", "label": {"yes": 1.0}}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 3, "answers": [{"answer": a, "answer_id": 1} for a in ["dog"] * 9 + ["x"]]},
        {"question_id": 99, "answers": [{"answer": "other"}]},
    ]
}
NLVR = {
    "identifier": "dev-7-0-1", "img0": "dev-7-0-img0", "img1": "dev-7-0-img1", "label": 0,
    "sent": "Two dogs.", "uid": "nlvr2_dev_1",
}  # fmt: skip


def picture(cocoid, split, *captions):
    sentences = [{"raw": raw, "tokens": []} for raw in captions]
    name = f"COCO_{cocoid:012d}.jpg"
    return {"cocoid": cocoid, "split": split, "filename": name, "sentences": sentences}


COCO = {
    "images": [
        picture(1, "train", "A dog.", "The dog. "),
        picture(2, "restval", "A cat."),
        picture(3, "val", "A cow.", "A cow.", "Cows."),
        picture(4, "test", "A hen."),
    ]
}


@pytest.fixture
def folder(tmp_path):
    files = {
        "vqa/karpathy_train.json": VQA,
        "vqa/karpathy_val.json": VQA,
        "vqa/karpathy_test.json": VQA,
        "vqa/v2_mscoco_val2014_annotations.json": ANNOTATIONS,
        "GQA/train.json": [GQA],
        "GQA/valid.json": [GQA | {"question_id": "08"}],
        "GQA/testdev.json": [GQA | {"question_id": "09"}],
        "nlvr/train.json": [NLVR, NLVR | {"label": 1}],
        "nlvr/valid.json": [NLVR],
        "nlvr/test.json": [NLVR],
        "COCO/dataset_coco.json": COCO,
    }
    for name, content in files.items():
        write(tmp_path / name, content)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# ----------------------------------------------------------------------------------------- readers


def test_gqa_trains_on_valid_and_tests_on_testdev(folder):
    assert [ex.id for ex in data.load_examples("gqa", "train", folder)] == ["07", "08"]
    assert [ex.id for ex in data.load_examples("gqa", "val", folder)] == ["09"]
    assert data.load_examples("gqa", "test", folder) == data.load_examples("gqa", "val", folder)


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        ("vqa", "vqa/karpathy_train.json", None, "lacks vqa/karpathy_train.json (VL-T5's"),
        ("vqa", "vqa/karpathy_train.json", [], "karpathy_train.json: there is no answered example"),
        ("vqa", "vqa/karpathy_train.json", VQA[1:], "there is no answered example of split train"),
        ("caption", "COCO/dataset_coco.json", {"images": [picture(1, "val", "A")]},
         "no answered example"),
    ],
)
def test_what_is_wrong_is_named(folder, task, name, content, message):
    (folder / name).unlink() if content is None else write(folder / name, content)
    with pytest.raises(ValueError) as error:
        data.load_examples(task, "train", folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_built_in_data_set_is_read(tmp_path):
    folder = scenes.write(tmp_path / "world", pictures=200, items=800, progress=False)
    for task in scenes.TASKS:
        for split in data.SPLITS:
            examples = data.load_examples(task, split, folder)
            assert len(examples) >= 10 and all(ex.targets for ex in examples)
            assert {len(ex.images) for ex in examples} == {1 + (task == "nlvr")}
            for ex in examples:
                assert all((folder / "images" / f"{name}.jpg").exists() for name in ex.images)
                if task == "vqa":
                    assert (split == "train") == (ex.references is None)
                    assert ex.references is None or len(ex.references) == 10
            best = [data.draw_answer(ex, None)[0] for ex in examples]
            if split == "train":
                continue
            # The world's ids are accepted by the servers' forms, and its answers are right.
            submit.write(task, data.TASKS[task].submit, best, examples, tmp_path / task)
            scores = data.TASKS[task].metric(best, examples)
            assert next(iter(scores.values())) > (95 if task != "vqa" else 80), (task, scores)


def test_what_is_not_there(folder):
    with pytest.raises(BadInput, match="nlvr submit: there is no such split"):
        data.load_examples("nlvr", "submit", folder)
    with pytest.raises(BadInput, match="nowhere is not a folder"):
        data.load_examples("vqa", "train", folder / "nowhere")


# ------------------------------------------------------------------------------ the other layouts

VQA2 = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
PEOPLE = "vqa/v2_mscoco_{}_annotations.json"


A, B = ("vqa/karpathy_train.json", "vqa/karpathy_val.json", "vqa/karpathy_test.json"), (
    *(VQA2.format(year) for year in ("train2014", "val2014")),
    *(PEOPLE.format(year) for year in ("train2014", "val2014")),
)  # fmt: skip


@pytest.mark.parametrize(
    "there, train, test",  # the layout of each split, or what is asked for
    [
        (A, "VL-T5's files", "VL-T5's files"),
        (A[::2], "VL-T5's files", "VL-T5's files"),  # val is not needed to train and test
        (A + B, "VL-T5's files", "VL-T5's files"),
        (B, "VQAv2's files", "VQAv2's files"),
        ((*B, "COCO/dataset_coco.json"), *["VQAv2's files in Karpathy's splits"] * 2),
        ((A[0], *B), "VQAv2's files", "VQAv2's files"),  # never A's train and B's test
        ((A[0], B[1]), "VL-T5's files", f"lacks {A[2]} (VL-T5's files), or {B[3]} "),
        (B[1::2], f"lacks {B[0]} and {B[2]} (VQAv2's files)", "VQAv2's files"),
        ((), *(f"lacks {a} (VL-T5's files), or {b}" for a, b in ((A[0], B[0]), (A[2], B[1])))),
    ],
)
def test_the_layout_is_found_by_its_files(tmp_path, there, train, test):
    for name in there:
        write(tmp_path / name, "")
    for split, expected in (("train", train), ("test", test)):
        if "lacks" in expected:
            with pytest.raises(ValueError) as error:
                data.load_examples("vqa", split, tmp_path)
            assert expected in str(error.value)
        else:
            assert data.find_files("vqa", split, tmp_path)[0].name == expected


def test_the_layouts_of_one_name_are_told_apart(tmp_path):
    write(tmp_path / "nlvr/train.json", [NLVR])
    for names in (("valid", "test"), ("dev", "test1")):
        for name in names:
            write(tmp_path / f"nlvr/{name}.json", [NLVR])
        assert [p.stem for s in ("val", "test") for p in
                data.find_files("nlvr", s, tmp_path)[1]] == list(names)  # fmt: skip
        for name in names:
            (tmp_path / f"nlvr/{name}.json").unlink()


# ----------------------------------------------------------------------------------------- collate


def question(i=0, text="what is it ?", task="vqa", **targets):
    return Example(task, i, text, (f"p{i}",), targets or {"dog": 1.0})


def test_collate_vqa():
    tok = Words()
    examples = [question(1, "what ?"), question(2, "what is it ?", cat=0.3), question(3, "x " * 40)]
    batch = data.collate(examples, tok, Pictures())
    say = {v: k for k, v in tok.ids.items()} | {0: "<s>", 1: "<pad>", 2: "</s>"}
    text = [" ".join(say[i] for i in row) for row in batch.input_ids.tolist()]
    assert text[0] == "<s> vqa: what ? </s>" + " <pad>" * 15
    assert text[2] == "<s> vqa: " + "x " * 17 + "</s>"  # 20 tokens, special ones included
    assert batch.labels.tolist()[:2] == [[0, tok.ids["dog"], 2], [0, tok.ids["cat"], 2]]
    assert batch.weights.tolist() == pytest.approx([w / 3 / 3 for w in (1.0, 0.3, 1.0)])
    assert batch.feats.shape == (3, 36, 5) and batch.feats.dtype == torch.float32
    assert batch.feats[1, 7].tolist() == pytest.approx([2.07] * 5)
    assert batch.image_ids.tolist() == [[0] * 36] * 3
    assert batch.order_ids.tolist() == [list(range(36))] * 3
    assert batch.tasks == ("vqa",) * 3 and batch.seen is None
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.order_ids.dtype} == {torch.long}


def test_labels_are_padded_with_what_the_loss_ignores():
    examples = [question(1, dog=1.0), question(2, **{"new york": 1.0})]
    labels = data.collate(examples, Words(), Pictures()).labels
    assert labels[0, 3:].tolist() == [-100] and (labels[1] >= 0).all()


def test_boxes_are_the_cells_of_the_grid():
    batch = data.collate([question()], Words(), Pictures())
    for row, column in ((0, 0), (0, 5), (2, 3), (5, 5)):
        x1, x2, y1, y2 = (column / 6, (column + 1) / 6, row / 6, (row + 1) / 6)
        assert batch.boxes[0, 6 * row + column].tolist() == pytest.approx([x1, x2, y1, y2])
    assert data.collate([question()], Words(), Pictures(), boxes="zero").boxes.abs().sum() == 0
    with pytest.raises(AssertionError, match="50 visual tokens"):
        data.collate([question()], Words(), Pictures(50))


def test_nlvr_has_two_pictures_an_example():
    examples = [
        Example("nlvr", "a", "same", ("p1", "p2"), {"true": 1.0}),
        Example("nlvr", "b", "same", ("p3", "p4"), {"false": 1.0}),
    ]
    batch = data.collate(examples, Words(), Pictures(4))
    first = [1, 1.01, 1.02, 1.03, 2, 2.01, 2.02, 2.03]
    assert batch.feats[0, :, 0].tolist() == pytest.approx(first)
    assert batch.feats[1, :, 0].tolist() == pytest.approx([value + 2 for value in first])
    assert batch.image_ids.tolist() == [[0] * 4 + [1] * 4] * 2
    assert batch.order_ids.tolist() == [[0, 1, 2, 3] * 2] * 2
    assert torch.equal(batch.boxes[:, :4], batch.boxes[:, 4:])
    assert batch.weights.tolist() == pytest.approx([1 / 3 / 2] * 2)


def test_text_without_task_names():
    tok = Words()
    ids = data.collate([question(1, "what ?")], tok, Pictures(), task_names=False).input_ids
    assert ids.tolist() == [[0, tok.ids["what"], tok.ids["?"], 2]] and "vqa:" not in tok.ids
    photo = Example("caption", 1, "", ("p1",), {"a dog": 1.0}, ["a dog"])
    assert data.collate([photo], tok, Pictures(), task_names=False).input_ids.tolist() == [[0, 2]]
    named = data.collate([photo], tok, Pictures()).input_ids
    assert named.tolist() == [[0, tok.ids["caption:"], 2]]


def test_a_text_is_tokenised_once():
    tok = Words()
    for _ in range(3):
        data.collate([question(1), question(2)], tok, Pictures())
    assert tok.calls == 2  # the question and the answer


def test_batch_moves_to_a_device():
    batch = data.collate([question()], Words(), Pictures()).to("meta")
    assert batch.feats.device.type == batch.weights.device.type == "meta"
    assert batch.tasks == ("vqa",) and len(batch.labels) == 1


# ------------------------------------------------------------------------------------ drawn answers


def test_answers_are_drawn_in_proportion_to_their_scores():
    examples = [question(i, dog=0.9, cat=0.3, cow=0.6) for i in range(6000)]
    drawn = [data.draw_answer(ex, (42, 0)) for ex in examples]
    counts = Counter(drawn)
    assert set(counts) == {("dog", 0.9), ("cat", 0.3), ("cow", 0.6)}
    for (_, soft), count in counts.items():  # 3000, 1000, 2000 with a deviation of at most 39
        assert abs(count - 6000 * soft / 1.8) < 160
    again = [data.draw_answer(ex, (42, 0)) for ex in reversed(examples)]
    assert again[::-1] == drawn  # neither order nor worker matters
    for other in ((42, 1), (43, 0)):
        assert [data.draw_answer(ex, other) for ex in examples] != drawn


def test_without_a_key_the_best_answer_is_taken():
    assert data.draw_answer(question(1, cat=1.0, dog=0.3), None) == ("cat", 1.0)
    nothing = Example("vqa", 1, "what ?", ("p1",), {})
    batch = data.collate([nothing], Words(), Pictures())
    assert batch.labels.tolist() == [[0, 2]] and batch.weights.tolist() == [0.0]


def test_collate_draws_with_its_key():
    tok, examples = Words(), [question(i, dog=0.3, cat=0.6) for i in range(50)]
    batch = data.collate(examples, tok, Pictures(), seed_key=(42, 3))
    drawn = [data.draw_answer(ex, (42, 3)) for ex in examples]
    assert batch.labels[:, 1].tolist() == [tok.ids[answer] for answer, _ in drawn]
    assert batch.weights.tolist() == pytest.approx([soft / 3 / 50 for _, soft in drawn])
    assert len(set(drawn)) == 2


# ----------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("b, sizes", [(500, [500, 833, 166, 416]), (300, [300, 500, 100, 250])])
def test_batch_sizes_are_the_papers(b, sizes):
    assert [data.batch_size(task, b) for task in ("vqa", "gqa", "nlvr", "caption")] == sizes
    assert data.batch_size("nlvr", 1) == 1


def test_an_epoch_holds_every_example_once():
    datasets = {"vqa": [None] * 101, "gqa": [None] * 60, "nlvr": [None] * 7}
    plan = list(data.batches(datasets, b=12, epoch=0, seed=42))
    for task, examples in datasets.items():
        parts = [indices for name, indices in plan if name == task]
        assert sorted(i for part in parts for i in part) == list(range(len(examples)))
        sizes = sorted(map(len, parts), reverse=True)
        assert set(sizes[:-1]) == {data.batch_size(task, 12)}  # only the last may be smaller
    assert len(plan) == data.steps_per_epoch(datasets, 12) == 9 + 3 + 2
    tasks = [name for name, _ in plan]
    assert tasks != sorted(tasks, key=list(datasets).index)  # tasks are mixed
    assert plan[0][1] != sorted(plan[0][1])  # and so are examples


def test_the_order_depends_on_seed_and_epoch_alone():
    datasets = {"vqa": [None] * 200, "nlvr": [None] * 60}
    plan, again, *others = (
        list(data.batches(datasets, 6, epoch, seed))
        for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    )
    assert plan == again
    for other in others:  # another order of tasks, and other examples together in a batch
        assert [task for task, _ in other] != [task for task, _ in plan]
        assert {frozenset(part) for _, part in other} != {frozenset(part) for _, part in plan}


def test_the_order_of_pictures_is_that_of_the_published_runs():
    """Not one example may move, however long the texts are: the plan of their commit."""
    sizes = {"vqa": 7, "gqa": 9, "nlvr": 3, "caption": 6}
    datasets = {task: [Example(task, i, "x" * (i * 5 % 7), ("p",), {}) for i in range(size)]
                for task, size in sizes.items()}  # fmt: skip
    assert list(data.batches(datasets, b=4, epoch=1, seed=42)) == [
        ("caption", [0, 2, 3]), ("caption", [1, 4, 5]), ("vqa", [1, 3, 4, 0]), ("gqa", [2, 5, 3]),
        ("nlvr", [0]), ("vqa", [2, 5, 6]), ("nlvr", [2]), ("nlvr", [1]),
        ("gqa", [8, 0, 1, 4, 7, 6])]  # fmt: skip


# ----------------------------------------------------------------------------- what would be scored


def vqa_test(folder, questions, people):
    """VL-T5's test split with raw answers."""
    (folder / "vqa").mkdir()
    one = {"img_id": "a", "sent": "what ?", "label": {"red": 1}}
    (folder / "vqa/karpathy_test.json").write_text(json.dumps(
        [one | {"question_id": q} for q in questions]))
    (folder / "vqa/v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [
        {"question_id": q, "answers": [{"answer": "red"}] * people} for q in set(questions)]}))
    return folder


def test_too_few_people_and_ids_twice_are_refused_before_anything_is_scored(tmp_path):
    for name, questions, people, words in (
            ("a", [1, 2], 3, "question 1 has 3 answers, and three other people must agree"),
            ("b", [1, 2, 1], 10, "karpathy_test.json: id 1 is there more than once")):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=words):
            data.load_examples("vqa", "test", vqa_test(tmp_path / name, questions, people))
    (tmp_path / "c").mkdir()
    assert len(data.load_examples("vqa", "test", vqa_test(tmp_path / "c", [1, 2], 4))) == 2
