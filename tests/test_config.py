"""config.py: the published recipes, what --help says, and configurations that make no sense."""
from dataclasses import fields, replace
from pathlib import Path

import pytest

import config as configs
import train
from config import Config
from support.gate import BadInput

# spec/training.md, "Recipes"
PUBLISHED = [
    ("image", False, "full", 1e-4, 500, 20, False),
    *(("image", False, row, 1e-3, 500, 20, True) for row in (
        "adapter", "compacter", "lora", "prompt", "bitfit", "vlpet-small", "vlpet-middleX",
        "vlpet-middleY", "vlpet-large")),
    *(("image", False, row, 1e-3, 500, 20, False) for row in (
        "hyperformer", "compacter-multiple", "lora-multiple", "prompt-multiple")),
    *(("image", False, row, 3e-4, 500, 20, False) for row in (
        "adapter-multiple", "adapter-half-shared")),
    ("image", True, "full", 1e-4, 300, 20, True),
    *(("image", True, row, 3e-4, 300, 20, True) for row in ("vlpet-large", "adapter", "lora")),
    ("video", False, "full", 3e-5, 50, 7, True),
    *(("video", False, row, 3e-4, 50, 7, True) for row in ("adapter", "lora", "prompt")),
    *(("video", False, row, 7e-4, 50, 20, True) for row in ("vlpet-small", "vlpet-large")),
]


@pytest.mark.parametrize("kind, is_t5, row, lr, batch, epochs, names", PUBLISHED)
def test_recipes(kind, is_t5, row, lr, batch, epochs, names):
    tasks = "tvqa,tvc" if kind == "video" else "vqa,caption"
    found = configs.recipe(Config(method=row, data="elsewhere", tasks=tasks), is_t5)
    assert found == {"lr": lr, "batch": batch, "epochs": epochs, "task_names": names}


def test_help_shows_recipes_and_changes(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "adapter-multiple        0.0003    500      20  no" in shown
    assert "decoder.cross_attn.k=lora" in shown


def test_every_flag_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(Config):
        assert f"{configs.flag(field.name)} " in shown
        assert len(field.metadata["help"]) > 3 and " ".join(
            field.metadata["help"].split()[:3]) in shown, field.name


@pytest.mark.parametrize("given, named", [
    ({"lr": "1"}, "--lr"), ({"lr": float("nan")}, "--lr"), ({"epochs": 1.5}, "--epochs"),
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
    assert configs.resolve(replace(config, tasks="tvqa", keep="")).keep == "best"
    assert configs.resolve(Config(steps=7)).epochs is None
    given = Config(lr=0.5, dropout=0.0, task_names=False, out="x", images="y")
    assert replace(configs.resolve(given), batch=None, epochs=None) == replace(
        configs.resolve(given), batch=None, epochs=None, lr=0.5, task_names=False, out="x",
        images="y")


def test_a_taken_folder_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert configs.free_folder(Config()) == "out/vlpet-large"
    Path("out/vlpet-large").mkdir(parents=True)
    assert configs.free_folder(Config()) == "out/vlpet-large-2"
    assert configs.free_folder(Config(control="blind")) == "out/vlpet-large-blind"
