"""Lesson 5, solved: where does LoRA go when training is over, and how much rank did it need?

    python -m pytest tests/test_lessons.py
"""
from copy import deepcopy

import torch
from torch import Tensor, nn


def merged(linear: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> nn.Linear:
    new, r = deepcopy(linear), len(A)
    with torch.no_grad():
        new.weight += alpha / r * B @ A
    return new


def shrunk(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    # Eckart and Young: the first parts are the best matrix of this rank. S goes to either side.
    return Vt[:rank], U[:, :rank] * S[:rank]


# Then: it bends (gelu) between D and U, and no matrix does.
