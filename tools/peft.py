"""How does a LoRA (or DoRA) run travel to and from the PEFT library?

PEFT's folder: adapter_config.json says what stands where, adapter_model.safetensors holds the
tensors, under the transformers model's names behind "base_model.model.":

    ours                              PEFT's
    <Linear>.tune.net.down.weight     <its published name>.lora_A.weight             r, in
    <Linear>.tune.net.up.weight       <its published name>.lora_B.weight             out, r
    <Linear>.tune.m                   <its published name>.lora_magnitude_vector     out (DoRA)
    <Linear or norm>.bias             <its published name>[.base_layer].bias         bias "all"

PEFT has no place for the visual embedding: it lies beside, in visual_embedding.safetensors.

    python -m tools.peft out/lora FOLDER                          # a run, for PEFT
    python -m tools.peft out/lora-multiple FOLDER --task vqa      # one task's modules
    python -m pytest tests/test_interchange.py
"""
import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import adapters
import methods as rows
import t5
from support import published_lm, weights
from support.gate import read_json
from model import VLModel, vocabulary, widths

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
VISUAL = "visual_embedding.safetensors"
# Fields of PEFT's config that are read here or change no number; all others must be off. Of the
# ways to begin, some change the frozen weights (pissa): such an adapter fits no published model.
KNOWN = set("""peft_type r lora_alpha bias use_dora use_rslora init_lora_weights lora_dropout
    target_modules exclude_modules layers_to_transform layers_pattern base_model_name_or_path
    task_type auto_mapping revision inference_mode peft_version megatron_core eva_config
    qalora_group_size""".split())
ALLOWED = {"peft_type": ("LORA",), "bias": ("none", "all"),
           "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class Lora:
    """A row in PEFT's words. Equal ones make the same function of the same tensors."""
    sites: frozenset[str]                                     # all places of each
    r: int
    alpha: float
    dora: bool
    biases: bool                                              # all of the model's, or none
    dropout: float = field(default=0.0, compare=False)
    names: dict[str, str] = field(default_factory=dict, compare=False)      # our tensor -> PEFT's


def export(m: VLModel, folder: str | Path, base: str = "", task: str = "") -> None:
    """Writes the installed LoRA or DoRA row as a PEFT folder, the visual embedding beside it.

    base: name or folder of the published language model. task: whose modules, where there is one
    a task. ValueError, and nothing written, for what PEFT's format cannot say.
    """
    lora, folder, trained = installed(m, task), Path(folder), m.trained()
    targets = [to_peft(m, name).removeprefix("base_model.model.") for name in m.installed]
    config = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": lora.r,
              "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_dora": lora.dora,
              "use_rslora": False, "bias": "all" if lora.biases else "none",
              "target_modules": sorted(targets), "fan_in_fan_out": False, "modules_to_save": None,
              "init_lora_weights": True, "inference_mode": True,
              "base_model_name_or_path": base or None}
    weights.write(folder / VISUAL, {n: t for n, t in trained.items() if n.startswith("visual.")})
    weights.write(folder / ADAPTER, {theirs: trained[n] for n, theirs in lora.names.items()},
                  {"format": "pt"})
    unfinished = folder / f".{CONFIG}.{os.getpid()}"
    unfinished.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / CONFIG)


def load(m: VLModel, folder: str | Path, task: str = "") -> bool:
    """Fills the installed LoRA or DoRA row from a PEFT folder. Returns whether the visual
    embedding, too, was there and filled. task: whose modules, where there is one a task.

    Places, r, alpha, DoRA, biases, names and shapes must agree: else ValueError, which says what
    row would fit, and nothing is changed.
    """
    folder = Path(folder)
    theirs, tensors = read(m, folder)
    try:
        ours, why = installed(m, task), "another row is installed"
    except ValueError as e:
        ours, why = None, str(e)
    if ours != theirs:
        raise ValueError(f"{folder} fits {row(m, theirs, task)}, but {why}: install the one that "
                         "fits")
    back, trained = {theirs: name for name, theirs in ours.names.items()}, m.trained()
    source = {back.get(name, name): t for name, t in tensors.items()}
    target = {name: trained[name] for name in ours.names}
    if visual := (folder / VISUAL).is_file():
        source |= weights.read(folder / VISUAL)
        target |= {n: t for n, t in trained.items() if n.startswith("visual.")}
    weights.load(target, source, where=str(folder))
    return visual


def table(m: VLModel) -> weights.Table:
    """PEFT's name of a module of the transformers model, ours."""
    c = m.lm.config
    return [(f"base_model.model.{theirs}", ours and f"lm.{ours}")
            for theirs, ours in published_lm.table(c, "" if c.is_t5 else "model.")]


def to_peft(m: VLModel, name: str) -> str:
    return weights.to_published(name, table(m))[0]


def installed(m: VLModel, task: str) -> Lora:
    """What is installed, in PEFT's words; ValueError for what they cannot say."""
    names, found = {}, set()
    for name, place in m.installed.items():
        tune, at = place.tune, f"{name}.tune"
        if isinstance(tune, adapters.PerTask) != bool(task) or task and task not in tune:
            raise ValueError(f"task {task!r} has no module of its own at {name}" if task else
                             f"there is one module a task at {name}: name the task")
        tune, at = (tune[task], f"{at}.{task}") if task else (tune, at)
        net = getattr(tune, "net", None)
        if not (isinstance(place, t5.Linear) and isinstance(net, adapters.Bottleneck)
                and net.linear and all(isinstance(d, adapters.Dense) for d in (net.down, net.up))
                and tune.reads_x and tune.gate is None and tune.s == 1):
            raise ValueError(f"PEFT's format cannot say what is installed at {name}: it can say "
                             "LoRA and DoRA, dense, with s 1, behind a Linear, not merged")
        r, dora = net.down.out_features, isinstance(tune, adapters.DoRA)
        found.add((r, number(tune.scale * r), "DoRA" if dora else "LoRA", tune.dropout))
        theirs = to_peft(m, name)
        names |= {f"{at}.net.down.weight": f"{theirs}.lora_A.weight",
                  f"{at}.net.up.weight": f"{theirs}.lora_B.weight"}
        names |= {f"{at}.m": f"{theirs}.lora_magnitude_vector"} if dora else {}
    if len(found) != 1:
        raise ValueError("PEFT's format wants modules of one r, alpha, kind and dropout; installed "
                         f"are {', '.join(map(str, sorted(found))) or 'none'}")
    biases = {n for n, _ in m.lm.named_parameters("lm") if n.endswith(".bias")}
    if m.base and m.base.keys() != biases:
        raise ValueError("PEFT's format can say that all biases are trained, and nothing else of "
                         f"the language model; the row opens {'+'.join(m.method.open)}")
    for name in m.base:
        module = name.removesuffix(".bias")
        names[name] = f"{to_peft(m, module)}{'.base_layer' * (module in m.installed)}.bias"
    (r, alpha, kind, dropout), = found
    return Lora(frozenset(m.method.at), r, alpha, kind == "DoRA", bool(m.base), dropout, names)


def number(x: float) -> float:
    """Without the rounding error of alpha / r * r; an int where it is one."""
    x = float(f"{x:.9g}")
    return int(x) if x.is_integer() else x


def read(m: VLModel, folder: Path) -> tuple[Lora, dict[str, Tensor]]:
    """What a PEFT folder says, and its tensors; ValueError for what no row of m could hold."""
    pickle, path = folder / "adapter_model.bin", folder / CONFIG
    if pickle.exists() and not (folder / ADAPTER).exists():
        raise ValueError(f"{pickle} is a pickle, which can run code when opened, and is not read "
                         f"here; convert it: {weights.CONVERT.format(pickle, folder / ADAPTER)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a folder that PEFT's save_pretrained "
                                "or interchange.py wrote")
    c, tensors = read_json(path), dict(weights.read(folder / ADAPTER))
    if odd := [f"{k} {v!r}" for k, v in c.items()
               if v and k not in KNOWN or k in ALLOWED and v not in ALLOWED[k]]:
        raise ValueError(f"{path}: {', '.join(odd)} is nothing that a row can say: train the "
                         "adapter without it")
    tensors.pop("base_model.model.final_logits_bias", None)     # in old files, but never trained
    modules, linears = dict(m.named_modules()), set()
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            ours = weights.to_ours(name.removesuffix(".lora_A.weight"), table(m)) or [()]
            if not isinstance(modules.get("".join(ours[0])), t5.Linear):
                raise ValueError(f"{folder / ADAPTER}: {name} adapts what is no Linear of this "
                                 "language model: give an adapter of this one")
            linears.update(ours[0])
    sites = frozenset(re.sub(r"^lm\.|\.blocks\.\d+|\.f(?=\.)", "", name) for name in linears)
    if {name for site in sites for name, _ in m.sites(site)} != linears or not sites:
        raise ValueError(f"{folder / ADAPTER} adapts some layers of a stack and others not, which "
                         "no row does: adapt all")
    r, alpha = c.get("r"), c.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{path}: r is {r!r} and lora_alpha {alpha!r}, which should be numbers")
    biases = c.get("bias") == "all" and not m.lm.config.is_t5             # T5 has none
    alpha = number(alpha * r ** 0.5 if c.get("use_rslora") else alpha)
    return Lora(sites, r, alpha, bool(c.get("use_dora")), biases), tensors


def row(m: VLModel, lora: Lora, task: str) -> str:
    """What installs this row, as train.py's command line says it."""
    method = "dora" if lora.dora else "lora"
    default = adapters.methods(m.lm.config.is_t5)[method]
    changes = [f"{site}={method}" for site in sorted(lora.sites - default.at.keys())]
    changes += [f"{site}=none" for site in default.at if site not in lora.sites]
    changes += [f"r={lora.r}", f"alpha={lora.alpha}"] + ["per_task=all"] * bool(task)
    if lora.biases != bool(default.open):
        changes.append(f"open={'biases' if lora.biases else 'none'}")
    return f"--method {method} --set {','.join(changes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a LoRA or DoRA run as a PEFT folder.")
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--task", default="", help="whose modules, where there is one a task")
    args = parser.parse_args()
    path = Path(args.run) / "adapter.safetensors"
    try:
        held = weights.read(path)
        config = json.loads(held.metadata.get("config", "{}"))
        if config.get("control", "random-lm") == "random-lm":
            raise ValueError(f"{path} adapts no published model, or no run of train.py wrote it")
        lm = published_lm.load_lm(config["lm"])
        m = VLModel(lm.resize(vocabulary(lm.config)), widths(held))
        m.install(rows.row(config["method"], lm.config.is_t5, config["set"]),
                  tuple(config["tasks"].split(",")))
        m.load_trained(path)
        export(m, args.folder, config["lm"], args.task)
    except (ValueError, OSError) as error:
        sys.exit(f"interchange.py: {error}")


if __name__ == "__main__":
    main()
