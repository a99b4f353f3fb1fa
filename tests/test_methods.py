"""One suite over every row of adapters.py, in both dialects: what a tuning method must do."""
import math
from dataclasses import replace

import pytest
import tiny
import torch

import adapters
import model
import weights

PAIRS = [(row, kind) for kind in tiny.KINDS for row in adapters.methods(kind == "t5")]
every_row = pytest.mark.parametrize("row, kind", PAIRS)


def build(row, kind, seed=0, **changes):
    return tiny.model(kind, adapters.row(row, kind == "t5", **changes), seed)


# ------------------------------------------------------------------------------------ counts
# spec/methods.md, to the last digit: (lm, features) -> row -> (trainable, total).

BART, VIDEO, T5 = ("bart-base", 2048), ("bart-base", 512), ("t5-base", 2048)
COUNTS = {
    BART: {"full": (141_156_864, 141_156_864), "adapter": (6_081_600, 145_606_464),
           "vlpet-small": (4_291_020, 143_845_068), "vlpet-middleX": (4_281_804, 143_835_852),
           "vlpet-middleY": (4_281_792, 143_835_840), "vlpet-large": (6_052_416, 145_606_464),
           "frozen": (1_582_848, 141_156_864), "norms": (1_632_000, 141_156_864)},
    VIDEO: {"full": (139_977_216, 139_977_216), "adapter": (4_901_952, 144_426_816),
            "vlpet-small": (3_111_372, 142_665_420), "vlpet-middleX": (3_102_156, 142_656_204),
            "vlpet-middleY": (3_102_144, 142_656_192), "vlpet-large": (4_872_768, 144_426_816)},
    T5: {"full": (224_540_160, 224_540_160), "adapter": (19_333_632, 242_292_480),
         "vlpet-small": (10_518_168, 233_457_816), "vlpet-middleX": (10_499_736, 233_439_384),
         "vlpet-middleY": (10_499_712, 233_439_360), "vlpet-large": (17_582_208, 240_521_856)},
}


@pytest.mark.parametrize("size", COUNTS, ids=str)
def test_counts(size):
    table = {name: counts for name, *counts in model.count_table(*size)}
    assert table.keys() == adapters.methods(size is T5).keys()
    for row, counts in COUNTS[size].items():
        assert tuple(table[row]) == counts, row


def test_count_table_names_an_unknown_size():
    with pytest.raises(ValueError, match="no preset 'bart-huge'; there are bart-base"):
        model.count_table("bart-huge", 2048)


# ------------------------------------------------------------------------------------ ownership

GATES = {"small": ("w.weight", "w.bias"), "middleX": ("w.weight", "w.bias"), "middleY": ("z",),
         "large": ("net.down.weight", "net.down.bias", "net.up.weight", "net.up.bias")}
BOTTLENECK = ("net.down.weight", "net.down.bias", "net.up.weight", "net.up.bias")
SUBLAYERS = [f"lm.{stack}.blocks.{i}.{sub}" for i in (0, 1) for stack, subs in (
    ("encoder", ("self_attn", "ffn")), ("decoder", ("self_attn", "cross_attn", "ffn")))
    for sub in subs]


def norms(kind, stack):
    """A T5 stack ends with a norm and its norms have no bias; a BART stack begins with one."""
    places = [f"{name}.norm" for name in SUBLAYERS if f".{stack}." in name]
    places.append(f"lm.{stack}.norm" if kind == "t5" else f"lm.{stack}.embed_norm")
    return {f"{p}.{w}" for p in places for w in ("weight", "bias")[:1 + (kind == "bart")]}


def trainable(row, kind, everything):
    """The names that a row trains, by the papers' recipes."""
    names = {f"visual.{n}.{w}" for n in ("feat", "box") for w in ("weight", "bias")}
    names |= {f"visual.{n}_norm.{w}" for n in ("feat", "box")
              for w in ("weight", "bias")[:1 + (kind == "bart")]}
    names.add("visual.image.weight")
    if row == "full":
        names |= {n for n in everything if n.startswith("lm.")}
    elif row == "norms" or row == "adapter" and kind == "bart":
        names |= norms(kind, "encoder") | norms(kind, "decoder")
    if row == "adapter":
        names |= {f"{place}.tune.{n}" for place in SUBLAYERS for n in BOTTLENECK}
    if row.startswith("vlpet-"):
        gate = [f"gate.{n}" for n in GATES[row.removeprefix("vlpet-")]]
        names |= norms(kind, "encoder")
        names |= {f"{place}.tune.{n}" for place in SUBLAYERS if ".encoder." in place
                  for n in (*BOTTLENECK, *gate)}
        names |= {f"lm.decoder.blocks.{i}.cross_attn.f.v.tune.{n}"
                  for i in (0, 1) for n in BOTTLENECK}
    return names


@every_row
def test_trainable_names(row, kind):
    m = build(row, kind)
    names = [n for n, _ in m.named_parameters(remove_duplicate=False)]
    found = {n for n, p in m.named_parameters() if p.requires_grad}
    assert found == trainable(row, kind, names) == m.trained().keys()
    owners = [id(p) for _, p in m.named_parameters(remove_duplicate=False)]
    assert len(set(owners)) == len(owners)                    # one parameter, one name, one owner
    part = dict((name, numbers) for name, *numbers in m.counts())
    assert part["all"] == [sum(p.numel() for p in m.parameters() if p.requires_grad),
                           sum(p.numel() for p in m.parameters())]
    assert part["all"] == [sum(c) for c in zip(*(v for k, v in part.items() if k != "all"))]


def train(m, b, steps=3):
    """AdamW steps in train mode; the gradients of the last one stay."""
    m.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        m.loss(b).backward()
        optimizer.step()
    m.eval()


@every_row
def test_training_and_removal(row, kind):
    """Trains exactly what it should; taken out, the language model is what it was."""
    b, base = tiny.batch(kind), tiny.lm(kind)
    m = build(row, kind)
    before = {n: t.clone() for n, t in m.state_dict().items()}
    train(m, b)
    trained = m.trained().keys()
    for name, t in m.state_dict().items():
        assert torch.equal(t, before[name]) == (name not in trained), name
    for name, p in m.named_parameters():
        # T5's VL-PET starts at zero: what feeds a zero up-projection has a gradient from the second
        # step on, so these are the third's. BART: no gradient reaches a key's bias in theory.
        if name in trained:
            assert p.grad.isfinite().all() and (p.grad.any() or name.endswith("f.k.bias")), name
        else:
            assert p.grad is None, name
    with torch.no_grad():
        assert not torch.equal(m.lm(b.input_ids, b.labels), base(b.input_ids, b.labels)) or (
            row == "frozen")
        m.remove()
        assert tiny.same_state(m.lm.state_dict(), base.state_dict())
        assert torch.equal(m.lm(b.input_ids, b.labels), base(b.input_ids, b.labels))
    assert not any(p.requires_grad for p in m.parameters())
    m.install(adapters.row(row, kind == "t5"))
    assert m.trained().keys() == trained


@every_row
def test_saved_and_loaded(row, kind, tmp_path):
    b, path = tiny.batch(kind), tmp_path / "adapter.safetensors"
    m = build(row, kind)
    train(m, b, 2)
    weights.write(path, m.trained())
    assert set(weights.read(path)) == trainable(row, kind, dict(m.named_parameters()))
    again = build(row, kind, seed=1)
    with torch.no_grad():
        want = m(b)
        assert not torch.equal(again(b), want)
        again.load_trained(path)
        assert torch.equal(again(b), want)
    other = build("frozen" if row != "frozen" else "norms", kind)
    with pytest.raises(ValueError, match="adapter.safetensors cannot be loaded.*(visual|norm)"
                       if row == "frozen" else "adapter.safetensors.*unexpected: lm"):
        other.load_trained(path)


@every_row
def test_bf16_is_finite(row, kind):
    b, m = tiny.batch(kind), build(row, kind)
    with torch.autocast("cpu", torch.bfloat16):
        m.loss(b).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    m, b.feats, b.boxes = m.to(torch.bfloat16), b.feats.bfloat16(), b.boxes.bfloat16()
    with torch.no_grad():
        assert m(b).dtype == torch.bfloat16 and m(b).isfinite().all()


# ------------------------------------------------------------------------------------ formulas

def gelu_t(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def oracle(row, kind, site, w, h, x, mask):
    """h' of a site, written from the spec's formulas; w: the module's tensors."""
    def bottleneck(name, z):
        return affine(w, f"{name}.up", gelu_t(affine(w, f"{name}.down", z)))
    if site == "decoder.cross_attn.v":
        return h + bottleneck("net", x)
    H = h + bottleneck("net", h)
    if row == "adapter":
        return H
    G = {"large": lambda: sigmoid(bottleneck("gate.net", x)),
         "middleX": lambda: sigmoid(affine(w, "gate.w", x + H)),
         "middleY": lambda: 1 + w["gate.z"],
         "small": lambda: torch.stack([
             sigmoid(affine(w, "gate.w", torch.cat([x, H], -1)[i, mask[i]])).mean(0, True)
             for i in range(len(h))])}[row.removeprefix("vlpet-")]()
    return (0.3 if kind == "t5" else 1.0) * G * H


def sites(row, kind):
    for site in adapters.methods(kind == "t5")[row].at:
        m = build(row, kind)
        for _, place in m.sites(site):
            yield site, place.tune.double()


@every_row
def test_formula(row, kind):
    law = torch.Generator().manual_seed(0)
    for site, tune in sites(row, kind):
        tiny.randomize(tune, seed=1, std=0.5)
        x = torch.randn(2, 5, 32, generator=law, dtype=torch.double)
        h = torch.randn(2, 5, tune.net.up.out_features, generator=law, dtype=torch.double)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        got = tune(h, x, adapters.Context(mask=mask))
        torch.testing.assert_close(got, oracle(row, kind, site, tune.state_dict(), h, x, mask),
                                   atol=1e-12, rtol=1e-12)


@every_row
def test_start(row, kind):
    """The papers' first step: BART's weights N(0, 0.02) with G near 1/2; T5's VL-PET exactly at
    0.3 G h with G = 1/2 (middleY 1), its adapters by PyTorch's law."""
    law = torch.Generator().manual_seed(0)
    for _, tune in sites(row, kind):
        h, x = (torch.randn(2, 5, d, generator=law).double()
                for d in (tune.net.up.out_features, 32))
        out, gated = tune(h, x, None), tune.gate
        share = 1.0 if gated is None else 1.0 if row == "vlpet-middleY" else 0.5
        down = tune.net.down
        if kind == "t5":
            share *= 0.3 if gated is not None else 1.0
            bound = down.in_features ** -0.5
            if row == "adapter":
                assert 0.9 * bound < down.weight.abs().max() <= bound and down.bias.any()
                continue
            torch.testing.assert_close(out, share * h, atol=1e-12, rtol=0)
        else:
            assert 0.015 < down.weight.std() < 0.025 and not down.bias.any()
            assert 0 < (out - share * h).abs().mean() < 0.1


def test_reduction():
    """Bottlenecks: T5's adapters d / 4, BART's d / 8, VL-PET's value module d / 8 on both."""
    for kind, row, site, r in (("t5", "adapter", "encoder.ffn", 8),
                               ("bart", "adapter", "encoder.ffn", 4),
                               ("t5", "vlpet-large", "encoder.ffn", 8),
                               ("t5", "vlpet-large", "decoder.cross_attn.v", 3),
                               ("bart", "vlpet-large", "decoder.cross_attn.v", 4)):
        (_, place), *_ = build(row, kind).sites(site)
        assert place.tune.net.down.out_features == r
    (_, place), *_ = build("vlpet-large", "bart", r=6, g=5).sites("encoder.ffn")
    assert (place.tune.net.down.out_features, place.tune.gate.net.down.out_features) == (6, 5)


@pytest.mark.parametrize("mean", ["real", "all"])
@every_row
def test_output_does_not_depend_on_the_batch(row, kind, mean):
    """An example alone and beside a longer one; the published small gate fails this."""
    m, b = build(row, kind, mean=mean), tiny.batch(kind, size=3)
    for _, place in [s for site in m.method.at for s in m.sites(site)]:
        tiny.randomize(place.tune)
    length = int((b.input_ids[2] != m.lm.config.pad).sum())
    with torch.no_grad():
        alone, together = m(tiny.rows(b, 2, length)), m(b)[2:]
    assert torch.allclose(alone, together, atol=1e-5) == (
        (row, mean) != ("vlpet-small", "all"))


# ------------------------------------------------------------------------------------ errors

def test_clear_errors():
    m = build("adapter", "bart")
    with pytest.raises(ValueError, match="installed already: call remove"):
        m.install(adapters.row("frozen", False))
    for call, message in (
            (lambda: adapters.row("lora7", False), "no method 'lora7'; there are frozen"),
            (lambda: adapters.row("adapter", True, rank=2), "has a field rank; there are .*r, "),
            (lambda: adapters.row("adapter", True, gate="huge"), "gate is 'huge'.*'large'"),
            (lambda: adapters.row("vlpet-small", True, mean="x"), "mean is 'x'.*'real', 'all'"),
            (lambda: adapters.row("adapter", True, reads="y"), "reads is 'y'.*'h', 'x'")):
        with pytest.raises(ValueError, match=message):
            call()
    m.remove()
    before, add = m.state_dict().keys(), adapters.Add()
    for site in ("encoder.cross_attn", "middle.ffn", "encoder", "encoder.ffn.q", "decoder.ffn.act",
                 "encoder.self_attn.q.x", ""):
        with pytest.raises(ValueError, match=f"no site '{site}'; there are encoder.self_attn, "):
            m.install(adapters.Method({"encoder.ffn": add, site: add}))
    with pytest.raises(ValueError, match="cannot open biases; it can all, norms, encoder.norms"):
        m.install(adapters.Method(open=("biases",)))
    assert m.state_dict().keys() == before and m.method is None         # nothing was half done


def test_a_row_of_ones_own():
    """Sites and openings combine freely: every Linear of a sub-layer, and all that is opened."""
    add = replace(adapters.Add(), r=2)
    m = tiny.model("t5")
    base = {n: t.clone() for n, t in m.lm.state_dict().items()}
    m.install(adapters.Method({"encoder.self_attn.q": add, "decoder.ffn.wi": add,
                               "decoder.ffn": add}, ("all",)))
    assert m.counts()[-1][1] == m.counts()[-1][2]
    train(m, tiny.batch("t5"))
    m.remove()
    assert tiny.same_state(m.lm.state_dict(), base)
