"""How fast is it?

    python -m tools.bench mixing          # a training step of one task against one of four tasks mixed
    python -m tools.bench kronecker       # two small products against building the matrix
    python -m tools.bench reading         # packed features read against what a training step takes
    python -m tools.bench subtitles       # clips with long texts: seconds and memory of a training step

Random weights of a published size, one thread; the median of several runs, the first left out (of
subtitles: the mean over four batches, 268 + 64 being half of 600 + 64).
"""
import argparse
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import adapters
import data
from support import features
import t5
from model import TASKS, VLModel


def seconds(times: int, *runs) -> list[float]:
    """Median durations of functions, run in turn, so that a busy machine is busy for all."""
    durations = [[] for _ in runs]
    for _ in range(times + 1):
        for run, found in zip(runs, durations):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in durations]


def random_batch(tasks: tuple[str, ...], text: int = 16, tokens: int = 36, answer: int = 6,
                 width: int = 2048) -> data.Batch:
    """Examples of one picture each, as data.collate would make them."""
    B, law = len(tasks), torch.Generator().manual_seed(0)
    labels = torch.randint(5, 1000, (B, answer), generator=law)
    return data.Batch(
        tasks, torch.randint(5, 1000, (B, text), generator=law),
        torch.randn(B, tokens, width, generator=law), torch.rand(B, tokens, 4, generator=law),
        torch.zeros(B, tokens, dtype=torch.long), torch.arange(tokens).expand(B, -1), None, labels,
        data.loss_weights(["examples"] * B, torch.ones(B), labels))


def step(m: VLModel, batch: data.Batch) -> None:
    m.loss(batch).backward()
    m.zero_grad()


def mixing(examples: int = 32) -> None:
    """What it costs that every module first sorts its examples by task."""
    config = replace(t5.PRESETS["bart-base"], vocab=1000, dropout=0.0)
    one = random_batch(("vqa",) * examples)
    mixed = replace(one, tasks=tuple(TASKS[i % len(TASKS)] for i in range(examples)))
    for row in ("adapter-multiple", "compacter-multiple", "lora-multiple", "hyperformer"):
        m = VLModel(t5.EncoderDecoder(config).init_weights(), 2048)
        m.install(adapters.methods(False)[row], TASKS)

        a, b = seconds(7, partial(step, m, one), partial(step, m, mixed))
        print(f"{row:20} {examples} examples: one task {a:6.2f} s, four mixed {b:6.2f} s, "
              f"{100 * (b / a - 1):+.0f} %", flush=True)


def build_and_apply(made: adapters.Kronecker, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, made.matrix())


@torch.no_grad()
def kronecker() -> None:
    """Where two products win: adapters.Kronecker takes them below in / 10 tokens."""
    for d_in, d_out, n in ((768, 96, 2), (96, 768, 2), (768, 96, 4), (96, 768, 4)):
        made = adapters.Kronecker(d_in, d_out, n)
        for tokens in (1, 5, 10, 20, 40, 80, 160):
            x = torch.randn(tokens, d_in)
            a, b = seconds(200, partial(build_and_apply, made, x), partial(made.products, x))
            print(f"{d_in} -> {d_out}, n {n}, {tokens:4} tokens: built {1e6 * a:5.0f} us, "
                  f"products {1e6 * b:5.0f} us", flush=True)


def reading(pictures: int = 5000, batch: int = 500) -> None:
    """Examples a second from packed features of RN101's size, against what a step takes."""
    files, law = {str(i): Path(str(i)) for i in range(pictures)}, random.Random(0)
    recipe = features.Recipe({}, (36, 2048), str, lambda path: torch.rand(36, 2048), lambda x: x,
                             64, 1024)
    with tempfile.TemporaryDirectory() as folder:
        features.pack(folder, files, recipe)
        packed = features.Features(folder)
        read, = seconds(20, lambda: packed.stack(law.sample(packed.ids, batch)))
    lm = t5.EncoderDecoder(replace(t5.PRESETS["bart-base"], vocab=1000)).init_weights()
    m = VLModel(lm, 2048)
    m.install(adapters.methods(False)["vlpet-large"], TASKS)
    takes, = seconds(3, partial(step, m, random_batch(("vqa",) * 32)))
    print(f"read {batch / read:,.0f} examples/s of {pictures:,} packed pictures; a training step "
          f"of BART-base takes {32 / takes:,.1f} examples/s")


def peak() -> int:
    """The most bytes that this process ever had resident."""
    import resource                                              # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clip_steps(shapes: list[tuple[int, int]], longest: tuple[int, int], size: int,
               dropout: float) -> tuple[float, float]:
    """Training steps on batches of `size` clips of so many (text tokens, frames): mean seconds
    of its thread, and the GB that `longest` takes on top of a step on next to nothing. A peak never
    falls again: every call needs a process of its own."""
    torch.set_num_threads(1)
    lm = t5.EncoderDecoder(replace(t5.PRESETS["bart-base"], vocab=1000, dropout=dropout))
    m = VLModel(lm.init_weights(), 512)
    m.install(adapters.methods(False)["vlpet-large"], ("tvqa",))
    step(m, random_batch(("tvqa",), 4, 1, width=512))
    base = peak()
    step(m, random_batch(("tvqa",) * size, *longest, width=512))
    held, start = peak() - base, time.process_time()       # steps long enough to be interrupted
    for text, frames in shapes:
        step(m, random_batch(("tvqa",) * size, text, frames, width=512))
    return (time.process_time() - start) / len(shapes), held / 1e9


def subtitles(size: int = 8, batches: int = 32) -> None:
    """What padding costs: texts log-normal about a median of 250 tokens, sigma 0.5, cut to 600 (4 %
    are), a token 3.5 to 4.5 characters; clips of 20 to 64 frames. Batches padded to their longest
    text and clip are timed at the 5th, 13th, ... by length."""
    law = random.Random(0)
    long = [law.lognormvariate(math.log(250), 0.5) for _ in range(batches * size)]
    clips = [(min(600, round(n)), law.randint(20, 64)) for n in long]
    examples = [data.Example("tvqa", i, "x" * round(n * law.uniform(3.5, 4.5)), ("v",), {})
                for i, n in enumerate(long)]

    def shapes(plan) -> list[tuple[int, int]]:
        found = [tuple(max(clips[i][k] for i in chosen) for k in (0, 1)) for chosen in plan]
        return sorted(found, key=sum)

    drawn = [range(i, i + size) for i in range(0, len(clips), size)]
    grouped = [chosen for _, chosen in data.batches({"tvqa": examples}, size, 0, 0)]
    cases = {"all 600 + 64": ([(600, 64)], 0.1),
             "padded per batch, drawn at random": (shapes(drawn), 0.1),
             "padded per batch, grouped by length": (shapes(grouped), 0.1),
             "all 268 + 64": ([(268, 64)], 0.1), "all 600 + 64, no dropout": ([(600, 64)], 0.0),
             "all 268 + 64, no dropout": ([(268, 64)], 0.0)}
    print(f"batches of {size}; without padding {sum(map(sum, clips)) / len(clips):.0f} tokens each")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name, (found, dropout) in cases.items():
            timed = found[4::8] or found
            took, held = fresh.apply(clip_steps, (timed, found[-1], size, dropout))
            tokens = sum(map(sum, found)) / len(found)
            print(f"{name:35} {tokens:4.0f} tokens an example, {took / size:5.2f} s; at the "
                  f"longest, {sum(found[-1])} tokens, {1000 * held / size:4.0f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast is it?")
    parser.add_argument("what", choices=("mixing", "kronecker", "reading", "subtitles"))
    torch.set_num_threads(1)
    globals()[parser.parse_args().what]()
