"""support/submit.py: each benchmark's own file, and what its server would refuse."""
import json

import pytest

from data import TASKS, Example
from support import submit
from support.gate import BadInput


def write(task, ids, answers, path):
    examples = [Example(task, name, "", ("p",), {}) for name in ids]
    return submit.write(task, TASKS[task].submit, answers, examples, path)


@pytest.mark.parametrize("task, ids, answers, name, content", [
    ("vqa", (3, 1), ["yes ", "né"], "a.json",
     [{"question_id": 3, "answer": "yes"}, {"question_id": 1, "answer": "né"}]),
    ("gqa", ("03", 4), ["dog", "no"], "a.json",
     [{"questionId": "03", "prediction": "dog"}, {"questionId": "4", "prediction": "no"}]),
    ("caption", (9,), ["a dog"], "a.json", [{"image_id": 9, "caption": "a dog"}]),
    ("nlvr", ("test1-0-1-0", "test1-0-0-0"), ["true", "false"], "a.csv",
     "test1-0-1-0,True\ntest1-0-0-0,False\n"),
    ("tvqa", (7, "b"), ["a4", "perhaps"], "a.json", {"7": 4, "b": 0}),
    ("yc2c", (7,), ["cut it"], "a.jsonl",
     {"vid_name": "p", "clip_id": 7, "descs": [{"desc": "cut it"}]})])
def test_each_benchmarks_file(tmp_path, capsys, task, ids, answers, name, content):
    path = write(task, ids, answers, tmp_path / "new" / "a")
    assert path == tmp_path / "new" / name and [p.name for p in path.parent.iterdir()] == [name]
    text = path.read_text(encoding="utf-8")
    assert (text if task == "nlvr" else json.loads(text)) == content
    assert ("1 of 2 answers are none of a0" in capsys.readouterr().out) == (task == "tvqa")


@pytest.mark.parametrize("task, ids, answers, message", [
    ("vqa", (1, 2, 1), ["a"] * 3, "vqa submission, record 1: it is there twice"),
    ("vqa", ("1",), ["a"], "record '1': .*ids are .*int"),
    ("caption", ("1#0",), ["a"], "record '1#0': .*ids are .*int"),
    ("gqa", (1, "1"), ["a", "b"], "record '1': it is there twice"),
    ("nlvr", ("dev-1-0-0",), ["yes"], "its answer should be one of false, true, not 'yes'")])
def test_what_a_server_would_refuse_is_not_written(tmp_path, task, ids, answers, message):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(BadInput, match=message):
        write(task, ids, answers, tmp_path / "a.json")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("ids, answers", [((), []), ((1, 2), ["a"])])
def test_one_answer_an_example(tmp_path, ids, answers):
    with pytest.raises(AssertionError, match="one answer an example, and at least one"):
        write("vqa", ids, answers, tmp_path / "a.json")


@pytest.mark.parametrize("task, split, name", [
    ("vqa", "test", "vqa"), ("nlvr", "val", "nlvr-val"),
    ("tvqa", "val", "tvqa/tvqa_val_predictions"), ("tvc", "test", "tvc/tvc_test_predictions"),
    ("how2qa", "submit", "how2qa/how2qa_test_public_predictions")])
def test_names_that_scorers_read(task, split, name):
    assert TASKS[task].submit.name(task, split) == name
