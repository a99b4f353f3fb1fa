"""The gate: whatever is wrong with what is read becomes one sentence with the culprit's name."""
import json
import os

import pytest
from support.gate import BadInput, Number, check, program, read_json, reading, replace_file


def fail(error):
    raise error


@pytest.mark.parametrize("wrong", [
    lambda: {}["question"], lambda: [][0], lambda: int("x"), lambda: None.get, lambda: 1 / 0,
    lambda: "\ud83d".encode(), lambda: json.loads("[" * 10 ** 5), lambda: bytes(-1),
    lambda: check({"a": 1}, {"a": str}), lambda: fail(OSError("a picture is truncated"))])
def test_what_goes_wrong_becomes_one_sentence(wrong):
    with pytest.raises(BadInput, match="^vqa.json, record 7: .") as found, reading("vqa.json", 7):
        wrong()
    assert "\n" not in str(found.value)


def test_what_is_said_already_passes(tmp_path):
    with pytest.raises(BadInput, match="^b: no$"), reading("a"), reading("b"):
        raise ValueError("no")
    with pytest.raises(FileNotFoundError), reading("somewhere"):
        open(tmp_path / "none")


@pytest.mark.parametrize("want, good, bad", [
    (str, ["a", ""], [1, None, True]), (int, [0, -3], [True, 1.0, "1"]), (bool, [True], [1]),
    ((int, str), [1, "a"], [1.5, True, []]), ({0, 1, "True"}, [0, "True"], [True, 2, "1", [0]]),
    (Number(0, 1), [0, 1, 0.5], [-0.1, 2, float("nan"), True, "0"]),
    (Number(0, 9, whole=True), [0, 9], [1.0, 10, False]), ([str], [[], ["a"]], ["a", [1]])])
def test_check(want, good, bad):
    for value in good:
        assert check({"x": value}, {"x": want}) == [value]
    for value in bad:
        with pytest.raises(AssertionError, match="'x' should be .*, not "):
            check({"x": value}, {"x": want})


def test_check_names():
    assert check({"b": 1}, {"a|b": int, "c?": str}) == [1, None]
    assert check({"c": None}, {"c?": str}) == [None]
    for record, said in (({}, "field 'a' or 'b' is missing"), ([], "an object with fields"),
                         ({"b": None}, "'b' should be text"), ({"a": "\ud83d"}, "surrogates")):
        with pytest.raises((AssertionError, UnicodeError), match=said):
            check(record, {"a|b": str})


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')                    # a byte order mark
    assert read_json(path) == {"a": 1}
    for content in (b"[1]", b'{"a": ', b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="a.json: ."):
            read_json(path)


def test_replace_file_is_whole_or_not_there(tmp_path, monkeypatch):
    replace_file(tmp_path / "new" / "a.txt", "first")
    monkeypatch.setattr(os, "replace", lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "new" / "a.txt", b"second")
    assert [p.read_text() for p in (tmp_path / "new").iterdir()] == ["first"]


@pytest.mark.parametrize("error, said", [
    (BadInput("a.json: no"), "a.json: no"), (KeyboardInterrupt(), "interrupted"),
    (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory")])
def test_program(error, said):
    with pytest.raises(SystemExit, match=f"^test_gate.py: {said}$"):
        program(lambda argv: fail(error))([])
    with pytest.raises(IndexError):                              # a bug shows its traceback
        program(lambda argv: argv[7])([])
