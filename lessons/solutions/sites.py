"""Lesson 2, solved: where does an adapter stand, and how wide may it be?

    python -m pytest tests/test_lessons.py
"""
from collections.abc import Callable

from torch import Tensor


def sublayer(x: Tensor, f: Callable, norm: Callable, adapter: Callable, pre_norm: bool) -> Tensor:
    h = f(norm(x)) if pre_norm else f(x)
    h = adapter(h, x)                     # before the residual sum and, on BART, before the norm
    x = x + h
    return x if pre_norm else norm(x)


def widest(d: int, budget: int) -> int:
    return (budget - d) // (2 * d + 1)    # 2dr + r + d <= budget


# Then: what reads x can run beside the frozen layer; what reads h must wait for it.
