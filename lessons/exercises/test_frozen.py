"""Turns green when lessons/exercises/frozen.py is solved.

    python -m pytest lessons/exercises/test_frozen.py
"""
import torch
from frozen import open_only, training_bytes
from torch import nn


class Model(nn.Module):
    """Words, an adapter, a frozen layer above it, and a head that is the table of words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4)
        self.adapter = nn.Linear(4, 4)
        self.debiased = nn.Linear(4, 4)                # its name holds "bias": a trap
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.words.weight           # tied: one tensor, two names

    def forward(self, ids):
        return self.head(self.debiased(self.adapter(self.words(ids))))


def test_counts():
    """words 10 * 4 = 40, once; adapter and debiased 4 * 4 + 4 = 20 each."""
    model = Model()
    assert open_only(model, [model.adapter]) == (20, 80)
    assert open_only(model, [model.words, model.head]) == (40, 80)
    assert open_only(model, []) == (0, 80)


def test_gradients_pass_through_what_is_frozen():
    """The adapter lies below a frozen layer: the gradient reaches it through that layer."""
    model = Model()
    open_only(model, [model.adapter])
    model(torch.tensor([1, 2])).sum().backward()
    assert model.adapter.weight.grad is not None
    assert model.debiased.weight.grad is None and model.words.weight.grad is None


def test_what_it_costs():
    """BART-base: 2.26 GB if all is trained, 0.66 GB with row adapter."""
    assert training_bytes(141_156_864, 141_156_864) == 2_258_509_824
    assert training_bytes(6_081_600, 145_606_464) == 655_405_056
