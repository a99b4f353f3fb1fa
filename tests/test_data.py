"""Where a task's files are found, what is loaded of them, collation and the sampler.

    python -m pytest tests/test_data.py
"""
import json
from collections import Counter

import pytest
import torch

import data
from data import Example
from support import readers, submit
from support.gate import BadInput
from world import scenes

SPLITS = ("train", "val", "test")


class Words:
    """A tokenizer of whole words: 0 begins, 2 ends, 1 pads, the rest count up as they come."""

    pad_id = 1

    def __init__(self):
        self.ids, self.calls = {}, 0

    def encode(self, text, max_length=None):
        self.calls += 1
        ids = [self.ids.setdefault(word, 3 + len(self.ids)) for word in text.split()]
        return [0, *ids[:None if max_length is None else max_length - 2], 2]


class Pictures:
    """Features of picture "p7" are all 7, plus the token's place / 100."""

    def __init__(self, tokens=36):
        self.tokens = tokens

    def stack(self, ids):
        values = torch.tensor([float(i[1:]) for i in ids])
        return (values[:, None, None] + torch.arange(self.tokens)[:, None] / 100).repeat(1, 1, 5)

    def grids(self, ids):
        return [(int(self.tokens ** 0.5),) * 2] * len(ids)


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------ what is loaded

GQA = {"img_id": "n1", "sent": "Is it?", "label": {"yes": 1.0}}
VQA = {"question_id": 3, "img_id": "a", "sent": "What?", "label": {"red": 1}}


def test_gqa_trains_on_valid_and_tests_on_testdev(tmp_path):
    for number, name in enumerate(("train", "valid", "testdev")):
        write(tmp_path / f"GQA/{name}.json", [GQA | {"question_id": number}])
    ids = {split: [ex.id for ex in data.load_examples("gqa", split, tmp_path)]
           for split in SPLITS}
    assert ids == {"train": [0, 1], "val": [2], "test": [2]}


def test_what_nobody_answered_is_not_trained_on(tmp_path, capsys):
    nothing = VQA | {"question_id": 4, "label": {"red": 0}}
    for split in SPLITS:
        write(tmp_path / f"vqa/karpathy_{split}.json", [nothing, VQA])
    assert [ex.id for ex in data.load_examples("vqa", "train", tmp_path)] == [3]
    assert "1 of 2 examples have no answer" in capsys.readouterr().out
    assert [ex.id for ex in data.load_examples("vqa", "val", tmp_path)] == [4, 3]


@pytest.mark.parametrize("content, message", [
    (None, "lacks vqa/karpathy_train.json (VL-T5's"),
    ([], "karpathy_train.json: it has no example of split train"),
    ([VQA | {"label": {}}], "karpathy_train.json: it has no example of split train, or none is")])
def test_what_is_wrong_is_named(tmp_path, content, message):
    for split in SPLITS:
        write(tmp_path / f"vqa/karpathy_{split}.json", [VQA])
    write(tmp_path / "vqa/karpathy_train.json", content)
    if content is None:
        (tmp_path / "vqa/karpathy_train.json").unlink()
    with pytest.raises(BadInput) as error:
        data.load_examples("vqa", "train", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="nlvr submit: there is no such split"):
        data.load_examples("nlvr", "submit", tmp_path)
    with pytest.raises(BadInput, match="nowhere is not a folder"):
        data.load_examples("vqa", "train", tmp_path / "nowhere")


@pytest.mark.parametrize("questions, people, words", [
    ([1, 2], 4, None),
    ([1, 2], 3, "question 1 has 3 answers, and three other people must agree"),
    ([1, 2, 1], 10, "karpathy_test.json: id 1 is there more than once")])
def test_too_few_people_and_ids_twice_are_refused(tmp_path, questions, people, words):
    write(tmp_path / "vqa/karpathy_test.json", [VQA | {"question_id": q} for q in questions])
    write(tmp_path / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": q, "answers": [{"answer": "red"}] * people} for q in set(questions)]})
    if words is None:
        assert len(data.load_examples("vqa", "test", tmp_path)) == 2
        return
    with pytest.raises(BadInput, match=words):
        data.load_examples("vqa", "test", tmp_path)


def test_the_built_in_data_set_is_read(tmp_path):
    folder = scenes.write(tmp_path / "world", pictures=200, items=800, progress=False)
    for task in scenes.TASKS:
        for split in SPLITS:
            examples = data.load_examples(task, split, folder)
            assert len(examples) >= 10 and all(ex.targets for ex in examples)
            assert {len(ex.images) for ex in examples} == {1 + (task == "nlvr")}
            for ex in examples:
                assert all((folder / "images" / f"{name}.jpg").exists() for name in ex.images)
                if task == "vqa":
                    assert (split == "train") == (ex.references is None)
                    assert ex.references is None or len(ex.references) == 10
            if split == "train":
                continue
            # The world's ids are accepted by the servers' forms, and its answers are right.
            best = [data.draw_answer(ex, None)[0] for ex in examples]
            submit.write(task, data.TASKS[task].submit, best, examples, tmp_path / task)
            scores = data.TASKS[task].metric(best, examples)
            assert next(iter(scores.values())) > (95 if task != "vqa" else 80), (task, scores)


# --------------------------------------------------------------------------- which layout is read

A = tuple(f"vqa/karpathy_{split}.json" for split in SPLITS)
B = tuple(f"vqa/v2_OpenEnded_mscoco_{year}_questions.json" for year in ("train2014", "val2014"))
B += tuple(f"vqa/v2_mscoco_{year}_annotations.json" for year in ("train2014", "val2014"))
SPLIT = "VQAv2's files in Karpathy's splits"


@pytest.mark.parametrize("there, train, test", [        # each split's layout, or what is asked for
    (A[::2], "VL-T5's files", "VL-T5's files"),         # val is not needed to train and test
    (A + B, "VL-T5's files", "VL-T5's files"),
    (B, "VQAv2's files", "VQAv2's files"),
    ((*B, "COCO/dataset_coco.json"), SPLIT, SPLIT),
    ((B[0], *B[2:], "vqa/annotations/" + B[1][4:]), "VQAv2's files", "VQAv2's files"),
    ((A[0], *B), "VQAv2's files", "VQAv2's files"),     # never A's train and B's test
    ((A[0], B[1]), "VL-T5's files", f"lacks {A[2]} (VL-T5's files), or {B[3]} "),
    (B[1::2], f"lacks {B[0]} and {B[2]} (VQAv2's files)", "VQAv2's files"),
    ((), *(f"lacks {name} (VL-T5's files), or " for name in A[::2]))])
def test_the_layout_is_found_by_its_files(tmp_path, there, train, test):
    for name in there:
        write(tmp_path / name)
    for split, expected in (("train", train), ("test", test)):
        if "lacks" in expected:
            with pytest.raises(BadInput) as error:
                data.load_examples("vqa", split, tmp_path)
            assert expected in str(error.value) and "LXMERT's files" in str(error.value)
        else:
            layout, paths = readers.find_files(data.TASKS["vqa"].layouts, split, tmp_path)
            assert layout.name == expected and all(path.exists() for path in paths)


def test_of_two_that_lack_as_much_the_one_of_which_more_is_there_is_read(tmp_path):
    write(tmp_path / "COCO/annotations/captions_val2014.json")
    layout, _ = readers.find_files(data.TASKS["caption"].layouts, "test", tmp_path)
    assert layout.name == "COCO's files"


def test_the_files_of_vqa_stand_in_the_order_in_which_they_are_read(tmp_path):
    for name in (*B, "COCO/dataset_coco.json"):
        write(tmp_path / name)
    _, paths = readers.find_files(data.TASKS["vqa"].layouts, "train", tmp_path)
    assert paths == [tmp_path / name for name in (B[0], B[2], B[1], B[3], "COCO/dataset_coco.json")]


@pytest.mark.parametrize("names", [("valid", "test"), ("dev", "test1")])
def test_the_layouts_of_one_name_are_told_apart(tmp_path, names):
    for name in ("train", *names):
        write(tmp_path / f"nlvr/{name}.json")
    found = [readers.find_files(data.TASKS["nlvr"].layouts, split, tmp_path)[1]
             for split in ("val", "test")]
    assert found == [[tmp_path / f"nlvr/{name}.json"] for name in names]


# --------------------------------------------------------------------------------------- collate

def question(i=0, text="what is it ?", task="vqa", **targets):
    return Example(task, i, text, (f"p{i}",), targets or {"dog": 1.0})


def test_collate_vqa():
    tok = Words()
    examples = [question(1, "what ?"), question(2, "what is it ?", **{"new york": 0.3}),
                question(3, "x " * 40)]
    batch = data.collate(examples, tok, Pictures())
    say = {v: k for k, v in tok.ids.items()} | {0: "<s>", 1: "<pad>", 2: "</s>"}
    text = [" ".join(say[i] for i in row) for row in batch.input_ids.tolist()]
    assert text[0] == "<s> vqa: what ? </s>" + " <pad>" * 15
    assert text[2] == "<s> vqa: " + "x " * 17 + "</s>"      # 20 tokens, special ones included
    dog, new, york = (tok.ids[word] for word in ("dog", "new", "york"))
    assert batch.labels.tolist() == [[0, dog, 2, -100], [0, new, york, 2], [0, dog, 2, -100]]
    assert batch.weights.tolist() == pytest.approx([1 / 3 / 3, 0.3 / 4 / 3, 1 / 3 / 3])
    assert batch.feats.shape == (3, 36, 5) and batch.feats.dtype == torch.float32
    assert batch.feats[1, 7].tolist() == pytest.approx([2.07] * 5)
    assert batch.image_ids.tolist() == [[0] * 36] * 3
    assert batch.order_ids.tolist() == [list(range(36))] * 3
    assert batch.tasks == ("vqa",) * 3 and batch.seen is None
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.order_ids.dtype} == {torch.long}
    moved = batch.to("meta")
    assert moved.feats.device.type == moved.weights.device.type == "meta"
    assert moved.tasks == batch.tasks and moved.seen is None


def test_boxes_are_the_cells_of_the_grid():
    batch = data.collate([question()], Words(), Pictures())
    for row, column in ((0, 0), (0, 5), (2, 3), (5, 5)):
        x1, x2, y1, y2 = (column / 6, (column + 1) / 6, row / 6, (row + 1) / 6)
        assert batch.boxes[0, 6 * row + column].tolist() == pytest.approx([x1, x2, y1, y2])
    assert data.collate([question()], Words(), Pictures(), boxes="zero").boxes.abs().sum() == 0


def test_nlvr_has_two_pictures_an_example():
    examples = [Example("nlvr", "a", "same", ("p1", "p2"), {"true": 1.0}),
                Example("nlvr", "b", "same", ("p3", "p4"), {"false": 1.0})]
    batch = data.collate(examples, Words(), Pictures(4))
    first = [1, 1.01, 1.02, 1.03, 2, 2.01, 2.02, 2.03]
    assert batch.feats[0, :, 0].tolist() == pytest.approx(first)
    assert batch.feats[1, :, 0].tolist() == pytest.approx([value + 2 for value in first])
    assert batch.image_ids.tolist() == [[0] * 4 + [1] * 4] * 2
    assert batch.order_ids.tolist() == [[0, 1, 2, 3] * 2] * 2
    assert torch.equal(batch.boxes[:, :4], batch.boxes[:, 4:])
    assert batch.weights.tolist() == pytest.approx([1 / 3 / 2] * 2)


def test_in_a_mixed_batch_one_picture_is_filled_up():
    pair = Example("nlvr", "a", "same", ("p1", "p2"), {"true": 1.0})
    batch = data.collate([question(5), pair], Words(), Pictures(4))
    assert batch.seen.tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    assert batch.feats[0, 4:].abs().sum() == 0 and batch.feats[0, 1, 0] == pytest.approx(5.01)
    assert batch.feats[1, 5, 0] == pytest.approx(2.01)


def test_text_without_task_names():
    tok, photo = Words(), Example("caption", 1, "", ("p1",), {"a dog": 1.0}, ["a dog"])
    ids = [data.collate([ex], tok, Pictures(), task_names=False).input_ids.tolist()
           for ex in (question(1, "what ?"), photo)]
    assert ids == [[[0, tok.ids["what"], tok.ids["?"], 2]], [[0, 2]]] and "vqa:" not in tok.ids
    named = data.collate([photo], tok, Pictures()).input_ids
    assert named.tolist() == [[0, tok.ids["caption:"], 2]]


def test_a_text_is_tokenised_once():
    tok = Words()
    for _ in range(3):
        data.collate([question(1), question(2)], tok, Pictures())
    assert tok.calls == 2                                   # the question and the answer


# ----------------------------------------------------------------------------------- drawn answers

def test_answers_are_drawn_in_proportion_to_their_scores():
    examples = [question(i, dog=0.9, cat=0.3, cow=0.6) for i in range(6000)]
    drawn = [data.draw_answer(ex, (42, 0)) for ex in examples]
    counts = Counter(drawn)
    assert set(counts) == {("dog", 0.9), ("cat", 0.3), ("cow", 0.6)}
    for (_, soft), count in counts.items():     # 3000, 1000, 2000 with a deviation of at most 39
        assert abs(count - 6000 * soft / 1.8) < 160
    again = [data.draw_answer(ex, (42, 0)) for ex in reversed(examples)]
    assert again[::-1] == drawn                             # neither order nor worker matters
    for other in ((42, 1), (43, 0)):
        assert [data.draw_answer(ex, other) for ex in examples] != drawn


def test_without_a_key_the_best_answer_is_taken():
    assert data.draw_answer(question(1, dog=0.3, cat=1.0), None) == ("cat", 1.0)
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


# --------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("b, sizes", [(500, [500, 833, 166, 416]), (300, [300, 500, 100, 250]),
                                      (1, [1, 1, 1, 1])])
def test_batch_sizes_are_the_papers(b, sizes):
    assert [data.batch_size(task, b) for task in ("vqa", "gqa", "nlvr", "caption")] == sizes


def test_an_epoch_holds_every_example_once():
    datasets = {"vqa": [None] * 101, "gqa": [None] * 60, "nlvr": [None] * 7}
    plan = list(data.batches(datasets, b=12, epoch=0, seed=42))
    for task, examples in datasets.items():
        parts = [indices for name, indices in plan if name == task]
        assert sorted(sum(parts, [])) == list(range(len(examples)))
        sizes = sorted(map(len, parts), reverse=True)
        assert set(sizes[:-1]) == {data.batch_size(task, 12)}   # only the last may be smaller
    assert len(plan) == data.steps_per_epoch(datasets, 12) == 9 + 3 + 2
    tasks = [name for name, _ in plan]
    assert tasks != sorted(tasks, key=list(datasets).index)     # tasks are mixed
    assert plan[0][1] != sorted(plan[0][1])                     # and so are examples


def test_the_order_depends_on_seed_and_epoch_alone():
    datasets = {"vqa": [None] * 200, "nlvr": [None] * 60}
    plan, again, *others = (list(data.batches(datasets, 6, epoch, seed))
                            for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2)))
    assert plan == again
    for other in others:    # another order of tasks, and other examples together in a batch
        assert [task for task, _ in other] != [task for task, _ in plan]
        assert {frozenset(part) for _, part in other} != {frozenset(part) for _, part in plan}


def test_the_order_of_pictures_is_that_of_the_published_runs():
    """Not one example may move, however long the texts are: the plan of their commit."""
    sizes = {"vqa": 7, "gqa": 9, "nlvr": 3, "caption": 6}
    datasets = {task: [Example(task, i, "x" * (i * 5 % 7), ("p",), {}) for i in range(size)]
                for task, size in sizes.items()}
    assert list(data.batches(datasets, b=4, epoch=1, seed=42)) == [
        ("caption", [0, 2, 3]), ("caption", [1, 4, 5]), ("vqa", [1, 3, 4, 0]), ("gqa", [2, 5, 3]),
        ("nlvr", [0]), ("vqa", [2, 5, 6]), ("nlvr", [2]), ("nlvr", [1]),
        ("gqa", [8, 0, 1, 4, 7, 6])]
