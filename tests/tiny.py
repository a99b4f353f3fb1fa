"""Tiny random models and batches for tests: d 32, 2 + 2 layers, weights large enough to matter."""
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import adapters
import data
import t5
from answers import AnswerHead
from model import TASKS, VLModel, vocabulary

KINDS, WIDTH = ("bart", "t5"), 12                                  # dialects, width of features


def config(kind: str, **other) -> t5.Config:
    if kind == "bert":
        return t5.bert(32, 4, 48, 2, **dict(vocab=80, positions=66) | other)
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
    heads = {}
    if kind == "bert":                                             # it chooses among five answers
        heads = {task: AnswerHead(32, 1e-12, list("abcde"), "bce") for task in tasks}
    m = VLModel(backbone, WIDTH, answers=heads).eval()
    if method is not None:
        m.install(method, tasks)
    return m


def generate(m: VLModel, b, beams: int = 1, max_length: int = 20, **settings) -> torch.Tensor:
    """m.generate with other decoding settings (t5.Config) than the model's own."""
    own = m.lm.config
    m.lm.config = replace(own, **settings)
    ids = m.generate(b, beams, max_length)
    m.lm.config = own
    return ids


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
    b = SimpleNamespace(
        tasks=(task,) * size, input_ids=ids, labels=labels, seen=None,
        answers=torch.rand(size, 5, generator=torch.Generator().manual_seed(seed)),
        feats=torch.randn(size, n, WIDTH, generator=law), boxes=torch.rand(size, n, 4,
                                                                           generator=law),
        image_ids=torch.arange(pictures).repeat_interleave(tokens).expand(size, n),
        order_ids=torch.arange(tokens).repeat(pictures).expand(size, n),
        weights=data.loss_weights([data.TASKS[task].loss] * size,
                                  torch.rand(size, generator=law), labels))
    if kind == "bert":
        b.weights = torch.full((size,), 1 / size)
    return b


def rows(b: SimpleNamespace, i: int, length: int | None = None) -> SimpleNamespace:
    """Example i alone, its text cut to `length` tokens."""
    cut = {k: v if v is None else v[i:i + 1] for k, v in vars(b).items()}
    cut["input_ids"] = cut["input_ids"][:, :length]
    return SimpleNamespace(**cut)


def mixed(kind: str, tasks: tuple[str, ...] = TASKS, each: int = 2) -> SimpleNamespace:
    """`each` examples of every task in one shuffled batch, padded; `seen` hides what fills the
    place of a second picture where others have two."""
    parts = [batch(kind, task, each, 5 + i, seed=i) for i, task in enumerate(tasks)]
    order = torch.randperm(each * len(tasks), generator=torch.Generator().manual_seed(0))
    fill = dict(input_ids=config(kind).pad, labels=-100, feats=3.0, boxes=0.5, image_ids=1,
                order_ids=0, seen=False, answers=0)
    for p in parts:
        p.seen = torch.ones(p.feats.shape[:2], dtype=torch.bool)

    def join(name: str) -> torch.Tensor:
        rows = [t for p in parts for t in getattr(p, name)]
        longest = max(map(len, rows))
        return torch.stack([F.pad(t, (0, 0) * (t.dim() - 1) + (0, longest - len(t)),
                                  value=fill[name]) for t in rows])[order]

    b = SimpleNamespace(**{name: join(name) for name in fill})
    b.tasks = tuple(tasks[i // each] for i in order.tolist())
    scores = torch.rand(len(order), generator=torch.Generator().manual_seed(1))
    b.weights = data.loss_weights([data.TASKS[t].loss for t in b.tasks], scores, b.labels)
    if kind == "bert":
        b.weights = torch.full_like(scores, 1 / len(scores))
    return b


def part(b: SimpleNamespace, places: list[int], pad: int) -> SimpleNamespace:
    """These examples of a `mixed` batch, without the padding that only the others needed."""
    cut = {k: tuple(v[i] for i in places) if k == "tasks" else v[places]
           for k, v in vars(b).items()}
    for names, real in ((["input_ids"], cut["input_ids"] != pad), (["labels"], cut["labels"] >= 0),
                        (["feats", "boxes", "image_ids", "order_ids", "seen"], cut["seen"])):
        longest = int(real.sum(1).max())
        cut |= {name: cut[name][:, :longest] for name in names}
    return SimpleNamespace(**cut | {"seen": None if cut["seen"].all() else cut["seen"]})


def same_state(a: dict, b: dict) -> bool:
    """Two state_dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
