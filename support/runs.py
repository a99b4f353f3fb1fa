"""What lies in a run folder, and what must still be the same when it is read again?

    config.json             the whole configuration; the run can be rebuilt from it
    log.jsonl               a line an interval: losses, learning rate, gradient norm; validation
    adapter.safetensors     what was trained, nothing else
    last/                   what an exact --resume needs (resume.py), the best epoch's weights
    predictions/<task>.json, submissions/, results.json, results.md

    python -m pytest tests/test_train.py
"""
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

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


# ------------------------------------------------------------------------------- the best epoch

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
