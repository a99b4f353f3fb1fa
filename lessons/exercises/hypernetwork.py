"""Lesson 4: how does one vector become a whole adapter?

Complete both functions, then run

    python -m pytest lessons/exercises/test_hypernetwork.py
"""
from collections.abc import Callable

from torch import Tensor, nn


def adapter_for(c: Tensor, generators: list[nn.Linear], d: int, r: int) -> Callable:
    """The adapter that the generators write for one c (p): a function of h (..., d).

    generators: four Linears of c that give the numbers of D (r x d), b_D (r), U (d x r) and
    b_U (d), in this order. Return a function h -> U gelu(D h + b_D) + b_U, with adapters.gelu.
    It has no parameters of its own: gradients must reach c and the generators.
    """
    raise NotImplementedError


def cheaper_from(p: int, sites_per_task: int) -> int:
    """The smallest number of tasks for which writing adapters takes fewer numbers than keeping
    one a task and site, where `sites_per_task` sites share the four generators.

    Leave out t_k, l_i and the little network before c. One adapter has a = 2dr + r + d numbers; the
    four generators, Linears from p, have how many times a? (The answer does not depend on a.)
    """
    raise NotImplementedError
