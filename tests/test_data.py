"""The readers on hand-written files in the published layouts (and the same world in two of them),
collation, the sampler, and submissions.

python -m pytest tests/test_data.py
"""

import json
import shutil
from collections import Counter
from dataclasses import replace

import data
from support import metrics
import pytest
from support import readers
from support import records
import torch
from world import scenes as world
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# ----------------------------------------------------------------------------------------- readers


def test_vqa(folder, capsys):
    (train,) = data.load("vqa", "train", folder)
    assert train == Example("vqa", 3, "What?", ("COCO_a",), {"dog": 1.0, "cat": 0.3})
    assert "1 of 2 examples have no answer" in capsys.readouterr().out
    first, second = data.load("vqa", "test", folder)
    assert first.references == ["dog"] * 9 + ["x"] and first.targets["dog"] == 1.0
    assert (second.text, second.targets, second.references) == ("Really?", {}, None)
    assert "1 of 2 questions have no raw answers" in capsys.readouterr().out


def test_vqa_without_raw_answers_says_so(folder, capsys):
    (folder / "vqa/v2_mscoco_val2014_annotations.json").unlink()
    assert [ex.references for ex in data.load("vqa", "val", folder)] == [None, None]
    assert "2 of 2 questions have no raw answers" in capsys.readouterr().out


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
        ("vqa", "vqa/karpathy_train.json", None, "lacks vqa/karpathy_train.json (VL-T5's"),
        ("vqa", "vqa/karpathy_train.json", "[{", "karpathy_train.json is not valid JSON"),
        ("vqa", "vqa/karpathy_train.json", [], "karpathy_train.json has no example"),
        ("vqa", "vqa/karpathy_train.json", VQA[1:], "has no answered example"),
        ("vqa", "vqa/karpathy_train.json", "", "is not valid JSON (a list or object of records"),
        ("vqa", "vqa/karpathy_train.json", "[] 1", "is not valid JSON (nothing more expected: '1"),
        ("vqa", "vqa/karpathy_train.json", {"a": 5}, "record 'a' should be an object"),
        ("vqa", "vqa/karpathy_train.json", [VQA[0], 5], "record 1 should be an object"),
        ("gqa", "GQA/valid.json", [{"question_id": 1}], "valid.json, record 0: field 'sent' or"),
        ("gqa", "GQA/train.json", [GQA, GQA | {"sent": 5}], "record 1: 'sent' should be str"),
        ("gqa", "GQA/train.json", [GQA | {"label": {"a": 2}}], "record 0: 'label' should score"),
        ("nlvr", "nlvr/train.json", [NLVR | {"label": 2}], "record 0: 'label' should be one of [0"),
        ("nlvr", "nlvr/train.json", [NLVR | {"label": 0.0}], "record 0: 'label' should be int"),
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
    for task in world.TASKS:
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
            data.submission(task, best, examples, tmp_path / task)  # the world's ids are accepted
            scores = metrics.score(task, best, examples)
            assert next(iter(scores.values())) > (95 if task != "vqa" else 80), (task, scores)


def test_unknown_names(folder):
    with pytest.raises(ValueError, match="'vga'.*'vqa', 'gqa', 'nlvr', 'caption'"):
        data.load("vga", "train", folder)
    with pytest.raises(ValueError, match="'valid'.*'train', 'val', 'test', 'submit'"):
        data.load("vqa", "valid", folder)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        data.load("vqa", "train", folder / "nowhere")


# ------------------------------------------------------------------------------ the other layouts

VQA2 = "vqa/v2_OpenEnded_mscoco_{}_questions.json"
PEOPLE = "vqa/v2_mscoco_{}_annotations.json"


def ten(label):
    """Ten people's answers with these soft scores."""
    counts = {a: {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}[soft] for a, soft in label.items()}
    counts[next(iter(counts))] += 10 - sum(counts.values())
    return [{"answer": a, "answer_id": 1} for a, n in counts.items() for _ in range(n)]


def write_vqa2(source, folder):
    """A world's vqa in VQAv2's files; its val and test pictures are val2014's, as Karpathy's."""
    people = json.loads((source / PEOPLE.format("val2014")).read_text())["annotations"]
    known = {record["question_id"]: record["answers"] for record in people}
    for year, splits in {"train2014": ["train"], "val2014": ["val", "test"]}.items():
        read = [json.loads((source / f"vqa/karpathy_{s}.json").read_text()) for s in splits]
        questions, annotations = [], []
        for record in sum(read, []):
            assert record["img_id"].startswith(f"COCO_{year}_")
            ids = {"question_id": record["question_id"], "image_id": int(record["img_id"][-12:])}
            questions.append(ids | {"question": record["sent"]})
            answers = known.get(record["question_id"]) or ten(record["label"])
            annotations.append(ids | {"answers": answers, "answer_type": "other"})
        head = {"info": {"year": 2014, "tags": ["a", 1]}, "license": {}, "data_subtype": year}
        write(folder / VQA2.format(year), head | {"questions": questions})
        write(folder / PEOPLE.format(year), head | {"annotations": annotations[::-1]})


def write_gqa(source, folder):
    names = {"train": "train", "valid": "val", "testdev": "testdev", "submit": "submission_all"}
    for ours, theirs in names.items():
        file, out = json.loads((source / f"GQA/{ours}.json").read_text()), {}
        for record in file:
            named = out[str(record["question_id"])] = {"semantic": [{"operation": "select"}]}
            named |= {"imageId": record["img_id"], "question": record["sent"], "isBalanced": True}
            if record["label"]:
                named["answer"] = max(record["label"])
        theirs += "_questions" if "all" in theirs else "_balanced_questions"
        write(folder / f"GQA/{theirs}.json", out)


def write_nlvr2(source, folder):
    for ours, theirs in {"train": "train", "valid": "dev", "test": "test1"}.items():
        lines = [
            json.dumps({"sentence": r["sent"], "label": str(bool(r["label"])), "synset": "ox"}
                       | {"identifier": r["identifier"], "left_url": "http://"})
            for r in json.loads((source / f"nlvr/{ours}.json").read_text())
        ]  # fmt: skip
        write(folder / f"nlvr/{theirs}.json", "\n".join(lines) + "\n")


def write_coco(source, folder):
    """Pictures in one order, captions all first ones before all second ones."""
    pictures = json.loads((source / "COCO/dataset_coco.json").read_text())["images"]
    for year, split in {"train2014": "train", "val2014": "test"}.items():
        some = [p for p in pictures if p["split"] == split]
        images = [{"id": p["cocoid"], "file_name": p["filename"], "height": 96} for p in some]
        captions = [
            {"image_id": p["cocoid"], "id": 1, "caption": p["sentences"][i]["raw"] + "\n"}
            for i in range(5) for p in some
        ]  # fmt: skip
        content = {"info": {}, "images": images, "licenses": [{"id": 1}], "annotations": captions}
        write(folder / f"COCO/annotations/captions_{year}.json", content)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same world in VL-T5's and in the benchmarks' own files."""
    root = tmp_path_factory.mktemp("layouts")
    source = world.write(root / "world", pictures=150, items=300, progress=False)
    for write_own in (write_vqa2, write_gqa, write_nlvr2, write_coco):
        write_own(source, root / "own")
    shutil.copytree(root / "own", root / "split")
    shutil.copy(source / "COCO/dataset_coco.json", root / "split/COCO")
    return source, root / "own", root / "split"


def fixed(ex):
    """An example as its benchmark publishes it: gqa's ids are text, nlvr's pictures named so."""
    if ex.task == "nlvr":
        one, place, pair, _ = ex.id.split("-")
        return replace(ex, images=tuple(f"{one}-{place}-{pair}-img{i}" for i in (0, 1)))
    return replace(ex, id=str(ex.id)) if ex.task == "gqa" else ex


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr", "caption"])
def test_both_layouts_give_the_same_examples(layouts, task, split, capsys):
    source, _, own = layouts
    expected = [fixed(ex) for ex in data.load(task, split, source)]
    examples = data.load(task, split, own)
    assert examples == expected and len(examples) > 5
    orders = [[list(ex.targets.items()) for ex in some] for some in (examples, expected)]
    assert orders[0] == orders[1]  # what is drawn depends on it
    answers = [data.draw_answer(ex, (1, i % 3))[0] for i, ex in enumerate(examples)]
    if split != "train":
        assert metrics.score(task, answers, examples) == metrics.score(task, answers, expected)
    assert capsys.readouterr().out == ""


def test_without_karpathys_split_val2014_tests_and_it_is_said(layouts, capsys):
    source, own, _ = layouts
    for task in ("vqa", "caption"):
        assert data.load(task, "train", own) == data.load(task, "train", source)
        assert "train2014 trains and val2014 tests, unlike in the papers" in capsys.readouterr().out
    assert data.load("caption", "test", own) == data.load("caption", "test", source)
    both = data.load("vqa", "val", source) + data.load("vqa", "test", source)
    assert data.load("vqa", "test", own) == data.load("vqa", "val", own) == both


def test_questions_to_submit_have_no_answers(layouts, folder):
    source, own, _ = layouts
    examples = data.load("gqa", "submit", own)
    assert examples == [fixed(ex) for ex in data.load("gqa", "submit", source)]
    assert len(examples) > 5 and not any(ex.targets for ex in examples)
    for year, name in (("test2015", "test2015"), ("test-dev2015", "test2015")):
        path = folder / VQA2.format(year)
        write(path, {"questions": [{"question_id": 5, "image_id": 14, "question": "Why?"}]})
        image = (f"COCO_{name}_000000000014",)
        assert data.load("vqa", "submit", folder) == [Example("vqa", 5, "Why?", image, {}, None)]
        path.unlink()
    write(folder / "vqa/test.json", [{"question_id": 6, "img_id": "a", "sent": "Who?"}])
    assert data.load("vqa", "submit", folder) == [Example("vqa", 6, "Who?", ("a",), {}, None)]
    images = [{"id": 7, "file_name": "COCO_test2014_000000000007.jpg"}]
    write(folder / "COCO/image_info_test2014.json", {"images": images})
    (ex,) = data.load("caption", "submit", folder)
    assert (ex.id, ex.images, ex.targets) == (7, ("COCO_test2014_000000000007",), {})
    with pytest.raises(ValueError, match="nlvr has no split 'submit'"):
        data.load("nlvr", "submit", folder)


def test_soft_scores():
    people = ["Yes."] * 3 + ["yes", "the  dog", "dog", "two", "2", "2 ", "a"]
    assert list(readers.soft_scores(people).items()) == [("yes", 1.0), ("2", 0.9), ("dog", 0.6)]
    assert readers.soft_scores(["no"]) == {"no": 0.3} and readers.soft_scores(["a"]) == {}


QUESTION = {"question_id": 1, "image_id": 2, "question": "Why?"}
ANSWER = {"question_id": 1, "image_id": 2, "answers": [{"answer": "so"}]}
IMAGE, SAID = {"id": 3, "file_name": "a.jpg"}, {"image_id": 3, "caption": "a"}


@pytest.mark.parametrize(
    "task, questions, answers, message",
    [
        ("vqa", [QUESTION | {"image_id": "2"}], [ANSWER], "0: 'image_id' should be int, not '2'"),
        ("vqa", [QUESTION, QUESTION | {"question_id": 3}], [ANSWER], "1: 'question_id' 3 is not"),
        ("vqa", [QUESTION], [ANSWER | {"answers": ["so"]}], "record 0, 'answers' should be an obj"),
        ("vqa", [QUESTION], [ANSWER | {"answers": [{}]}], "record 0, 'answers': field 'answer' is"),
        ("vqa", None, [ANSWER], "train2014_questions.json: field 'questions' is missing"),
        ("vqa", [QUESTION], None, "train2014_annotations.json: field 'annotations' is missing"),
        ("vqa", [QUESTION], [ANSWER | {"answers": [{"answer": "a"}]}], "has no answered example"),
        ("caption", [IMAGE | {"id": 4}], [SAID], "0: no record of 'annotations' has its"),
        ("caption", [IMAGE], [SAID | {"caption": None}], "0: 'caption' should be str, not None"),
        ("caption", [{"id": 3}], [SAID], "record 0: field 'file_name' is missing"),
    ],
)
def test_what_is_wrong_in_the_own_files_is_named(tmp_path, task, questions, answers, message):
    if task == "vqa":
        questions = {} if questions is None else {"questions": questions}
        write(tmp_path / VQA2.format("train2014"), questions)
        write(tmp_path / PEOPLE.format("train2014"), {"annotations": answers} if answers else {})
    else:
        content = {"images": questions, "annotations": answers}
        write(tmp_path / "COCO/captions_train2014.json", content)
    with pytest.raises(ValueError) as error:
        data.load(task, "train", tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


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
                data.load("vqa", split, tmp_path)
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


def test_equal_answers_and_pictures_are_one_object(folder):
    write(folder / "GQA/valid.json", [GQA | {"question_id": f"1{i}"} for i in range(9)])
    examples = data.load("gqa", "train", folder)
    assert len(examples) == 10 and not hasattr(examples[0], "__dict__")
    assert len({id(ex.targets) for ex in examples}) == len({id(ex.images) for ex in examples}) == 1


# ----------------------------------------------------------------------------------------- records


DOCUMENTS = [
    [],
    {},
    [1, -2.5e3, 'a"]b\\', "é€😀 [{", True, None, [], {}, [[1], {"a": [2]}], {"b": {"c": "}"}}],
    {"one": 12345, "": {"x": [1, 2]}, 'q"uote': "y", "last": 678},
]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("document", DOCUMENTS, ids=["[]", "{}", "list", "object"])
def test_records_are_whole_wherever_a_piece_ends(tmp_path, monkeypatch, piece, document):
    monkeypatch.setattr(records, "PIECE", piece)
    members = list(document.items() if isinstance(document, dict) else enumerate(document))
    for indent in (None, 3):
        for ascii_only in (True, False):
            text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
            write(tmp_path / "a.json", "\ufeff \r\n" + text + "\n")
            found = list(records.records(tmp_path / "a.json"))
            assert [(name, value) for _, name, value in found] == members
            write(tmp_path / "b.json", f'{{"x": 1, "y": {text}, "key": {text}, "z": [{text}]}}')
            found = list(records.records(tmp_path / "b.json", "key"))
            assert [(name, value) for _, name, value in found] == members
    lines = [{"n": value} for _, value in members] + [{}]
    write(tmp_path / "c.json", "\n".join(map(json.dumps, lines)))
    found = list(records.records(tmp_path / "c.json", lines=True))
    assert [value for *_, value in found] == lines


@pytest.mark.parametrize("piece", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    '[1, 2|[1 2]|[1, ]|[,]|{"a" 1}|{1: 2}|{"a": }|[1] 2|"a"|1|| |[t]|[2.x]|["a]|[{]|1]'.split("|"),
)
def test_broken_files_are_named(tmp_path, monkeypatch, piece, text):
    monkeypatch.setattr(records, "PIECE", piece)
    write(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match="a.json is not valid JSON .*: fetch or write it again.$"):
        list(records.records(tmp_path / "a.json"))


def test_files_are_read_in_bounded_memory(tmp_path, monkeypatch):
    held, more = [], records.Stream.more

    def watched(self):
        answer = more(self)
        held.append(len(self.text))
        return answer

    monkeypatch.setattr(records.Stream, "more", watched)
    monkeypatch.setattr(records, "PIECE", 1000)
    rows = [{"question_id": i, "text": "word " * (i % 60)} for i in range(3000)]
    write(tmp_path / "a.json", {"first": rows, "key": rows, "last": rows})
    size = (tmp_path / "a.json").stat().st_size
    assert [row for *_, row in records.records(tmp_path / "a.json", "key")] == rows
    assert size > 1_000_000 and max(held) < 3000
    held.clear()  # a text without an end is given up, not read to the end
    monkeypatch.setattr(records, "LONGEST", 5000)
    write(tmp_path / "b.json", '["' + "a" * size)
    with pytest.raises(ValueError, match="Unterminated string"):
        list(records.records(tmp_path / "b.json"))
    assert max(held) < 20_000


def test_only_large_files_show_a_bar(folder, monkeypatch, capsys):
    data.load("gqa", "train", folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(records, "BIG", 10)
    data.load("gqa", "train", folder)
    assert "read train.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- submissions


def asked(task, *ids):
    return [Example(task, i, "", ("p",), {}) for i in ids]


@pytest.mark.parametrize(
    "task, ids, answers, name, content",
    [
        ("vqa", (3, 1), ["yes ", "né"], "a.json",
         [{"question_id": 3, "answer": "yes"}, {"question_id": 1, "answer": "né"}]),
        ("gqa", ("03", 4), ["dog", "no"], "a.json",
         [{"questionId": "03", "prediction": "dog"}, {"questionId": "4", "prediction": "no"}]),
        ("caption", (9,), ["a dog"], "a.json", [{"image_id": 9, "caption": "a dog"}]),
        ("nlvr", ("test1-0-1-0", "test1-0-0-0"), ["true", "false"], "a.csv",
         "test1-0-1-0,True\ntest1-0-0-0,False\n"),
    ],
)  # fmt: skip
def test_submission(tmp_path, task, ids, answers, name, content):
    path = data.submission(task, answers, asked(task, *ids), tmp_path / "new" / "a")
    assert path == tmp_path / "new" / name and [p.name for p in path.parent.iterdir()] == [name]
    text = path.read_text(encoding="utf-8")
    assert (text if task == "nlvr" else json.loads(text)) == content


@pytest.mark.parametrize(
    "task, ids, answers, message",
    [
        ("vqa", (1, 2), ["a"], "1 answers for 2 examples"),
        ("vqa", (), [], "at least one"),
        ("vqa", (1, 2, 1), ["a"] * 3, "question_id 1: it is there twice"),
        ("vqa", ("1",), ["a"], "question_id '1': it should be int"),
        ("caption", ("1#0",), ["a"], "image_id '1#0': it should be int"),
        ("gqa", (1, "1"), ["a", "b"], "questionId '1': it is there twice"),
        ("gqa", ("1",), [None], "questionId '1': its answer should be text, not None"),
        ("nlvr", ("dev-1-0-0",), ["yes"], "its answer should be false or true, not 'yes'"),
    ],
)
def test_what_a_server_would_refuse_is_not_written(tmp_path, task, ids, answers, message):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ValueError, match=message):
        data.submission(task, answers, asked(task, *ids), tmp_path / "a.json")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with pytest.raises(ValueError, match="an id of"):
        data.submission("caption", ["a"], asked("vqa", 1), tmp_path / "a.json")


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
            ("b", [1, 2, 1], 10, "karpathy_test.json has id 1 more than once")):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=words):
            data.load("vqa", "test", vqa_test(tmp_path / name, questions, people))
    (tmp_path / "c").mkdir()
    assert len(data.load("vqa", "test", vqa_test(tmp_path / "c", [1, 2], 4))) == 2


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "karpathy_train.json"), ("[" + "1" * 5000 + "]", "karpathy_train.json"),
    ('[{"question_id": true, "img_id": "a", "sent": "", "label": {}}]', "'question_id' should be"),
])
def test_endless_json_and_truth_values_are_named(tmp_path, text, words):
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa/karpathy_train.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        data.load("vqa", "train", tmp_path)
