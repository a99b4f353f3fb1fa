"""Lesson 1: what is trained, what is frozen, and what does it cost?

Complete both functions, then run

    python -m pytest lessons/exercises/test_frozen.py
"""
from torch import nn


def open_only(model: nn.Module, opened: list[nn.Module]) -> tuple[int, int]:
    """Freezes all of `model`, then opens every parameter of the modules in `opened`.

    Returns (trainable, total), counted in numbers. A tensor that two modules share counts once.
    Decide by the modules that own a parameter, not by its name: a "bias" may be anything.
    """
    raise NotImplementedError


def training_bytes(trainable: int, total: int) -> int:
    """Bytes that weights, gradients and AdamW's state take in fp32 (4 bytes a number).

    Every weight is held. A trained one needs its gradient and AdamW's two moments beside it.
    """
    raise NotImplementedError
