"""What lies in a run folder, and what must still be the same when it is read again?

    config.json             the whole configuration; the run can be rebuilt from it
    log.jsonl               a line an interval: losses, learning rate, gradient norm; validation
    adapter.safetensors     what was trained, nothing else
    last/                   what an exact --resume needs (resume.py), the best epoch's weights
    predictions/<task>.json, submissions/, results.json, results.md, report.html

    python -m pytest tests/test_train.py
"""
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

import answers
import config as configs
import methods
from config import Config
from model import VLModel
from support import features, ranks, weights
from support.gate import fits, read_json, read_text, reading, replace_file

try:
    import resource
except ImportError:
    resource = None                                         # Windows does not tell

ADAPTER, BEST = "adapter.safetensors", "last/best.safetensors"
WRITES = "lm.decoder.", "lm.head."                          # what a model that chooses lacks


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
        return features.default_device(self.config.device)


def read_config(folder: str, **given) -> Config:
    """The configuration of a run folder, with what is given instead of its own."""
    folder = configs.shipped(folder)
    path = Path(folder) / "config.json"
    content = read_json(path)
    with reading(path):
        odd = content.keys() ^ {f.name for f in fields(Config)}
        assert not odd, f"it is of another version, with other fields: {', '.join(sorted(odd))}"
        if "data" in given:                         # other data, with its own pictures and clips
            assert "features" in given or content["features"] in ("", "none"), \
                "it was trained on packed --features: beside --data, name the other data's, too"
            content |= {"images": "", "clips": ""}
    return configs.resolve(Config(**content | {"out": folder} | given))


def save_json(path: Path, content: object) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------- its tensors

def write(run: Run, path: Path, tensors: dict[str, Tensor], more: dict | None = None) -> None:
    """A file of a run's tensors; its metadata says how they were made, with what, and `more`."""
    if not ranks.FIRST:
        return                                             # before gigabytes are put together
    metadata = {"config": json.dumps(asdict(run.config)), "method": run.config.method,
                "features": json.dumps(features.sources(run.features)),
                "identity": json.dumps(run.identity)}
    chosen = {task: head.vocabulary for task, head in run.model.answers.items()}
    if chosen:
        metadata["answers"] = json.dumps(chosen)
    metadata |= {name: str(value) for name, value in (more or {}).items()}
    weights.write(path, tensors, metadata | {"digest": digest_all(tensors, metadata)})


def read(path: Path) -> weights.Tensors:
    """Such a file; BadInput if a byte of it has changed."""
    held = weights.read(path)
    with reading(path):
        metadata = held.metadata.copy()
        was = metadata.pop("digest", None)                 # none: tools/peft.py brought it in
        assert was in (None, digest_all(held, metadata)), \
            "it is damaged, for its numbers are not those that were written: use a copy"
    return held


def digest(*parts: bytes) -> str:
    """16 hex digits that change with any of these bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def digest_all(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Of names, types, shapes and numbers, and of what the metadata says."""
    whole = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def widths(held: weights.Tensors) -> list[int]:
    """The widths of features that an adapter file was trained on."""
    names = [n for n in sorted(held) if n.startswith("visual.") and n.endswith("feat.weight")]
    return [held.shape(name)[1] for name in names]


def load_trained(run: Run, held: weights.Tensors, path: Path, free: tuple[str, ...] = ()) -> None:
    """Fills what the installed method trains from an adapter file, if all else is the same."""
    check_same(run, held, path, free)
    weights.load(run.model.trained(), held, where=str(path))


def begin_with(run: Run) -> None:
    """--init: what the row trains begins as a run folder or an adapter file left it."""
    path, trained = Path(run.config.init), run.model.trained()
    if path.is_dir():
        path = path / ADAPTER
    held = read(path)
    check_same(run, held, path, only=("language model", "tokenizer"))
    with reading(path):
        before = json.loads(held.metadata["config"])
        row = methods.row(before["method"], run.model.lm.config.is_t5, before["set"])
        assert row == run.model.method, (f"it was trained with --method {before['method']} --set "
                                         f"{before['set']!r}: install the same row")
    if not any(name.startswith("visual.") for name in held):
        print(f"{path} has no visual embedding: it starts afresh")
        trained = {name: t for name, t in trained.items() if not name.startswith("visual.")}
    weights.load(trained, held, where=str(path))


def choices(config: Config, examples: dict[str, list]) -> dict[str, list[str]]:
    """The answers among which those of each task are chosen; none where they are written."""
    if not config.answers:
        return {}
    if config.answers == "yes":
        return {task: answers.vocabulary(found) for task, found in examples.items()}
    with reading(config.answers):
        listed = json.loads(read_text(config.answers))
        assert len(examples) == 1 and fits(listed, [str]) and 0 < len(listed) == len(set(listed)), \
            "it should be a list of different answers, of one task"
    return dict.fromkeys(examples, listed)


def begin_pretrained(model: VLModel, config: Config) -> None:
    """--pretrained: all but a frozen CLIP begins as a run of row full (V&L) left it."""
    path = Path(config.pretrained) / ADAPTER
    held = read(path)
    with reading(f"--pretrained {config.pretrained}"):
        before = json.loads(held.metadata["config"])
        assert before["method"] == "full" and not before["set"], (
            f"it trained {before['method']}, not the whole model: name a run of --method full")
        assert not before["train_clip"] or config.features == "none", (
            "it trained CLIP, too: packed features are from before that, use --features none")
    started = {name: p for name, p in model.named_parameters()
               if name in held or not name.startswith("clip.")}
    if model.answers and "answers" not in held.metadata:    # it wrote: its decoder is not needed
        started = {name: p for name, p in started.items() if not name.startswith("answers.")}
        held = {name: held[name] for name in held if not name.startswith(WRITES)}
    weights.load(started, held, where=str(path))


def keep_best(run: Run, line: dict, scores: dict[int, float]) -> None:
    """Keeps the weights of the first epoch with the best mean of the validation scores, a line of
    the log. scores: the means before."""
    if run.config.keep == "best" and line["mean"] > max(scores.values(), default=-math.inf):
        more = {name: line[name] for name in ("epoch", "mean")}
        write(run, run.folder / BEST, run.model.trained(), more)


def finish(run: Run, scores: dict[int, float]) -> None:
    """adapter.safetensors: what the last epoch left, or the best one."""
    path, more = run.folder / BEST, {}
    ranks.agree()                                           # the first rank has written it
    if run.config.keep == "best" and scores:
        held = read(path)
        with reading(path):
            more = {name: held.metadata[name] for name in ("epoch", "mean")}
            assert float(more["mean"]) == max(scores.values()), "log.jsonl knows a better epoch"
        weights.load(run.model.trained(), held, where=str(path))
        print(f"the best epoch is number {int(more['epoch']) + 1}: {float(more['mean']):.2f}")
    write(run, run.folder / ADAPTER, run.model.trained(), more)


# ------------------------------------------------------------------------------- still the same?

# Settings that name a place: what is there is compared, not its name.
PLACES = ("data", "images", "clips", "lm", "clip", "features", "pretrained", "init", "out",
          "device")


def identity(lm: torch.nn.Module, config: Config, method: object,
             choices: dict | None = None) -> dict[str, str]:
    """What a run's numbers depend on beside settings and features; see also `data_identity`."""
    names = "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"
    files = [Path(config.lm) / name for name in names]
    return {"language model": weights.fingerprint(lm), "its config.json": repr(lm.config),
            "tokenizer": digest(*(file.read_bytes() for file in files if file.exists())),
            "row": repr(method), "list of answers": digest(repr(choices or {}).encode())}


def data_identity(examples: dict[str, list]) -> str:
    """Of the examples of a split: ids, texts, pictures, answers."""
    return digest(*(repr(found).encode() for found in examples.values()))


def features_identity(run: Run, examples: dict[str, list]) -> str:
    """Of the first pictures or clips of each task: published features do not say who made them."""
    parts = []
    for task, found in examples.items():
        ids = [example.images[0] for example in found[:16]]
        parts.append(run.features[task].stack(ids).cpu().numpy())
    return digest(*parts)


def check_same(run: Run, held: weights.Tensors, path: Path, free: tuple[str, ...] = (),
               only: tuple[str, ...] = ()) -> None:
    """BadInput names what is not what it was when a file of a run was written. free: settings that
    may differ; only: if given, all that is compared. What an older file does not say is passed."""
    with reading(path):
        was, now = {}, {}
        seen = json.loads(held.metadata.get("features", "{}"))
        for kind, source in features.sources(run.features).items():
            assert only or kind in seen, f"it was trained without {kind}: ask it about others"
            for name in "clip", "resize", "width":
                was[f"{name} of {kind}"] = seen.get(kind, {}).get(name)
                now[f"{name} of {kind}"] = source.get(name)
        was |= json.loads(held.metadata["config"]) | json.loads(held.metadata.get("identity", "{}"))
        now |= asdict(run.config) | run.identity
        for name, value in now.items():
            if name in (only or was) and name not in (*PLACES, *free):
                assert was.get(name) in (None, value), (
                    f"{name} was {was[name]!s:.300}, now it is {value!s:.300}: give back what it "
                    "was trained with, or start a new run")


# ------------------------------------------------------------------------------- results

def peak_memory(device: str) -> int:
    """The most bytes held at once: on the GPU, or by this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024          # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def report(run: Run, results: dict, split: str, seconds: float, save: bool = False) -> None:
    """Prints the results as a table in Markdown; save: keeps them, too."""
    config, (_, trainable, total) = run.config, run.model.counts()[-1]
    lines = ["| task | metric | score |", "|---|---|---|"]
    for task, scores in results.items():
        if task != "average":
            lines += [f"| {task} | {metric} | {value:.2f} |" for metric, value in scores.items()]
    changed = [f" ({text})" for text in (config.set, config.control) if text]
    lines += [
        f"| **average** | headline metrics | **{results['average']:.2f}** |\n",
        f"{config.method}{''.join(changed)}: trained {trainable:,} of {total:,} parameters "
        f"({100 * trainable / total:.2f} %), seed {config.seed}, split {split}, {seconds:.0f} s\n"]
    print("\n".join(lines), end="")
    if save:
        save_json(run.folder / "results.json", results | {
            "trainable": trainable, "total": total, "seconds": round(seconds, 1),
            "memory": peak_memory(run.device), "split": split})
        replace_file(run.folder / "results.md", "\n".join(lines))


def draw_page(run: Run) -> None:
    """report.html, by a program of its own: tools/report.py knows train.py, not the reverse."""
    if ranks.FIRST:
        sys.stdout.flush()                                  # what was printed stands above its line
        code = {"PYTHONPATH": str(Path(__file__).parent.parent)}
        subprocess.run([sys.executable, "-m", "tools.report", run.folder], env=os.environ | code)
