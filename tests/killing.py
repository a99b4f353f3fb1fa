"""Kills features.py at random moments and starts it again: the same bytes must come out."""
import importlib
import multiprocessing
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import torch

from support import clips
from support import features
from support.features import INDEX


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def slow_main(module: str, seconds: float, argv: list[str], begun) -> None:
    """The command line, where `module` takes these seconds more to read a picture."""
    read = clips.decode

    def decode(path, size, resize):
        time.sleep(seconds)
        return read(path, size, resize)
    importlib.import_module(module).decode = decode
    torch.set_num_threads(1)
    begun.set()
    raise SystemExit(features.main(argv))


def spawn(module: str, seconds: float, *argv: str):
    """A process of its own, under way; forked from one that imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])       # "meta" needs the second
    begun = context.Event()
    process = context.Process(target=slow_main, args=(module, seconds, [*argv], begun))
    process.start()
    assert begun.wait(60)
    return process


def kill_often(module: str, seconds: float, arguments: list[str], undisturbed: dict[str, bytes],
               out: Path, kills: int, seed: int = 0) -> list[tuple[bool, bool]]:
    """SIGKILL at random amounts of written bytes, then to the end; of each kill: was it early, was
    it in a shard?"""
    moment, found = Random(seed), []
    total = sum(map(len, undisturbed.values()))

    def written() -> int:
        size = 0
        for path in out.glob("0*"):
            with suppress(FileNotFoundError):                     # just renamed
                size += path.stat().st_size
        return size
    for _ in range(kills):
        process = spawn(module, seconds, *arguments, str(out))
        enough = written() + moment.random() * 0.9 * (total - written())
        while process.is_alive() and written() < enough:
            time.sleep(0.001)
        process.kill()
        process.join()
        found.append((not (out / INDEX).exists(), bool([*out.glob("0*.unfinished")])))
    process = spawn(module, seconds, *arguments, str(out))
    process.join()
    assert process.exitcode == 0 and contents(out) == undisturbed
    return found
