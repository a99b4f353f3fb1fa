"""Lesson 7: how do examples of many tasks share a batch, and how long is an epoch of all?

Complete both functions, then run

    python -m pytest lessons/exercises/test_many_tasks.py
"""
from torch import Tensor, nn


def route(modules: nn.ModuleDict, tasks: list[str], x: Tensor) -> Tensor:
    """Every example passes through its own task's module; results stay in their places.

    x (B, ...), tasks: B names. Call the module of a task once, with all of its examples, and do
    not call the modules of other tasks: these must get no gradient at all (not zeros), or AdamW
    would go on moving them.
    """
    raise NotImplementedError


def steps(sizes: dict[str, int], b: int, shares: dict[str, tuple[int, int]]) -> int:
    """Steps of one epoch over all tasks: a batch belongs to one task, and every example comes once.

    sizes: examples of each task. A task's batch is the share of b that `shares` says: with b 500
    and (100, 60) it is int(500 * 100 / 60) = 833. The last batch of a task may be smaller.
    """
    raise NotImplementedError
