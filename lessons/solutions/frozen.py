"""Lesson 1, solved: what is trained, what is frozen, and what does it cost?

    python -m pytest tests/test_lessons.py
"""
from torch import nn


def open_only(model: nn.Module, opened: list[nn.Module]) -> tuple[int, int]:
    model.requires_grad_(False)
    for module in opened:
        module.requires_grad_(True)
    # model.parameters() gives a shared tensor once: no bookkeeping is needed.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def training_bytes(trainable: int, total: int) -> int:
    return 4 * (total + 3 * trainable)                 # weights; gradient and two moments


# Then: the gradient passes through a frozen layer; its own weights alone get none. Under
# no_grad() nothing is remembered, so nothing gets one.
