"""What can be added to a frozen network?

VL-Adapter (Sung et al., CVPR 2022, arXiv 2112.06825) and VL-PET (Hu et al., ICCV 2023, arXiv
2308.09804) in one idea: a tuning method is a function (h, x) -> h' at named sites,

    h   what comes out of the frozen sub-layer (or Linear) of the site
    x   what went into it; at a sub-layer the residual stream (on T5 before its norm)

and a row of a table (methods.py) says which function stands at which sites, and what else is
trained. One formula covers nearly all of them:

    h' = s G (.) (h + scale dh),    dh = U f(D y + b_D) + b_U,    y = h or x

    Adapter   G = 1, y = h                         Compacter    D, U sums of Kronecker products
    VL-PET    G a granularity matrix               Hyperformer  D, U generated for each task
    LoRA      y = x, f and the biases left out     DoRA         G = m / |W + scale U D|
    (IA)3     no dh, G = 1 + z                     prompt       tokens in front, no h at all

    python -m tools.count --lm bart-base --features 2048      # every row and what it trains
    python -m pytest tests/test_methods.py

Add, near the end, is how a row describes a module; Adapter, before it, is the formula.

Axes: B batch, S tokens, d width of the site, r bottleneck, n Kronecker terms, K tasks, L layers.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------- one module a task


@dataclass(frozen=True)
class Context:
    """The one thing passed down beside tensors: what a site may know besides h and x."""
    mask: Tensor | None = None                                  # (B, S) True on real tokens
    rows: dict[str, Tensor] = field(default_factory=dict)       # task -> its rows of the batch
    generated: dict[tuple, tuple] = field(default_factory=dict)    # task, place -> D, b_D, U, b_U
    shared_R: Tensor | None = None                              # (n, n, n) of the whole model

    def by_task(self, run: Callable, *tensors: Tensor) -> Tensor:
        """run(task, its examples' tensors, their ctx) for each task; results in batch order."""
        assert len(self.rows) > 0, "a module for each task, but the batch names no tasks"
        if len(self.rows) == 1:                            # the usual batch: nothing to sort
            (task,) = self.rows
            return run(task, *tensors, self)
        # A tensor may hold several rows an example, side by side: the beams of a decoder.
        beams = len(tensors[0]) // sum(map(len, self.rows.values()))
        results, places = [], []
        for task, rows in self.rows.items():
            mask = None if self.mask is None else self.mask[rows]
            own = replace(self, mask=mask, rows={task: rows})
            place = rows[:, None] * beams + torch.arange(beams, device=rows.device)
            places.append(place.flatten())                 # example i stands at i * beams, ...
            results.append(run(task, *(tensor[places[-1]] for tensor in tensors), own))
        return torch.cat(results)[torch.cat(places).argsort()]


class PerTask(nn.ModuleDict):
    """One module a task: every example passes through its own task's.

    Each task has parameters of its own (not rows of a stacked tensor), so that those of an idle
    task have no gradient at all: the optimiser then leaves them, its moments and decay alone.
    """

    def __init__(self, tasks: tuple[str, ...], make: Callable[[], nn.Module]):
        assert tasks, "this row has a module for each task: install it with tasks=(...)"
        super().__init__({task: make() for task in tasks})

    def forward(self, *args) -> Tensor:
        *tensors, ctx = args
        return ctx.by_task(lambda task, *own: self[task](*own), *tensors)


# ------------------------------------------------------------------------------- matrices

def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")                   # as the papers' code, not the exact one


class Dense(nn.Linear):
    """y = W x + b: weight N(0, std), bias 0; std None: PyTorch's default; zero: all zero."""

    def __init__(self, d_in: int, d_out: int, std: float | None, zero=False, bias=True):
        super().__init__(d_in, d_out, bias)
        if zero:
            nn.init.zeros_(self.weight)
        elif std is not None:
            nn.init.normal_(self.weight, std=std)
        if bias and (zero or std is not None):
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return super().forward(x)                                            # B, S, d_out

    def matrix(self) -> Tensor:
        return self.weight                                                   # d_out, d_in


class Kronecker(nn.Module):
    """y = x M + b,  M = sum_i kron(R_i, W_i)   (Compacter, Mahabadi et al. 2021, arXiv 2106.04647)

    R is n x n x n, W n x (d_in / n) x (d_out / n): 1 / n of a Dense's parameters, plus n^3.
    The original has W_i = L_i U_i of rank 1, and one R for the whole model: the context brings it.
    With one term and shared_R there is no R: M = L U is a plain low-rank matrix.
    """

    def __init__(self, d_in: int, d_out: int, add: "Add", zero=False, bias=True):
        super().__init__()
        n, self.rank = add.n, add.rank
        assert d_in % n == 0 and d_out % n == 0, \
            f"{n} Kronecker terms must divide both widths, {d_in} and {d_out}"
        self.R = None if add.shared_R else nn.Parameter(torch.empty(n, n, n).normal_(std=0.01))
        shapes = {"W": (d_in // n, d_out // n)}
        if self.rank:
            shapes = {"L": (d_in // n, self.rank), "U": (self.rank, d_out // n)}
        for name, shape in shapes.items():
            stack = torch.zeros(n, *shape)
            if not zero or name == "L":                    # were L zero, too: no gradient
                for factor in stack:
                    nn.init.xavier_uniform_(factor, gain=2 ** 0.5)
            self.register_parameter(name, nn.Parameter(stack))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def terms(self, ctx: Context | None) -> tuple[Tensor, Tensor]:
        """R (n, n, n) and W (n, d_in / n, d_out / n)."""
        W, R = self.L @ self.U if self.rank else self.W, self.R
        if R is None:
            R = W.new_ones(1, 1, 1) if len(W) == 1 else ctx.shared_R
        return R, W

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        R, W = self.terms(ctx)
        n, d_in = len(W), len(W) * W.size(1)
        tokens = x.numel() // d_in
        if 10 * tokens >= d_in:                            # 10, not n: small products run slower
            return F.linear(x, self.matrix(ctx), self.bias)
        # Two small products take tokens (d_in + n^2) d_out multiplications, one with M takes
        # (tokens + n) d_in d_out: fewer for few tokens, as in decoding. x is n x (d_in / n).
        y = torch.einsum("...ac,icd->...iad", x.unflatten(-1, (n, -1)), W)
        y = torch.einsum("...iad,iab->...bd", y, R).flatten(-2)              # B, S, d_out
        return y if self.bias is None else y + self.bias

    def matrix(self, ctx: Context | None = None) -> Tensor:
        M = torch.einsum("iab,icd->bdac", *self.terms(ctx))                  # n, out/n, n, in/n
        return M.flatten(2).flatten(0, 1)                                    # d_out, d_in


class Bottleneck(nn.Module):
    """U f(D x + b_D) + b_U: (..., d) -> (..., r) -> (..., out), f = gelu or nothing.

    VL-PET's multi-head down-projection (N_h heads of width r / N_h, concatenated) is exactly this
    one d -> r, with the same initial distribution.
    """

    def __init__(self, d: int, r: int, out: int, add: "Add", tasks: tuple[str, ...] = ()):
        super().__init__()
        self.linear = add.linear

        def half(which: str, d_in: int, d_out: int) -> nn.Module:
            zero, bias = add.zero and which == "up", not add.linear
            make = partial(Dense, d_in, d_out, add.std, zero, bias)
            if add.matrix == "kronecker":
                make = partial(Kronecker, d_in, d_out, add, zero, bias)
            return PerTask(tasks, make) if add.per_task == which else make()

        self.down, self.up = half("down", d, r), half("up", r, out)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        y = self.down(x, ctx)                                                # B, S, r
        if not self.linear:
            y = gelu(y)
        return self.up(y, ctx)                                               # B, S, out


# ------------------------------------------------------------- matrices that a network writes

class Generated(nn.Module):
    """A bottleneck without parameters: a hypernetwork makes D, b_D, U, b_U."""

    def __init__(self, d: int, r: int, out: int, place: str):
        super().__init__()
        self.shape, self.place = (d, r, out), place

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        def run(task: str, x: Tensor, _) -> Tensor:
            D, b_D, U, b_U = ctx.generated[task, self.place]
            return F.linear(gelu(F.linear(x, D, b_D)), U, b_U)               # B, S, out
        return ctx.by_task(run, x)


class HyperStack(nn.Module):
    """Writes the adapters of one stack, the matrices of all layers in one go.

        c = LayerNorm(W_2 relu(W_1 [t_k ; l_i] + b_1) + b_2)       task k, layer i;  W_2: 128 -> p
        D = view(A c + a, r x d), and so b_D, U, b_U               A, a: a pair for each of the
                                                                   four, and each kind of site
    """

    def __init__(self, sites: dict[str, list[Generated]], add: "Add", size: int):
        super().__init__()
        std, p = add.std, add.p
        self.sites, self.make = sites, nn.ModuleDict()     # kind of site -> its places, generators
        layers = max(len(modules) for modules in sites.values())
        self.layers = nn.Parameter(torch.randn(layers, size) * add.std_tokens)           # l_i
        self.W1, self.W2 = Dense(2 * size, 128, std), Dense(128, p, std)
        self.norm = nn.LayerNorm(p, 1e-6)
        for site, modules in sites.items():
            d, r, out = modules[0].shape
            numbers = (r * d, r, out * r, out)             # of D, b_D, U, b_U
            self.make[site] = nn.ModuleList(Dense(p, count, std) for count in numbers)

    def forward(self, tasks: dict[str, Tensor]) -> dict[tuple[str, str], tuple[Tensor, ...]]:
        """task -> t_k (512)   =>   task, place -> D (r, d), b_D (r), U (out, r), b_U (out)"""
        # c is small: one at a time, so that its sums round as in the papers' code (golden files).
        c = []
        for t_k in tasks.values():
            for l_i in self.layers:
                c.append(self.norm(self.W2(F.relu(self.W1(torch.cat([t_k, l_i]))))))
        c = torch.stack(c).unflatten(0, (len(tasks), -1))                    # K, L, p
        written = {}
        for site, modules in self.sites.items():
            d, r, out = modules[0].shape
            D, b_D, U, b_U = (make(c) for make in self.make[site])           # K, L, numbers
            D, U = D.unflatten(-1, (r, d)), U.unflatten(-1, (out, r))
            for i, module in enumerate(modules):
                for k, task in enumerate(tasks):
                    written[task, module.place] = D[k, i], b_D[k, i], U[k, i], b_U[k, i]
        return written


class Hypernetwork(nn.Module):
    """Hyperformer (Mahabadi et al. 2021, arXiv 2106.04489): a small network writes all adapters.

    stacks: stack -> (kind of site -> its Generated modules, the description that they share).
    """

    def __init__(self, tasks: tuple[str, ...], stacks: dict[str, tuple], size: int = 512):
        super().__init__()
        assert tasks, "a hypernetwork writes for each task: install it with tasks=(...)"
        self.tasks = nn.ParameterDict({task: torch.randn(size) for task in tasks})       # t_k
        self.stacks = nn.ModuleDict({stack: HyperStack(sites, add, size)
                                     for stack, (sites, add) in stacks.items()})

    def forward(self, tasks: list[str]) -> dict[tuple[str, str], tuple[Tensor, ...]]:
        """What Context.generated holds. Both stacks read the same task embeddings."""
        t, generated = torch.stack([self.tasks[task] for task in tasks]), {}
        for stack in self.stacks.values():
            generated |= stack(dict(zip(tasks, t)))
        return generated


# ------------------------------------------------------------------------ granularity (VL-PET)
# What G is for: H = h + dh may change every channel of every token. The granularity-controlled
# matrix G (VL-PET, section 3.2) multiplies H and so decides *how much* of it the frozen network
# gets to see: one number for the whole example (small), one a token (middleX), one a channel
# (middleY), or one for each (large). VL-PET's figure shows gates on h and middleY = s (1 +
# sigmoid(z)); here is what its published code computes, because it made the published numbers.

class Large(nn.Module):
    """G = sigmoid(U_g gelu(D_g x + b_g) + b_g')                                   B, S, d"""

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
        assert d_in == d, f"gate 'middleX' adds x, {d_in} wide, to H, {d} wide: take another gate"
        self.w = Dense(d, 1, add.std, add.zero)

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return torch.sigmoid(self.w(x + H))


class MiddleY(nn.Module):
    """G = 1 + z                                                                         d"""

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        std = 0.02 if add.std is None else add.std
        self.z = nn.Parameter(torch.zeros(d).normal_(std=0.0 if add.zero else std))

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return 1 + self.z


class Small(nn.Module):
    """G = mean over tokens of sigmoid(w . [x ; H] + b)                            B, 1, 1

    The published code averages over padding too, so that an example's output depends on the others
    of its batch: mean="all". In a decoder it would average over tokens to come: methods.check_row
    refuses it.
    """

    def __init__(self, d_in: int, d: int, add: "Add"):
        super().__init__()
        self.w, self.mean = Dense(d_in + d, 1, add.std, add.zero), add.mean

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        g = torch.sigmoid(self.w(torch.cat([x, H], -1)))                     # B, S, 1
        if self.mean == "all" or ctx.mask is None:
            return g.mean(1, keepdim=True)
        real = ctx.mask[..., None].to(g.dtype)                               # B, S, 1
        count = real.sum(1, keepdim=True).clamp(min=1)     # a text of padding alone: 0, not NaN
        return (g * real).sum(1, keepdim=True) / count


GATES = {"large": Large, "middleX": MiddleX, "middleY": MiddleY, "small": Small}


# ------------------------------------------------------------------------ what stands at a site

class Site(NamedTuple):
    """A place where a module may stand, as far as the module must know it."""
    place: str                         # its full name, "lm.encoder.blocks.0.ffn"
    d_in: int                          # width of x
    d_out: int                         # width of h
    linear: nn.Linear | None = None    # the frozen Linear, if it is one
    tasks: tuple[str, ...] = ()


class Adapter(nn.Module):
    """h' = s G (.) (h + scale dh),  dh = U f(D y + b_D) + b_U,  without a gate G = 1

    Adapter (Houlsby et al. 2019, arXiv 1902.00751): no gate, dh of h. VL-PET's encoder modules:
    with a gate. VL-PET's decoder module: no gate, dh of x, at the value projection of the
    cross-attention, where x is the encoder's output: it is computed once a sequence.
    LoRA (Hu et al. 2022, arXiv 2106.09685): h + (alpha / r) B A dropout(x), D = A, U = B.
    (IA)3 (Liu et al. 2022, arXiv 2205.05638): no dh, a gate middleY that starts at 1.
    """

    def __init__(self, add: "Add", site: Site):
        super().__init__()
        self.reads_x, self.dropout, self.s = add.reads == "x", add.dropout, add.s
        self.net, self.gate = None, None
        if add.matrix != "none":
            d, r = site.d_in if self.reads_x else site.d_out, add.width(site.d_out)
            self.scale = add.scale * (1 if add.alpha is None else add.alpha / r)
            if add.matrix == "generated":
                self.net = Generated(d, r, site.d_out, site.place)
            else:
                self.net = Bottleneck(d, r, site.d_out, add, site.tasks)
        if add.gate is not None:
            self.gate = GATES[add.gate](site.d_in, site.d_out, add)

    def update(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """H = h + scale dh                                                        B, S, d"""
        if self.net is None:
            return h
        y = F.dropout(x if self.reads_x else h, self.dropout, self.training)
        return torch.add(h, self.net(y, ctx), alpha=self.scale)              # in one pass

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        H = self.update(h, x, ctx)
        if self.gate is not None:
            H = self.gate(x, H, ctx) * H                   # G (.) H
        return H if self.s == 1 else self.s * H


class DoRA(Adapter):
    """h' = G (.) (W x + scale U D x) + b,  G = m / |W + scale U D| (of each row)

    Weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): G has a number a channel,
    like middleY. m starts at |W|, so that h' = h.
    """

    def __init__(self, add: "Add", site: Site):
        super().__init__(add, site)
        assert site.linear is not None, f"dora stands at Linears (.q .wi ...), not {site.place}"
        self.frozen = (site.linear,)   # in a tuple: a module would become a part of this one
        self.m = nn.Parameter(site.linear.weight.detach().norm(dim=1))       # d_out

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        (linear,) = self.frozen
        b = 0 if linear.bias is None else linear.bias
        delta = self.scale * self.net.up.matrix() @ self.net.down.matrix()   # d_out, d_in
        # The norm is a constant for the gradient (section 4.3). W is bf16 with --precision bf16.
        W = linear.weight.to(self.m.dtype)                                   # d_out, d_in
        G = self.m / (W + delta).norm(dim=1).detach()                        # d_out
        return G * (self.update(h, x, ctx) - b) + b


class SoftPrompt(nn.Module):
    """P = W_2 tanh(W_1 E + b_1) + b_2 in front of the encoder's text, E length x d (prefix-tuning,
    Li and Liang 2021, arXiv 2101.00190, at the input alone)."""

    def __init__(self, prompt: "Prompt", site: Site):
        super().__init__()
        d = site.d_out
        self.E = nn.Parameter(torch.randn(prompt.length, d) * prompt.std_tokens)
        self.W1, self.W2 = Dense(d, prompt.mid, prompt.std), Dense(prompt.mid, d, prompt.std)

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        P = self.W2(torch.tanh(self.W1(self.E)))                             # length, d
        return P.expand(len(h), -1, -1)                                      # B, length, d


# ------------------------------------------------------------------------ how a row says it

@dataclass(frozen=True)
class Add:
    """Description of one Adapter."""
    reads: str = "h"                   # y, dh's input: h (sequential) or x (parallel)
    matrix: str = "dense"              # D and U: dense, kronecker, generated; none: no dh
    r: int = 0                         # bottleneck; 0: d / reduction
    reduction: int = 8
    n: int = 2                         # Kronecker terms
    rank: int = 0                      # of each; 0: full
    shared_R: bool = False             # R is one for the whole model (n = 1: there is none)
    p: int = 8                         # width of the hypernetwork's c
    linear: bool = False               # f and the biases left out (LoRA)
    dropout: float = 0.0               # on y
    scale: float = 1.0                 # of dh
    alpha: float | None = None         # scale is multiplied by alpha / r (LoRA)
    gate: str | None = None            # a key of GATES
    g: int = 0                         # the large gate's bottleneck; 0: like r
    s: float = 1.0                     # the fixed factor in h' = s G (.) (h + dh)
    mean: str = "real"                 # tokens that small averages: "real" or "all"
    std: float | None = 0.02           # of the initial weights; None: PyTorch's default
    std_tokens: float = 0.02           # of the hypernetwork's layer embeddings
    zero: bool = False                 # up-projection and gate start at zero: G = 1/2 (middleY: 1)
    per_task: str | None = None        # one a task: "all" of it, its "down" or its "up" alone
    module: type[nn.Module] = Adapter  # what is built: any module of (add, site)

    def width(self, d: int) -> int:
        """The bottleneck at a site of width d."""
        r = self.r or d // self.reduction
        assert r > 0, f"a bottleneck of {d} / {self.reduction} has no room: give r"
        return r


@dataclass(frozen=True)
class Prompt:
    """Description of a SoftPrompt."""
    length: int = 40
    mid: int = 800
    std: float | None = 0.02           # of W_1 and W_2, as in Add
    std_tokens: float = 0.02           # of E
    per_task: str | None = None        # or "all"
    module: ClassVar[type[nn.Module]] = SoftPrompt


def build(add: Add | Prompt, site: Site) -> nn.Module:
    """The module that a description stands for, one a task where it says so."""
    if add.per_task == "all":
        return PerTask(site.tasks, lambda: add.module(add, site))
    return add.module(add, site)


@dataclass(frozen=True)
class Method:
    """A row: what stands at which sites, and which of the backbone's own weights are opened."""
    at: dict[str, Add | Prompt] = field(default_factory=dict)
    open: tuple[str, ...] = ()         # of OPEN in model.py: norms, encoder.norms, biases, all
    formula: str = field(default="-", compare=False, repr=False)       # h', to be printed

    def new_R(self, dtype: torch.dtype) -> nn.Parameter | None:
        """The one R (n, n, n) of the modules that share it."""
        sharing = [add for add in self.at.values() if getattr(add, "shared_R", False)]
        found = {add.n for add in sharing if add.matrix == "kronecker" and add.n > 1}
        assert len(found) <= 1, "one R is for the whole model: n must be the same at all sites"
        if not found:
            return None
        (n,) = found
        return nn.Parameter(torch.empty(n, n, n).normal_(std=0.01).to(dtype))
