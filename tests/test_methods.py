"""What must every tuning method do? One suite over every row of methods.py, in both dialects.

A new row is taken up by itself: it must train what it says, leave no trace when removed, be saved
and loaded, run in bf16, keep examples apart and look at nothing to come. The papers' rows are also
held to their counts, initial laws and formulas, which are written out here. Rows with something for
each task run with one task and with four, the others with four.
"""
import math
import re
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import adapters
import model
import methods
from adapters import GATES
from model import TASKS
from support import weights
from support.gate import BadInput
from tools import count

# A row of our own in the suite -> the row and its changes; what fits the rows into a tiny model.
OWN = {"adapter-half-shared-up": ("adapter-half-shared", "per_task=up"),
       "compacter-original-multiple": ("compacter-original", "per_task=all"),
       "low-rank": ("compacter-original", "n=1,rank=3")}
FIT = {"prompt": "length=3,mid=6", r"t5 compacter\+": "decoder.cross_attn.v.r=4"}
PAPERS = """frozen norms full bitfit adapter adapter-multiple adapter-half-shared compacter
    compacter-multiple compacter-original hyperformer lora lora-multiple dora ia3 prompt
    prompt-multiple""".split()
for gate in GATES:
    PAPERS += [f"adapter+{gate}", f"compacter+{gate}", f"vlpet-{gate}"]
PAPERS = {*PAPERS}

EVERY = []
for kind in (*tiny.KINDS, "bert"):             # BERT: the encoder's half, and answer heads
    rows = methods.methods(kind == "t5") | {
        name: methods.row(base, kind == "t5", changes) for name, (base, changes) in OWN.items()}
    for name, method in rows.items():
        by_task = any(add.per_task or getattr(add, "matrix", "") == "generated"
                      for add in method.at.values())
        if not name.startswith("vlpet-"):      # adapter+G by another name, as is held below
            EVERY += [(kind, name, K) for K in ((1, 4) if by_task else (4,))]
every_row = pytest.mark.parametrize("kind, name, K", EVERY)
every_row_that_writes = pytest.mark.parametrize("kind, name, K", [
    (kind, name, K) for kind, name, K in EVERY if kind != "bert"])
every_paper_row = pytest.mark.parametrize("kind, name, K", [
    (kind, name, K) for kind, name, K in EVERY if name in {*PAPERS, *OWN}])
every_row_by_task = pytest.mark.parametrize("kind, name", [
    (kind, name) for kind, name, K in EVERY if K == 1])
every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


def row(kind, name, changes=""):
    fit = [text for at, text in FIT.items() if re.search(at, f"{kind} {name}")]
    name, own = OWN.get(name, (name, ""))
    return methods.row(name, kind == "t5", ",".join([*fit, own, changes]))


def build(kind, name, K=4, changes="", seed=0, **other):
    return tiny.model(kind, row(kind, name, changes), seed, TASKS[:K], **other).eval()


def awake(kind, name, K=4, changes="", std=0.15, **other):
    """A model whose added modules all matter, and differ from task to task."""
    m = build(kind, name, K, changes, **other)
    for tune in filter(None, (*(place.tune for place in m.installed.values()), m.hyper)):
        tiny.randomize(tune, 1, std)
    if m.shared_R is not None:
        m.shared_R.data.normal_(std=std)
    return m


def snapshot(m):
    return {n: t.clone() for n, t in m.state_dict().items()}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# ------------------------------------------------------------------------------------ counts
# Every number of the papers' tables: row and changes, trainable / total = percent.

COUNTS = {"bart-base 2048": """
    full 141,156,864 / 141,156,864 = 100            bitfit 1,708,800 / 141,156,864 = 1.2106
    adapter 6,081,600 / 145,606,464 = 4.1767        hyperformer 8,579,088 / 148,103,952 = 5.7926
    adapter-multiple 19,430,400 / 158,955,264 = 12.2238
    adapter-half-shared 12,725,760 / 152,250,624 = 8.3584
    adapter-half-shared per_task=up - / - = 8.39    compacter 3,870,240 / 143,395,104 = 2.6990
    compacter-multiple 10,584,960 / 150,109,824 = 7.0515
    lora 8,786,688 / 148,234,752 = 5.9275     lora-multiple 30,020,352 / 169,468,416 = 17.7144
    prompt 2,843,936 / 142,417,952 = 1.9969   prompt-multiple 6,627,200 / 146,201,216 = 4.5329
    vlpet-small 4,291,020 / 143,845,068 = 2.9831    vlpet-middleX 4,281,804 / 143,835,852 = 2.9769
    vlpet-middleY 4,281,792 / 143,835,840 = 2.9769  vlpet-large 6,052,416 / 145,606,464 = 4.1567
    compacter+small 2,964,204 / 142,518,252 = 2.0799
    compacter+middleX 2,954,988 / 142,509,036 = 2.0735
    compacter+middleY 2,954,976 / 142,509,024 = 2.0735
    compacter+large 4,725,600 / 144,279,648 = 3.2753
    frozen 1,582,848 / 141,156,864 = 1.1213         norms 1,632,000 / 141,156,864 = 1.1562
    vlpet-large decoder=none 5,162,496 / - = 3.5673
    vlpet-large encoder=none,open=none 2,472,768 / 142,046,784 = 1.7408
    vlpet-large gate=none 4,272,576 / 143,826,624 = 2.9706
    vlpet-large decoder=none,decoder.self_attn=adapter,decoder.cross_attn=adapter,\
decoder.ffn=adapter 7,832,256 / 147,386,304 = 5.3141
    """, "bart-base 512": """
    full 139,977,216 / 139,977,216 = 100            bitfit 529,152 / 139,977,216 = 0.3780
    adapter 4,901,952 / 144,426,816 = 3.3941        compacter 2,690,592 / 142,215,456 = 1.8919
    lora 7,607,040 / 147,055,104 = 5.1729           prompt 1,664,288 / 141,238,304 = 1.1784
    vlpet-small 3,111,372 / 142,665,420 = 2.1809    vlpet-middleX 3,102,156 / 142,656,204 = 2.1746
    vlpet-middleY 3,102,144 / 142,656,192 = 2.1746  vlpet-large 4,872,768 / 144,426,816 = 3.3739
    """, "t5-base 2048": """
    full 224,540,160 / 224,540,160 = 100            hyperformer 8,534,544 / 231,493,392 = 3.6867
    adapter 19,333,632 / 242,292,480 = 7.9795       adapter r=96 10,480,512 / 233,439,360 = 4.4896
    adapter-multiple 37,178,112 / 260,136,960 = 14.2917
    adapter-half-shared 23,768,832 / 246,727,680 = 9.6336
    compacter 6,057,792 / 229,016,640 = 2.6451
    compacter-multiple 19,487,232 / 242,446,080 = 8.0378
    lora 18,170,112 / 241,128,960 = 7.5354          prompt 2,842,400 / 225,801,248 = 1.2588
    vlpet-small 10,518,168 / 233,457,816 = 4.5054   vlpet-middleX 10,499,736 / 233,439,384 = 4.4978
    vlpet-middleY 10,499,712 / 233,439,360 = 4.4978 vlpet-large 17,582,208 / 240,521,856 = 7.3100
    """}


@pytest.mark.parametrize("size, cells", [*zip(COUNTS, (27, 10, 14))])
def test_counts(size, cells):
    lm, width = size.split()
    table = re.findall(r"([a-z]\S+) +(\S+=\S+)?\s*([\d,-]+) / ([\d,-]+) = ([\d.]+)", COUNTS[size])
    every = {(name, changes): methods.row(name, lm == "t5-base", changes)
            for name, changes, *_ in table}
    assert len(table) == len(every) == cells
    found = {key: counts for key, *counts in count.table(lm, int(width), every)}
    for *key, trainable, total, percent in table:
        got = found[tuple(key)]
        assert trainable in ("-", f"{got[0]:,}") and total in ("-", f"{got[1]:,}"), key
        assert f"{100 * got[0] / got[1]:.{len(percent.partition('.')[2])}f}" == percent, key


@pytest.mark.parametrize("lm, sites, others", [("bart-base", 30, "norms"),
                                               ("t5-base", 60, "frozen")])
def test_count_of_the_original_compacter(lm, sites, others):
    """By hand: n (d / n + r / n) numbers in L and U, of D and of U each; two biases; one R."""
    d, r, n = 768, 96, 4
    rows = {name: methods.row(name, lm == "t5-base") for name in (others, "compacter-original")}
    (_, before, _), (_, trainable, _) = count.table(lm, 2048, rows)
    assert trainable - before == sites * (2 * n * (d // n + r // n) + d + r) + n ** 3


def test_the_table_has_every_row():
    """By these names; T5 has no biases to open."""
    for kind, names in (("bart", PAPERS), ("t5", PAPERS - {"bitfit"})):
        table = methods.methods(kind == "t5")
        assert table.keys() >= names
        assert all(table[f"vlpet-{gate}"] == table[f"adapter+{gate}"] for gate in GATES)


# ------------------------------------------------------------------------------------ ownership
# The papers' recipes: at which places modules stand, and what else is trained. (What the modules'
# parameters are called, the golden files and the formulas below know.)

STACKS = {"encoder": ("self_attn", "ffn"), "decoder": ("self_attn", "cross_attn", "ffn")}
SUBLAYERS = [f"lm.{stack}.blocks.{i}.{sub}" for stack in STACKS for i in (0, 1)
             for sub in STACKS[stack]]
ENCODER = [p for p in SUBLAYERS if "encoder" in p]
ATTENTION, FFN = ([p for p in SUBLAYERS if p.endswith(end)] for end in ("attn", "ffn"))
VALUE = [f"{p}.f.v" for p in SUBLAYERS if p.endswith("cross_attn")]
QV = [f"{p}.f.{w}" for p in ATTENTION for w in "qv"]
KV = [f"{p}.f.{w}" for p in ATTENTION for w in "kv"]
PLACES = {"lora": QV, "dora": QV, "ia3": [*KV, *(f"{p}.f.hidden" for p in FFN)],
          "prompt": ["lm.encoder"], **dict.fromkeys(("frozen", "norms", "full", "bitfit"), [])}


def norms(kind, *stacks):
    """A T5 stack ends with a norm and its norms have no bias; a BART stack begins with one."""
    stacks = [stack for stack in stacks if f"{kind} {stack}" != "bert decoder"]
    found = [f"{p}.norm" for p in SUBLAYERS if p.split(".")[1] in stacks]
    found += [f"lm.{s}.{'norm' if kind == 't5' else 'embed_norm'}" for s in stacks]
    return {f"{p}.{w}" for p in found for w in ("weight", "bias")[:1 + (kind != "t5")]}


def opened(kind, name, m):
    """What a row trains of the language model; one that is not the papers', what it opens."""
    family = name.split("-")[0]
    if name not in {*PAPERS, *OWN}:
        return {n for open in m.method.open for n, p in m.named_parameters()
                if any(p is q for q in model.OPEN[open](m))}
    if name == "full":
        return {n for n, _ in m.named_parameters() if n.startswith("lm.")}
    if "+" in name:
        return norms(kind, "encoder")
    if family == "norms" or kind != "t5" and family in ("adapter", "compacter", "low",
                                                          "hyperformer"):
        return norms(kind, *STACKS)
    if kind != "t5" and family in ("bitfit", "lora", "dora"):
        there = [p for p in SUBLAYERS if kind == "bart" or p in ENCODER]
        return {n for n in norms(kind, *STACKS) if n.endswith("bias")} | {
            f"{p}.f.{w}.bias" for p in there for w in (("wi", "wo") if p in FFN else "qkvo")} | (
            {"lm.pooler.bias"} if kind == "bert" else set())
    return set()


@every_row
def test_trainable_names(kind, name, K):
    m = build(kind, name, K)
    found = {n for n, p in m.named_parameters() if p.requires_grad}
    added = {n for n, _ in m.named_parameters()
             if ".tune." in n or n.startswith(("visual.", "answers.", "hyper.", "shared_R"))}
    assert found == added | opened(kind, name, m) == m.trained().keys()
    if name in {*PAPERS, *OWN}:
        places = PLACES.get(name.split("-")[0], ENCODER + VALUE if "+" in name else SUBLAYERS)
        if kind == "bert":
            places = [p for p in places if "decoder" not in p]
        assert {*m.installed} == {*places}
        assert {n.split(".tune.")[0] for n in added if ".tune." in n} == (
            set() if name == "hyperformer" else {*places})
    owners = [id(p) for _, p in m.named_parameters(remove_duplicate=False)]
    assert len(set(owners)) == len(owners)                    # one parameter, one name, one owner
    part = {part: counts for part, *counts in m.counts()}
    assert part["all"] == [sum(p.numel() for p in m.parameters() if p.requires_grad),
                           sum(p.numel() for p in m.parameters())]
    assert part.pop("all") == [sum(c) for c in zip(*part.values())]
    assert part["method"] == [sum(p.numel() for n, p in m.named_parameters()
                                  if ".tune." in n or n.startswith(("hyper.", "shared_R")))] * 2


# ------------------------------------------------------------------------------------ the start

# "dialect row parameter" -> N(0, s), U(-bound, bound), zero or one; the first that fits holds.
# (fan: 1 / sqrt(inputs), which is PyTorch's default and Kaiming's law with a = sqrt 5.)
LAWS = [
    (r"(norm|answers\.2)\.weight$", "one"), (r"norm\.bias$", "zero"),
    (r"hyper\.tasks", 1.0), (r"^t5 .*( E|layers|image\.weight)$", 1.0),
    (r"( E|layers|image\.weight)$", 0.02), (r" hyper\..*bias$", "zero"), (r"^t5 .* hyper\.", 0.01),
    (r"\WR$|_R$", 0.01), (r"^t5 \w+\+.* (gate\.)?(net\.up|[wz]$|w\.)", "zero"),
    (r"ia3 gate", "zero"), (r"ora\S* net\.up", "zero"), (r"\.[WLU]$", "xavier"),
    (r"(compacter|low-)\S* net\.\w+\.bias", "zero"), (r"ora\S* net\.down", "fan"),
    (r"^t5", "fan"), (r"bias$", "zero"), (r"", 0.02),
]


@every_paper_row
def test_initial_laws(kind, name, K):
    """What is added is drawn from the papers' laws: alike parameters of all places together."""
    params = build(kind, name, K).trained()
    groups = {}
    for n, p in params.items():
        if n.startswith("lm.") and ".tune." not in n or n.endswith(".tune.m"):
            continue                                       # the backbone's; DoRA's |W|
        short = ".".join(w for w in n.rpartition(".tune.")[2].split(".") if w not in TASKS)
        law = next(law for at, law in LAWS if re.search(at, f"{kind} {name} {short}"))
        scale = {"fan": params.get(re.sub("bias$", "weight", n), p).size(-1) ** -0.5,
                 "xavier": 2 ** 0.5 * (6 / sum(p.shape[-2:])) ** 0.5}.get(law, law)
        scale = 1.0 if isinstance(scale, str) else scale
        groups.setdefault((short, law), []).append((p / scale).flatten())
    for (short, law), drawn in groups.items():
        drawn = torch.cat(drawn)
        if law in ("zero", "one"):
            assert (drawn == float(law == "one")).all(), short
            continue
        std, slack = (3 ** -0.5, 2.5) if isinstance(law, str) else (1.0, 4.0)
        slack *= std * len(drawn) ** -0.5
        assert (drawn.square().mean().sqrt() - std).abs() < slack, (short, law)
        assert drawn.mean().abs() < 2 * slack, (short, law)
        assert (drawn.abs().max() <= 1) == isinstance(law, str) or len(drawn) < 50, (short, law)


@every_kind
def test_start(kind):
    """LoRA, DoRA and (IA)3 start as nothing at all; VL-PET at s G h with G = 1/2, middleY 1."""
    b = tiny.mixed(kind)
    frozen = build(kind, "frozen")(b)
    for name in ("lora", "lora-multiple", "dora", "ia3"):
        close(build(kind, name)(b), frozen, 2e-6)
    for name in [f"{base}+{gate}" for base in ("adapter", "compacter") for gate in GATES]:
        for path, place in build(kind, name).installed.items():
            h = torch.randn(3, 5, getattr(place, "out_features", 32))
            share = 1.0 if "decoder" in path else (1.0 if kind == "bart" else 0.3) * (
                1.0 if "middleY" in name else 0.5)
            moved = place.tune(h, torch.randn(3, 5, 32), adapters.Context()) - share * h
            assert moved.abs().max() < 1e-6 if kind == "t5" else 0 < moved.abs().mean() < 0.1


# ------------------------------------------------------------------------------------ formulas
# Written from the papers, for one example of one task.

def gelu_t(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def affine(w, name, z):
    """z M + b, M a Linear's transposed weight or a sum of Kronecker products."""
    own = {n.removeprefix(f"{name}."): t for n, t in w.items()}
    M = own["weight"].T if "weight" in own else kronecker_sum(**own)
    return z @ M + own.get("bias", 0)


def kronecker_sum(W=None, R=None, L=None, U=None, shared_R=None, **others):
    W = W if L is None else [left @ right for left, right in zip(L, U)]
    R = R if shared_R is None else shared_R
    return W[0] if R is None else sum(torch.kron(*pair) for pair in zip(R, W))


def bottleneck(w, name, z):
    return affine(w, f"{name}.up", gelu_t(affine(w, f"{name}.down", z)))


def generated(w, task, path):
    """Hyperformer: D, b_D, U, b_U of a task at lm.<stack>.blocks.<i>.<sub>."""
    _, stack, _, i, sub = path.split(".")
    e = torch.cat([w[f"tasks.{task}"], w[f"stacks.{stack}.layers"][int(i)]])
    w = {n.removeprefix(f"stacks.{stack}."): t for n, t in w.items()}
    c = affine(w, "W2", affine(w, "W1", e).clamp(min=0))
    c = (c - c.mean()) / ((c - c.mean()).square().mean() + 1e-6).sqrt()
    c = c * w["norm.weight"] + w["norm.bias"]
    shapes = {"down.weight": (4, 32), "down.bias": (4,), "up.weight": (32, 4), "up.bias": (32,)}
    return {f"net.{n}": affine(w, f"make.{sub}.{j}", c).view(shapes[n])
            for j, n in enumerate(shapes)}


def oracle(kind, name, path, place, w, h, x, real):
    """h' (S, D) of one example at a place; w: its task's tensors; real: not padding."""
    family, gate = re.match(r"(\w+)[^+]*\+?(\w*)", name).groups()
    if family == "prompt":
        return affine(w, "W2", torch.tanh(affine(w, "W1", w["E"])))
    if family == "ia3":
        return (1 + w["gate.z"]) * h
    if family in ("lora", "dora"):
        BA = 32 / (150 if kind == "t5" else 128) * w["net.up.weight"] @ w["net.down.weight"]
        if family == "lora":
            return h + x @ BA.T
        V, b = place.weight + BA, 0 if place.bias is None else place.bias
        length = V.square().sum(1).sqrt().detach()            # section 4.3: a constant
        return x @ (w["m"][:, None] * V / length[:, None]).T + b
    if gate and "decoder" in path:
        return h + bottleneck(w, "net", x)
    H = h + bottleneck(w, "net", h)
    G = {"": lambda: 1, "middleY": lambda: 1 + w["gate.z"],
         "large": lambda: sigmoid(bottleneck(w, "gate.net", x)),
         "middleX": lambda: sigmoid(affine(w, "gate.w", x + H)),
         "small": lambda: sigmoid(affine(w, "gate.w", torch.cat([x, H], -1)[real])).mean(0)}[gate]()
    return (0.3 if gate and kind == "t5" else 1.0) * G * H


@every_paper_row
def test_formula(kind, name, K):
    """Of every installed module, and its gradients."""
    m, law = awake(kind, name, K, std=0.4).double(), torch.Generator().manual_seed(0)
    tasks = ("vqa", "nlvr" if K > 1 else "vqa", "vqa")
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
    for path, place in m.installed.items():
        x, h = (torch.randn(3, 5, getattr(place, f"{end}_features", 32), generator=law).double()
                for end in ("in", "out"))
        if isinstance(place, nn.Linear):
            h = F.linear(x, place.weight, place.bias)
        got = place.tune(h, x, replace(m.context(tasks, x.device), mask=mask))
        w, want = dict((m.hyper or place.tune).named_parameters()), []
        w |= {} if m.shared_R is None else {"shared_R": m.shared_R}
        for i, task in enumerate(tasks):
            own = generated(w, task, path) if m.hyper else {
                ".".join(p for p in n.split(".") if p != task): t for n, t in w.items()}
            want.append(oracle(kind, name, path, place, own, h[i], x[i], mask[i]))
        want = torch.stack(want)
        close(got, want, 1e-10)
        c = torch.randn(want.shape, generator=law).double()
        grads = [torch.autograd.grad((out * c).sum(), list(w.values()), allow_unused=True)
                 for out in (got, want)]
        assert [a is None for a in grads[0]] == [b is None for b in grads[1]]
        close(*([g for g in both if g is not None] for both in grads), 1e-9)


def test_lora_drops_x_alone():
    """And nothing where the model was in eval mode when it was installed."""
    assert not any(module.training for module in tiny.model("bart", row("bart", "lora")).modules())
    m, x = awake("bart", "lora").train(), torch.randn(3, 5, 32)
    place = m.installed[QV[0]]
    torch.manual_seed(7)
    got = place(x)
    torch.manual_seed(7)
    z, w = F.dropout(x, 0.1), place.tune.state_dict()
    h = F.linear(x, place.weight, place.bias)
    close(got, h + 32 / 128 * z @ w["net.down.weight"].T @ w["net.up.weight"].T)
    assert (z == 0).any()


@pytest.mark.parametrize("n, rank, shared", [
    (1, 0, False), (2, 0, False), (4, 0, True), (4, 1, True), (2, 3, False), (1, 2, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_kronecker(n, rank, shared, bias, monkeypatch):
    """Few tokens go through two small products, many through the matrix; both are the sum."""
    add = adapters.Add(n=n, rank=rank, shared_R=shared)
    net = tiny.randomize(adapters.Kronecker(32, 8, add, bias=bias), std=1.0).double()
    w = dict(net.named_parameters())
    if shared and n > 1:
        w["shared_R"] = torch.randn(n, n, n).double().requires_grad_()
    ctx = adapters.Context(shared_R=w.get("shared_R"))
    built, matrix = [], adapters.Kronecker.matrix
    monkeypatch.setattr(adapters.Kronecker, "matrix",
                        lambda self, ctx: built.append(1) or matrix(self, ctx))
    for shape, times in (((1, 1), 0), ((3,), 0), ((8, 40), 1)):
        x = torch.randn(*shape, 32).double()
        got, want = net(x, ctx), x @ kronecker_sum(**w) + w.get("bias", 0)
        assert len(built) == times
        grads = [torch.autograd.grad(y.square().sum(), list(w.values())) for y in (got, want)]
        close((got, *grads[0]), (want, *grads[1]), 1e-10)


@every_kind
def test_what_a_site_hands_over(kind):
    """h is what the frozen part gave, before dropout, residual and norm; x what it read."""
    m, into, out, sites = build(kind, "frozen"), {}, {}, [*methods.SUBLAYERS]
    for site in methods.SUBLAYERS:
        sites += [f"{site}.{w}" for w in (("wi", "hidden", "wo") if "ffn" in site else "qkvo")]

    class Half(nn.Module):
        def forward(self, h, x, ctx):
            return h * 0.5

    def watch(module, key):
        def note(_, args, y):
            into[key], out[key] = args, y
        module.register_forward_hook(note)

    place = {site: next(m.sites(site))[1] for site in sites}
    for site, at in place.items():
        at.tune = Half()
        watch(at.tune, site)
        if site in methods.SUBLAYERS:
            watch(at, f"{site} whole")
            watch(at.f, f"{site} f")
    for training in (True, False):
        m.train(training)(tiny.batch(kind))
        for site, at in place.items():
            h, x, _ = into[site]
            if isinstance(at, nn.Linear):
                assert torch.equal(h, F.linear(x, at.weight, at.bias))
            elif site.endswith("hidden"):
                wi, wo = (site.replace("hidden", w) for w in ("wi", "wo"))
                assert torch.equal(h, (F.relu if kind == "t5" else F.gelu)(out[wi]))
                assert torch.equal(x, into[wi][1])
                assert training or torch.equal(into[wo][1], out[site])
            else:
                f, whole = f"{site} f", f"{site} whole"
                assert torch.equal(h, out[f] if "ffn" in site else out[f][0])
                assert torch.equal(x, into[whole][0])           # T5: not normalised
                assert torch.equal(into[f][0], at.norm(x) if kind == "t5" else x)
                y = x + out[site]
                assert training or torch.equal(out[whole][0], y if kind == "t5" else at.norm(y))


@every_kind
@pytest.mark.parametrize("name", ["prompt", "prompt-multiple"])
def test_prompt_stands_in_front(kind, name):
    """[prompt | text | picture]: seen by all, without positions of its own (BART)."""
    b, x, mask = tiny.mixed(kind), [], []
    for m in (build(kind, "frozen"), awake(kind, name)):
        m.lm.encoder.blocks[0].self_attn.register_forward_pre_hook(lambda _, args: x.append(args))
        mask.append(m.encode(b)[1])
    words = m.lm.shared(b.input_ids)
    P = m.lm.encoder.tune(words, words, m.context(b.tasks, words.device))
    close(x[1][0], torch.cat([m.lm.encoder.embed_norm(P) if kind == "bart" else P, x[0][0]], 1))
    assert torch.equal(mask[1], F.pad(mask[0], (3, 0), value=True))


# ------------------------------------------------------------------------------------ training

def train(m, b, steps=3, by=None):
    """Steps in train mode; the gradients of the last one stay."""
    m.train()
    torch.manual_seed(0)
    by = by or torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2,
                                 weight_decay=0.1)
    for _ in range(steps):
        by.zero_grad()
        m.loss(b).backward()
        by.step()
    m.eval()
    return by


@every_row
def test_training_and_removal(kind, name, K):
    """Trains exactly what it should; taken out, the language model is what it was."""
    b, base, m = tiny.mixed(kind, TASKS[:K]), tiny.lm(kind), build(kind, name, K)
    before, trained = snapshot(m), m.trained().keys()
    train(m, b)
    for n, t in m.state_dict().items():
        assert torch.equal(t, before[n]) == (n not in trained), n
    for n, p in m.named_parameters():
        # What feeds a zero up-projection has a gradient from the second step on, so these are the
        # third's. In theory no gradient reaches a key's bias.
        if n in trained:
            assert p.grad.isfinite().all() and (p.grad.any() or n.endswith("f.k.bias")), n
        else:
            assert p.grad is None, n
    m.remove()
    assert tiny.same_state(m.lm.state_dict(), base.state_dict())
    with torch.no_grad():
        assert torch.equal(m.lm.encode(b.input_ids)[0], base.encode(b.input_ids)[0])
        assert kind == "bert" or torch.equal(m.lm(b.input_ids, b.labels),
                                             base(b.input_ids, b.labels))
    assert not any(p.requires_grad for p in m.parameters())
    m.requires_grad_(True)                                     # whatever was open before
    m.install(row(kind, name), TASKS[:K])
    assert m.trained().keys() == trained


@every_row_by_task
def test_idle_tasks_stand_still(kind, name):
    """Parameters, moments and decay; before they were ever trained, and after."""
    m, b = build(kind, name), tiny.mixed(kind)
    one = tiny.part(b, [i for i, t in enumerate(b.tasks) if t == "gqa"], m.lm.config.pad)
    idle = {n: p for n, p in m.named_parameters() if p.requires_grad
            and {*n.split(".")} & {"vqa", "nlvr", "caption"}}
    assert len(idle) == 3 * sum("gqa" in n.split(".") for n in m.trained())

    def state():
        return {(n, k): torch.as_tensor(v).clone() for n, p in idle.items()
                for k, v in {"": p.detach(), **by.state.get(p, {})}.items()}

    by = train(m, one, 0)
    for trained_before in (False, True):
        start = state()
        assert len(start) == len(idle) * (4 if trained_before else 1)     # step and two moments
        train(m, one, 2, by)
        assert tiny.same_state(state(), start) and all(p.grad is None for p in idle.values())
        train(m, b, 2, by)
        assert not any(torch.equal(p, start[n, ""]) for n, p in idle.items())


@every_row
def test_saved_and_loaded(kind, name, K, tmp_path):
    b, path, m = tiny.mixed(kind, TASKS[:K]), tmp_path / "adapter.safetensors", build(kind, name, K)
    train(m, b, 2)
    weights.write(path, m.trained())
    assert weights.read(path).keys() == m.trained().keys()
    again = build(kind, name, K, seed=1)
    with torch.no_grad():
        want = m(b)
        assert not torch.equal(again(b), want)
        weights.load(again.trained(), weights.read(path), where=str(path))
        assert torch.equal(again(b), want)
    other = build(kind, "frozen" if name != "frozen" else "norms")
    with pytest.raises(ValueError, match="adapter.safetensors.*cannot be loaded.*(norm|lm|hyper)"):
        weights.load(other.trained(), weights.read(path), where=str(path))


@every_row
def test_bf16_is_finite(kind, name, K):
    b, m = tiny.mixed(kind, TASKS[:K]), build(kind, name, K)
    with torch.autocast("cpu", torch.bfloat16):
        m.loss(b).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    m.to(torch.bfloat16)
    with torch.no_grad():
        assert m(b).dtype == torch.bfloat16 and m(b).isfinite().all()


# One row of each kind of module; each takes seconds to trace.
TRACED = ["vlpet-large", "vlpet-small", "dora", "compacter-original", "hyperformer",
          "adapter-multiple", "prompt"]


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_compiles_whole(kind, name):
    """--compile yes: the training loss is one graph, forward and backward, of the same numbers."""
    m, b = awake(kind, name, dropout=0.0).train(), tiny.batch(kind)
    torch.compiler.reset()
    for stack in m.lm.encoder, m.lm.decoder:                       # the second is traced alike
        stack.blocks = stack.blocks[:1]
    for lora in filter(lambda module: isinstance(module, adapters.Adapter), m.modules()):
        lora.dropout = 0.0
    params = [p for p in m.parameters() if p.requires_grad]
    one = torch.compile(m.loss, fullgraph=True, backend="aot_eager")(b)
    two = m.loss(b)
    close(one, two)
    for a, b in zip(*(torch.autograd.grad(loss, params, allow_unused=True) for loss in (one, two))):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_less_memory_same_numbers(kind, monkeypatch):
    """--checkpoint yes, and logits in parts: the same loss and gradients, dropout drawn alike."""
    m, b = awake(kind, "vlpet-large", 4, dropout=0.2).train(), tiny.batch(kind)

    def found():
        torch.manual_seed(3)
        m.zero_grad()
        loss = m.loss(b)
        loss.backward()
        return [loss.detach(), *(p.grad for p in m.parameters() if p.requires_grad)]
    before = found()
    m.lm.checkpoint = True
    monkeypatch.setattr(model, "LOGITS", 2 * 5 * m.lm.config.vocab)    # two of three examples
    for a, b in zip(found(), before):
        close(a, b)


# ------------------------------------------------------------------------------------ batches

def decoded(m, b):
    """Greedy and beams, as lists without the padding behind the end; or what is chosen."""
    if m.answers:
        return [m(b).argmax(-1).tolist()]
    return [[[t for t in ids if t != m.lm.config.pad] for ids in
             tiny.generate(m, b, beams, 8, no_repeat_ngram=0).tolist()]
            for beams in (1, 3)]


@every_row
def test_mixed_batch(kind, name, K):
    """Shuffled examples of all tasks equal the same examples task by task, and each one alone."""
    m, b = awake(kind, name, K), tiny.mixed(kind, TASKS[:K])
    loss, texts, together = m.loss(b), decoded(m, b), m(b)
    by_task = [[i for i, t in enumerate(b.tasks) if t == task] for task in TASKS[:K]]
    parts = [tiny.part(b, index, m.lm.config.pad) for index in by_task]
    with torch.no_grad():
        for i in range(len(b.tasks)):
            alone = m(tiny.part(b, [i], m.lm.config.pad))
            close(alone, together[[i], :alone.size(1)])
        for part, index in zip(parts, by_task):
            close(m(part), together[index, :m(part).size(1)])
            assert decoded(m, part) == [[text[i] for i in index] for text in texts]
    losses = sum(map(m.loss, parts))
    params = [p for p in m.parameters() if p.requires_grad]
    close(loss, losses)
    for a, b in zip(*(torch.autograd.grad(out, params) for out in (loss, losses))):
        close(a, b, 1e-5 * max(1, b.abs().max().item()))


@every_row_that_writes
def test_decoder(kind, name, K):
    """No position depends on later tokens; step by step with a cache is the full forward."""
    m, b = awake(kind, name, K), tiny.mixed(kind, TASKS[:K])
    with torch.no_grad():
        full = m(b)
        _, mask, cache, ctx = m.encode(b)
        steps = [m.lm.logits(m.lm.decode(ids[:, None], mask, cache, ctx))
                 for ids in m.lm.shift_right(b.labels).T]
        close(torch.cat(steps, 1), full)
        b.labels[:, 2:] = 7
        other = m(b)
    close(other[:, :3], full[:, :3], 1e-6)
    assert not torch.allclose(other[:, 3:], full[:, 3:], atol=1e-3)


@pytest.mark.parametrize("changes, alike", [
    ("mean=all", False),                              # as published: it averages over padding
    ("decoder.cross_attn.v.gate=small,decoder.cross_attn.k=compacter+small", True),
    ("per_task=all", True)])
def test_small_gate(changes, alike):
    """Allowed where a decoder reads the encoder's tokens; padding is left out there, too."""
    m, b = awake("bart", "adapter+small", changes=changes), tiny.mixed("bart")
    with torch.no_grad():
        alone = torch.cat([m(tiny.part(b, [i], 1))[:, :2] for i in range(len(b.tasks))])
        assert torch.allclose(alone, m(b)[:, :2], atol=1e-5) == alike


# ------------------------------------------------------------------------------------ changes

def test_changes_of_a_row():
    """Every form that `methods.row` lists, against the row written out."""
    plain, part, v = methods.methods(False)["vlpet-large"], methods.parts(False), VALUE_SITE
    at, ffn = plain.at, "encoder.ffn"
    encoder, decoder = {s: at[s] for s in at if s != v}, {v: at[v]}

    def every(sites, **changed):
        return {site: replace(add, **changed) for site, add in sites.items()}

    for text, want in {
            "": at, "r=6,g=5": every(at, r=6, g=5), " r = 6 ,": every(at, r=6),
            "zero=yes,std=none,scale=0.5": every(at, zero=True, std=None, scale=0.5),
            "encoder.gate=none": every(encoder, gate=None) | decoder,
            f"{v}=none": encoder, "decoder=none": encoder, "encoder=none": decoder,
            f"{v}=none,decoder.cross_attn.k=lora": encoder | {"decoder.cross_attn.k": part["lora"]},
            "encoder.ffn.r=3,encoder.ffn=adapter": at | {ffn: part["adapter"]},
            "encoder.ffn=adapter,encoder.ffn.r=3": at | {ffn: replace(part["adapter"], r=3)},
            "encoder.prompt=prompt,length=5": at | {"encoder.prompt": adapters.Prompt(5)}}.items():
        assert methods.row("vlpet-large", False, text) == replace(plain, at=want), text
    for text, want in (("open=norms+biases", ("norms", "biases")), ("open=none", ())):
        assert methods.row("vlpet-large", False, text) == replace(plain, open=want)


VALUE_SITE = "decoder.cross_attn.v"
ERRORS = [
    ("lora7", "", "no method 'lora7'"), ("t5 bitfit", "", "no method 'bitfit'"),
    ("adapter", "width=2", "'width' no field"), ("adapter", "r", "'r' is no change of a row"),
    ("adapter", "r=", "'r=' is no change"), ("adapter", "=4", "'=4' is no change"),
    ("adapter", "encoder.ffn=lorax", "'lorax' is no part for a site"),
    ("adapter", "middle=none", "nothing is there; the row's sites are encoder.self_attn, "),
    ("adapter", "decoder.ffn.q.r=3", "no module with a r is there"),
    ("adapter", "length=3", "no module with a length"), ("frozen", "r=3", "the row's sites are -"),
    # Values out of their range.
    ("adapter", "r=big", "r=big: 'r' should be a whole number from 0, not 'big'"),
    ("adapter", "r=1.5", "'r' should be .*, not '1.5'"), ("adapter", "r=none", "not 'none'"),
    ("adapter", "zero=1", "zero is '1'"), ("adapter", "r=-1", "'r' should be .*, not -1"),
    ("vlpet-small", "gate=huge", "'gate' should be"), ("vlpet-small", "s=nan", "'s' should be"),
    ("adapter", "dropout=1", "'dropout' should be"), ("compacter", "n=0", "'n' should be"),
    ("prompt", "length=0", "'length' should be"),
    # Combinations that mean nothing, or would leave the row as it is.
    ("dora", "per_task=up", "dora is for LoRA's"), ("dora", "gate=middleY", "dora is for LoRA's"),
    ("dora", "matrix=kronecker,shared_R=yes", "dora is for LoRA's"),
    ("hyperformer", "per_task=all", "one a task already"), ("hyperformer", "zero=yes", "zero out"),
    ("ia3", "gate=none", "has no down or up"), ("ia3", "per_task=down", "has no down or up"),
    ("prompt", "per_task=down", "per_task of a prompt is 'down'"),
    ("ia3", "scale=2", "would change nothing: scale needs matrix=dense or generated or kronecker"),
    ("adapter", "n=4", "would change nothing: n needs matrix=kronecker"),
    ("ia3", "reads=x", "reads needs matrix="), ("ia3", "linear=yes", "linear needs matrix="),
    ("adapter", "rank=4", "rank needs matrix=kronecker"), ("adapter", "g=4", "g needs gate=large"),
    ("lora", "reduction=4", "reduction needs r=0"),
    ("hyperformer", "encoder.ffn.p=4", "one hypernetwork writes for all of the encoder"),
    ("compacter-original", "encoder.n=2", "one R is for the whole model"),
    ("vlpet-middleX", "encoder.ffn.wi=adapter+middleX", "adds x, 32 wide, to H, 48 wide"),
    ("adapter", "gate=small", "'small' at decoder.self_attn would average over the tokens to come"),
    ("lora", "decoder.cross_attn.q.gate=small", "'small' at decoder.cross_attn.q would"),
    ("adapter", "encoder.prompt=lora", "Add cannot stand at encoder.prompt"),
    ("prompt", "encoder.ffn=prompt", "Prompt cannot stand at encoder.ffn"),
    # What shows when it is installed.
    ("adapter", "open=bias", "cannot open bias; it can all, norms, encoder.norms, biases"),
    ("adapter", "open=clip", "the image tower"), ("t5 frozen", "open=biases", "has no biases"),
    ("adapter", "reduction=64", "bottleneck of 32 / 64 has no room"),
    ("compacter", "n=3", "3 Kronecker terms must divide both widths, 32 and 4"),
    ("adapter", "encoder.ffn=dora", "dora stands at Linears"),
    ("ia3", "encoder.ffn.hidden=dora", "dora stands at Linears"),
    *(("adapter", f"{site}=adapter", f"no site '{site}'; there are encoder.self_attn, ")
      for site in ("encoder.cross_attn", "middle.ffn", "encoder", "encoder.ffn.q", "encoder.norm",
                   "decoder.ffn.act", "encoder.self_attn.q.x", "decoder.prompt")),
]


@pytest.mark.parametrize("name, changes, message", ERRORS)
def test_clear_errors(name, changes, message):
    """And the model is left as it was."""
    m = tiny.model("t5" if name.startswith("t5") else "bart")
    before = snapshot(m)
    with pytest.raises((AssertionError, BadInput), match=message):
        m.install(methods.row(name.split()[-1], name.startswith("t5"), changes), TASKS)
    assert m.method is None and tiny.same_state(m.state_dict(), before)


def test_clear_errors_of_install():
    for name in ("adapter-multiple", "hyperformer"):
        with pytest.raises(AssertionError, match=r"for each task: install it with tasks="):
            build("bart", name, 0)
    m = build("bart", "adapter")
    with pytest.raises(AssertionError, match="installed already: call remove"):
        m.install(methods.row("frozen", False))


@every_row_by_task
def test_a_task_that_was_not_installed(kind, name):
    with pytest.raises(AssertionError, match="has examples of caption, gqa.*installed for vqa"):
        build(kind, name, 1)(tiny.mixed(kind))


def test_a_row_of_ones_own():
    """Sites and openings combine freely: every Linear of a sub-layer, and all that is opened."""
    add, m = adapters.Add(r=2), tiny.model("t5")
    base = snapshot(m.lm)
    m.install(adapters.Method({"encoder.self_attn.q": add, "decoder.ffn.wi": add,
                               "decoder.ffn": add}, ("all",)))
    assert m.counts()[-1][1] == m.counts()[-1][2]
    train(m, tiny.batch("t5"))
    m.remove()
    assert tiny.same_state(m.lm.state_dict(), base)


def test_fields_that_are_zero_or_none():
    """alpha=0 is a scale of 0 and std=0 a start at zero, not the defaults; none unsets. And T5's
    inner width of attention is 24 here, its d 32, its feed-forward 48: gates of both."""
    widths = ",".join(["encoder.self_attn.v=adapter+large", "encoder.ffn.wi=adapter+small",
                       "encoder.ffn.wo=adapter+large", "decoder.cross_attn.v=adapter+middleY"])
    for kind, name, changes, site, holds in (
            ("bart", "lora", "alpha=0", "encoder.self_attn.q", lambda tune: tune.scale == 0),
            ("bart", "lora", "alpha=none", "encoder.self_attn.q", lambda tune: tune.scale == 1),
            ("bart", "vlpet-middleY", "std=0", "encoder.ffn", lambda tune: not tune.gate.z.any()),
            ("bart", "adapter-multiple", "per_task=none", "encoder.ffn", lambda tune: tune.net),
            ("bart", "hyperformer", "encoder.p=5,encoder.r=2", "encoder.ffn",
             lambda tune: tune.net.shape == (32, 2, 32)),
            ("t5", "vlpet-small", widths, "encoder.ffn.wo",
             lambda tune: tune.gate.net.down.weight.shape[1] == 48)):
        m = tiny.model(kind, methods.row(name, kind == "t5", changes))
        (_, place), *_ = m.sites(site)
        assert holds(place.tune), changes
        m.loss(tiny.batch(kind, "gqa")).backward()


def test_a_shared_row_takes_any_task():
    assert build("bart", "adapter", 1)(tiny.batch("bart", "caption")).isfinite().all()
