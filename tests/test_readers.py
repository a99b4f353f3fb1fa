"""The readers on small hand-written files: every layout with the examples it gives, every damage
named by file, record and field, and hundreds of seeded edits against json.loads.

    python -m pytest tests/test_readers.py
"""
import json
import random
from functools import partial

import pytest

from support import readers
from support.gate import BadInput
from support.metrics import vqa_accuracy

# ----------------------------------------------------------------------------- the sample files


class Lines(list):
    """Records that are written one behind the other."""


def text_of(content) -> str:
    if isinstance(content, Lines):
        return "".join(f"{json.dumps(record)}\n" for record in content)
    return json.dumps(content)


def answers(*people):
    return [{"answer": answer, "answer_id": 1} for answer in people]


def picture(cocoid, split, *captions):
    sentences = [{"raw": caption, "tokens": []} for caption in captions]
    return {"sentids": [1], "filename": f"COCO_{cocoid}.jpg", "split": split, "cocoid": cocoid,
            "sentences": sentences}


def said(text, start, end):
    return {"text": text, "start": start, "end": end}


TV = Lines([
    {"vid_name": "friends_1", "sub": [
        said("Hello  there .", 0.5, 2), said("", 2, 3), said("How are\nyou ?", 3.0, 5.25),
        said("Fine .", 8, 9)]},
    {"vid_name": "unused", "sub": []}, {"vid_name": "v", "sub": [said("three", 8, 6)]},
    {"vid_name": "v", "sub": [said("one", 0, 2), said("two", 3, 5)]}])
CHOICES = {"a0": "Ann", "a1": "Ben ", "a2": "Cy", "a3": "Di", "a4": "Ed"}
HOW = {k: v for k, v in CHOICES.items() if k != "a4"}
QUESTION = {"vid_name": "friends_1", "qid": 7, "q": "Who waves? ", "ts": "2.50-5.2"}
CLIPS = Lines([
    {"vid_name": "friends_1", "ts": [2.5, 5.2], "clip_id": 88,
     "descs": [{"desc": "Ann waves. ", "desc_id": 1}, {"desc": "A woman waves.", "desc_id": 2}]},
    {"vid_name": "v", "duration": 9, "ts": "0-7", "descs": [{"desc": "He smiles."}]},
    {"vid_name": "v", "duration": 9, "ts": "0-7", "descs": [{"desc": "He laughs."}]}])
VQA2 = {
    "v2_OpenEnded_mscoco_train2014_questions.json": {
        "info": {"year": 2014, "tags": ["questions", {"questions": [1]}]}, "questions": [
            {"question_id": 3, "image_id": 12, "question": "What?"},
            {"question_id": 41, "image_id": 345, "question": "Really?"}], "license": {}},
    "v2_mscoco_train2014_annotations.json": {"data_type": "mscoco", "annotations": [
        {"question_id": 41, "image_id": 345, "answers": answers(*["Two."] * 2, *["2"] * 8)},
        {"question_id": 3, "image_id": 12, "answers": answers(*["dog"] * 8, "a cat", "cat")}]}}
GQA = {"img_id": "n1", "sent": "Is it?", "label": {"yes": 1.0}}
KARPATHY = {"dataset": "coco", "images": [
    picture(12, "train", "A dog.", "The dog. "), picture(345, "restval", "A cat."),
    picture(6, "val", "A cow.", "A cow.", "Cows."), picture(7, "test", "A hen.")]}
SAMPLES = {
    "vqa": (readers.read_vqa, {"karpathy.json": [
        {"question_id": 3, "img_id": "a", "sent": "What?",
         "label": {"dog": 1, "cat": 0.3, "x": 0}},
        {"question_id": 4, "img_id": "b", "question": "Really?", "label": {}}]}),
    "vqa2": (readers.read_vqa2, VQA2),
    "vqa2 karpathy": (readers.read_vqa2, VQA2 | {"dataset_coco.json": KARPATHY}),
    "vqa2 alone": (readers.read_vqa2, {"v2_OpenEnded_mscoco_test-dev2015_questions.json": {
        "questions": [{"question_id": 5, "image_id": 14, "question": "Why?"}]}}),
    "gqa": (readers.read_questions, {
        "train.json": [GQA | {"question_id": "07"}],
        "valid.json": [GQA | {"question_id": 8, "sent": "Is é?"}]}),
    "gqa own": (readers.read_questions, {"train_balanced_questions.json": {
        "07": {"semantic": [{"a": []}], "imageId": "n1", "question": "Is it?", "answer": "yes"},
        "2805": {"imageId": "n2", "question": "Which?", "answer": "left", "isBalanced": True}}}),
    "nlvr": (readers.read_nlvr, {"train.json": [
        {"identifier": "dev-7-0-1", "img0": "x0", "img1": "x1", "label": 0, "sent": "Two dogs."},
        {"identifier": "dev-7-0-2", "img0": "y0", "img1": "y1", "label": 1, "sent": "Two."}]}),
    "nlvr2": (readers.read_nlvr, {"train.json": Lines([
        {"sentence": "Two dogs.", "label": "False", "identifier": "dev-7-0-1", "synset": "ox"},
        {"validation": {"1": "True"}, "sentence": "Two.", "label": "True",
         "identifier": "dev-7-0-2"}])}),
    "karpathy": (readers.read_karpathy, {"dataset_coco.json": KARPATHY}),
    "coco": (readers.read_coco, {"captions_train2014.json": {
        "info": {}, "images": [{"id": 3, "file_name": "COCO_3.jpg"},
                               {"id": 4, "file_name": "COCO_4.jpg"}], "licenses": [{"id": 1}],
        "annotations": [
            {"image_id": 4, "caption": "A cat.\n"}, {"image_id": 3, "caption": "A dog."},
            {"image_id": 4, "caption": "Cats."}]}}),
    "coco alone": (readers.read_coco, {"image_info_test2014.json": {
        "images": [{"id": 7, "file_name": "COCO_7.jpg"}]}}),
    "tvqa": (partial(readers.read_choices, subtitles="span"), {"tvqa.jsonl": Lines([
        QUESTION | CHOICES | {"answer_idx": 4},
        QUESTION | CHOICES | {"vid_name": "v", "qid": "8", "ts": "NaN-NaN", "answer_idx": 0}]),
        "subtitles.jsonl": TV}),
    "how2qa": (partial(readers.read_choices, choices=4, subtitles="span"), {"how2qa.jsonl": Lines([
        QUESTION | HOW | {"answer_idx": 3, "ts": None},
        QUESTION | HOW | {"vid_name": "silent", "qid": "h2", "answer_idx": 1}]),
        "subtitles.jsonl": TV}),
    "tvc": (partial(readers.read_clip_captions, spans=True, subtitles="span"),
            {"c.jsonl": CLIPS, "s.jsonl": TV}),
    "yc2c": (partial(readers.read_clip_captions, subtitles="span"),
             {"c.jsonl": CLIPS, "s.jsonl": TV}),
}


def write(folder, files):
    paths = [folder / name for name in files]
    for path, content in zip(paths, files.values()):
        path.write_text(content if isinstance(content, str) else text_of(content))
    return paths


def read(reader, split, paths):
    """All fields of data.Example but the task."""
    return [{"references": None, "context": ""} | fields for fields in reader(split, paths)]


def example(id, text, images, targets, references=None, context=""):
    return dict(id=id, text=text, images=tuple(images.split()), targets=targets,
                references=references, context=context)


# ------------------------------------------------------------------------- what each layout gives

# fmt: off
PEOPLE = {3: ["dog"] * 8 + ["a cat", "cat"], 41: ["Two."] * 2 + ["2"] * 8}
WHAT, REALLY = "COCO_train2014_000000000012", "COCO_train2014_000000000345"
WAVES = "Who waves? (2.5, 5.2) a0: Ann. a1: Ben. a2: Cy. a3: Di. a4: Ed."
VAL_CLIPS = [
    example(88, "(2.5, 5.2)", "friends_1", {"Ann waves.": 1.0, "A woman waves.": 1.0},
            ["Ann waves.", "A woman waves."], "How are you ?"),
    example("v:0-7", "(0, 7)", "v", {"He smiles.": 1.0, "He laughs.": 1.0},
            ["He smiles.", "He laughs."], "one two three")]
TRAIN_CLIPS = [
    example(name, text, video, {caption: 1.0}, [caption], context)
    for name, text, video, caption, context in (
        ("88#0", "(2.5, 5.2)", "friends_1", "Ann waves.", "How are you ?"),
        ("88#1", "(2.5, 5.2)", "friends_1", "A woman waves.", "How are you ?"),
        ("v:0-7#0", "(0, 7)", "v", "He smiles.", "one two three"),
        ("v:0-7#1", "(0, 7)", "v", "He laughs.", "one two three"))]
SCORED = {"dog": 1.0, "cat": 0.6}
VQA2_TRAIN = [example(3, "What?", WHAT, SCORED), example(41, "Really?", REALLY, {"2": 1.0})]
GIVEN = [
    ("vqa", "train", [example(3, "What?", "a", {"dog": 1.0, "cat": 0.3}),
                      example(4, "Really?", "b", {})]),
    ("vqa", "submit", [example(3, "What?", "a", {}), example(4, "Really?", "b", {})]),
    ("vqa2", "train", VQA2_TRAIN),
    ("vqa2", "val", [found | {"references": PEOPLE[found["id"]]} for found in VQA2_TRAIN]),
    ("vqa2 alone", "submit", [example(5, "Why?", "COCO_test2015_000000000014", {})]),
    ("vqa2 karpathy", "train", VQA2_TRAIN),
    ("vqa2 karpathy", "val", []),
    ("gqa", "train", [example("07", "Is it?", "n1", {"yes": 1.0}),
                      example(8, "Is é?", "n1", {"yes": 1.0})]),
    ("gqa own", "val", [example("07", "Is it?", "n1", {"yes": 1.0}),
                        example("2805", "Which?", "n2", {"left": 1.0})]),
    ("gqa own", "submit", [example("07", "Is it?", "n1", {}),
                           example("2805", "Which?", "n2", {})]),
    ("nlvr", "test", [example("dev-7-0-1", "Two dogs.", "x0 x1", {"false": 1.0}),
                      example("dev-7-0-2", "Two.", "y0 y1", {"true": 1.0})]),
    ("nlvr2", "test", [
        example("dev-7-0-1", "Two dogs.", "dev-7-0-img0 dev-7-0-img1", {"false": 1.0}),
        example("dev-7-0-2", "Two.", "dev-7-0-img0 dev-7-0-img1", {"true": 1.0})]),
    ("karpathy", "train", [example("12#0", "", "COCO_12", {"A dog.": 1.0}, ["A dog."]),
                           example("12#1", "", "COCO_12", {"The dog.": 1.0}, ["The dog."]),
                           example("345#0", "", "COCO_345", {"A cat.": 1.0}, ["A cat."])]),
    ("karpathy", "val", [example(6, "", "COCO_6", {"A cow.": 1.0, "Cows.": 1.0},
                                 ["A cow.", "A cow.", "Cows."])]),
    ("coco", "train", [example("3#0", "", "COCO_3", {"A dog.": 1.0}, ["A dog."]),
                       example("4#0", "", "COCO_4", {"A cat.": 1.0}, ["A cat."]),
                       example("4#1", "", "COCO_4", {"Cats.": 1.0}, ["Cats."])]),
    ("coco", "val", [example(3, "", "COCO_3", {"A dog.": 1.0}, ["A dog."]),
                     example(4, "", "COCO_4", {"A cat.": 1.0, "Cats.": 1.0},
                             ["A cat.", "Cats."])]),
    ("coco alone", "submit", [example(7, "", "COCO_7", {})]),
    ("coco", "submit", [example(3, "", "COCO_3", {}), example(4, "", "COCO_4", {})]),
    ("tvqa", "train", [
        example(7, WAVES, "friends_1", {"a4": 1.0}, None, "How are you ?"),
        example("8", WAVES.replace("(2.5, 5.2) ", ""), "v", {"a0": 1.0}, None, "one two three")]),
    ("how2qa", "val", [
        example(7, "Who waves? a0: Ann. a1: Ben. a2: Cy. a3: Di.", "friends_1", {"a3": 1.0},
                None, "Hello there . How are you ? Fine ."),
        example("h2", WAVES.replace(" a4: Ed.", ""), "silent", {"a1": 1.0})]),
    ("tvc", "train", TRAIN_CLIPS),
    ("tvc", "val", VAL_CLIPS),
    ("tvc", "submit", [clip | {"targets": {}, "references": None} for clip in VAL_CLIPS]),
    ("yc2c", "train", [clip | {"text": ""} for clip in TRAIN_CLIPS]),
    ("yc2c", "val", [clip | {"text": ""} for clip in VAL_CLIPS]),
]
# fmt: on


@pytest.mark.parametrize("layout, split, expected", GIVEN)
def test_what_each_layout_gives(tmp_path, layout, split, expected):
    reader, files = SAMPLES[layout]
    found = read(reader, split, write(tmp_path, files))
    assert found == expected
    for ours, theirs in zip(found, expected):       # what is drawn depends on the order
        assert list(ours["targets"].items()) == list(theirs["targets"].items())


@pytest.mark.parametrize("split", ["val", "test"])
def test_vqa_is_tested_with_what_people_answered(tmp_path, split, capsys):
    """Karpathy's val and test pictures are val2014's, whose annotations lie beside."""
    reader, files = SAMPLES["vqa"]
    (path,) = write(tmp_path, files)
    assert [found["references"] for found in read(reader, split, [path])] == [None, None]
    assert "2 of 2 questions are scored by their 'label'" in capsys.readouterr().out
    people = [{"question_id": 99, "answers": 5}, {"question_id": 3, "answers": answers(*"abcd")}]
    write(tmp_path, {"v2_mscoco_val2014_annotations.json": {"annotations": people}})
    first, second = read(reader, split, [path])
    assert (first["references"], second["references"]) == (["a", "b", "c", "d"], None)
    assert first["targets"] == {"dog": 1.0, "cat": 0.3}
    assert "1 of 2 questions are scored by their 'label'" in capsys.readouterr().out


def test_karpathys_split_chooses_among_vqas_own_questions(tmp_path):
    other = text_of(KARPATHY).replace('"split": "restval"', '"split": "val"')
    paths = write(tmp_path, VQA2 | {"dataset_coco.json": other})
    both = [read(readers.read_vqa2, split, paths) for split in ("train", "val", "test")]
    assert [[found["id"] for found in part] for part in both] == [[3], [41], []]


def test_a_test_split_of_clips_may_keep_its_answers(tmp_path):
    for layout, field in (("tvqa", "answer_idx"), ("yc2c", "descs")):
        reader, files = SAMPLES[layout]
        name, lines = next(iter(files.items()))
        hidden = {key: value for key, value in lines[1].items() if key != field}
        paths = write(tmp_path, files | {name: Lines([lines[0], hidden])})
        known, unknown = read(reader, "test", paths)
        assert known["targets"] and (unknown["targets"], unknown["references"]) == ({}, None)
        assert not any(found["targets"] for found in read(reader, "submit", paths))
        with pytest.raises(BadInput, match=f"record 1: field '{field}' is missing"):
            read(reader, "val", paths)


@pytest.mark.parametrize("ts, text, context", [
    ("2-3", "(2, 3) ", ""),                         # what ends where the span begins is not within
    ("0-3.5", "(0, 3.5) ", "Hello there . How are you ?"),
    (" 1.75 - 8.25 ", "(1.75, 8.25) ", "Hello there . How are you ? Fine ."),
    ([4, 4.5], "(4, 4.5) ", "How are you ?"), ("100-1234.567", "(100, 1234.567) ", ""),
    (".5-2.", "(0.5, 2) ", "Hello there ."), ("", "", "Hello there . How are you ? Fine ."),
    ("NaN-NaN", "", "Hello there . How are you ? Fine ."),
    (None, "", "Hello there . How are you ? Fine .")])
def test_subtitles_are_cut_to_the_span(tmp_path, ts, text, context):
    lines = Lines([QUESTION | CHOICES | {"ts": ts, "answer_idx": 0}])
    paths = write(tmp_path, {"tvqa.jsonl": lines, "subtitles.jsonl": TV})
    (whole,) = read(readers.read_choices, "val", paths)
    assert whole["context"] == "Hello there . How are you ? Fine ."      # as the papers show it
    (found,) = read(partial(readers.read_choices, subtitles="span"), "val", paths)
    assert found["context"] == context and found["text"].startswith(f"Who waves? {text}a0: Ann.")


def test_a_choice_ends_in_one_full_stop(tmp_path):
    """As the papers' code has it, strip(". ") + "."."""
    asked = QUESTION | {"a0": "Red.", "a1": "Blue", "a2": "Green. ", "a3": "No ..", "a4": "?"}
    paths = write(tmp_path, {"q.jsonl": Lines([asked | {"answer_idx": 0}]), "s.jsonl": TV})
    (found,) = read(readers.read_choices, "val", paths)
    assert found["text"].endswith(" a0: Red. a1: Blue. a2: Green. a3: No. a4: ?.")


def test_a_clip_without_a_name_is_named_by_its_span(tmp_path):
    lines = Lines({"vid_name": "v", "ts": ts, "descs": [{"desc": "a"}]}
                  for ts in (None, "1000.125-123456.75"))
    paths = write(tmp_path, {"c.jsonl": lines, "s.jsonl": TV})
    found = read(readers.read_clip_captions, "val", paths)
    assert [clip["id"] for clip in found] == ["v", "v:1000.125-123456.75"]


def test_soft_scores():
    people = ["Yes."] * 3 + ["yes", "the  dog", "dog", "two", "2", "2 ", "a"]
    assert list(readers.soft_scores(people).items()) == [("yes", 1.0), ("2", 0.9), ("dog", 0.6)]
    assert readers.soft_scores(["no"]) == {"no": 0.3} and readers.soft_scores(["a"]) == {}


def test_no_answer_is_taught_that_the_metric_gives_nothing_for():
    assert readers.soft_scores(["none"] * 6 + ["kite"] * 4) == {"kite": 1.0}     # not "0"
    generator = random.Random(0)
    words = ["none", "0", "the dog", "dog", "Dog", "two", "2", "a", "yes,", "yes", "1,000", "dont"]
    for _ in range(300):
        people = generator.choices(generator.sample(words, 3), k=10)
        scores = readers.soft_scores(people)
        for answer in {*scores, "dog"}:
            assert (answer in scores) == (vqa_accuracy(answer, people) > 0), (answer, people)


def test_equal_answers_and_pictures_are_one_object(tmp_path):
    record = {"img_id": "n1", "sent": "", "label": {"yes": 1.0}}
    content = [record | {"question_id": number} for number in range(9)]
    found = read(readers.read_questions, "train", write(tmp_path, {"a.json": content}))
    assert len({id(fields["targets"]) for fields in found}) == 1
    assert len({id(fields["images"]) for fields in found}) == 1


# ------------------------------------------------------------------------------ damage is named

HALF = r"\ud83d"                                    # half an emoji: no text that can be written
DAMAGE = [  # layout, what stands in its last place, what stands there now, the complaint
    ("vqa", '"label": {}', '"label": 5', "karpathy.json, record 1: 'label' should be an object or"),
    ("vqa", '"question_id": 4', '"question_id": true', "record 1: 'question_id' should be"),
    ("gqa", '"sent"', '"said"', "valid.json, record 0: field 'sent' or 'question' is missing"),
    *(("gqa", '"yes": 1.0', f'"yes": {wrong}', "valid.json, record 0: 'label' should score 'yes' "
       "from 0 to 1, not") for wrong in ("2", "NaN", "1e999", "true")),
    ("gqa own", '{"imageId": "n2", "question"', '5, "x": {"question"', "'2805': an object with"),
    ("gqa own", '"left"', "null", "record '2805': 'answer' should be an object or text"),
    ("nlvr", '"label": 1', '"label": 1.0', "record 1: 'label' should be one of"),
    ("nlvr", '"y1"', "0", "record 1: 'img1' should be text, not 0"),
    ("nlvr2", '"label": "True"', '"label": "true"', "record 1: 'label' should be one of"),
    ("karpathy", '"images"', '"image"', "dataset_coco.json: field 'images' is missing"),
    ("karpathy", '"dataset"', '"images"', "a list or object should stand at"),
    ("karpathy", '"dataset": "coco"', '"images": []', "field 'images' is there twice"),
    ("karpathy", '"restval"', '"dev"', "record 1: 'split' should be one of"),
    ("karpathy", '[{"raw": "A cat.", "tokens": []}]', "[]", "record 1: 'sentences' is empty"),
    ("karpathy", '"A cat."', "3", "record 1: 'raw' in 'sentences' should be text, not [3]"),
    ("karpathy", '{"raw": "A cat.", "tokens": []}', "5", "1: 'sentences' should be a list, each"),
    ("coco", '"id": 4', '"id": 5', "record 1: no record of 'annotations' has its 'id', 5"),
    ("coco", '"Cats."', "null", "train2014.json, record 2: 'caption' should be text, not None"),
    ("vqa2", '"image_id": 345, "q', '"image_id": "345", "q', "record 1: 'image_id' should be a"),
    ("vqa2", '"question_id": 3, "image_id": 12, "que', '"question_id": 9, "image_id": 12, "que',
     "questions.json, record 0: no record of 'annotations' has its 'question_id', 9"),
    ("vqa2", '"questions": [{"', '"q": [{"', "questions.json: field 'questions' is missing"),
    ("vqa2", '"answer": "cat", ', "", "annotations.json, record 1: field 'answer' is missing"),
    *(("tvqa", '"answer_idx": 0', f'"answer_idx": {wrong}', "tvqa.jsonl, record 1: 'answer_idx' "
       "should be a whole number from 0 to 4, not ") for wrong in (5, -1, "true", '"1"', 1.0)),
    ("how2qa", '"answer_idx": 1', '"answer_idx": 4', "1: 'answer_idx' should be a whole number"),
    ("tvqa", '"a2": "Cy"', '"a2": 3', "record 1: 'a2' should be text, not 3"),
    *(("tvqa", '"NaN-NaN"', wrong, "record 1: 'ts' should be \"start-end\" in seconds")
      for wrong in ('"5"', '"a-b"', '"1-2-3"', '"-1-2"', '"3-2"', "[]", "[1]", '[1, "2"]', "[2, 1]",
                    '"1-NaN"', "[-1, 2]", "[0, Infinity]", "[1, 2, 3]", f'"{"9" * 400}-9"',
                    f'"{"9" * 100_000}"')),          # and no hang
    ("tvqa", '"NaN-NaN"', "{}", "record 1: 'ts' should be text or a list, not {}"),
    ("tvc", '[{"desc": "He laughs."}]', "[]", "c.jsonl, record 2: 'descs' should hold one caption"),
    ("tvc", '"He laughs."', '" "', "c.jsonl, record 2: 'descs' should hold one caption or more"),
    ("yc2c", '"descs": [{"desc": "He l', '"x": [{"desc": "He l', "2: field 'descs' is missing"),
    ("tvqa", '"end": 5', '"end": NaN', "subtitles.jsonl, record 3: 'end' should be a number"),
    ("tvqa", ', "end": 5', "", "subtitles.jsonl, record 3: field 'end' is missing"),
    ("tvqa", '"two"', "2", "subtitles.jsonl, record 3: 'text' should be text, not 2"),
    *((layout, there, HALF, f"{where}: ") for layout, there, where in (
        ("gqa", "Is ", "valid.json, record 0"), ("vqa", "Really", "karpathy.json, record 1"),
        ("gqa own", "2805", "record '\\ud83d'"), ("gqa own", "left", "record '2805'"),
        ("gqa", "yes", "valid.json, record 0"), ("karpathy", "A cat.", "coco.json, record 1"),
        ("vqa2", "a cat", "annotations.json, record 1"), ("tvqa", "Cy", "tvqa.jsonl, record 1"),
        ("yc2c", "He laughs.", "c.jsonl, record 2"), ("tvqa", "two", "subtitles.jsonl, record 3"))),
]


@pytest.mark.parametrize("layout, there, now, complaint", DAMAGE, ids=lambda value: value[:20])
def test_damage_is_named(tmp_path, layout, there, now, complaint):
    reader, files = SAMPLES[layout]
    texts = {name: text_of(content) for name, content in files.items()}
    name = [name for name in texts if there in texts[name]][-1]
    before, _, behind = texts[name].rpartition(there)
    with pytest.raises(BadInput) as error:
        read(reader, "train", write(tmp_path, texts | {name: before + now + behind}))
    assert complaint in str(error.value) and "\n" not in str(error.value)
    str(error.value).encode()


def test_too_few_people_to_score_an_answer_are_refused(tmp_path):
    few = text_of(VQA2["v2_mscoco_train2014_annotations.json"]).replace(
        text_of(answers(*PEOPLE[3])), text_of(answers("a", "b", "a")))
    paths = write(tmp_path, VQA2 | {"v2_mscoco_train2014_annotations.json": few})
    assert read(readers.read_vqa2, "train", paths)[0]["targets"] == {"b": 0.3}
    with pytest.raises(BadInput, match="record 1: question 3 has 3 answers, and three"):
        read(readers.read_vqa2, "val", paths)


# ------------------------------------------------------------------------------------- records

DOCUMENTS = [
    [], {}, {"one": 12345, "": {"x": [1, 2]}, 'q"uote': "y", "last": 678},
    [1, -2.5e3, 'a"]b\\', "é€😀 [{", True, None, [], {}, [[1], {"a": [2]}], {"b": {"c": "}"}}]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=["[]", "{}", "object", "list"])
@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_records(tmp_path, document, indent, ascii_only):
    members = document
    if isinstance(document, dict):                  # GQA's: the name is a field of the record
        members = [value | {"question_id": name} if isinstance(value, dict) else value
                   for name, value in document.items()]
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    inside = f'{{"x": "key", "y": {{"key": {text}}}, "key": {text}, "z": [{text}]}}'
    lines = [{"number": value} for value in members] + [{}]
    a, b, c = write(tmp_path, {
        "a.json": f"\ufeff \r\n{text}\n", "b.json": inside, "c.json": Lines(lines)})
    assert list(readers.records([a], lambda record: [record])) == [[one] for one in members]
    assert list(readers.records([b, b], str, "key")) == list(map(str, members)) * 2
    assert list(readers.records([c], dict, lines=True)) == lines
    if isinstance(document, list):
        found = readers.records([a], lambda record: [record], lines=True)
        assert [one for one, in found] == members                    # no lines, though asked


@pytest.mark.parametrize("text, record", [
    ("", ""), (" ", ""), ("1", ""), ('"a"', ""), ("[1 2]", ""), ("[1, ]", 1), ("[,]", 0),
    ("[t]", 0), ("[2.x]", ""), ('["a]', 0), ("[{]", 0), ("[1", ""), ("[1,", 1), ("[1] 2", ""),
    ("{1: 2}", ""), ('{"a" 1}', ""), ('{"a": }', "'a'"), ('{"b": 1, "a": [}', "'a'"), ('{"a', ""),
    ("[1,\xa02]", 1), ("[" * 100_000, 0), ('{"a":' * 100_000, "'a'"),
    ("[1, " + "1" * 5000 + "]", 1),
], ids=lambda value: str(value)[:12])
def test_broken_json_is_named(tmp_path, text, record):
    (path,) = write(tmp_path, {"a.json": text})
    where = f"a.json, record {record}: " if record != "" else "a.json: "
    for key, content in ((None, text), ("key", f'{{"x": 1, "key": {text}'), ("key", text)):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(BadInput) as error:
            list(readers.records([path], repr, key))
        assert (where if key is None else "a.json") in str(error.value)
        assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("content", [
    b'{"key": [1, 2]', b'{"key": [1, 2], "x": [', b'{"key": [1, 2], "x": 1} {}', b'{"\xff": 1}'])
def test_a_file_that_was_cut_off_behind_its_list_is_not_a_whole_one(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="a.json[:,] "):
        list(readers.records([path], repr, "key"))


def test_only_large_files_show_a_bar(tmp_path, monkeypatch, capsys):
    (path,) = write(tmp_path, {"a.json": [1, 2, 3]})
    assert list(readers.records([path], repr)) and capsys.readouterr().err == ""
    monkeypatch.setattr(readers, "BIG", 5)
    assert list(readers.records([path], repr)) and "read a.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------- seeded edits

def plain_records(paths, read, key=None, lines=False):
    """What `records` should give, by json.loads of the whole file."""
    for path in paths:
        text = path.read_bytes().decode("utf-8-sig").strip(" \t\r\n")
        content = []
        if not (lines and text.startswith("{")):
            content, text = json.loads(text), ""
            content = content[key] if key else content
        while text:
            value, end = json.JSONDecoder().raw_decode(text)
            content.append(value)
            text = text[end:].lstrip(" \t\r\n")
        assert isinstance(content, (list, dict))
        if isinstance(content, dict):
            content = [value | {"question_id": name} for name, value in content.items()]
        yield from (made for made in map(read, content) if made is not None)


MILD = ["", " ", "x", "1", "0", "é", "\\n"]
TOKENS = MILD + ["{", "}", "[", "]", ",", ":", '"', "\\", "-", ".", "e", "null", "true", "[]",
                 "{}", '""', "NaN", "Infinity", "1e999", "\\ud83d", "\\u0000", "\ufeff",
                 "9" * 5000, "[" * 5000]


def edited(text, generator):
    """The bytes of a text with an edit or two: characters gone, another token, an end."""
    for _ in range(generator.choice([1, 1, 2])):
        start = generator.randrange(len(text))
        length = generator.choice([0, 1, 1, 2])
        tokens = generator.choice([MILD, TOKENS])
        text = text[:start] + generator.choice(tokens) + text[start + length:]
    if generator.random() < 0.05:
        text = text[:generator.randrange(len(text))]
    content = text.encode()
    if generator.random() < 0.05:
        content = content.replace(b"a", b"\xff", 1)
    return content


@pytest.mark.parametrize("layout", [name for name in SAMPLES if "alone" not in name])
def test_edited_files_are_refused_or_read_as_json_reads_them(tmp_path, monkeypatch, layout):
    generator = random.Random(layout)
    reader, files = SAMPLES[layout]
    files = {name: text_of(content) for name, content in files.items()}
    counts = {True: 0, False: 0}
    for _ in range(100):
        paths = write(tmp_path, files)
        path = generator.choice(paths)
        path.write_bytes(edited(files[path.name], generator))
        split = generator.choice(["train", "val"])
        try:
            ours = read(reader, split, paths)
        except BadInput:                            # anything else is a bug and fails the test
            ours = None
        with monkeypatch.context() as patch:
            patch.setattr(readers, "records", plain_records)
            try:
                theirs = read(reader, split, paths)
            except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
                theirs = None
        assert ours == theirs, path.read_bytes()[:3000]
        counts[ours is None] += 1
    assert min(counts.values()) > 8, counts       # both happen
