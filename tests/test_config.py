"""config.py: the published recipes, what --help says, and configurations that make no sense."""
from dataclasses import fields, replace

import pytest

import config as configs
import train
from t5 import PRESETS
from config import Config
from support.gate import BadInput

# spec/training.md, "Recipes"
PUBLISHED = [
    ("image", "bart", "full", 1e-4, 500, 20, False),
    *(("image", "bart", row, 1e-3, 500, 20, True) for row in (
        "adapter", "compacter", "lora", "prompt", "bitfit", "vlpet-small", "vlpet-middleX",
        "vlpet-middleY", "vlpet-large")),
    *(("image", "bart", row, 1e-3, 500, 20, False) for row in (
        "hyperformer", "compacter-multiple", "lora-multiple", "prompt-multiple")),
    *(("image", "bart", row, 3e-4, 500, 20, False) for row in (
        "adapter-multiple", "adapter-half-shared")),
    ("image", "t5", "full", 1e-4, 300, 20, True),
    *(("image", "t5", row, 3e-4, 300, 20, True) for row in ("vlpet-large", "adapter", "lora")),
    ("video", "bart", "full", 3e-5, 50, 7, True),
    *(("video", "bart", row, 3e-4, 50, 7, True) for row in ("adapter", "lora", "prompt")),
    ("image", "bert", "full", 5e-5, 256, 5, False),
    *(("image", "bert", row, 5e-4, 256, 5, False) for row in ("adapter", "vlpet-large")),
    *(("video", "bart", row, 7e-4, 50, 20, True) for row in ("vlpet-small", "vlpet-large")),
]


LMS = {"bart": PRESETS["bart-base"], "t5": PRESETS["t5-base"], "bert": PRESETS["clip-vil"]}


@pytest.mark.parametrize("kind, dialect, row, lr, batch, epochs, names", PUBLISHED)
def test_recipes(kind, dialect, row, lr, batch, epochs, names):
    tasks = "tvqa,tvc" if kind == "video" else "vqa,caption"
    found = configs.recipe(Config(method=row, data="elsewhere", tasks=tasks), LMS[dialect])
    assert found == {"lr": lr, "batch": batch, "epochs": epochs, "task_names": names}


def test_help_shows_recipes_and_what_every_flag_is_for(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "adapter-multiple        0.0003    500      20  no" in shown
    assert "decoder.cross_attn.k=lora" in shown
    words = " ".join(shown.split())
    for field in fields(Config):
        told = field.metadata["help"].split()
        assert f"{configs.flag(field.name)} " in words and " ".join(told[:3]) in words


@pytest.mark.parametrize("given, named", [
    ({"lr": "1"}, "--lr"), ({"lr": float("nan")}, "--lr"), ({"epochs": 1.5}, "--epochs"),
    ({"lr": -1.0}, "--lr"), ({"warmup": -1.0}, "--warmup"), ({"dropout": 2.0}, "--dropout"),
    ({"train_clip": 1}, "--train-clip"), ({"method": 3}, "--method"), ({"seed": True}, "--seed"),
    ({"epochs": 3, "steps": 3}, "--steps or --epochs"), ({"keep": "all"}, "--keep"),
    ({"tasks": "vqa,vga"}, "no 'vga'"), ({"control": "deaf"}, "'blind'")])
def test_values_that_cannot_be(given, named):
    with pytest.raises(BadInput, match=named):
        configs.resolve(replace(Config(), **given))


def test_what_is_left_open_is_filled():
    config = configs.resolve(Config(data=configs.WORLD, tasks="vqa"))
    assert (config.lr, config.batch, config.epochs, config.steps) == (3e-3, 64, 1, None)
    assert config.keep == "last" and config.lm == configs.TINY_BART and config.dropout == 0
    for tasks in "tvqa", "vqa,tvqa":
        clips = configs.resolve(Config(data=configs.WORLD, tasks=tasks))
        assert clips.keep == "best" and clips.lm == configs.TINY_BART_VIDEO and clips.batch == 16
    assert configs.resolve(Config(steps=7)).epochs is None
    given = {"lr": 0.5, "dropout": 0.0, "task_names": False, "out": "x", "images": "y"}
    config = configs.resolve(Config(**given))
    assert {name: getattr(config, name) for name in given} == given


def test_half_of_the_data_can_be_the_built_in(tmp_path):
    """Clips of ours beside pictures of others."""
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "world.json").touch()
    for tasks, batch in {"tvqa": 16, "vqa": 500, "vqa,tvqa": 50}.items():
        config = Config(data=str(tmp_path), tasks=tasks)
        assert configs.recipe(config, LMS["bart"])["batch"] == batch


def test_answers_that_are_chosen_have_the_recipe_of_their_language_model():
    """A BART keeps BART's; a BERT in the built-in world is as a BART."""
    config = configs.resolve(Config(tasks="vqa", answers="yes"))
    assert configs.recipe(config, LMS["bert"]) == {
        name: getattr(config, name) for name in ("lr", "batch", "epochs", "task_names")}
