"""In which file does a benchmark's server take answers?

    path = write("vqa", form, answers, examples, "out/submissions/vqa")      # vqa.json

vqa, gqa, caption: a JSON list of {id, answer}; nlvr: lines "identifier,True"; tvqa, how2qa: a JSON
object {qid: index}; tvc, yc2c: a JSON object {vid_name, clip_id, descs} a line; these four under
the names that VALUE's scorer reads. Which task takes which form stands in data.py's table.

    python -m pytest tests/test_submit.py
"""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.gate import reading, replace_file


def plain_name(task: str, split: str) -> str:
    return task if split == "test" else f"{task}-{split}"


def value_name(task: str, split: str) -> str:
    """Where VALUE's scorer looks: "tvqa/tvqa_val_predictions"; its splits are val and test."""
    if split != "val":
        split = "test_public" if task == "how2qa" else "test"
    return f"{task}/{task}_{split}_predictions"


class Form(NamedTuple):
    ids: type | tuple[type, ...]             # what the benchmark's ids are
    ending: str
    text: Callable[[list[tuple]], str]       # [(id, answer, picture or clip)] -> the file's content
    allowed: tuple[str, ...] = ()            # the answers that a server takes; (): any text
    name: Callable[[str, str], str] = plain_name     # (task, split) -> the file's, without ending


def json_list(ids: type, id_field: str, answer_field: str) -> Form:
    return Form(ids, ".json", lambda rows: json.dumps(
        [{id_field: name, answer_field: answer} for name, answer, _ in rows]))


def lines(*allowed: str) -> Form:
    return Form(str, ".csv", lambda rows: "".join(
        f"{name},{answer.capitalize()}\n" for name, answer, _ in rows), allowed)


def indices(choices: int) -> Form:
    """An answer that is none of the choices is sent as 0; their number is printed."""
    def text(rows: list[tuple]) -> str:
        named = {f"a{k}": k for k in range(choices)}
        odd = sum(answer not in named for _, answer, _ in rows)
        if odd:
            print(f"submission: {odd} of {len(rows)} answers are none of {', '.join(named)} and "
                  "are sent as 0")
        return json.dumps({name: named.get(answer, 0) for name, answer, _ in rows})
    return Form(str, ".json", text, name=value_name)


def descriptions() -> Form:
    def line(name: int | str, answer: str, video: str) -> str:
        record = {"vid_name": video, "clip_id": name, "descs": [{"desc": answer}]}
        return json.dumps(record) + "\n"
    return Form((int, str), ".jsonl", lambda rows: "".join(line(*row) for row in rows),
                name=value_name)


def write(task: str, form: Form, answers: list[str], examples: list, path: str | Path) -> Path:
    """Writes the file for a whole split; returns its path, with the right ending. BadInput, and no
    file, where the server would refuse: an id that is there twice or of the wrong type, no answer.
    """
    assert examples and len(answers) == len(examples), "one answer an example, and at least one"
    rows = {}
    for example, answer in zip(examples, answers):
        with reading(f"{task} submission", example.id):
            name, answer = str(example.id) if form.ids is str else example.id, answer.strip()
            assert isinstance(name, form.ids), f"the server's ids are {form.ids}, not {name!r}"
            assert name not in rows, "it is there twice; the server takes one answer an id"
            assert not form.allowed or answer in form.allowed, \
                f"its answer should be one of {', '.join(form.allowed)}, not {answer!r}"
            rows[name] = name, answer, example.images[0]
    path = Path(path).with_suffix(form.ending)
    replace_file(path, form.text(list(rows.values())))
    return path
