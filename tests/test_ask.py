"""tools/ask.py: the shipped tiny run, built-in scenes, pictures of one's own, errors."""
from random import Random

import pytest
import torch
from house import ROOT
from PIL import Image

import clip_encoder
from support.published_clip import load_clip
from tools import ask
from world import pretrain_clip, scenes


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Scenes and pages are kept in the working folder's out/ask; what is shipped is found beside
    the code."""
    monkeypatch.chdir(tmp_path)


def lines(capsys, *argv: str) -> list[str]:
    ask.main(list(argv))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_built_in_scene(capsys, task):
    """The scene in words and as a file, the question with the right answer, then answers with
    probabilities; asked about that file, the same."""
    found = lines(capsys, "--task", task, "--seed", "3")
    pictures = 2 if task == "nlvr" else 1
    assert all(line.startswith("scene: ") for line in found[:pictures])
    assert found[pictures].startswith(task) and "(right: " in found[pictures]
    answers = [line.split("%") for line in found[pictures + 1:]]
    assert len(answers) == 2 if task == "nlvr" else 1 < len(answers) <= 5
    p = [float(number) for number, _ in answers]
    assert p == sorted(p, reverse=True) and 0 < sum(p) <= 100.1
    assert (task != "nlvr" or sum(p) == pytest.approx(100, abs=0.2))
    paths = [line.rpartition("(")[2].rstrip(")") for line in found[:pictures]]
    assert all(Image.open(path).size == (96, 96) for path in paths)
    argv = [word for path in paths for word in ("--image", path)]
    asked = found[pictures].partition("   (right")[0].partition(": ")[2]
    again = lines(capsys, *argv, "--task", task, *filter(None, [asked]))
    assert again[1:] == found[pictures + 1:]


def test_a_page_about_one_picture(capsys, photo):
    """--report: the same answers, the gates, the picture; from a scene also the right answer."""
    found = lines(capsys, *photo, "--report", "what color is the circle?")
    path = found[-1].removeprefix("page: ")
    text = open(path, encoding="utf-8").read()
    assert path == "out/ask/photo.html" and "what color is the circle?" in text
    for line in found[1:-1]:
        p, answer = line.split("%")
        assert f"<span>{answer.strip()}</span><span>{p.strip()} %</span>" in text or float(p) < 0.1
    assert text.count("<h3>layer ") == 6 and "<p>right: " not in text
    assert lines(capsys, "--seed", "3", "--report")[-1] == "page: out/ask/vqa-3-0.html"
    assert "<p>right: cross" in open("out/ask/vqa-3-0.html", encoding="utf-8").read()


def test_it_sees(capsys):
    """Of 20 built-in scenes the shipped run answers most as it should; blind it could not."""
    right = 0
    for seed in range(20):
        found = lines(capsys, "--task", "vqa", "--seed", str(seed))
        right += found[1].endswith(f"(right: {found[2].split('%')[1].strip()})")
    assert right >= 12


@pytest.fixture
def photo(tmp_path):
    scenes.render((("circle", "red", "large", "center"),), Random(0)).save(tmp_path / "photo.png")
    return ["--image", str(tmp_path / "photo.png")]


def test_a_picture_of_ones_own(capsys, photo):
    found = lines(capsys, *photo, "what color is the circle?")
    assert found[1].split("%")[1].strip() == "red"
    assert len(lines(capsys, *photo, "--task", "caption")) == 6
    assert len(lines(capsys, *photo, *photo, "--task", "nlvr", "both have a red circle")) == 3


def test_errors_are_one_sentence(tmp_path, photo):
    (tmp_path / "text.png").write_text("no picture")
    torch.manual_seed(0)
    tower = clip_encoder.randomized(load_clip(ROOT / "weights/tiny-clip"))
    pretrain_clip.save_clip(tower, tmp_path / "clip", {})
    for argv, named in ((["--image", str(tmp_path / "text.png"), "what?"], "text.png"),
                        (["--image", str(tmp_path / "none.png"), "what?"], "none.png"),
                        (photo, "every other task one"),
                        ([*photo, "--task", "nlvr", "x"], "nlvr needs --image 2 x"),
                        (["--task", "caption", "what?"], "needs no question"),
                        (["--clip", "weights/nowhere"], "nowhere"),
                        (["--clip", str(tmp_path / "clip")], "clip of pictures was"),
                        (["what \udcff?"], "the question: 'utf-8' codec can't encode"),
                        (["--run", "nowhere"], "nowhere/config.json: No such file")):
        with pytest.raises(SystemExit, match=named) as error:
            ask.main(argv)
        assert "\n" not in str(error.value)
