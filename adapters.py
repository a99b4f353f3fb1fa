"""What can be added to a frozen network?

VL-Adapter (Sung et al., CVPR 2022, arXiv 2112.06825) and VL-PET (Hu et al., ICCV 2023, arXiv
2308.09804) in one idea: a tuning method is a function (h, x) -> h' at named sites,

    h   what comes out of the frozen sub-layer (or Linear) of the site
    x   what went into it; at a sub-layer the residual stream (on T5 before its norm)

and a method is a row of a table that says which function stands at which sites and what else is
trained. This file knows no backbone; model.py installs a row on one.

    python model.py --lm bart-base --features 2048      # every row and what it trains
    python -m pytest tests/test_methods.py
"""
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S tokens, D width of the site, R bottleneck, G width of the large gate's bottleneck.


@dataclass(frozen=True)
class Context:
    """The one thing passed down beside tensors."""
    mask: Tensor | None = None         # (B, S) True on real tokens


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def linear(d_in: int, d_out: int, std: float | None, zero: bool = False) -> nn.Linear:
    """A new Linear with weight N(0, std) and bias 0; std None: PyTorch's default law."""
    m = nn.Linear(d_in, d_out)
    if zero or std is not None:
        nn.init.normal_(m.weight, std=0.0 if zero else std)
        nn.init.zeros_(m.bias)
    return m


class Bottleneck(nn.Module):
    """U gelu(D x + b_D) + b_U: (..., D) -> (..., R) -> (..., out).

    VL-PET's multi-head down-projection (N_h heads of width R / N_h, concatenated) is exactly this
    one Linear D -> R, with the same initial law.
    """

    def __init__(self, d: int, r: int, out: int, add: "Add"):
        super().__init__()
        self.down, self.up = linear(d, r, add.std), linear(r, out, add.std, add.zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(gelu(self.down(x)))


# ------------------------------------------------------------------------ granularity (VL-PET)
# A gate returns the granularity-controlled matrix G (VL-PET, section 3.2), which multiplies
# H = h + dh. VL-PET's figure shows gates on h and middleY = s (1 + sigmoid(z)); here is what its
# published code computes, because it made the published numbers.

class Large(nn.Module):
    """G = sigmoid(U_g gelu(D_g x + b) + b')                                       B, S, D"""

    def __init__(self, d: int, add: "Add"):
        super().__init__()
        self.net = Bottleneck(d, add.g or add.width(d), d, add)

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return torch.sigmoid(self.net(x))


class MiddleX(nn.Module):
    """G = sigmoid(w . (x + H) + b)                                                B, S, 1"""

    def __init__(self, d: int, add: "Add"):
        super().__init__()
        self.w = linear(d, 1, add.std, add.zero)

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return torch.sigmoid(self.w(x + H))


class MiddleY(nn.Module):
    """G = 1 + z                                                                   1, 1, D"""

    def __init__(self, d: int, add: "Add"):
        super().__init__()
        self.z = nn.Parameter(torch.zeros(d).normal_(std=0.0 if add.zero else add.std or 0.02))

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        return 1 + self.z


class Small(nn.Module):
    """G = mean over tokens of sigmoid(w . [x ; H] + b)                            B, 1, 1

    The published code averages over padding too, so that an example's output depends on the
    others of its batch; `mean="all"` does so for comparison, "real" leaves padding out.
    """

    def __init__(self, d: int, add: "Add"):
        super().__init__()
        self.w, self.mean = linear(2 * d, 1, add.std, add.zero), add.mean

    def forward(self, x: Tensor, H: Tensor, ctx: Context) -> Tensor:
        g = torch.sigmoid(self.w(torch.cat([x, H], -1)))                  # B, S, 1
        if self.mean == "all" or ctx is None or ctx.mask is None:
            return g.mean(1, keepdim=True)
        real = ctx.mask[..., None].to(g.dtype)
        return (g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


GATES = {"large": Large, "middleX": MiddleX, "middleY": MiddleY, "small": Small}


# ------------------------------------------------------------------------ what stands at a site

@dataclass(frozen=True)
class Add:
    """Description of one module; widths left at 0 follow the site's width D."""
    reads: str = "h"                   # dh is a function of h (one after the other) or x (parallel)
    r: int = 0                         # bottleneck; 0: D / reduction
    reduction: int = 8
    scale: float = 1.0                 # of dh
    gate: str | None = None            # a key of GATES
    g: int = 0                         # the large gate's bottleneck; 0: like r
    s: float = 1.0                     # of the (gated) sum
    mean: str = "real"                 # tokens that small averages: "real" or "all"
    std: float | None = 0.02           # initial law of the weights; None: PyTorch's default
    zero: bool = False                 # up-projection and gate start at zero: G = 1/2 (middleY: 1)

    def __post_init__(self):
        for name, allowed in (("reads", ("h", "x")), ("gate", (None, *GATES)),
                              ("mean", ("real", "all"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, allowed))}")

    def width(self, d: int) -> int:
        """The bottleneck at a site of width D."""
        r = self.r or d // self.reduction
        if r < 1:
            raise ValueError(f"a bottleneck of {d} / {self.reduction} has no room: give r, or a "
                             f"reduction of at most {d}")
        return r


class Adapter(nn.Module):
    """h' = s G (.) (h + scale dh),  dh = U gelu(D h + b_D) + b_U,  without a gate G = 1

    Adapter (Houlsby et al. 2019, arXiv 1902.00751): no gate, dh of h. VL-PET's encoder modules:
    with a gate. VL-PET's decoder module: no gate, dh of x, at the value projection of the
    cross-attention, where x is the encoder's output: it is computed once a sequence.
    """

    def __init__(self, add: Add, d_in: int, d_out: int):
        super().__init__()
        self.reads_x, self.scale, self.s = add.reads == "x", add.scale, add.s
        self.net = Bottleneck(d_in if self.reads_x else d_out, add.width(d_out), d_out, add)
        self.gate = GATES[add.gate](d_out, add) if add.gate else None

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        H = h + self.scale * self.net(x if self.reads_x else h)
        return self.s * (H if self.gate is None else self.gate(x, H, ctx) * H)


# ------------------------------------------------------------------------ the table of methods

SUBLAYERS = ("encoder.self_attn", "encoder.ffn",
             "decoder.self_attn", "decoder.cross_attn", "decoder.ffn")


@dataclass(frozen=True)
class Method:
    """A row: what stands at which sites, and which of the backbone's own weights are opened."""
    at: dict[str, Add] = field(default_factory=dict)
    open: tuple[str, ...] = ()         # of OPEN in model.py: norms, encoder.norms, all


def methods(t5: bool) -> dict[str, Method]:
    """Every row by name, with the papers' settings for BART or for T5.

    Deliberate: on T5 the papers' adapters leave all norms frozen and reduce by 4, and VL-PET's
    start at zero and scale the sub-layer's output by 0.3.
    """
    add = Add(reduction=4, std=None) if t5 else Add()
    gated = replace(add, s=0.3, zero=True) if t5 else add
    value = replace(gated, reads="x", reduction=8, s=1.0)
    rows = {
        "frozen": Method(),
        "norms": Method(open=("norms",)),
        "full": Method(open=("all",)),
        "adapter": Method({site: add for site in SUBLAYERS}, () if t5 else ("norms",)),
    }
    for name in ("small", "middleX", "middleY", "large"):
        encoder = replace(gated, gate=name)
        rows[f"vlpet-{name}"] = Method(
            {"encoder.self_attn": encoder, "encoder.ffn": encoder, "decoder.cross_attn.v": value},
            ("encoder.norms",))
    return rows


def row(name: str, t5: bool, **changes) -> Method:
    """Row `name`, with fields of its modules replaced where they are named (r=..., s=...)."""
    rows = methods(t5)
    if name not in rows:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(rows)}")
    unknown = changes.keys() - {f.name for f in fields(Add)}
    if unknown:
        raise ValueError(f"no module has a field {', '.join(sorted(unknown))}; "
                         f"there are {', '.join(f.name for f in fields(Add))}")
    found = rows[name]
    return replace(found, at={site: replace(add, **changes) for site, add in found.at.items()})
