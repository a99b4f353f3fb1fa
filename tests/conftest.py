"""Tests import the files of the repository's root, wherever pytest is started."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)             # tiny tensors: threads would wait for each other


@pytest.fixture(autouse=True)
def few_pages(monkeypatch):
    """A page takes 5 seconds: only the runs of fixtures, which come before this, draw theirs."""
    from support import runs
    monkeypatch.setattr(runs, "draw_page", lambda run: None)
