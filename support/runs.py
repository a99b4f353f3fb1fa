"""What lies in a run folder, and how is it written and read?

    config.json             the whole configuration; the run can be rebuilt from it
    log.jsonl               a line an interval: losses, learning rate, gradient norm; validation
    adapter.safetensors     what was trained, nothing else
    last/                   what an exact --resume needs, and the best epoch's weights
    predictions/<task>.json, submissions/, results.json, results.md

    python -m pytest tests/test_train.py
"""
import hashlib
import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import config as configs
import methods
from config import Config
from model import VLModel
from support import features, weights
from support.gate import BadInput, lock, read_json, reading, replace_file


@dataclass
class Run:
    """All that a run is made of; train.setup builds it once, and it is handed down."""
    config: Config
    model: VLModel
    tokenizer: object
    features: dict                     # task -> Features or Pixels
    identity: dict[str, str]           # language model, tokenizer, row, data: what must not change

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def device(self) -> str:
        return device_of(self.config)


def device_of(config: Config) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_config(folder: str, **given) -> Config:
    """The configuration of a run folder, with what is given instead of its own."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    with reading(path):
        odd = content.keys() ^ {f.name for f in fields(Config)}
        assert not odd, ("it is no configuration of this version: its fields should be those of "
                         f"config.py, but differ in {', '.join(sorted(odd))}")
        config = Config(**content)
        moved = "data" in given and "features" not in given
        assert not moved or config.features in ("", "none"), (
            "--data beside --test: this run was trained on packed --features, so name the other "
            "data's, too")
    if "data" in given:
        given = {"images": "", "clips": ""} | given
    return configs.resolve(replace(config, out=str(folder), **given))


def save_config(run: Run) -> None:
    save_json(run.folder / "config.json", asdict(run.config))


def save_json(path: Path, content) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------- adapter files

def save_trained(run: Run, path: Path, found: dict | None = None) -> None:
    """An adapter-only file; its metadata says how it was made. found: the best epoch, its mean."""
    found = {name: str(value) for name, value in (found or {}).items()}
    weights.write(path, run.model.trained(), metadata(run) | found)


def metadata(run: Run) -> dict[str, str]:
    """How the weights in a file were made, and with what."""
    return {"config": json.dumps(asdict(run.config)), "method": run.config.method,
            "features": json.dumps(features.sources(run.features)),
            "identity": json.dumps(run.identity)}


def load_trained(run: Run, path: Path) -> None:
    """Fills what the installed method trains from an adapter-only file, strictly."""
    held = weights.read(path)
    weights.finite(held, str(path))
    weights.load(run.model.trained(), held, where=str(path))


def adapter_config(held: weights.Tensors, path: Path) -> dict:
    """The configuration of the run that wrote an adapter file."""
    with reading(path):
        return json.loads(held.metadata["config"])


def widths(held: weights.Tensors) -> list[int]:
    """The widths of features that an adapter file was trained on."""
    names = [n for n in sorted(held) if n.startswith("visual.") and n.endswith("feat.weight")]
    return [held.shape(name)[1] for name in names]


def begin_with(run: Run) -> None:
    """--init: what the row trains begins as a run folder or an adapter file left it."""
    path = Path(run.config.init)
    if path.is_dir():
        path = path / "adapter.safetensors"
    held = weights.read(path)
    before, trained = adapter_config(held, path), run.model.trained()
    with reading(path):
        row = methods.row(before["method"], run.model.lm.config.is_t5, before["set"])
        assert row == run.model.method, (f"it was trained with --method {before['method']} --set "
                                         f"{before['set']!r}: install the same row")
    if not any(name.startswith("visual.") for name in held):
        print(f"{path} has no visual embedding: it starts afresh")
        trained = {name: t for name, t in trained.items() if not name.startswith("visual.")}
    weights.load(trained, held, where=str(path))


def begin_pretrained(model: VLModel, config: Config) -> None:
    """--pretrained: all but a frozen CLIP begins as a run of row full (V&L) left it."""
    path = Path(config.pretrained) / "adapter.safetensors"
    held = weights.read(path)
    before = adapter_config(held, path)
    with reading(f"--pretrained {config.pretrained}"):
        assert before["method"] == "full" and not before["set"], (
            f"it trained {before['method']}, not the whole model: name a run of --method full")
        assert not before["train_clip"] or config.features == "none", (
            "it trained CLIP, too: packed features are from before that, use --features none")
    started = {name: p for name, p in model.named_parameters()
               if name in held or not name.startswith("clip.")}
    weights.load(started, held, where=str(path))


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


# ------------------------------------------------------------------------------- still the same?

def digest(*parts: bytes) -> str:
    """16 hex digits that change with any of these bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def identity(lm: torch.nn.Module, config: Config, method: object) -> dict[str, str]:
    """What a run's numbers depend on beside its settings; data is added by `data_identity`."""
    files = [Path(config.lm) / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return {"language model": weights.fingerprint(lm), "row": repr(method),
            "tokenizer": digest(*(file.read_bytes() for file in files if file.exists()))}


def data_identity(examples: dict[str, list]) -> str:
    """Of the examples of a split: ids, texts, pictures, answers."""
    return digest(*(repr(example).encode() for found in examples.values() for example in found))


def check_identity(run: Run, metadata: dict[str, str], path: Path, free: tuple[str, ...]) -> None:
    """BadInput names what is not what it was when a file of this run was written.

    free: settings that may differ. Folders may move: what is in them is compared, not their names.
    """
    with reading(path):
        was = json.loads(metadata.get("identity", "{}"))
        for name, now in run.identity.items():
            assert was.get(name, now) == now, (
                f"the {name} has changed since ({was[name]}, now {now}): give back what it was "
                "trained with, or start a new run")
        before, paths = json.loads(metadata["config"]), ("data", "images", "clips", "lm", "clip",
                                                         "features", "pretrained", "init", "out")
        for name, now in asdict(run.config).items():
            if name not in (*paths, *free) and name in before:
                assert before[name] == now, (
                    f"config.json has been changed: {name} was {before[name]!r}, now it is {now!r}")


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


# ------------------------------------------------------------------------------- log, best epoch

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


def best_path(run: Run) -> Path:
    return run.folder / "last" / "best.safetensors"


def keep_best(run: Run, line: dict) -> None:
    """Keeps the weights of the epoch with the best mean of the validation scores so far."""
    path = best_path(run)
    if path.exists() and float(weights.read(path).metadata["mean"]) >= line["mean"]:
        return
    save_trained(run, path, {"epoch": line["epoch"], "mean": line["mean"]})


def finish(run: Run) -> None:
    """adapter.safetensors: what the last epoch left, or the best one."""
    path, found = best_path(run), {}
    if run.config.keep == "best" and path.exists():
        load_trained(run, path)
        held = weights.read(path).metadata
        found = {name: held[name] for name in ("epoch", "mean")}
        print(f"best mean of the validation scores: {float(found['mean']):.2f}, of epoch "
              f"{int(found['epoch']) + 1}")
    save_trained(run, run.folder / "adapter.safetensors", found)


# ------------------------------------------------------------------------------- results

def average(results: dict[str, dict[str, float]]) -> float:
    """Of the tasks' headlines, which come first."""
    return sum(next(iter(scores.values())) for scores in results.values()) / len(results)


def report(run: Run, results: dict, counts: list, seconds: float, split: str) -> str:
    """The results as a table in Markdown."""
    config, (_, trainable, total) = run.config, counts[-1]
    name = config.method
    for changed in (config.set, config.control):
        if changed:
            name += f" ({changed})"
    lines = ["| task | metric | score |", "|---|---|---|"]
    for task, scores in results.items():
        if task != "average":
            lines += [f"| {task} | {metric} | {value:.2f} |" for metric, value in scores.items()]
    return "\n".join([
        *lines, f"| **average** | headline metrics | **{results['average']:.2f}** |", "",
        f"{name}: trained {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %), "
        f"seed {config.seed}, split {split}, {seconds:.0f} s"])


def save_results(run: Run, results: dict, counts: list, seconds: float, split: str) -> None:
    save_json(run.folder / "results.json", results | {
        "trainable": counts[-1][1], "total": counts[-1][2], "seconds": round(seconds, 1),
        "split": split})
    replace_file(run.folder / "results.md", report(run, results, counts, seconds, split) + "\n")
