"""Turns green when lessons/exercises/low_rank.py is solved.

    python -m pytest lessons/exercises/test_low_rank.py
"""
import torch
from low_rank import merged, shrunk
from torch import nn

from adapters import Adapter, Add, Site


def test_merged_like_the_adapter():
    """The same function as LoRA's module at this Linear, with alpha / r = 2."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    lora = Adapter(Add(reads="x", linear=True, r=3, alpha=6.0, std=0.5), Site("q", 6, 4)).eval()
    before, x = linear.weight.clone(), torch.randn(5, 6)
    new = merged(linear, lora.net.down.weight, lora.net.up.weight, 6.0)
    assert torch.allclose(new(x), lora(linear(x), x, None), atol=1e-5)
    assert torch.equal(linear.weight, before)
    assert torch.equal(new.bias, linear.bias)


def test_nothing_is_left_beside_it():
    new = merged(nn.Linear(6, 4), torch.randn(3, 6), torch.randn(4, 3), 6.0)
    assert sum(p.numel() for p in new.parameters()) == 6 * 4 + 4


def test_shrunk_is_the_best():
    """B A of rank 4 in two: what is lost are the two smallest singular values, and no less."""
    torch.manual_seed(0)
    A, B = torch.randn(4, 10), torch.randn(8, 4)
    S = torch.linalg.svdvals(B @ A)
    for rank in (1, 2, 4):
        small_A, small_B = shrunk(A, B, rank)
        assert small_A.shape == (rank, 10) and small_B.shape == (8, rank)
        lost = (B @ A - small_B @ small_A).norm()
        assert torch.allclose(lost, S[rank:].norm(), atol=1e-4)
