"""Turns green when lessons/exercises/hypernetwork.py is solved.

    python -m pytest lessons/exercises/test_hypernetwork.py
"""
import torch
from hypernetwork import adapter_for, cheaper_from
from torch import nn

from adapters import Add, Context, Generated, HyperStack

D, R, P = 6, 2, 8                                          # width, bottleneck, width of c


def test_like_the_models():
    """The adapter that HyperStack writes for (task, layer 1), from the same c."""
    torch.manual_seed(0)
    layers = [Generated(D, R, D, f"layer {i}") for i in range(2)]
    stack = HyperStack({"ffn": layers}, Add(matrix="generated", std=0.5, p=P), size=4)
    t, h = torch.randn(4), torch.randn(3, D)
    c = stack.norm(stack.W2(torch.relu(stack.W1(torch.cat([t, stack.layers[1]])))))
    mine = adapter_for(c, list(stack.make["ffn"]), D, R)(h)
    ctx = Context(rows={"vqa": torch.arange(3)}, generated=stack({"vqa": t}))
    assert torch.allclose(mine, layers[1](h, ctx), atol=1e-5)


def test_what_is_trained_writes():
    """No parameters of its own, and gradients for c and all four generators."""
    torch.manual_seed(0)
    generators = [nn.Linear(P, count) for count in (R * D, R, D * R, D)]
    c = torch.randn(P, requires_grad=True)
    adapter = adapter_for(c, generators, D, R)
    adapter(torch.randn(3, D)).square().sum().backward()
    assert c.grad.abs().sum() > 0
    assert all(p.grad is not None for p in nn.ModuleList(generators).parameters())
    assert not isinstance(adapter, nn.Module) or not list(adapter.parameters())


def test_when_it_pays():
    """One layer: with p 8 it takes ten tasks; BART's six layers: two tasks."""
    assert cheaper_from(8, 1) == 10
    assert cheaper_from(8, 6) == 2
    assert cheaper_from(64, 6) == 11
    assert cheaper_from(8, 3) == 4                         # 3 tasks: 9 a against 9 a, not fewer
