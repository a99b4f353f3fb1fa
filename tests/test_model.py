"""model.py against formulas written out by hand, brute force, and one example at a time."""
from types import SimpleNamespace

import pytest
import tiny
import torch

import data
import methods
import model
import t5
from support import decoding
from tools import count

every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


@every_kind
def test_visual_embedding(kind):
    """spec/backbone.md, token by token."""
    m, b = tiny.randomize(tiny.model(kind)), tiny.batch(kind, "nlvr")
    w = {n: p.detach() for n, p in m.visual.named_parameters()}
    words = m.lm.shared.weight.detach()

    def norm(name, z):
        if kind == "t5":
            return w[f"{name}.weight"] * z / (z.square().mean() + 1e-6).sqrt()
        z = (z - z.mean()) / ((z - z.mean()).square().mean() + 1e-5).sqrt()
        return w[f"{name}.weight"] * z + w[f"{name}.bias"]

    want = torch.zeros(3, 8, 32)
    for i in range(3):
        for j in range(8):                                  # two pictures of four tokens
            x1, x2, y1, y2 = b.boxes[i, j]
            box = torch.stack([x1, x2, y1, y2, (y2 - y1) * (x2 - x1)])
            want[i, j] = (norm("feat_norm", w["feat.weight"] @ b.feats[i, j] + w["feat.bias"])
                          + norm("box_norm", w["box.weight"] @ box + w["box.bias"])
                          + w["image.weight"][j // 4] + words[280 - 1 - j % 4])
    assert len(words) == 280
    got = m.visual(b.feats, b.boxes, b.image_ids, b.order_ids, words)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # They stand behind the text, and padded text is the only thing that is not seen.
    mask = m.encode(b)[1]
    assert mask.tolist() == [[True] * n + [False] * (7 - n) + [True] * 8 for n in (7, 6, 5)]


def test_vocabulary():
    assert model.vocabulary(tiny.t5.PRESETS["bart-base"]) == 50465
    assert model.vocabulary(tiny.t5.PRESETS["t5-base"]) == 32200


@every_kind
@pytest.mark.parametrize("row", ["full", "norms"])
def test_remove_restores_what_was_assigned(kind, row):
    """load_state_dict(assign=True) puts other parameters in the places of the opened ones."""
    before = tiny.lm(kind).state_dict()
    m = tiny.model(kind, methods.row(row, kind == "t5", ""))
    m.load_state_dict({name: t + 1 for name, t in m.trained().items()}, strict=False, assign=True)
    assert not tiny.same_state(m.lm.state_dict(), before)
    m.remove()
    assert tiny.same_state(m.lm.state_dict(), before)


def test_a_language_model_holds_one_method():
    """A second model of the same parts, as when a notebook's cell is run again, is refused."""
    m = tiny.model("bart", methods.row("adapter", False))
    with pytest.raises(AssertionError, match="holds a method: call remove"):
        model.VLModel(m.lm, tiny.WIDTH)
    m.remove()
    model.VLModel(m.lm, tiny.WIDTH)


def test_clip_looks_on_without_a_method():
    m, b = tiny.model("bart"), tiny.batch("bart", tokens=36)
    m.clip = SimpleNamespace(encode=lambda pixels: pixels.new_ones(len(pixels), 36, tiny.WIDTH))
    b.feats = torch.zeros(3, 3, 8, 8)                           # a picture an example
    assert m.loss(b).isfinite()


# ------------------------------------------------------------------------------------ losses

def test_losses():
    """By hand: token losses [[1, 2, 3], [4, -, -]], scores 0.5 and 0.25."""
    p = torch.tensor([[[1., 2, 3], [4, 0, 0]]]).neg().exp()[0]
    logits = torch.stack([p.log(), torch.log1p(-p.clamp(max=0.99))], -1)
    labels = torch.tensor([[0, 0, 0], [0, -100, -100]])
    loss = model.token_loss(logits, labels)
    torch.testing.assert_close(loss, torch.tensor([[1., 2, 3], [4, 0, 0]]), atol=1e-5, rtol=0)
    for want, kinds in ((3.0, ["examples"] * 2), ((0.5 * 2 + 0.25 * 4) / 2, ["score"] * 2),
                        (10 / 4, ["tokens"] * 2), ((0.5 * 2 + 4) / 2, ["score", "tokens"]),
                        ((2 + 0.25 * 4) / 2, ["tokens", "score"])):
        weights = data.loss_weights(kinds, torch.tensor([0.5, 0.25]), labels)
        assert (loss * weights[:, None]).sum().item() == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------------ answers

@every_kind
def test_choose_is_the_full_forward(kind):
    """nlvr: T5 answers at its first place, BART behind <s>, with which its targets begin."""
    m, b = tiny.randomize(tiny.model(kind), std=0.4), tiny.batch(kind, "nlvr", size=24)
    tokens = list(range(70, 2, -3))
    b.labels = torch.full((24, 3), 5)
    b.labels[:, 0] = 0 if kind == "bart" else 5
    with torch.no_grad():
        logits = m(b)[:, 1 if kind == "bart" else 0].tolist()
    want = [max(range(len(tokens)), key=lambda i: row[tokens[i]]) for row in logits]
    assert m.choose(b, tokens).argmax(-1).tolist() == want and len(set(want)) > 1


def test_ban_repeats():
    law = torch.Generator().manual_seed(0)
    for n in (0, 1, 2, 3):
        for t in range(1, 12):
            ids = torch.randint(0, 3, (20, t), generator=law)
            got = decoding.ban_repeats(torch.zeros(20, 4), ids, n)
            for row, text in zip(got.tolist(), ids.tolist()):
                seen = {tuple(text[i:i + n]) for i in range(t - n + 1)} if n else set()
                banned = [v for v in range(4) if n and tuple([*text, v][-n:]) in seen]
                assert [v for v in range(4) if row[v] != 0] == banned


def one_by_one(m, b, **settings):
    """Each example alone and without padding."""
    for i, ids in enumerate(b.input_ids):
        real = int((ids != m.lm.config.pad).sum())
        yield tiny.generate(m, tiny.rows(b, i, real), **settings)[0]


@pytest.mark.parametrize("settings", [{}, {"beams": 4, "no_repeat_ngram": 3},
                                      {"beams": 3, "early_stopping": True, "no_repeat_ngram": 0}])
@every_kind
def test_batch_decodes_like_one_by_one(kind, settings):
    m = tiny.randomize(tiny.model(kind), std=0.3 if kind == "bart" else 0.15)
    b, c, settings = tiny.batch(kind, size=8, length=12), m.lm.config, {"max_length": 10} | settings
    if kind == "t5":
        m.lm.shared.weight[c.eos] *= 3                                  # some answers end early
    first = tiny.generate(m, b, **settings | {"max_length": 1})
    assert first.equal(torch.full((8, 1), c.start))
    together = tiny.generate(m, b, **settings)
    assert together.size(1) <= 10 and together[:, 0].eq(c.start).all()
    ends = set()
    for row, alone in zip(together, one_by_one(m, b, **settings)):
        assert row[:len(alone)].equal(alone) and row[len(alone):].eq(c.pad).all()
        text = [*row[1:].tolist(), c.eos]
        ends.add(text.index(c.eos))
        assert set(text[text.index(c.eos) + 1:-1]) <= {c.pad}
    assert len(ends) > 1


@pytest.mark.parametrize("row", ["adapter-multiple", "hyperformer"])
def test_mixed_tasks_decode_like_one_by_one(row):
    """Items leave the search when they are done; who stays keeps the modules of its own task."""
    m = tiny.randomize(tiny.model("bart", methods.row(row, False)), std=0.3)
    m.lm.shared.weight[m.lm.config.eos] *= 3                            # some answers end early
    b, settings, lengths = tiny.mixed("bart"), dict(beams=3, early_stopping=True), set()
    together = tiny.generate(m, b, **settings)
    for i, text in enumerate(together):
        alone = tiny.generate(m, tiny.part(b, [i], m.lm.config.pad), **settings)[0]
        assert text[:len(alone)].equal(alone) and text[len(alone):].eq(m.lm.config.pad).all()
        lengths.add(len(alone))
    assert len(lengths) > 1


@every_kind
def test_beams_share_the_encoder(kind, monkeypatch):
    """Cross-attention's keys and values are never repeated for each beam."""
    m, b = tiny.model(kind), tiny.batch(kind)
    sizes, decode = set(), m.lm.decode

    def watch(ids, mask, cache, ctx=None):
        sizes.add((len(ids), len(mask), *(len(t) for kv in cache for t in kv[1])))
        return decode(ids, mask, cache, ctx)

    monkeypatch.setattr(m.lm, "decode", watch)
    m.generate(b, beams=4)
    assert sizes == {(12, 3, 3, 3, 3, 3)}


def test_beam_search_by_hand():
    """Four words (0 start and pad, 1 end, 2 a, 3 b), two beams, a step known by heart.

    First p(a) 0.5, p(b) 0.4, p(end) 0.1; behind a: a 0.5, b 0.4, end 0.1; behind b: end 0.92.
    Scores are sum(log p) / length with the start counted and the end not, so cut at 3
    a, a: log(0.5 * 0.5) / 3 = -0.462 wins over b, end: log(0.4 * 0.92) / 2 = -0.500.
    """
    after = torch.tensor([[1e-9, 0.1, 0.5, 0.4], [0.25] * 4,
                          [1e-9, 0.1, 0.5, 0.4], [1e-9, 0.92, 0.04, 0.04]]).log()
    c = SimpleNamespace(pad=0, eos=1, force_eos=False, forced_bos=None, no_repeat_ngram=0,
                        early_stopping=False)

    def search():
        start = torch.zeros(1, 1, dtype=torch.long)
        return decoding.beam_search(lambda ids, *_: after[ids[:, -1]], start, c, 3, 2)
    text, logp = search()
    assert text.tolist() == [[[0, 2, 2], [0, 3, 1]]]
    assert logp.exp()[0].tolist() == pytest.approx([0.25, 0.368])
    c.force_eos = True       # only "end" at the last place, with probability 1: log(0.5) / 2 wins
    assert search()[0][:, 0].tolist() == [[0, 2, 1]]


def test_kept_for_the_backward_pass():
    """tools.count --batch, on no memory at all, counts what a step on the CPU really keeps."""
    m = tiny.model("bart", methods.row("vlpet-large", False), dropout=0.1).train()
    real = count.kept(m, "vqa", 3, tiny.WIDTH)
    with torch.device("meta"):
        shapes = model.VLModel(t5.EncoderDecoder(m.lm.config), tiny.WIDTH)
        shapes.install(methods.row("vlpet-large", False))
    assert count.kept(shapes.train(), "vqa", 3, tiny.WIDTH) == pytest.approx(real, rel=0.02)
    twice = count.kept(shapes, "vqa", 6, tiny.WIDTH)
    assert twice == pytest.approx(2 * real, rel=0.05)


def test_views_are_kept_once():
    """x^2 keeps x, x[:4] * x[4:] two views of it: 8 numbers of 4 bytes, whoever looks at them."""
    class Squares(torch.nn.Module):
        lm = SimpleNamespace(shared=torch.nn.Embedding(1, 1))

        def loss(self, batch):
            x = torch.ones(8, requires_grad=True) + 0
            return (x * x).sum() + (x[:4] * x[4:]).sum()
    assert count.kept(Squares(), "vqa", 1, 1) == 32
