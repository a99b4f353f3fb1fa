"""The tiny weights: made by working commands, read by others, as able as their cards say."""
import json
import sys
from dataclasses import replace
from random import Random

import pytest
import torch
import transformers

from world import pretrain
from support import tokenizer
from support.published_clip import load_clip
from support.published_lm import load_lm
from world import scenes as world

LMS = ("bart", "t5", "video")


def folder(kind):
    return pretrain.WEIGHTS / {"video": "tiny-bart-video"}.get(kind, f"tiny-{kind}")


def test_all_weights_are_small():
    assert sum(p.stat().st_size for p in pretrain.WEIGHTS.rglob("*") if p.is_file()) < 15e6


@pytest.mark.parametrize("kind", LMS)
def test_the_world_is_in_the_vocabulary(kind):
    """Every word is one token, nothing is unknown, and decoding gives the text back."""
    tok, r = tokenizer.load_tokenizer(folder(kind)), Random(3)
    for task in world.TASKS:
        for _ in range(200):
            item = world.example(task, r, True)
            for text in (f"{task}: {item.text}".strip(), item.answer, *world.captions(
                    item.scenes[0], r), ", ".join(world.describe(item.scenes[0]))):
                ids = tok.encode(text)
                assert tok.unk_id not in ids and tok.decode(ids) == text
                assert len(ids) <= len(pretrain.WORD.findall(text)) + 2


@pytest.mark.parametrize("kind", LMS)
def test_transformers_reads_the_same_model(kind):
    theirs = (transformers.T5ForConditionalGeneration if kind == "t5" else
              transformers.BartForConditionalGeneration)
    theirs = theirs.from_pretrained(folder(kind)).float().eval()
    ours, tok = load_lm(folder(kind)), tokenizer.load_tokenizer(folder(kind))
    ids = tok.batch(["vqa: is there a red star? scene: top large red star", "list: scene: left"])
    labels = tok.batch(["yes", "top large red star"])
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=ids != tok.pad_id,
                      decoder_input_ids=ours.shift_right(labels)).logits
        torch.testing.assert_close(ours(ids, labels), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", LMS)
def test_a_language_model_reads_as_its_card_says(kind):
    card = json.loads((folder(kind) / "card.json").read_text())
    clips = pretrain.Clips(400, 5) if kind == "video" else None
    found = pretrain.read_well(load_lm(folder(kind)), pretrain.Reader(folder(kind), clips), 200)
    assert found.keys() == card["described scenes, % right"].keys()
    for name, score in found.items():                     # 200 items: about 3.5 points of noise
        assert abs(score - card["described scenes, % right"][name]) < 12, name


def test_clip_sees_as_its_card_says():
    card = json.loads((folder("clip") / "card.json").read_text())
    found = pretrain.probe(load_clip(folder("clip")), 500)
    for name, share in found.items():
        assert abs(share - card["linear probe"][name]) < 0.06, name


def test_the_commands_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "read_well", lambda *_: {"nothing": 0.0})
    for kind in LMS:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", kind, "--steps", "12", "--batch", "8",
                                          "--out", str(tmp_path / kind)] + ["--clips", "40"] * (
                                              kind == "video"))
        pretrain.main()
        made, shipped = load_lm(tmp_path / kind).config, load_lm(folder(kind)).config
        assert abs(made.vocab - shipped.vocab) < 10      # it follows the words that the world uses
        assert replace(made, vocab=shipped.vocab) == shipped
    monkeypatch.setattr(pretrain, "probe", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "clip", "--steps", "3", "--out",
                                      str(tmp_path / "clip")])
    (tmp_path / "clip").mkdir()
    pretrain.main()
    assert load_clip(tmp_path / "clip").config == \
        load_clip(folder("clip")).config
