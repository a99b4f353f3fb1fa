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
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import answers
import config as configs
import methods
from config import Config
from model import VLModel
from support import features, weights
from support.gate import fits, read_json, reading, replace_file


@dataclass
class Run:
    """All that a run is made of; train.setup builds it once, and it is handed down."""
    config: Config
    model: VLModel
    tokenizer: object
    features: dict                     # task -> Features or Pixels
    identity: dict[str, str] = field(default_factory=dict)   # what must stay the same, see below

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
    folder = configs.shipped(folder)
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
    return configs.resolve(replace(config, out=folder, **given))


def save_config(run: Run) -> None:
    save_json(run.folder / "config.json", asdict(run.config))


def save_json(path: Path, content) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------- its tensors

def write(run: Run, path: Path, tensors: dict[str, Tensor], more: dict | None = None) -> None:
    """A file of a run's tensors; its metadata says how they were made, with what, and `more`."""
    metadata = {"config": json.dumps(asdict(run.config)), "method": run.config.method,
                "features": json.dumps(features.sources(run.features)),
                "identity": json.dumps(run.identity)}
    chosen = {task: head.vocabulary for task, head in run.model.answers.items()}
    if chosen:
        metadata["answers"] = json.dumps(chosen)
    metadata |= {name: str(value) for name, value in (more or {}).items()}
    weights.write(path, tensors, metadata | {"digest": digest_all(tensors, metadata)})


def read(path: Path) -> weights.Tensors:
    """Such a file; BadInput if a byte of it has changed, or if it holds NaN or inf."""
    held = weights.read(path)
    with reading(path):
        metadata = held.metadata.copy()
        was = metadata.pop("digest", None)                 # none: tools/peft.py brought it in
        assert was in (None, digest_all(held, metadata)), \
            "it is damaged, for its numbers are not those that were written: use a copy"
    weights.finite(held, str(path))
    return held


def digest(*parts: bytes) -> str:
    """16 hex digits that change with any of these bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def digest_all(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Of names, types, shapes and numbers, and of what the metadata says."""
    parts = [json.dumps(metadata, sort_keys=True).encode()]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.flatten().view(torch.uint8).numpy())
    return digest(*parts)


def adapter_config(held: weights.Tensors, path: Path) -> dict:
    """The configuration of the run that wrote an adapter file."""
    with reading(path):
        return json.loads(held.metadata["config"])


def widths(held: weights.Tensors) -> list[int]:
    """The widths of features that an adapter file was trained on."""
    names = [n for n in sorted(held) if n.startswith("visual.") and n.endswith("feat.weight")]
    return [held.shape(name)[1] for name in names]


def load_trained(run: Run, held: weights.Tensors, path: Path, free: tuple[str, ...]) -> None:
    """Fills what the installed method trains from an adapter file, if all else is the same."""
    check_same(run, held, path, free)
    weights.load(run.model.trained(), held, where=str(path))


def begin_with(run: Run) -> None:
    """--init: what the row trains begins as a run folder or an adapter file left it."""
    path = Path(run.config.init)
    if path.is_dir():
        path = path / "adapter.safetensors"
    held = read(path)
    before, trained = adapter_config(held, path), run.model.trained()
    check_identity(run, held, path, ("language model", "tokenizer"))
    with reading(path):
        row = methods.row(before["method"], run.model.lm.config.is_t5, before["set"])
        assert row == run.model.method, (f"it was trained with --method {before['method']} --set "
                                         f"{before['set']!r}: install the same row")
    if not any(name.startswith("visual.") for name in held):
        print(f"{path} has no visual embedding: it starts afresh")
        trained = {name: t for name, t in trained.items() if not name.startswith("visual.")}
    weights.load(trained, held, where=str(path))


def choices(config: Config, examples: dict[str, list]) -> dict[str, list[str]]:
    """The answers among which those of each task are chosen; none where they are written."""
    if config.answers in ("", "yes"):
        return {task: answers.vocabulary(found) for task, found in examples.items()
                if config.answers}
    with reading(config.answers):
        (task,) = examples
        listed = read_json(config.answers, list)
        assert fits(listed, [str]) and len(listed) == len(set(listed)), \
            "it should be a list of different answers"
    return {task: listed}


def begin_pretrained(model: VLModel, config: Config) -> None:
    """--pretrained: all but a frozen CLIP begins as a run of row full (V&L) left it."""
    path = Path(config.pretrained) / "adapter.safetensors"
    held = read(path)
    before = adapter_config(held, path)
    with reading(f"--pretrained {config.pretrained}"):
        assert before["method"] == "full" and not before["set"], (
            f"it trained {before['method']}, not the whole model: name a run of --method full")
        assert not before["train_clip"] or config.features == "none", (
            "it trained CLIP, too: packed features are from before that, use --features none")
    started = {name: p for name, p in model.named_parameters()
               if name in held or not name.startswith("clip.")}
    weights.load(started, held, where=str(path))


def best_path(run: Run) -> Path:
    return run.folder / "last" / "best.safetensors"


def keep_best(run: Run, line: dict, scores: dict[int, float]) -> None:
    """Keeps the weights of the epoch with the best mean of the validation scores. scores: means
    that there were before."""
    if run.config.keep == "best" and line["mean"] > max(scores.values(), default=-math.inf):
        write(run, best_path(run), run.model.trained(),
              {"epoch": line["epoch"], "mean": line["mean"]})


def finish(run: Run, scores: dict[int, float]) -> None:
    """adapter.safetensors: what the last epoch left, or the first one with the best mean."""
    path, found = best_path(run), {}
    if run.config.keep == "best" and scores:
        held = read(path)
        found = {name: held.metadata[name] for name in ("epoch", "mean")}
        with reading(path):
            assert float(found["mean"]) == max(scores.values()), \
                "it is not the best epoch of log.jsonl: train again"
        weights.load(run.model.trained(), held, where=str(path))
        print(f"best mean of the validation scores: {float(found['mean']):.2f}, of epoch "
              f"{int(found['epoch']) + 1}")
    write(run, run.folder / "adapter.safetensors", run.model.trained(), found)


# ------------------------------------------------------------------------------- still the same?

# Settings that name a place: what is there is compared, not its name.
PLACES = ("data", "images", "clips", "lm", "clip", "features", "pretrained", "init", "out")


def identity(lm: torch.nn.Module, config: Config, method: object) -> dict[str, str]:
    """What a run's numbers depend on beside its settings; data is added by `data_identity`."""
    names = "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"
    files = [Path(config.lm) / name for name in names]
    return {"language model": weights.fingerprint(lm), "its config.json": repr(lm.config),
            "tokenizer": digest(*(file.read_bytes() for file in files if file.exists())),
            "row": repr(method)}


def data_identity(examples: dict[str, list]) -> str:
    """Of the examples of a split: ids, texts, pictures, answers."""
    return digest(*(repr(found).encode() for found in examples.values()))


def features_identity(run: Run, examples: dict[str, list]) -> str:
    """Of the first pictures or clips of each task: published features do not say who made them."""
    parts = []
    for task, found in examples.items():
        ids = [example.images[0] for example in found[:16]]
        parts.append(run.features[task].stack(ids).numpy())
    return digest(*parts)


def check_same(run: Run, held: weights.Tensors, path: Path, free: tuple[str, ...]) -> None:
    """BadInput names what is not what it was when a file of this run was written. free: settings
    that may differ."""
    features.check_same(held.metadata, run.features,
                        "give back the CLIP that it had, as --clip, or its features")
    check_identity(run, held, path, tuple(run.identity))
    before = adapter_config(held, path)
    with reading(path):
        for name, now in asdict(run.config).items():
            if name not in (*PLACES, *free) and name in before:
                assert before[name] == now, (
                    f"config.json has been changed: {name} was {before[name]!r}, now it is {now!r}")


def check_identity(run: Run, held: weights.Tensors, path: Path, names: tuple[str, ...]) -> None:
    with reading(path):
        was = json.loads(held.metadata.get("identity", "{}"))
        for name, now in run.identity.items():
            if name in names:
                assert was.get(name, now) == now, (
                    f"the {name} changed since then ({was[name]:.300}, now {now:.300}): give back "
                    "what it was trained with, or start a new run")


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
