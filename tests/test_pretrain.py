"""The tiny weights: made by working commands, read by others, as able as their cards say."""
import json
from dataclasses import replace
from random import Random

import pytest
import torch
import transformers

import data
from support.published_clip import load_clip
from support.published_lm import load_lm
from support.tokenizer import load_tokenizer
from world import pretrain_clip, pretrain_lm, scenes, shapes

CLIP = pretrain_clip.FOLDER
FOLDERS = {name: pretrain_lm.WEIGHTS / recipe[0] for name, recipe in pretrain_lm.RECIPES.items()}


def read_card(folder):
    return json.loads((folder / "card.json").read_text())


def test_all_weights_are_small():
    files = [path for path in pretrain_lm.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6


@pytest.mark.parametrize("name", FOLDERS)
def test_the_world_is_in_the_vocabulary(name):
    """Every word is one token, nothing is unknown, and decoding gives the text back."""
    tokenizer, rng = load_tokenizer(FOLDERS[name]), Random(3)
    for task in scenes.TASKS:
        for _ in range(200):
            item = scenes.example(task, rng, True)
            for text in (f"{task}: {item.text}".strip(), item.answer,
                         *shapes.captions(item.scenes[0], rng),
                         ", ".join(shapes.describe(item.scenes[0]))):
                ids = tokenizer.encode(text)
                assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == text
                assert len(ids) <= len(pretrain_lm.WORD.findall(text)) + 2


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_reads_the_same_model(name):
    theirs = (transformers.T5ForConditionalGeneration if name == "t5" else
              transformers.BartForConditionalGeneration)
    theirs = theirs.from_pretrained(FOLDERS[name]).float().eval()
    ours, tokenizer = load_lm(FOLDERS[name]), load_tokenizer(FOLDERS[name])
    texts = "vqa: is there a red star? scene: top large red star", "list: scene:"
    ids = data.pad([tokenizer.encode(text) for text in texts], tokenizer.pad_id)
    answers = "yes", "top large red star"
    labels = data.pad([tokenizer.encode(text) for text in answers], tokenizer.pad_id)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=ids != tokenizer.pad_id,
                      decoder_input_ids=ours.shift_right(labels)).logits
        torch.testing.assert_close(ours(ids, labels), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_language_model_reads_as_its_card_says(name):
    clips = pretrain_lm.Clips(400, seed=5) if name == "video" else None
    reader = pretrain_lm.Reader(FOLDERS[name], clips)
    found = pretrain_lm.read_well(load_lm(FOLDERS[name]), reader, 200)
    told = read_card(FOLDERS[name])["described scenes, % right"]
    assert found.keys() == told.keys()
    for task, score in found.items():                     # 200 items: about 3.5 points of noise
        assert abs(score - told[task]) < 12, task


def test_clip_sees_as_its_card_says():
    found, told = pretrain_clip.probe(load_clip(CLIP), 500), read_card(CLIP)["linear probe"]
    for name in found.keys() & told.keys():
        assert abs(found[name] - told[name]) < 0.06, name


@pytest.mark.parametrize("name, want", {"bart": 41.0565, "t5": 15.7161, "video": 23.8893,
                                        "clip": 2.74439}.items())
def test_the_commands_work(name, want, tmp_path, monkeypatch):
    """A few steps. The losses are those of the commands that made the shipped files."""
    module, step = (pretrain_clip, "contrast") if name == "clip" else (pretrain_lm, "token_loss")
    losses, loss_of = [], getattr(module, step)
    monkeypatch.setattr(module, step, lambda *args: losses.append(loss_of(*args)) or losses[-1])
    monkeypatch.setattr(pretrain_clip, "PAIRS", 8)
    monkeypatch.setattr(pretrain_clip, "probe", lambda *_: {})
    monkeypatch.setattr(pretrain_lm, "BATCH", 8)
    monkeypatch.setattr(pretrain_lm, "read_well", lambda *_: {})
    monkeypatch.setitem(pretrain_lm.RECIPES, "video", (*pretrain_lm.RECIPES["video"][:-1], 40))
    if name == "clip":
        pretrain_clip.main(["--steps", "3", "--out", str(tmp_path)])
        assert load_clip(tmp_path).config == load_clip(CLIP).config
    else:
        pretrain_lm.main([name, "--steps", "12", "--out", str(tmp_path)])
        made, shipped = load_lm(tmp_path).config, load_lm(FOLDERS[name]).config
        assert abs(made.vocab - shipped.vocab) < 10      # it follows the words that the world uses
        assert replace(made, vocab=shipped.vocab) == shipped
    assert losses[-1].sum().item() == pytest.approx(want, rel=1e-3)
