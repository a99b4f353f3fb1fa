"""tools/ask.py: the shipped tiny run, built-in scenes, pictures of one's own, errors."""
from random import Random

import pytest
import torch

import clip_encoder
from support.published_clip import load_clip
from tools import ask
from world import pretrain_clip, scenes


def lines(capsys, *argv: str) -> list[str]:
    ask.main(list(argv))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_built_in_scene(capsys, monkeypatch, tmp_path, task):
    """The scene in words, the question with the right answer, then answers with probabilities;
    from another working folder the same, for what is shipped is found beside the code."""
    found = lines(capsys, "--task", task, "--seed", "3")
    pictures = 2 if task == "nlvr" else 1
    assert all(line.startswith("scene: ") for line in found[:pictures])
    assert found[pictures].startswith(task) and "(right: " in found[pictures]
    answers = [line.split("%") for line in found[pictures + 1:]]
    assert len(answers) == 2 if task == "nlvr" else 1 < len(answers) <= 5
    p = [float(number) for number, _ in answers]
    assert p == sorted(p, reverse=True) and 0 < sum(p) <= 100.1
    assert (task != "nlvr" or sum(p) == pytest.approx(100, abs=0.2))
    monkeypatch.chdir(tmp_path)
    assert lines(capsys, "--task", task, "--seed", "3") == found


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
    tower = clip_encoder.randomized(load_clip("weights/tiny-clip"))
    pretrain_clip.save_clip(tower, tmp_path / "clip", {})
    for argv, named in ((["--image", str(tmp_path / "text.png"), "what?"], "text.png"),
                        (["--image", str(tmp_path / "none.png"), "what?"], "none.png"),
                        (photo, "every other task one"),
                        ([*photo, "--task", "nlvr", "x"], "nlvr needs --image 2 x"),
                        (["--task", "caption", "what?"], "needs no question"),
                        (["--clip", "weights/nowhere"], "nowhere"),
                        (["--clip", str(tmp_path / "clip")], "clip of pictures was"),
                        (["--run", "nowhere"], "nowhere/config.json: No such file")):
        with pytest.raises(SystemExit, match=named) as error:
            ask.main(argv)
        assert "\n" not in str(error.value)
