"""Lesson 6, solved: what does G depend on, and what are VL-PET's heads?

    python -m pytest tests/test_lessons.py
"""
import torch
from torch import Tensor, nn


def middle_x(x: Tensor, H: Tensor, gate: nn.Linear) -> Tensor:
    return torch.sigmoid(gate(x + H))                              # B, S, 1


def small(x: Tensor, H: Tensor, gate: nn.Linear, mask: Tensor) -> Tensor:
    g = torch.sigmoid(gate(torch.cat([x, H], -1)))                 # B, S, 1
    real = mask[..., None].float()                                 # B, S, 1
    return (g * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)     # B, 1, 1


def one_linear(heads: list[nn.Linear]) -> nn.Linear:
    # A Linear's output i depends on row i of its weight alone: rows may be stacked.
    weight = torch.cat([head.weight for head in heads])            # r, d
    new = nn.Linear(weight.size(1), weight.size(0))
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(torch.cat([head.bias for head in heads]))
    return new


# Then: a decoder's mean would look at tokens that are not written yet.
