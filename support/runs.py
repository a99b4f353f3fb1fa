"""What lies in a run folder, and how is it written and read?

    config.json             the whole configuration; the run can be rebuilt from it
    log.jsonl               a line an interval: losses, learning rate, gradient norm; validation
    adapter.safetensors     what was trained, nothing else
    last/                   what an exact --resume needs, and the best epoch's weights
    predictions/<task>.json, submissions/, results.json, results.md

    python -m pytest tests/test_train.py
"""
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import config as configs
import methods
from config import Config
from model import VLModel
from support import features, weights
from support.gate import read_json, reading, replace_file


@dataclass
class Run:
    """All that a run is made of; train.setup builds it once, and it is handed down."""
    config: Config
    model: VLModel
    tokenizer: object
    features: dict                     # task -> Features or Pixels

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
    weights.write(path, run.model.trained(), {
        "config": json.dumps(asdict(run.config)), "method": run.config.method,
        "features": json.dumps(features.sources(run.features)),
        **{name: str(value) for name, value in (found or {}).items()}})


def load_trained(run: Run, path: Path) -> None:
    """Fills what the installed method trains from an adapter-only file, strictly."""
    weights.load(run.model.trained(), weights.read(path), where=str(path))


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


# ------------------------------------------------------------------------------- exact resume

def save_last(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    """last/: trained weights, the optimiser's moments, random states and the step, in one file."""
    tensors = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
    for name, p in run.model.named_parameters():
        for kind, moment in optimizer.state.get(p, {}).items():
            tensors[f"{kind}/{name}"] = moment
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    weights.write(run.folder / "last" / "state.safetensors", tensors, {"step": str(step)})


def load_last(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Puts last/ back and returns the step to go on from."""
    path = run.folder / "last" / "state.safetensors"
    with reading(path):
        assert path.is_file(), "nothing was saved yet: delete the folder and start the run afresh"
        state = weights.read(path)
        trained = {f"weight/{name}": tensor for name, tensor in run.model.trained().items()}
        held = {name: state[name] for name in state if name.startswith("weight/")}
        weights.load(trained, held, where=str(path))
        for name, p in run.model.named_parameters():
            if f"step/{name}" in state:                    # modules of idle tasks have none yet
                optimizer.state[p] = moments(state, name, p)
        torch.set_rng_state(state["random/cpu"])
        if torch.cuda.is_available() and "random/cuda" in state:
            torch.cuda.set_rng_state(state["random/cuda"])
        return int(state.metadata["step"])


def moments(state: weights.Tensors, name: str, p: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter: its own count of steps, and two running means."""
    return {"step": state[f"step/{name}"], "exp_avg": state[f"exp_avg/{name}"].to(p.device),
            "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(p.device)}


# ------------------------------------------------------------------------------- log, best epoch

class Log:
    """log.jsonl: the mean loss of each task since the last line, every so many steps."""

    def __init__(self, path: Path, step: int):
        """step: where the run begins or goes on; lines behind it are dropped."""
        kept = []
        if step:
            for line in path.read_text().splitlines(True):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        replace_file(path, "".join(kept))
        self.file, self.started, self.losses = open(path, "a"), time.time(), defaultdict(list)

    def add(self, task: str, loss: Tensor) -> None:
        self.losses[task].append(loss.detach())            # no .item(): it would wait for the GPU

    def write(self, line: dict) -> dict[str, float]:
        """Writes the losses since the last line behind `line`, and returns them."""
        means = {task: torch.stack(losses).mean().item() for task, losses in self.losses.items()}
        self.losses.clear()
        seconds = round(time.time() - self.started, 1)
        self.put(line | {"seconds": seconds, "loss": means})
        return means

    def put(self, line: dict) -> None:
        print(json.dumps(line), file=self.file, flush=True)


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
        metadata = weights.read(path).metadata
        found = {name: metadata[name] for name in ("epoch", "mean")}
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
