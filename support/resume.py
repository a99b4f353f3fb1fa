"""How does a run survive interruptions, and go on exactly where it was?

    with alone(folder), Stop() as stop:            # one process a run; SIGTERM and Ctrl-C are heard
        step = load_last(run, optimizer, log, total)
        ...
        save_last(run, optimizer, step, log)

last/state.safetensors holds the trained weights, the optimiser's moments, random states, the losses
that no line of log.jsonl holds yet, and what the run depends on (runs.check_identity). A run killed
at any moment and resumed leaves the bytes of an undisturbed one.

    python -m pytest tests/test_train.py
"""
import json
import os
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
from support import weights
from support.gate import BadInput, lock, reading, replace_file
from support.runs import Run, check_identity, metadata

# ------------------------------------------------------------------------------- one at a time

def make_folder(config: Config, chosen: bool) -> Config:
    """Takes a run folder by making it: two runs never share one. Unless its name was chosen, the
    next free one is taken."""
    while True:
        try:
            Path(config.out).mkdir(parents=True)
            return config
        except FileExistsError as taken:
            if chosen:
                raise BadInput(f"{config.out} exists: name another --out, delete it, or go on with "
                               f"--resume {config.out}") from taken
            config = replace(config, out=configs.free_folder(config))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run folder: one process a run. A killed owner lets go, and what it left half-written
    is removed."""
    with open(folder / ".lock", "w") as file:
        with reading(folder):
            assert lock(file), "another process is at work on this run: wait for it, or stop it"
        for path in folder.rglob(".*.tmp"):
            path.unlink()
        yield


class Stop:
    """SIGTERM and Ctrl-C: `asked` says that the loop should save and stop behind its step."""

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = {kind: signal.signal(kind, self.ask)
                       for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, kind: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt                        # asked twice: at once
        self.asked = True

    def __exit__(self, *error) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


# ------------------------------------------------------------------------------- the log

class Log:
    """log.jsonl: the mean loss of each task since the last line, every so many steps."""

    def __init__(self, path: Path):
        self.path, self.losses = path, defaultdict(list)   # task -> losses not yet written

    def open(self, step: int) -> None:
        """step: where the run begins or goes on; lines behind it are dropped."""
        kept = []
        if step:
            for line in self.path.read_text().splitlines(True):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        replace_file(self.path, "".join(kept))

    def add(self, task: str, loss: Tensor) -> None:
        self.losses[task].append(loss.detach())            # no .item(): it would wait for the GPU

    def means(self) -> dict[str, float]:
        """Of each task, over the steps since the last call."""
        means = {task: torch.stack(losses).mean().item() for task, losses in self.losses.items()}
        self.losses.clear()
        return means

    def put(self, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------- exact resume

def save_last(run: Run, optimizer: torch.optim.Optimizer, step: int, log: "Log") -> None:
    """last/: trained weights, the optimiser's moments, random states and the step, in one file. The
    state before it is kept until the next: a disk may lie."""
    tensors = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
    for name, p in run.model.named_parameters():
        for kind, moment in optimizer.state.get(p, {}).items():
            tensors[f"{kind}/{name}"] = moment
    tensors |= {f"loss/{task}": torch.stack(losses) for task, losses in log.losses.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    path = run.folder / "last" / "state.safetensors"
    if path.exists():
        os.replace(path, path.with_name("before.safetensors"))
    weights.write(path, tensors, metadata(run) | {"step": str(step)})


def load_last(run: Run, optimizer: torch.optim.Optimizer, log: "Log", total: int) -> int:
    """Puts last/ back and returns the step to go on from; the state before it if it is damaged."""
    path = run.folder / "last" / "state.safetensors"
    try:
        return load_state(run, optimizer, log, total, path)
    except BadInput as why:
        before = path.with_name("before.safetensors")
        if not before.exists():
            raise
        step = load_state(run, optimizer, log, total, before)
        print(f"{why}; the state before it is used, of step {step}")
        return step


def load_state(run: Run, optimizer: torch.optim.Optimizer, log: "Log", total: int,
               path: Path) -> int:
    """All of a state, or BadInput and nothing of it."""
    state = weights.read(path)
    check_identity(run, state.metadata, path, ("device",))
    with reading(path):
        step = int(state.metadata["step"])
        assert 0 <= step <= total, f"step {step} is not one of {total}"
        trained = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
        names = dict(run.model.named_parameters())
        moments = {}                                       # idle tasks' modules have none yet
        for full in state:
            kind, name = full.split("/", 1)
            if kind in ("step", "exp_avg", "exp_avg_sq"):
                moment, p = state[full], names[name]
                assert moment.shape == (() if kind == "step" else p.shape), f"{full} is misshapen"
                moments.setdefault(p, {})[kind] = moment if kind == "step" else moment.to(p.device)
        assert all(len(found) == 3 for found in moments.values()), "a moment is missing"
        held = {name: state[name] for name in state if name.startswith("weight/")}
        weights.finite({name: state[name] for name in state if "random/" not in name}, str(path))
        torch.set_rng_state(state["random/cpu"])
        if torch.cuda.is_available() and "random/cuda" in state:
            torch.cuda.set_rng_state(state["random/cuda"])
        weights.load(trained, held, where=str(path))
        optimizer.state.update(moments)
        log.losses.update({name.removeprefix("loss/"): list(state[name].unbind())
                           for name in state if name.startswith("loss/")})
    return step
