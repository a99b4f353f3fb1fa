"""Lesson 5: where does LoRA go when training is over, and how much rank did it need?

Complete both functions, then run

    python -m pytest lessons/exercises/test_low_rank.py
"""
from torch import Tensor, nn


def merged(linear: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> nn.Linear:
    """One new Linear that computes W x + b + (alpha / r) B A x; `linear` stays as it is.

    A (r, d_in), B (d_out, r).
    """
    raise NotImplementedError


def shrunk(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' (rank, d_in) and B' (d_out, rank) with B' A' as near to B A as this rank allows.

    torch.linalg.svd(B @ A, full_matrices=False) gives U, S, V^T with B A = U diag(S) V^T, the
    largest parts first.
    """
    raise NotImplementedError
