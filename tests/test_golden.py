"""Our numbers against those of the papers' official code on tiny random models (tests/golden)."""
import adapters
import pytest
import torch
from golden_files import batch, build, read

import model

# file, dialect, row
IMAGE_TEXT = [
    ("bart_plain", "bart", "frozen"), ("t5_plain", "t5", "frozen"), ("bart_full", "bart", "full"),
    ("bart_adapter_single", "bart", "adapter"), ("t5_adapter_single", "t5", "adapter"),
]
SETTINGS = {"greedy": {"no_repeat_ngram": 0}, "greedy_nr3": {"no_repeat_ngram": 3},
            "beam5": {"beams": 5, "no_repeat_ngram": 3, "early_stopping": True},
            "beam5_plain": {"beams": 5, "max_length": 12, "no_repeat_ngram": 0,
                            "early_stopping": False}}


def close(a, b, atol=5e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def check_gradients(m, expected):
    """1e-4 relative to the largest entry; a key's bias has a true gradient of 0."""
    trainable = {n: p.grad for n, p in m.named_parameters() if p.requires_grad}
    assert set(trainable) == set(expected)
    for name, grad in expected.items():
        scale = grad.abs().max().clamp(min=1e-3)
        close(trainable[name] / scale, grad / scale, 1e-4)


def check_decoding(m, g, task):
    for name, settings in SETTINGS.items():
        want = g.out.get(f"{task}/{name}")
        if want is None:
            continue
        got = m.generate(batch(g, task), **settings)
        assert got[:, want.size(1):].eq(m.lm.config.pad).all()
        got = torch.nn.functional.pad(got, (0, max(0, want.size(1) - got.size(1))),
                                      value=m.lm.config.pad)[:, :want.size(1)]
        assert got.tolist() == want.tolist(), f"{task} {name}"


@pytest.mark.parametrize("name, kind, row", IMAGE_TEXT, ids=[f[0] for f in IMAGE_TEXT])
def test_image_text(name, kind, row):
    g = read(name)
    m = build(g, kind, adapters.row(row, kind == "t5", reduction=4))
    total = m.counts()[-1]
    assert total[1:] == (int(g.meta["n_trainable"]), int(g.meta["n_total"]))
    for task in ("vqa", "nlvr", "caption"):
        b = batch(g, task)
        with torch.no_grad():
            close(m.encode(b)[0], g.out[f"{task}/encoder"])
            logits = m(b)
            close(logits, g.out[f"{task}/logits"])
            loss = model.token_loss(logits, b.labels)
            close(loss.flatten(), g.out[f"{task}/loss_none"].flatten())
            if task == "caption":
                close(model.reduce_loss(loss, b.labels, per_token=True), g.out["caption/loss_mean"])
        check_decoding(m, g, task)
    loss = m.loss(batch(g))
    close(loss, g.out["vqa/step_loss"])
    loss.backward()
    check_gradients(m, g.grad)


VLPET = [
    ("vlpet_bart_large", "bart", "vlpet-large", {"s": 0.3}),
    ("vlpet_bart_small", "bart", "vlpet-small", {"s": 0.3}),
    ("vlpet_t5_small", "t5", "vlpet-small", {}), ("vlpet_t5_middleX", "t5", "vlpet-middleX", {}),
    ("vlpet_bart_apply_large", "bart", "vlpet-large", {"s": 1.0}),
]


@pytest.mark.parametrize("name, kind, row, changes", VLPET, ids=[f[0] for f in VLPET])
def test_vlpet(name, kind, row, changes):
    g = read(name)
    method = adapters.row(row, kind == "t5", r=8, g=5, mean="all")
    at = {site: adapters.replace(add, **({"r": 6, "s": 1.0} if add.reads == "x" else changes))
          for site, add in method.at.items()}
    m = build(g, kind, adapters.replace(method, at=at), vlpet=True)
    b = batch(g)
    close(m.encode(b)[0], g.out["encoder"])
    logits = m(b)
    close(logits, g.out["logits"])
    loss = model.token_loss(logits, b.labels)
    close(loss.flatten(), g.out["token_loss"].flatten())
    loss = model.reduce_loss(loss, b.labels)
    close(loss.view(1), g.out["loss"])
    loss.backward()
    check_gradients(m, g.grad)


GENERATE = [("generate_bart_s21_b3", "bart"), ("generate_t5_s19_b2.5", "t5"),
            ("generate_t5_s1_b4", "t5")]


@pytest.mark.parametrize("name, kind", GENERATE, ids=[f[0] for f in GENERATE])
def test_generate(name, kind):
    g = read(name)
    m = build(g, kind, adapters.row("frozen", kind == "t5"))
    tasks = {k.split("/")[0] for k in g.out}
    assert tasks
    for task in tasks:
        check_decoding(m, g, task)
