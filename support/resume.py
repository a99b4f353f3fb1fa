"""How does a run survive interruptions, and go on exactly where it was?

    with alone(folder, again), Stop(folder) as stop:
        step = load_last(run, optimizer, total, log)
        ...
        save_last(run, optimizer, step, log)

last/state.safetensors holds the trained weights, the optimiser's moments, random states, the losses
that no line of log.jsonl holds yet, and what the run depends on. A run that is killed at any moment
and resumed leaves the bytes of an undisturbed one.

    python -m pytest tests/test_train.py tests/test_kills.py
    python -m tests.kills                        # 60 kills in five kinds of run, minutes
"""
import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import config as configs
from config import Config
from support import runs, weights
from support.gate import BadInput, lock, reading, replace_file
from support.runs import Run

# ------------------------------------------------------------------------------- one at a time

def is_free(folder: Path) -> bool:
    """Nothing is there, or what a run left that was killed before it wrote its config.json."""
    if not folder.exists():
        return True
    return all(path.name == "last" or path.name.startswith(".") for path in folder.iterdir())


def free_name(config: Config) -> Config:
    """Takes the first default name that is free by making the folder: two runs get two."""
    while True:
        try:
            Path(config.out).mkdir(parents=True)
            return config
        except FileExistsError:
            config = replace(config, out=configs.free_folder(config))


@contextmanager
def alone(folder: Path, again: bool) -> Iterator[None]:
    """Holds a run folder: one process a run, a new one (not `again`) in a free folder.

    A killed owner lets go, and what it left half-written is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        with reading(folder):
            assert lock(file), "another process is at work on this run: wait for it, or stop it"
            assert again or is_free(folder), \
                f"it exists: name another --out, delete it, or go on with --resume {folder}"
        for path in folder.rglob(".*.tmp"):
            path.unlink()
        if not again:
            shutil.rmtree(folder / "last", ignore_errors=True)
        yield


class Stop:
    """SIGTERM and Ctrl-C end a run with a sentence, and one step is lost at most.

    Between `hold` and `release` they are noted in `asked`: the loop ends its step and saves. All
    other work is cut short, because the state before it is saved. Who asks twice is obeyed.
    """

    def __init__(self, folder: Path):
        self.folder, self.asked, self.held = folder, False, False

    def __enter__(self) -> "Stop":
        self.before = {kind: signal.signal(kind, self.ask)
                       for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, kind: int, frame: object) -> None:
        if self.asked or not self.held:
            raise KeyboardInterrupt
        self.asked = True

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise BadInput(f"stopped: go on with python train.py --resume {self.folder}") from None


# ------------------------------------------------------------------------------- the log

class Log:
    """log.jsonl: the mean loss of each task since the last line, every so many steps; the scores of
    the validation."""

    def __init__(self, path: Path):
        self.path, self.losses = path, defaultdict(list)   # task -> losses not yet written
        self.scores = {}                                   # step -> mean of the validation scores

    def open(self, step: int) -> None:
        """step: where the run begins or goes on; lines behind it are dropped, and half a line."""
        kept = []
        if step:
            with reading(self.path):
                for text in self.path.read_text(encoding="utf-8").splitlines(True):
                    if text.endswith("\n") and json.loads(text)["step"] <= step:
                        kept.append(text)
                        self.note(json.loads(text))
        replace_file(self.path, "".join(kept))

    def note(self, line: dict) -> None:
        if "mean" in line:
            self.scores[line["step"]] = line["mean"]

    def add(self, task: str, loss: Tensor) -> None:
        self.losses[task].append(loss.detach())            # no .item(): it would wait for the GPU

    def means(self) -> dict[str, float]:
        """Of each task, in alphabetical order, over the steps since the last call."""
        means = {task: torch.stack(self.losses[task]).mean().item() for task in sorted(self.losses)}
        self.losses.clear()
        return means

    def put(self, line: dict) -> None:
        self.note(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------- exact resume

def save_last(run: Run, optimizer: torch.optim.Optimizer, step: int, log: Log) -> None:
    """last/: the whole state in one file. The one before it is kept until the next: a disk may
    lie."""
    tensors = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
    for name, p in run.model.named_parameters():           # modules of idle tasks have no moments
        for kind, moment in optimizer.state.get(p, {}).items():
            tensors[f"{kind}/{name}"] = moment
    for task, losses in log.losses.items():
        tensors[f"loss/{task}"] = torch.stack(losses)
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    path = run.folder / "last" / "state.safetensors"
    if path.exists():
        os.replace(path, path.with_name("before.safetensors"))
    runs.write(run, path, tensors, {"step": step})


def load_last(run: Run, optimizer: torch.optim.Optimizer, total: int, log: Log) -> int:
    """Puts last/ back and returns the step to go on from; the state before it if it is damaged."""
    path = run.folder / "last" / "state.safetensors"
    before = path.with_name("before.safetensors")
    try:
        state = runs.read(path)
    except BadInput as why:
        if not before.exists():
            raise
        path, state = before, runs.read(before)
        print(f"{why}; the state before it is used")
    runs.check_same(run, state, path, ("device",))
    found = defaultdict(dict)                              # weight, exp_avg, ... -> name -> tensor
    with reading(path):
        step = int(state.metadata["step"])
        assert 0 <= step <= total, f"step {step} is not one of {total}"
        for full in state:
            kind, name = full.split("/", 1)
            found[kind][name] = state[full]
        weights.load(run.model.trained(), found["weight"], where=str(path))
        for name, p in run.model.named_parameters():
            for kind in found.keys() & {"step", "exp_avg", "exp_avg_sq"}:
                if name in found[kind]:
                    # AdamW counts its steps on the CPU, wherever the weights are.
                    device = "cpu" if kind == "step" else p.device
                    optimizer.state[p][kind] = found[kind][name].to(device)
        for task, losses in found["loss"].items():
            log.losses[task] = list(losses.to(run.device))
        torch.set_rng_state(found["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in found["random"]:
            torch.cuda.set_rng_state(found["random"]["cuda"])
    return step
