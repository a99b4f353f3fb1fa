"""Turns green when lessons/exercises/kronecker.py is solved.

    python -m pytest lessons/exercises/test_kronecker.py
"""
import torch
from kronecker import numbers, project
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made inside it."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_by_hand():
    """The lesson's example: M = [[1, 0, 2, 0], [0, 2, 0, 4], [3, 0, 4, 0], [0, 6, 0, 8]]."""
    R = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    W = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(project(x, R, W), torch.tensor([[4.0, 8.0, 6.0, 12.0]]))


def test_like_the_built_matrix():
    torch.manual_seed(0)
    for n, p, q in ((1, 3, 5), (2, 64, 8), (4, 3, 2)):
        R, W, x = torch.randn(n, n, n), torch.randn(n, p, q), torch.randn(5, n * p)
        M = sum(torch.kron(R[i], W[i]) for i in range(n))
        assert torch.allclose(project(x, R, W), x @ M, atol=1e-4)


def test_the_matrix_is_never_made():
    """For a single token, every tensor on the way is far smaller than M."""
    n, p, q = 8, 32, 16
    R, W, x = torch.randn(n, n, n), torch.randn(n, p, q), torch.randn(1, n * p)
    with Largest() as largest:
        project(x, R, W)
    assert 0 < largest.size <= n * p * q < (n * p) * (n * q)


def test_numbers():
    assert numbers(128, 16, 2) == (2048, 1024 + 8)
    assert numbers(768, 96, 4) == (73_728, 18_432 + 64)
