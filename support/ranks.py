"""How do several processes train one model?

    torchrun --nproc_per_node=8 train.py --method vlpet-large ...
    python -m pytest tests/test_ranks.py

Each process (a rank, on a GPU of its own) holds the whole model and follows the same plan of
batches. Of each batch it computes every world-th example; the gradients of what is trained are
summed, so that all take the same step as one process would on the whole batch. Frozen weights have
no gradients: of BART-base with vlpet-large 24 MB a step pass between the ranks, with full 565 MB.
Scores are of all answers, each rank's share gathered. The first rank alone writes and prints.
"""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import gate
from support.gate import BadInput

# torchrun says who we are; without it, there is one process, whatever else has set such names.
RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FIRST = RANK == 0


def start(device: str) -> None:
    """Meets the others; does nothing in a single process."""
    if WORLD == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                # "cuda" means this one
    # The first rank may pack features for hours before the others see it again.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    if not FIRST:
        sys.stdout, gate.read_only = open(os.devnull, "w"), True


@contextmanager
def meeting() -> Iterator[None]:
    """Around what all ranks do together: if one is missing, the others say so in a sentence."""
    try:
        yield
    except RuntimeError as why:
        raise BadInput(f"another rank ended, its message is above or below ({why!s:.200})") from why


def start_thread() -> None:
    """What a thread beside the main one must be told: one core is enough, and which GPU is ours."""
    torch.set_num_threads(1)
    if WORLD > 1 and torch.cuda.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def agree(value: object = None) -> object:
    """The first rank's value, for all; ranks that come early wait."""
    values = [value]
    if WORLD > 1:
        with meeting():
            dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first rank does a block alone; the others find written what it wrote there."""
    if not FIRST:
        agree()
    yield
    if FIRST:
        agree()


def shares(parts: int) -> list[slice]:
    """This rank's shares of a batch, computed one after another."""
    count = parts * WORLD
    return [slice(RANK * parts + i, None, count) for i in range(parts)]


def gather(own: list) -> list:
    """Results of the items RANK, RANK + WORLD, ... -> those of all items, in their order."""
    if WORLD == 1:
        return own
    parts = [None] * WORLD
    with meeting():
        dist.all_gather_object(parts, own)
    found = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        found[rank::WORLD] = part
    return found


def seed_dropout(seed: int, step: int) -> None:
    """Ranks must not drop the same units. What is dropped depends on seed, step and rank."""
    if WORLD > 1:
        torch.manual_seed(((seed * 1_000_003 + step) * 4096 + RANK) % 2**63)


def add_up(model: nn.Module, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """Sums the gradients over the ranks, in place; returns the summed loss, and whether any rank
    was told to stop. A batch belongs to one task, so all ranks have gradients of the same tensors.
    """
    if WORLD == 1:
        return loss, stop
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    extra = torch.stack([loss.float(), loss.new_tensor(float(stop)).float()])
    # One long vector: many small messages would cost more than their bytes.
    flat = torch.cat([*(grad.flatten() for grad in grads), extra.to(grads[0].dtype)])
    with meeting():
        dist.all_reduce(flat)                                               # summed
    *summed, extra = flat.split([grad.numel() for grad in grads] + [2])
    for grad, total in zip(grads, summed):
        grad.copy_(total.view_as(grad))
    return extra[0].clone(), bool(extra[1])              # a view would keep the long vector
