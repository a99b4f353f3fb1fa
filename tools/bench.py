"""How fast is it?

    python -m tools.bench mixing       # a training step of one task against one of four tasks mixed
    python -m tools.bench reading      # packed features read against what a training step takes
    python -m tools.bench subtitles    # clips with long texts: seconds and memory of a step

Random weights of a published size, one thread; the median of several runs, the first left out (of
subtitles: the mean over four batches, 268 + 64 being half of 600 + 64).
"""
import argparse
import math
import multiprocessing
import random
import resource
import statistics
import sys
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
        features.pack(folder, names, {}, lambda path: torch.rand(36, 2048), torch.stack, 36)
        packed = features.Features(folder)
        read, = seconds(20, lambda: packed.stack(generator.sample(packed.ids, batch)))
    model, examples = bart_base("vlpet-large", 2048), random_batch(("vqa",) * 32)
    takes, = seconds(3, partial(step, model, examples))
    print(f"read {batch / read:,.0f} examples/s of {pictures:,} packed pictures; a training step "
          f"of BART-base takes {32 / takes:,.1f} examples/s")


def peak() -> int:
    """The most bytes that this process ever had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clip_steps(shapes: list[tuple[int, int]], longest: tuple[int, int], size: int,
               dropout: float) -> tuple[float, float]:
    """Training steps on batches of `size` clips of so many (text tokens, frames): mean seconds
    of its thread, and the GB that `longest` takes on top of a step on next to nothing. A peak never
    falls again: every call needs a process of its own."""
    torch.set_num_threads(1)
    model, tasks = bart_base("vlpet-large", 512, dropout), ("tvqa",) * size
    step(model, random_batch(("tvqa",), 4, 1, width=512))
    base = peak()
    step(model, random_batch(tasks, *longest, width=512))
    held, start = peak() - base, time.process_time()       # steps long enough to be interrupted
    for text, frames in shapes:
        step(model, random_batch(tasks, text, frames, width=512))
    return (time.process_time() - start) / len(shapes), held / 1e9


def subtitles(size: int = 8, batches: int = 32) -> None:
    """What padding costs: texts log-normal about a median of 250 tokens, sigma 0.5, cut to 600 (4 %
    are), a token 3.5 to 4.5 characters; clips of 20 to 64 frames. Batches padded to their longest
    text and clip are timed at the 5th, 13th, ... by length."""
    generator, clips, examples = random.Random(0), [], []
    tokens = [generator.lognormvariate(math.log(250), 0.5) for _ in range(batches * size)]
    for i, n in enumerate(tokens):
        text = "x" * round(n * generator.uniform(3.5, 4.5))
        examples.append(data.Example("tvqa", i, text, ("v",), {}))
        clips.append((min(600, round(n)), generator.randint(20, 64)))

    def shapes(plan: list) -> list[tuple[int, int]]:
        """Of each batch, its longest text and clip; shortest batches first."""
        found = []
        for chosen in plan:
            texts, frames = zip(*(clips[i] for i in chosen))
            found.append((max(texts), max(frames)))
        return sorted(found, key=sum)

    drawn = [range(i, i + size) for i in range(0, len(clips), size)]
    grouped = [chosen for _, chosen in data.batches({"tvqa": examples}, size, 0, 0)]
    cases = {"all 600 + 64": ([(600, 64)], 0.1),
             "padded per batch, drawn at random": (shapes(drawn), 0.1),
             "padded per batch, grouped by length": (shapes(grouped), 0.1),
             "all 268 + 64": ([(268, 64)], 0.1), "all 600 + 64, no dropout": ([(600, 64)], 0.0),
             "all 268 + 64, no dropout": ([(268, 64)], 0.0)}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name, (found, dropout) in cases.items():
            timed = found[4::8] or found
            took, held = fresh.apply(clip_steps, (timed, found[-1], size, dropout))
            tokens = sum(map(sum, found)) / len(found)
            print(f"{name:35} {tokens:4.0f} tokens an example, "
                  f"{took / size:5.2f} s; at the longest, {sum(found[-1])} tokens, "
                  f"{1000 * held / size:4.0f} MB", flush=True)


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast is it?")
    parser.add_argument("what", choices=("mixing", "reading", "subtitles"))
    torch.set_num_threads(1)
    {"mixing": mixing, "reading": reading, "subtitles": subtitles}[parser.parse_args(argv).what]()


if __name__ == "__main__":
    main()
