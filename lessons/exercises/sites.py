"""Lesson 2: where does an adapter stand, and how wide may it be?

Complete both functions, then run

    python -m pytest lessons/exercises/test_sites.py
"""
from collections.abc import Callable

from torch import Tensor


def sublayer(x: Tensor, f: Callable, norm: Callable, adapter: Callable, pre_norm: bool) -> Tensor:
    """A sub-layer with an adapter at its site, without dropout: x (B, S, D) -> the same shape.

    f is the frozen attention or feed-forward, adapter(h, x) -> h'. BART (pre_norm False)
    normalises behind the residual sum, T5 (pre_norm True) before f. On both, x is the residual
    stream that came in.
    """
    raise NotImplementedError


def widest(d: int, budget: int) -> int:
    """The largest r for which D, b_D, U and b_U of an adapter d -> r -> d fit into `budget`
    numbers. Solve for r: no loop."""
    raise NotImplementedError
