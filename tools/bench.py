"""How fast is it?

    python -m tools.bench mixing       # a training step of one task against one of four tasks mixed
    python -m tools.bench reading      # packed features read against what a training step takes

Random weights of a published size, one thread; the median of several runs, the first left out.
"""
import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
import methods
import t5
from model import TASKS, VLModel
from support import features
from support.gate import program


def seconds(times: int, *runs: Callable) -> list[float]:
    """Median durations of functions, run in turn, so that a busy machine is busy for all."""
    durations = [[] for _ in runs]
    for _ in range(times + 1):
        for run, found in zip(runs, durations):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in durations]


def bart_base(row: str, width: int, dropout: float = 0.1) -> VLModel:
    config = replace(t5.PRESETS["bart-base"], vocab=1000, dropout=dropout)
    model = VLModel(t5.EncoderDecoder(config).init_weights(), width)
    model.install(methods.row(row, is_t5=False), (*TASKS, "tvqa"))
    return model


def random_batch(tasks: tuple[str, ...], text: int = 16, tokens: int = 36, answer: int = 6,
                 width: int = 2048) -> data.Batch:
    """Examples of one picture each, as data.collate would make them."""
    B, generator = len(tasks), torch.Generator().manual_seed(0)
    labels = torch.randint(5, 1000, (B, answer), generator=generator)
    return data.Batch(
        tasks=tasks, input_ids=torch.randint(5, 1000, (B, text), generator=generator),
        feats=torch.randn(B, tokens, width, generator=generator),
        boxes=torch.rand(B, tokens, 4, generator=generator),
        image_ids=torch.zeros(B, tokens, dtype=torch.long),
        order_ids=torch.arange(tokens).expand(B, -1), seen=None, labels=labels,
        weights=data.loss_weights(["examples"] * B, torch.ones(B), labels))


def step(model: VLModel, batch: data.Batch) -> None:
    model.loss(batch).backward()
    model.zero_grad()


def mixing(examples: int = 32) -> None:
    """What it costs that every module first sorts its examples by task."""
    one = random_batch(("vqa",) * examples)
    mixed = replace(one, tasks=tuple(TASKS[i % len(TASKS)] for i in range(examples)))
    for row in ("adapter-multiple", "compacter-multiple", "lora-multiple", "hyperformer"):
        model = bart_base(row, 2048, dropout=0.0)
        alone, together = seconds(7, partial(step, model, one), partial(step, model, mixed))
        print(f"{row:20} {examples} examples: one task {alone:6.2f} s, four mixed {together:6.2f} "
              f"s, {100 * (together / alone - 1):+.0f} %", flush=True)


def reading(pictures: int = 5000, batch: int = 500) -> None:
    """Examples a second from packed features of RN101's size, against what a step takes."""
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        names = {str(i): Path(str(i)) for i in range(pictures)}
        features.pack(folder, names, {}, 2048, lambda path: torch.rand(36, 2048), list)
        packed = features.Features(folder)
        read, = seconds(20, lambda: packed.stack(generator.sample(packed.ids, batch)))
    model, examples = bart_base("vlpet-large", 2048), random_batch(("vqa",) * 32)
    takes, = seconds(3, partial(step, model, examples))
    print(f"read {batch / read:,.0f} examples/s of {pictures:,} packed pictures; a training step "
          f"of BART-base takes {32 / takes:,.1f} examples/s")


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast is it?")
    parser.add_argument("what", choices=("mixing", "reading"))
    torch.set_num_threads(1)
    if parser.parse_args(argv).what == "mixing":
        mixing()
    else:
        reading()


if __name__ == "__main__":
    main()
