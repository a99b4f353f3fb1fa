"""examples/: what they write is read, as it is said to be; their README says what they print."""
import dataclasses
import json
import re

import pytest
from house import EXAMPLES, FILES, ROOT
from PIL import Image

import config as configs
from data import load_examples
from examples import easy_vqa
from support.gate import BadInput

README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
TRAIN = [["is it red?", "no", 0], ["what color is it?", "blue", 0],
         ["is it red?", "yes", 1], ["is it red?", "yes", 1],
         ["what color is it?", "green", 2]]
TEST = [["is it red?", "yes", 0], ["what color is it?", "blue", 0],
        ["is it a circle?", "yes", 1], ["is it red?", "no", 1]]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in easy-vqa's layout, found before one that is installed: three training pictures,
    two of test, each of a colour of its own. Returns its folder data/."""
    source = tmp_path / "site" / "easy_vqa" / "data"
    for part, questions, pictures in (("train", TRAIN, 3), ("test", TEST, 2)):
        (source / part / "images").mkdir(parents=True)
        (source / part / "questions.json").write_text(json.dumps(questions))
        for number in range(pictures):
            color = (number, 200 if part == "train" else 100, 0)
            Image.new("RGB", (4, 4), color).save(source / part / "images" / f"{number}.png")
    (source.parent / "__init__.py").write_text("raise RuntimeError('found, but not imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(easy_vqa, "VAL", 1)
    return source


def test_what_is_written_is_read(package, tmp_path, capsys):
    to = tmp_path / "out"
    easy_vqa.main(["--to", str(to)])
    printed = capsys.readouterr().out
    read = {}
    for split in ("train", "val", "test"):
        examples = load_examples("vqa", split, to)
        read[split] = [(ex.id, ex.text, ex.images, ex.targets) for ex in examples]
    assert read == {
        "train": [(0, "is it red?", ("train_0",), {"no": 1.0}),
                  (1, "what color is it?", ("train_0",), {"blue": 1.0}),
                  (2, "is it red?", ("train_1",), {"yes": 1.0}),
                  (3, "is it red?", ("train_1",), {"yes": 1.0})],
        "val": [(4, "what color is it?", ("train_2",), {"green": 1.0})],
        "test": [(0, "is it red?", ("test_0",), {"yes": 1.0}),
                 (1, "what color is it?", ("test_0",), {"blue": 1.0}),
                 (2, "is it a circle?", ("test_1",), {"yes": 1.0}),
                 (3, "is it red?", ("test_1",), {"no": 1.0})]}
    # The parts' pictures have the same numbers and different colours: none stands for another.
    colors = {path.stem: Image.open(path).getpixel((0, 0)) for path in (to / "images").iterdir()}
    assert colors == {"train_0": (0, 200, 0), "train_1": (1, 200, 0), "train_2": (2, 200, 0),
                      "test_0": (0, 100, 0), "test_1": (1, 100, 0)}
    # "yes" is right twice of four. To each question: yes and blue are right; a question that was
    # never trained on gets the commonest answer, right; the last "is it red?" is wrong.
    assert "the commonest answer scores 50.0" in printed
    assert "the commonest answer to each question 75.0" in printed
    assert "train      4 questions about     2 pictures" in printed


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install easy-vqa$"):
        easy_vqa.main(["--to", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['[["is it red?", "yes"]]', '{"questions": []}', "[["])
def test_a_broken_package(package, tmp_path, content):
    (package / "train" / "questions.json").write_text(content)
    with pytest.raises(BadInput, match=r"train.questions\.json: "):
        easy_vqa.write(package, tmp_path / "out")


def test_the_real_one(tmp_path, capsys):
    """The numbers that examples/README.md gives, and a file for every picture."""
    if easy_vqa.find_spec("easy_vqa") is None:
        pytest.skip("easy-vqa is not installed: pip install easy-vqa")
    easy_vqa.main(["--to", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and not [line for line in printed if line not in README]
    pictures = {path.stem for path in (tmp_path / "images").iterdir()}
    assert len(pictures) == 5000
    shown = {split: {ex.images[0] for ex in load_examples("vqa", split, tmp_path)}
             for split in ("train", "val", "test")}
    assert {split: len(ids) for split, ids in shown.items()} == {
        "train": 3800, "val": 200, "test": 1000}
    assert shown["train"] | shown["val"] | shown["test"] == pictures


def test_readme():
    """Its commands are commands, every example is named."""
    known = {configs.flag(f.name) for f in dataclasses.fields(configs.Config)}
    trained = re.findall(r"python train\.py(.*)", README)
    assert trained
    for line in trained:
        assert set(re.findall(r"--[\w-]+", line)) <= known, line
    for module in re.findall(r"python -m ([\w.]+\w)", README):
        assert module == "pytest" or module in FILES | EXAMPLES, module
    assert not [name for name in EXAMPLES if f"python -m {name}" not in README]
    assert README.count("\n") <= 25
