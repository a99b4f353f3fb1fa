"""Lesson 6: what does G depend on, and what are VL-PET's heads?

Complete the three functions, then run

    python -m pytest lessons/exercises/test_granularity.py

Axes: B batch, S tokens, D width.
"""
from torch import Tensor, nn


def middle_x(x: Tensor, H: Tensor, gate: nn.Linear) -> Tensor:
    """G = sigmoid(w . (x + H) + b): x, H (B, S, D), gate D -> 1; one number a token."""
    raise NotImplementedError


def small(x: Tensor, H: Tensor, gate: nn.Linear, mask: Tensor) -> Tensor:
    """G = mean over real tokens of sigmoid(w . [x ; H] + b): one number an example.

    gate 2D -> 1, mask (B, S) True on real tokens. The shape must let G * H work for H (B, S, D).
    Padding differs from batch to batch: an example's G must not depend on it.
    """
    raise NotImplementedError


def one_linear(heads: list[nn.Linear]) -> nn.Linear:
    """VL-PET's down-projection: heads d -> r / N_h, their outputs side by side. Build the single
    Linear d -> r that computes the same."""
    raise NotImplementedError
