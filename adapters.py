"""What can be added to a frozen network?

VL-Adapter (Sung et al., CVPR 2022, arXiv 2112.06825) and VL-PET (Hu et al., ICCV 2023, arXiv
2308.09804) in one idea: a tuning method is a function (h, x) -> h' at named sites,

    h   what comes out of the frozen sub-layer (or Linear) of the site
    x   what went into it; at a sub-layer the residual stream (on T5 before its norm)

and a method is a row of a table that says which function stands at which sites and what else is
trained. One formula covers nearly all of them:

    h' = s G (.) (h + scale dh),    dh = U f(D z + b_D) + b_U,    z = h or x

    Adapter   G = 1, z = h                         Compacter    D, U sums of Kronecker products
    VL-PET    G a granularity matrix               Hyperformer  D, U generated for each task
    LoRA      z = x, f and the biases left out     DoRA         G = m / |W + scale U D|
    (IA)3     no dh, G = 1 + z                     prompt       tokens in front, no h at all

Read downwards: the matrices, the gates, what stands at a site, the table. This file knows no
backbone; model.py installs a row on one, rows.py changes one from the command line.

    python model.py --lm bart-base --features 2048      # every row and what it trains
    python -m pytest tests/test_methods.py
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S tokens, D width of the site, R bottleneck, n Kronecker terms, K tasks, L layers.


@dataclass(frozen=True)
class Context:
    """The one thing passed down beside tensors: what a site may know besides h and x."""
    mask: Tensor | None = None         # (B, S) True on real tokens
    rows: dict[str, Tensor] = field(default_factory=dict)      # task -> its examples, of 0..B-1
    generated: dict[str, dict] = field(default_factory=dict)   # task -> place -> D, b_D, U, b_U

    def by_task(self, run: Callable, *tensors: Tensor) -> Tensor:
        """run(task, its rows of the tensors, their context), every result back in its place.

        A tensor may hold several rows an example, side by side: the beams of a decoder.
        """
        if not self.rows:
            raise ValueError("there is a module for each task here, but the batch names no tasks")
        if len(self.rows) == 1:
            return run(*self.rows, *tensors, self)
        beams = len(tensors[0]) // sum(map(len, self.rows.values()))
        parts, places = [], []
        for task, rows in self.rows.items():
            many = (rows[:, None] * beams + torch.arange(beams, device=rows.device)).flatten()
            ctx = replace(self, mask=None if self.mask is None else self.mask[rows],
                          rows={task: rows})
            parts.append(run(task, *(t[many] for t in tensors), ctx))
            places.append(many)
        return torch.cat(parts)[torch.cat(places).argsort()]


class PerTask(nn.ModuleDict):
    """One module a task: every example passes through its own task's.

    Each task has parameters of its own (not rows of a stacked tensor), so that those of an idle
    task have no gradient at all: the optimiser then leaves them, its moments and decay alone.
    """

    def __init__(self, tasks: tuple[str, ...], make: Callable[[], nn.Module]):
        if not tasks:
            raise ValueError("this row has a module for each task: install it with tasks=(...)")
        super().__init__({task: make() for task in tasks})

    def forward(self, *args) -> Tensor:
        *tensors, ctx = args
        return ctx.by_task(lambda task, *own: self[task](*own), *tensors)


# ------------------------------------------------------------------------ matrices

def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Dense(nn.Linear):
    """y = W x + b: weight N(0, std), bias 0; std None: PyTorch's default law; zero: all zero."""

    def __init__(self, d_in: int, d_out: int, std: float | None, zero: bool = False,
                 bias: bool = True):
        super().__init__(d_in, d_out, bias)
        if zero or std is not None:
            nn.init.normal_(self.weight, std=0.0 if zero else std)
            if bias:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return super().forward(x)

    def matrix(self) -> Tensor:
        return self.weight


class Kronecker(nn.Module):
    """y = x M + b,  M = sum_i R_i (x) W_i   (Compacter, Mahabadi et al. 2021, arXiv 2106.04647)

    R is n x n x n, W n x (in / n) x (out / n): 1 / n of a Dense's parameters (and n^3).
    """

    def __init__(self, d_in: int, d_out: int, n: int, zero: bool = False, bias: bool = True):
        super().__init__()
        if d_in % n or d_out % n:
            raise ValueError(f"{n} Kronecker terms must divide both widths, {d_in} and {d_out}")
        self.R = nn.Parameter(torch.empty(n, n, n).normal_(std=0.01))
        self.W = nn.Parameter(torch.zeros(n, d_in // n, d_out // n))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        for W in () if zero else self.W.data:
            nn.init.xavier_uniform_(W, gain=2 ** 0.5)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        d_in = len(self.R) * self.W.size(1)
        # Two small products take tokens (in + n^2) out multiplications, a product with M
        # (tokens + n) in out: fewer for few tokens, as in decoding (`python -m tools.bench kronecker`).
        if x.numel() // d_in * 10 >= d_in:
            return F.linear(x, self.matrix(), self.bias)
        y = self.products(x)
        return y if self.bias is None else y + self.bias

    def products(self, x: Tensor) -> Tensor:
        """x M without M: x is n x (in / n), first through every W_i, then through every R_i."""
        y = torch.einsum("...ac,icd->...iad", x.unflatten(-1, (len(self.R), -1)), self.W)
        return torch.einsum("...iad,iab->...bd", y, self.R).flatten(-2)

    def matrix(self) -> Tensor:
        return torch.einsum("iab,icd->bdac", self.R, self.W).flatten(2).flatten(0, 1)   # out, in


class Bottleneck(nn.Module):
    """U f(D x + b_D) + b_U: (..., D) -> (..., R) -> (..., out), f = gelu or nothing.

    VL-PET's multi-head down-projection (N_h heads of width R / N_h, concatenated) is exactly this
    one D -> R, with the same initial law.
    """

    def __init__(self, d: int, r: int, out: int, add: "Add", tasks: tuple[str, ...] = ()):
        super().__init__()
        self.linear = add.linear

        def half(d_in: int, d_out: int, which: str) -> nn.Module:
            def make():
                kind, law = (Kronecker, add.n) if add.matrix == "kronecker" else (Dense, add.std)
                return kind(d_in, d_out, law, add.zero and which == "up", not add.linear)
            return PerTask(tasks, make) if add.per_task == which else make()
        self.down, self.up = half(d, r, "down"), half(r, out, "up")

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        y = self.down(x, ctx)
        return self.up(y if self.linear else gelu(y), ctx)


class Generated(nn.Module):
    """A bottleneck without parameters: a hypernetwork makes D, b_D, U, b_U for (task, place)."""

    def __init__(self, d: int, r: int, out: int, place: str):
        super().__init__()
        self.shape, self.place = (d, r, out), place

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        def run(task: str, x: Tensor, _) -> Tensor:
            D, b_D, U, b_U = ctx.generated[task][self.place]
            return F.linear(gelu(F.linear(x, D, b_D)), U, b_U)
        return ctx.by_task(run, x)


class HyperStack(nn.Module):
    """Writes the adapters of one stack, the matrices of all layers in one go.

        c = LayerNorm(W_2 relu(W_1 [t_k ; l_i] + b_1) + b_2)       task k, layer i;  W_2: 128 -> p
        D = view(A c + a, R x D), and so b_D, U, b_U               A, a: one of each a kind of site
    """

    def __init__(self, sites: dict[str, list[Generated]], add: "Add", size: int, hidden: int = 128):
        super().__init__()
        std, p = add.std, add.p
        self.places = {site: [m.place for m in made] for site, made in sites.items()}
        self.shapes = {site: made[0].shape for site, made in sites.items()}
        count = max(map(len, sites.values()))
        self.layers = nn.Parameter(torch.randn(count, size) * add.std_tokens)
        self.W1, self.W2 = Dense(2 * size, hidden, std), Dense(hidden, p, std)
        self.norm = nn.LayerNorm(p, 1e-6)
        self.make = nn.ModuleDict({
            site: nn.ModuleList(Dense(p, n, std) for n in (r * d, r, out * r, out))
            for site, (d, r, out) in self.shapes.items()})

    def forward(self, t: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Task embeddings (K, 512) -> place -> D (K, R, D), b_D (K, R), U (K, out, R), b_U."""
        # c is small: one at a time, so that its sums round as in the papers' code (golden files).
        c = [self.norm(self.W2(F.relu(self.W1(torch.cat([tk, li])))))
             for tk in t for li in self.layers]
        c, out = torch.stack(c).unflatten(0, (len(t), -1)), {}                   # K, L, p
        for site, (d, r, o) in self.shapes.items():
            D, b_D, U, b_U = (make(c) for make in self.make[site])
            D, U = D.unflatten(-1, (r, d)), U.unflatten(-1, (o, r))
            for i, place in enumerate(self.places[site]):
                out[place] = D[:, i], b_D[:, i], U[:, i], b_U[:, i]
        return out


class Hypernetwork(nn.Module):
    """Hyperformer (Mahabadi et al. 2021, arXiv 2106.04489): a small network writes all adapters.

    Task embeddings are shared by encoder and decoder. stacks: stack -> (site -> its Generated, and
    the description that they share).
    """

    def __init__(self, tasks: tuple[str, ...],
                 stacks: dict[str, tuple[dict[str, list[Generated]], "Add"]], size: int = 512):
        super().__init__()
        if not tasks:
            raise ValueError("a hypernetwork writes for each task: install it with tasks=(...)")
        self.tasks = nn.ParameterDict({task: torch.randn(size) for task in tasks})
        self.stacks = nn.ModuleDict({stack: HyperStack(sites, add, size)
                                     for stack, (sites, add) in stacks.items()})

    def forward(self, tasks: list[str]) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """What Context.generated holds: task -> place -> D, b_D, U, b_U."""
        t = torch.stack([self.tasks[task] for task in tasks])
        made = {place: w for net in self.stacks.values() for place, w in net(t).items()}
        return {task: {place: tuple(m[k] for m in w) for place, w in made.items()}
                for k, task in enumerate(tasks)}


# ------------------------------------------------------------------------ granularity (VL-PET)
# A gate returns the granularity-controlled matrix G (VL-PET, section 3.2), which multiplies
# H = h + dh. VL-PET's figure shows gates on h and middleY = s (1 + sigmoid(z)); here is what its
# published code computes, because it made the published numbers.

class Large(nn.Module):
    """G = sigmoid(U_g gelu(D_g x + b) + b')                                       B, S, D"""

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        dense = replace(add, matrix="dense", linear=False, per_task=None)
        self.net = Bottleneck(d_in, add.g or add.width(d), d, dense)

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return torch.sigmoid(self.net(x))


class MiddleX(nn.Module):
    """G = sigmoid(w . (x + H) + b)                                                B, S, 1"""

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        if d_in != d:
            raise ValueError(f"gate 'middleX' adds x, {d_in} wide, to H, {d} wide: take large, "
                             "middleY or small where they differ")
        self.w = Dense(d, 1, add.std, add.zero)

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return torch.sigmoid(self.w(x + H))


class MiddleY(nn.Module):
    """G = 1 + z                                                                   1, 1, D"""

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        std = 0.0 if add.zero else 0.02 if add.std is None else add.std
        self.z = nn.Parameter(torch.zeros(d).normal_(std=std))

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return 1 + self.z


class Small(nn.Module):
    """G = mean over tokens of sigmoid(w . [x ; H] + b)                            B, 1, 1

    The published code averages over padding too, so that an example's output depends on the
    others of its batch; `mean="all"` does so for comparison, "real" leaves padding out. In a
    decoder it would average over tokens to come, so no row may put it there.
    """

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        self.w, self.mean = Dense(d_in + d, 1, add.std, add.zero), add.mean

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        g = torch.sigmoid(self.w(torch.cat([x, H], -1)))                  # B, S, 1
        if self.mean == "all" or ctx is None or ctx.mask is None:
            return g.mean(1, keepdim=True)
        real = ctx.mask[..., None].to(g.dtype)
        return (g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


GATES = {"large": Large, "middleX": MiddleX, "middleY": MiddleY, "small": Small}


# ------------------------------------------------------------------------ what stands at a site

ALLOWED = {"reads": ("h", "x"), "matrix": ("dense", "kronecker", "generated", "none"),
           "gate": (None, *GATES, "dora"), "mean": ("real", "all"),
           "per_task": (None, "all", "down", "up")}


def check_numbers(described, **least: int) -> None:
    """Widths are at least these, floats finite, laws not negative, a dropout is below 1."""
    for f in fields(described):
        value = getattr(described, f.name)
        low = 0 if f.name in ("std", "std_tokens", "dropout") else least.get(f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{f.name} is {value}; it must be a finite number")
        if value is not None and low is not None and value < low:
            raise ValueError(f"{f.name} is {value}; it must be at least {low}")
        if f.name == "dropout" and value >= 1:
            raise ValueError(f"dropout is {value}; it must be below 1")


@dataclass(frozen=True)
class Add:
    """Description of one Adapter; widths left at 0 follow the site's width D."""
    reads: str = "h"                   # z: dh is a function of h (in a row) or of x (parallel)
    matrix: str = "dense"              # D and U: dense, kronecker, generated; none: no dh
    r: int = 0                         # bottleneck; 0: D / reduction
    reduction: int = 8
    heads: int = 1                     # N_h of VL-PET: must divide r, changes nothing (Bottleneck)
    n: int = 2                         # Kronecker terms
    p: int = 8                         # width of the hypernetwork's c
    linear: bool = False               # f and the biases left out (LoRA)
    dropout: float = 0.0               # of z
    scale: float = 1.0                 # of dh
    alpha: float | None = None         # scale is alpha / r (LoRA)
    gate: str | None = None            # a key of GATES, or dora
    g: int = 0                         # the large gate's bottleneck; 0: like r
    s: float = 1.0                     # of the (gated) sum
    mean: str = "real"                 # tokens that small averages: "real" or "all"
    std: float | None = 0.02           # initial law of the weights; None: PyTorch's default
    std_tokens: float = 0.02           # of the hypernetwork's layer embeddings
    zero: bool = False                 # up-projection and gate start at zero: G = 1/2 (middleY: 1)
    per_task: str | None = None        # one a task: "all" of it, its "down" or its "up" alone

    def __post_init__(self):
        check_numbers(self, r=0, g=0, reduction=1, heads=1, n=1, p=1)
        for name, allowed in ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; it can be "
                                 f"{', '.join(repr(a) if a else 'none' for a in allowed)}")
        if self.gate == "dora" and not (
                self.linear and self.reads == "x" and self.matrix in ("dense", "kronecker")
                and self.s == 1 and self.per_task in (None, "all")):
            raise ValueError("gate 'dora' is for LoRA's linear update of x: start from row dora")
        if self.matrix == "generated" and (self.per_task or self.linear or self.zero):
            raise ValueError("a generated module is one a task already, with gelu, biases and a "
                             "start of its own: leave per_task, linear and zero out")
        if self.matrix == "none" and not (self.gate and self.per_task in (None, "all")):
            raise ValueError("matrix 'none' has no down or up: give it a gate, and per_task all "
                             "or none")

    def width(self, d: int) -> int:
        """The bottleneck at a site of width D."""
        r = self.r or d // self.reduction
        if r < 1:
            raise ValueError(f"a bottleneck of {d} / {self.reduction} has no room: give r, or a "
                             f"reduction of at most {d}")
        if r % self.heads:
            raise ValueError(f"a bottleneck of {r} cannot be shared by {self.heads} heads: give "
                             "heads that divide r")
        return r


class Adapter(nn.Module):
    """h' = s G (.) (h + scale dh),  dh = U f(D z + b_D) + b_U,  without a gate G = 1

    Adapter (Houlsby et al. 2019, arXiv 1902.00751): no gate, dh of h. VL-PET's encoder modules:
    with a gate. VL-PET's decoder module: no gate, dh of x, at the value projection of the
    cross-attention, where x is the encoder's output: it is computed once a sequence.
    LoRA (Hu et al. 2022, arXiv 2106.09685): h + (alpha / r) B A dropout(x), D = A, U = B.
    (IA)3 (Liu et al. 2022, arXiv 2205.05638): no dh, a gate middleY that starts at 1.
    """

    def __init__(self, add: Add, d_in: int, d_out: int, tasks: tuple[str, ...] = (),
                 place: str = ""):
        super().__init__()
        self.reads_x, self.dropout, self.s = add.reads == "x", add.dropout, add.s
        self.net, self.gate = None, None
        if add.matrix != "none":
            r, d = add.width(d_out), d_in if self.reads_x else d_out
            self.scale = add.scale * (1.0 if add.alpha is None else add.alpha / r)
            self.net = (Generated(d, r, d_out, place) if add.matrix == "generated" else
                        Bottleneck(d, r, d_out, add, tasks))
        if add.gate in GATES:
            self.gate = GATES[add.gate](d_in, d_out, add)

    def update(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """H = h + scale dh"""
        if self.net is None:
            return h
        z = F.dropout(x if self.reads_x else h, self.dropout, self.training)
        return h + self.scale * self.net(z, ctx)

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        H = self.update(h, x, ctx)
        return self.s * (H if self.gate is None else self.gate(x, H, ctx) * H)

    def delta(self) -> Tensor:
        """scale U D (out, in) of a linear module: dh = delta x."""
        return self.scale * self.net.up.matrix() @ self.net.down.matrix()

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The frozen W (out, in) and b with this module in them: W' x + b' = h'."""
        linear = self.net is None or (
            self.reads_x and isinstance(self.net, Bottleneck) and self.net.linear
            and not any(isinstance(m, PerTask) for m in (self.net.down, self.net.up)))
        if not linear or not (self.gate is None or isinstance(self.gate, MiddleY)):
            raise ValueError("only what is linear in x can be merged, as LoRA, DoRA and (IA)3 are")
        G = self.s * (1.0 if self.gate is None else self.gate(None, None, None))
        W = W if self.net is None else W + self.delta()
        return (W.T * G).T, None if b is None else b * G


class DoRA(Adapter):
    """h' = G (.) (W x + scale U D x) + b,  G = m / |W + scale U D| (of each row)

    Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): a granularity matrix with a
    number a channel, like middleY. The norm is a constant for the gradient (section 4.3), m starts
    at |W|, so that h' = h. linear: the frozen Linear of the site.
    """

    def __init__(self, add: Add, linear: nn.Linear, tasks: tuple[str, ...] = ()):
        super().__init__(add, linear.in_features, linear.out_features, tasks)
        self.frozen = (linear,)        # in a tuple: a module would become a part of this one
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        (linear,) = self.frozen
        b = 0 if linear.bias is None else linear.bias
        G = self.m / (linear.weight + self.delta()).norm(dim=1).detach()
        return G * (self.update(h, x, ctx) - b) + b

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = W + self.delta()
        return (self.m / M.norm(dim=1))[:, None] * M, b


@dataclass(frozen=True)
class Prompt:
    """Description of a SoftPrompt."""
    length: int = 40
    mid: int = 800
    std: float | None = 0.02
    std_tokens: float = 0.02           # of E
    per_task: str | None = None        # or "all"

    def __post_init__(self):
        check_numbers(self, length=1, mid=1)
        if self.per_task not in (None, "all"):
            raise ValueError(f"per_task of a prompt is {self.per_task!r}; it can be none, 'all'")


class SoftPrompt(nn.Module):
    """P = W_2 tanh(W_1 E + b_1) + b_2, put in front of the encoder's text (prefix-tuning, Li and
    Liang 2021, arXiv 2101.00190, at the input alone). E is length x D, W_1 D -> mid."""

    def __init__(self, prompt: Prompt, d: int):
        super().__init__()
        self.E = nn.Parameter(torch.randn(prompt.length, d) * prompt.std_tokens)
        self.W1, self.W2 = Dense(d, prompt.mid, prompt.std), Dense(prompt.mid, d, prompt.std)

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """Words (B, L, D), of which only B matters -> (B, length, D)."""
        return self.W2(torch.tanh(self.W1(self.E))).expand(len(h), -1, -1)


def build(add: Add | Prompt, d_in: int, d_out: int, tasks: tuple[str, ...], place: str,
          linear: nn.Linear | None) -> nn.Module:
    """The module that a description stands for, one a task where it says so.

    place: the site's name, for what is generated there. linear: the site's Linear, if it is one.
    """
    def make():
        if isinstance(add, Prompt):
            return SoftPrompt(add, d_out)
        if add.gate != "dora":
            return Adapter(add, d_in, d_out, tasks, place)
        if linear is None:
            raise ValueError(f"dora stands at Linears (.q .k .v .o .wi .wg .wo), not at {place}")
        return DoRA(add, linear, tasks)
    return PerTask(tasks, make) if add.per_task == "all" else make()


# ------------------------------------------------------------------------ the table of methods

SUBLAYERS = ("encoder.self_attn", "encoder.ffn",
             "decoder.self_attn", "decoder.cross_attn", "decoder.ffn")
ATTENTION = tuple(site for site in SUBLAYERS if "attn" in site)
ENCODER = SUBLAYERS[:2]


@dataclass(frozen=True)
class Method:
    """A row: what stands at which sites, and which of the backbone's own weights are opened."""
    at: dict[str, Add | Prompt] = field(default_factory=dict)
    open: tuple[str, ...] = ()         # of OPEN in model.py: norms, encoder.norms, biases, all

    def __post_init__(self):
        for site, add in self.at.items():
            if (getattr(add, "gate", None) == "small" and site.startswith("decoder")
                    and not site.endswith(("cross_attn.k", "cross_attn.v"))):
                raise ValueError(f"gate 'small' at {site} would average over the tokens to come: "
                                 "in a decoder take middleX, middleY or large")
            if isinstance(add, Prompt) != (site == "encoder.prompt"):
                raise ValueError(f"a {type(add).__name__} cannot stand at {site}: a prompt stands "
                                 "at encoder.prompt, everything else behind a sub-layer or Linear")


def parts(t5: bool) -> dict[str, Add | Prompt]:
    """What rows are made of, by name, with the papers' settings for BART or for T5.

    Deliberate: on T5 the papers' adapters reduce by 4, and VL-PET's start at zero and scale the
    sub-layer's output by 0.3.
    """
    add, tokens = (Add(std=None), 1.0) if t5 else (Add(), 0.02)
    light = replace(add, reads="x", zero=t5)
    gated = replace(add, heads=4, s=0.3 if t5 else 1.0, zero=t5)
    lora = Add(reads="x", linear=True, r=150 if t5 else 128, alpha=32, dropout=0.1, std=None,
               zero=True)
    found = {
        "adapter": replace(add, reduction=4 if t5 else 8), "adapter-light": light,
        "compacter": replace(add, matrix="kronecker"),
        "compacter-light": replace(light, matrix="kronecker"),
        "hyperformer": Add(matrix="generated", std=0.01 if t5 else 0.02, std_tokens=tokens),
        "lora": lora, "dora": replace(lora, gate="dora"),
        "ia3": Add(matrix="none", gate="middleY", zero=True),
        "prompt": Prompt(std=add.std, std_tokens=tokens),
    }
    for gate in GATES:
        found[f"adapter+{gate}"] = replace(gated, gate=gate, reduction=4 if t5 else 8)
        found[f"compacter+{gate}"] = replace(gated, gate=gate, matrix="kronecker")
    return found


def methods(t5: bool) -> dict[str, Method]:
    """Every row by name. Deliberate: on T5 the papers leave all norms frozen but VL-PET's, and T5
    has no biases, so that there is no row bitfit."""
    part = parts(t5)
    norms, biases = ((), ()) if t5 else (("norms",), ("biases",))

    def everywhere(add: Add) -> Method:
        return Method({site: add for site in SUBLAYERS}, norms)

    def attention(add: Add, open: tuple[str, ...], linears: str = "qv", **more) -> Method:
        return Method({f"{site}.{w}": add for site in ATTENTION for w in linears} | more, open)

    narrow = replace(part["adapter"], reduction=8)
    rows = {
        "frozen": Method(),
        "norms": Method(open=("norms",)),
        "full": Method(open=("all",)),
        "bitfit": Method(open=("biases",)),
        "adapter": everywhere(part["adapter"]),
        "adapter-multiple": everywhere(replace(narrow, per_task="all")),
        "adapter-half-shared": everywhere(replace(narrow, per_task="down")),
        "compacter": everywhere(part["compacter"]),
        "hyperformer": everywhere(part["hyperformer"]),
        "lora": attention(part["lora"], biases),
        "dora": attention(part["dora"], biases),
        "ia3": attention(part["ia3"], (), "kv", **{
            f"{stack}.ffn.hidden": part["ia3"] for stack in ("encoder", "decoder")}),
        "prompt": Method({"encoder.prompt": part["prompt"]}),
    }
    if t5:
        del rows["bitfit"]
    for name in ("compacter", "lora", "prompt"):
        at = {site: replace(add, per_task="all") for site, add in rows[name].at.items()}
        rows[f"{name}-multiple"] = replace(rows[name], at=at)
    # VL-PET's designs: G behind the encoder's modules, one light module for each decoder block.
    # VL-PET itself is "adapter + G" (its heads are one matrix, see Bottleneck): one row, two names.
    for base in ("adapter", "compacter"):
        for gate in GATES:
            at = dict.fromkeys(ENCODER, part[f"{base}+{gate}"])
            at["decoder.cross_attn.v"] = part[f"{base}-light"]
            rows[f"{base}+{gate}"] = Method(at, ("encoder.norms",))
    return rows | {f"vlpet-{gate}": rows[f"adapter+{gate}"] for gate in GATES}
