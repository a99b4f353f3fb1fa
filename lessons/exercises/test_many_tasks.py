"""Turns green when lessons/exercises/many_tasks.py is solved.

    python -m pytest lessons/exercises/test_many_tasks.py
"""
import torch
from many_tasks import route, steps
from torch import nn


class Counting(nn.Linear):
    """A Linear that counts how often it is called."""
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def modules() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({task: Counting(3, 2) for task in ("vqa", "gqa", "nlvr")})


def test_everyone_through_their_own():
    own, x = modules(), torch.randn(5, 4, 3)
    tasks = ["gqa", "vqa", "vqa", "gqa", "vqa"]
    y = route(own, tasks, x)
    assert [module.calls for module in own.values()] == [1, 1, 0]
    for i, task in enumerate(tasks):
        assert torch.allclose(y[i], own[task](x[i]), atol=1e-6)


def test_idle_tasks_stand_still():
    """Two steps: nlvr trains in the first alone. AdamW's moments and decay must then leave it."""
    own = modules()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1, weight_decay=0.5)
    for tasks in (["nlvr", "vqa"], ["vqa", "gqa"]):
        before = own["nlvr"].weight.detach().clone()
        route(own, tasks, torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.equal(own["nlvr"].weight, before)


def test_steps():
    """3 batches of vqa (500, 500, 1) and 1 of gqa (833); of nlvr's 166 a batch, 2."""
    shares = {"vqa": (60, 60), "gqa": (100, 60), "nlvr": (20, 60)}
    assert steps({"vqa": 1001}, 500, shares) == 3
    assert steps({"vqa": 1001, "gqa": 833, "nlvr": 200}, 500, shares) == 6
