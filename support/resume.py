"""How does a run survive interruptions, and go on exactly where it was?

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
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from support import ranks, runs, weights
from support.gate import BadInput, Number, check, lock, reading, replace_file
from support.runs import Run

# ------------------------------------------------------------------------------- one at a time

def check_folder(out: str, again: bool) -> None:
    """A run folder can be written, and that of a new run (not `again`) is free: in it is nothing,
    or what a run left that was killed before it wrote its config.json."""
    folder = Path(out or "out").absolute()                 # "": one will be chosen there
    home = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    with reading(folder):
        assert home.is_dir() and os.access(home, os.W_OK), \
            f"{home} is a file or cannot be written to: name another --out"
        left = [path for path in folder.glob("[!.]*") if path.name != "last"]
        assert again or not out or not left, \
            f"it exists: name another --out, delete it, or go on with --resume {out}"


def take_folder(config: Config) -> Config:
    """out/<method>-<control>, or with the first number after it that is free. It is taken by being
    made: two runs get two."""
    name = f"out/{config.method}"
    if config.control:
        name += f"-{config.control}"
    for number in count(1):
        out = name if number == 1 else f"{name}-{number}"
        with suppress(FileExistsError):
            Path(out).mkdir(parents=True)
            return replace(config, out=out)


class Stop:
    """SIGTERM and Ctrl-C end a run with a sentence, and one step is lost at most.

    While `held` they are noted in `asked`: the loop ends its step and saves. All other work is cut
    short, because the state before it is saved. A second signal ends the run at once.
    """

    asked = held = False

    def ask(self, kind: int, frame: object) -> None:
        if self.asked or not self.held:
            raise KeyboardInterrupt
        self.asked = True

    def release(self) -> None:
        self.held = False
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def alone(run: Run, again: bool) -> Iterator[Stop]:
    """Holds a run's folder: one process a run, a new one (not `again`) in a free folder."""
    if not run.config.out and ranks.FIRST:
        run.config = take_folder(run.config)
    run.config = ranks.agree(run.config)
    folder, stop = run.folder, Stop()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if ranks.FIRST:                                    # a killed process has let go of it
            with reading(folder):
                assert lock(file), "another process is at work on this run: wait for it, or stop it"
            check_folder(str(folder), again)
            for half_written in folder.rglob(".*.tmp"):
                half_written.unlink()
            if not again:
                shutil.rmtree(folder / "last", ignore_errors=True)
        ranks.agree()                                      # now the folder is ours
        before = {kind: signal.signal(kind, stop.ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        except KeyboardInterrupt:
            raise BadInput(f"stopped: go on with python train.py --resume {folder}") from None
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


# ------------------------------------------------------------------------------- the log

class Log:
    """log.jsonl: each task's mean loss since the last line; the scores of the validation."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []
        self.losses = defaultdict(list)                    # task -> losses not yet written

    def open(self, step: int) -> None:
        """The run goes on after this step: later lines are dropped, and so is half a line."""
        with reading(self.path):
            text = self.path.read_text(encoding="utf-8") if step else ""
            for line in map(json.loads, text[:text.rfind("\n") + 1].splitlines()):
                at, _ = check(line, {"step": Number(0, whole=True), "mean?": Number()})
                if at <= step:
                    self.lines.append(line)
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    @property
    def scores(self) -> dict[int, float]:
        """Step -> mean of the validation scores."""
        return {line["step"]: line["mean"] for line in self.lines if line.get("mean") is not None}

    def add(self, task: str, loss: Tensor) -> None:
        self.losses[task].append(loss)                     # a tensor, as last/ keeps it

    def means(self) -> dict[str, float]:
        """Of each task, in alphabetical order, over the steps since the last call."""
        means = {task: torch.stack(self.losses[task]).mean().item() for task in sorted(self.losses)}
        self.losses.clear()
        return means

    def put(self, line: dict) -> None:
        self.lines.append(line)
        if not ranks.FIRST:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------- exact resume

def save_last(run: Run, optimizer: torch.optim.Optimizer, step: int, log: Log) -> None:
    """last/: the whole state in one file. The one before it is kept: a disk may lie."""
    tensors = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
    for name, p in run.model.named_parameters():           # modules of idle tasks have no moments
        for kind, moment in optimizer.state.get(p, {}).items():
            tensors[f"{kind}/{name}"] = moment
    for task, losses in log.losses.items():
        tensors[f"loss/{task}"] = torch.stack(losses)
    tensors["random/cpu"] = torch.get_rng_state()
    if run.device == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    path = run.folder / "last" / "state.safetensors"
    if path.exists() and ranks.FIRST:
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
    runs.check_same(run, state, path)
    found = defaultdict(dict)                              # weight, exp_avg, ... -> name -> tensor
    with reading(path):
        step = int(state.metadata["step"])
        assert 0 <= step <= total, f"step {step} is not one of {total}"
        for full in state:
            kind, name = full.split("/", 1)
            found[kind][name] = state[full]
        weights.load(run.model.trained(), found["weight"], where=str(path))
        parameters = dict(run.model.named_parameters())
        for kind in found.keys() & {"step", "exp_avg", "exp_avg_sq"}:
            for name, moment in found[kind].items():
                # AdamW counts its steps on the CPU, wherever the weights are.
                device = "cpu" if kind == "step" else run.device
                optimizer.state[parameters[name]][kind] = moment.to(device)
        for task, losses in found["loss"].items():
            log.losses[task] = list(losses.to(run.device))
        torch.set_rng_state(found["random"]["cpu"])
        if run.device == "cuda" and "cuda" in found["random"]:
            torch.cuda.set_rng_state(found["random"]["cuda"])
    return step
