"""Our numbers against those of the papers' official code on tiny random models (tests/golden)."""
import pytest
import tiny
import torch
from golden_files import FOLDER, batch, build, read

import model

# Every file of the folder is a case; the flags in it say which row it is.
FILES = sorted(p.stem for p in FOLDER.glob("*.safetensors") if not p.stem.startswith("clip"))
VLPET = [name for name in FILES if name.startswith("vlpet_")]
GENERATE = [name for name in FILES if name.startswith("generate_")]
IMAGE_TEXT = [name for name in FILES if name not in VLPET + GENERATE]
SETTINGS = {"greedy": {"no_repeat_ngram": 0}, "greedy_nr3": {"no_repeat_ngram": 3},
            "beam5": {"beams": 5, "no_repeat_ngram": 3, "early_stopping": True},
            "beam5_plain": {"beams": 5, "max_length": 12, "no_repeat_ngram": 0,
                            "early_stopping": False}}


def close(a, b, atol=5e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=2e-6)


def check_gradients(m, expected):
    """1e-4 relative to the largest entry; a key's bias has a true gradient of 0."""
    trainable = {n: p.grad for n, p in m.named_parameters() if p.requires_grad}
    idle = {n for n, grad in trainable.items() if grad is None}
    assert set(trainable) - idle == set(expected)
    assert all({"gqa", "nlvr", "caption"} & set(n.split(".")) for n in idle)
    for name, grad in expected.items():
        scale = grad.abs().max().clamp(min=1e-3)
        close(trainable[name] / scale, grad / scale, 1e-4)


def check_decoding(m, g, task):
    for name, settings in SETTINGS.items():
        want = g.out.get(f"{task}/{name}")
        if want is None:
            continue
        got = tiny.generate(m, batch(g, task), **settings)
        assert got[:, want.size(1):].eq(m.lm.config.pad).all()
        got = torch.nn.functional.pad(got, (0, max(0, want.size(1) - got.size(1))),
                                      value=m.lm.config.pad)[:, :want.size(1)]
        assert got.tolist() == want.tolist(), f"{task} {name}"


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_image_text(name):
    g = read(name)
    m = build(g)
    total = m.counts()[-1]
    if "t5" not in name or "norm" not in g.meta["flags"]:
        assert total[1] == int(g.meta["n_trainable"])
    assert total[2] == int(g.meta["n_total"])
    for task in ("vqa", "nlvr", "caption"):
        b = batch(g, task)
        with torch.no_grad():
            close(m.encode(b)[0], g.out[f"{task}/encoder"])
            logits = m(b)
            close(logits, g.out[f"{task}/logits"])
            loss = model.token_loss(logits, b.labels)
            close(loss.flatten(), g.out[f"{task}/loss_none"].flatten())
            if task == "caption":
                close(m.loss(b), g.out["caption/loss_mean"])
        check_decoding(m, g, task)
    loss = m.loss(batch(g))
    close(loss, g.out["vqa/step_loss"])
    loss.backward()
    check_gradients(m, g.grad)


@pytest.mark.parametrize("name", VLPET)
def test_vlpet(name):
    g = read(name)
    m = build(g)
    b = batch(g)
    close(m.encode(b)[0], g.out["encoder"])
    logits = m(b)
    close(logits, g.out["logits"])
    loss = model.token_loss(logits, b.labels)
    close(loss.flatten(), g.out["token_loss"].flatten())
    loss = m.loss(b)
    close(loss.view(1), g.out["loss"])
    loss.backward()
    check_gradients(m, g.grad)


@pytest.mark.parametrize("name", GENERATE)
def test_generate(name):
    g = read(name)
    m = build(g)
    tasks = {k.split("/")[0] for k in g.out}
    assert tasks
    for task in tasks:
        check_decoding(m, g, task)
