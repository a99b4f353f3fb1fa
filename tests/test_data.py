"""The readers on hand-written files in the published layouts, collation, and the sampler.

python -m pytest tests/test_data.py
"""

import json
from collections import Counter

import data
import metrics
import pytest
import torch
import world
from data import Example


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
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# ----------------------------------------------------------------------------------------- readers


def test_vqa(folder, capsys):
    (train,) = data.load("vqa", "train", folder)
    assert train == Example("vqa", 3, "What?", ("COCO_a",), {"dog": 1.0, "cat": 0.3})
    assert "1 of 2 examples have no answer" in capsys.readouterr().out
    first, second = data.load("vqa", "test", folder)
    assert first.references == ["dog"] * 9 + ["x"] and first.targets["dog"] == 1.0
    assert (second.text, second.targets, second.references) == ("Really?", {}, None)
    assert "lacks 1 of 2 questions" in capsys.readouterr().out


def test_vqa_without_raw_answers_says_so(folder, capsys):
    (folder / "vqa/v2_mscoco_val2014_annotations.json").unlink()
    assert [ex.references for ex in data.load("vqa", "val", folder)] == [None, None]
    assert "scored by the soft scores" in capsys.readouterr().out


def test_gqa_trains_on_valid_and_tests_on_testdev(folder):
    assert [ex.id for ex in data.load("gqa", "train", folder)] == ["07", "08"]
    assert [ex.id for ex in data.load("gqa", "val", folder)] == ["09"]
    assert data.load("gqa", "test", folder) == data.load("gqa", "val", folder)


def test_nlvr(folder):
    images = ("dev-7-0-img0", "dev-7-0-img1")
    (test,) = data.load("nlvr", "test", folder)
    assert test == Example("nlvr", "dev-7-0-1", "Two dogs.", images, {"false": 1.0})
    assert [ex.targets for ex in data.load("nlvr", "train", folder)][1] == {"true": 1.0}


def test_captions(folder):
    train = data.load("caption", "train", folder)  # an example a caption, restval included
    assert [next(iter(ex.targets)) for ex in train] == ["A dog.", "The dog.", "A cat."]
    assert [ex.images for ex in train][1:] == [("COCO_000000000001",), ("COCO_000000000002",)]
    assert len({ex.id for ex in train}) == 3 and {ex.text for ex in train} == {""}
    (val,) = data.load("caption", "val", folder)  # an example a picture
    assert val.id == 3 and val.references == ["A cow.", "A cow.", "Cows."]


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        ("vqa", "vqa/karpathy_train.json", None, "karpathy_train.json is missing"),
        ("vqa", "vqa/karpathy_train.json", "[{", "karpathy_train.json is not valid JSON"),
        ("vqa", "vqa/karpathy_train.json", [], "karpathy_train.json has no example"),
        ("vqa", "vqa/karpathy_train.json", VQA[1:], "has no answered example"),
        ("vqa", "vqa/karpathy_train.json", {}, "should hold a list of records, not a dict"),
        ("vqa", "vqa/karpathy_train.json", [VQA[0], 5], "record 1 should be an object"),
        ("gqa", "GQA/valid.json", [{"question_id": 1}], "valid.json, record 0: field 'sent' or"),
        ("gqa", "GQA/train.json", [GQA, GQA | {"sent": 5}], "record 1: 'sent' should be str"),
        ("gqa", "GQA/train.json", [GQA | {"label": {"a": 2}}], "record 0: 'label' should score"),
        ("nlvr", "nlvr/train.json", [NLVR | {"label": 2}], "record 0: 'label' should be 0 or 1"),
        ("nlvr", "nlvr/train.json", [NLVR | {"label": "True"}], "record 0: 'label' should be int"),
        ("caption", "COCO/dataset_coco.json", {"image": []}, "field 'images' is missing"),
        ("caption", "COCO/dataset_coco.json", {"images": [picture(1, "dev", "A")]}, "'split'"),
        ("caption", "COCO/dataset_coco.json", {"images": [picture(1, "train")]}, "'sentences'"),
        ("caption", "COCO/dataset_coco.json", {"images": [picture(1, "val", "A")]}, "no example"),
    ],
)
def test_what_is_wrong_is_named(folder, task, name, content, message):
    (folder / name).unlink() if content is None else write(folder / name, content)
    with pytest.raises(ValueError) as error:
        data.load(task, "train", folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_built_in_data_set_is_read(tmp_path):
    folder = world.write(tmp_path / "world", pictures=200, items=800, progress=False)
    for task in data.TASKS:
        for split in data.SPLITS:
            examples = data.load(task, split, folder)
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
            scores = metrics.score(task, best, examples)
            assert next(iter(scores.values())) > (95 if task != "vqa" else 80), (task, scores)


def test_unknown_names(folder):
    with pytest.raises(ValueError, match="'vga'.*'vqa', 'gqa', 'nlvr', 'caption'"):
        data.load("vga", "train", folder)
    with pytest.raises(ValueError, match="'valid'.*'train', 'val', 'test'"):
        data.load("vqa", "valid", folder)


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
    with pytest.raises(ValueError, match="'none'"):
        data.collate([question()], Words(), Pictures(), boxes="none")
    with pytest.raises(ValueError, match="50 visual tokens"):
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
