"""Turns green when lessons/exercises/granularity.py is solved.

    python -m pytest lessons/exercises/test_granularity.py
"""
import torch
from granularity import middle_x, one_linear, small
from torch import nn

from adapters import Add, Context, MiddleX, Small

B, S, D = 2, 5, 6


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, S, D), torch.randn(B, S, D)


def test_middle_x():
    """By hand: w . (x + H) + b = 0 gives 1/2. And as adapters.MiddleX."""
    zero = nn.Linear(D, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    x, H = inputs()
    assert torch.equal(middle_x(x, H, zero), torch.full((B, S, 1), 0.5))
    module = MiddleX(D, D, Add(std=1.0))
    assert torch.allclose(middle_x(x, H, module.w), module(x, H, Context()), atol=1e-6)


def test_small():
    x, H = inputs()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    module = Small(D, D, Add(std=1.0))
    G = small(x, H, module.w, mask)
    assert (G * H).shape == H.shape and G.numel() == B
    assert torch.allclose(G, module(x, H, Context(mask=mask)), atol=1e-6)


def test_small_does_not_see_padding():
    """The second example alone, without its padding, has the same G."""
    x, H = inputs()
    gate = nn.Linear(2 * D, 1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    together, alone = small(x, H, gate, mask), small(x[1:, :2], H[1:, :2], gate, mask[1:, :2])
    assert torch.allclose(together[1:], alone, atol=1e-6)


def test_heads_are_one_linear():
    torch.manual_seed(0)
    heads = [nn.Linear(D, 2) for _ in range(4)]
    x, _ = inputs()
    apart = torch.cat([head(x) for head in heads], -1)             # B, S, 8
    new = one_linear(heads)
    assert type(new) is nn.Linear and new.weight.shape == (8, D)
    assert torch.allclose(new(x), apart, atol=1e-6)
