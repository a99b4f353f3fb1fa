"""Tiny random models and batches for tests: d 32, 2 + 2 layers, weights large enough to matter."""
from types import SimpleNamespace

import torch

import adapters
import data
import t5
from model import TASKS, VLModel, vocabulary

KINDS, WIDTH = ("bart", "t5"), 12                                  # dialects, width of features


def config(kind: str, **other) -> t5.Config:
    if kind == "bart":
        return t5.bart(32, 4, 48, 2, **dict(vocab=80, positions=66) | other)
    return t5.t5(32, 4, 48, 2, **dict(vocab=80, d_kv=6, buckets=8, max_distance=20) | other)


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.15) -> torch.nn.Module:
    """Every parameter and buffer N(0, std), scales of norms N(1, std)."""
    law = torch.Generator().manual_seed(seed)
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        p.copy_(torch.randn(p.shape, generator=law) * std
                + float("norm" in name and name.endswith("weight")))
    return module


def lm(kind: str, **other) -> t5.EncoderDecoder:
    c = config(kind, **other)
    return randomize(t5.EncoderDecoder(c)).resize(vocabulary(c)).eval()


def model(kind: str, method: adapters.Method | None = None, seed: int = 0,
          tasks: tuple[str, ...] = TASKS, **other) -> VLModel:
    """The same language model for every seed; what is trained is drawn from the seed."""
    backbone = lm(kind, **other)
    torch.manual_seed(seed)
    m = VLModel(backbone, WIDTH).eval()
    if method is not None:
        m.install(method, tasks)
    return m


def batch(kind: str, task: str = "vqa", size: int = 3, length: int = 7, tokens: int = 4,
          seed: int = 0) -> SimpleNamespace:
    """What model.py reads of a data.Batch; texts and labels of different lengths, padded."""
    c, law = config(kind), torch.Generator().manual_seed(seed)
    pictures = 2 if task == "nlvr" else 1
    ids = torch.randint(3, c.vocab, (size, length), generator=law)
    labels = torch.randint(3, c.vocab, (size, 5), generator=law)
    for i in range(size):
        ids[i, max(2, length - i):] = c.pad
        labels[i, max(2, 5 - i):] = -100
    n = pictures * tokens
    return SimpleNamespace(
        tasks=(task,) * size, input_ids=ids, labels=labels, seen=None,
        feats=torch.randn(size, n, WIDTH, generator=law), boxes=torch.rand(size, n, 4,
                                                                           generator=law),
        image_ids=torch.arange(pictures).repeat_interleave(tokens).expand(size, n),
        order_ids=torch.arange(tokens).repeat(pictures).expand(size, n),
        weights=data.loss_weights([data.TASKS[task].loss] * size,
                                  torch.rand(size, generator=law), labels))


def rows(b: SimpleNamespace, i: int, length: int | None = None) -> SimpleNamespace:
    """Example i alone, its text cut to `length` tokens."""
    cut = {k: v if v is None else v[i:i + 1] for k, v in vars(b).items()}
    cut["input_ids"] = cut["input_ids"][:, :length]
    return SimpleNamespace(**cut)


def same_state(a: dict, b: dict) -> bool:
    """Two state_dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
