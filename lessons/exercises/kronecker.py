"""Lesson 3: can one multiply with a Kronecker sum without ever building it?

Complete both functions, then run

    python -m pytest lessons/exercises/test_kronecker.py
"""
from torch import Tensor


def project(x: Tensor, R: Tensor, W: Tensor) -> Tensor:
    """y = x M with M = sum_i kron(R_i, W_i), and M is never made: no tensor is as large.

    x (T, n * p), R (n, n, n), W (n, p, q) -> y (T, n * q). Cut each token into n pieces of p
    numbers: what does W_i do to a piece, and what does R_i do to the pieces?
    """
    raise NotImplementedError


def numbers(d_in: int, d_out: int, n: int) -> tuple[int, int]:
    """How many numbers a dense d_in x d_out matrix has, and how many R and W have together."""
    raise NotImplementedError
