"""How does a tuned model go to other programs, and an adapter of theirs come here?

    python -m tools.peft out/lora FOLDER                       # LoRA or DoRA, for the PEFT library
    python -m tools.peft out/lora-multiple FOLDER --task vqa   # one task's modules
    python -m tools.peft out/lora FOLDER --merge               # a published model, LoRA in W
    python -m tools.peft FOLDER lora.safetensors --lm LM       # PEFT's folder, for train.py --init
    python -m pytest tests/test_peft.py

PEFT's folder is adapter_config.json and adapter_model.safetensors, whose names are the transformers
model's behind "base_model.model.":

    ours                              PEFT's
    <Linear>.tune.net.down.weight     <its published name>.lora_A.weight             r, in
    <Linear>.tune.net.up.weight       <its published name>.lora_B.weight             out, r
    <Linear>.tune.m                   <its published name>.lora_magnitude_vector     out (DoRA)
    <Linear or norm>.bias             <its published name>[.base_layer].bias         bias "all"

The visual embedding has no place in it, nor in a merged (published) folder: it lies beside, in
visual_embedding.safetensors, an adapter file of row frozen.
"""
import argparse
import json
import re
import shutil
from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import methods
import t5
from adapters import Adapter, Add, Context, DoRA
from config import task_list
from model import VLModel, vocabulary
from support import published_lm, runs, weights
from support.gate import Number, check, program, read_json, reading, replace_file

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
VISUAL = "visual_embedding.safetensors"
COPIED = ("generation_config.json", "*token*.json", "vocab.*", "merges.txt", "*.model")
PREFIX, A = "base_model.model.", ".lora_A.weight"
TAILS = {"net.down.weight": A, "net.up.weight": ".lora_B.weight", "m": ".lora_magnitude_vector"}

# Fields of PEFT's config that are read, and those that change no number; all others must be off.
FIELDS = {
    "peft_type": {"LORA"}, "r": Number(1, whole=True), "lora_alpha": Number(),
    "lora_dropout?": Number(0, 0.999), "use_dora?": bool, "use_rslora?": bool,
    "bias?": {"none", "all"},
    # Other ways to begin (pissa) change the frozen weights: they fit no published model.
    "init_lora_weights?": {True, False, "gaussian", "eva", "orthogonal"},
}
FREE = set("""target_modules exclude_modules layers_to_transform layers_pattern revision
    base_model_name_or_path task_type auto_mapping inference_mode peft_version megatron_core
    eva_config qalora_group_size""".split())
# Fields of Add that PEFT has words for, or that only say how training began.
SAID = ("r", "reduction", "alpha", "scale", "dropout", "module", "std", "zero")


def names_table(config: t5.Config) -> weights.Table:
    """The names of transformers' BartForConditionalGeneration or T5ForConditionalGeneration."""
    return published_lm.table(config, "" if config.is_t5 else "model.")


def build(lm_folder: str, widths: list[int], method: str, changes: str,
          tasks: tuple[str, ...] = ()) -> VLModel:
    """The published model with a row installed; widths: of the visual features."""
    lm = published_lm.load_lm(lm_folder)
    model = VLModel(lm.resize(vocabulary(lm.config)), widths).eval()
    model.install(methods.row(method, lm.config.is_t5, changes), tasks)
    return model


def write_adapter(path: Path, tensors: dict[str, Tensor], method: str = "frozen",
                  changes: str = "") -> None:
    """A file for train.py --init, with what it wants to know."""
    config = {"method": method, "set": changes, "tasks": "", "train_clip": False}
    weights.write(path, tensors, {"config": json.dumps(config)})


# ----------------------------------------------------------------------------------- to PEFT

def export(model: VLModel, folder: Path, base: str = "", task: str = "") -> None:
    """Writes the installed LoRA or DoRA row, for a base model, as a PEFT folder; of one task, if
    each has its own. BadInput, and nothing written, if PEFT cannot say the row."""
    adds, opened = list(set(model.method.at.values())), model.method.open
    lora = Add(reads="x", linear=True, per_task="all" if task else None)
    if len(adds) == 1 and adds[0].module in (Adapter, DoRA):
        lora = replace(lora, **{name: getattr(adds[0], name) for name in SAID})
    linears = [module for module in model.installed.values() if isinstance(module, t5.Linear)]
    ranks = {lora.width(linear.out_features) for linear in linears}
    # Whole descriptions are compared, so that no field of Add, old or new, is forgotten.
    same = adds == [lora] and len(linears) == len(model.installed) and len(ranks) == 1
    with reading("PEFT's format"):
        assert same and opened in ((), ("biases",)), \
            "it can say dense LoRA or DoRA of Linears, with one r and alpha, and all biases or none"
    r, names, trained = min(ranks), peft_names(model, task), model.trained()
    config = {
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": r,
        "lora_alpha": lora.scale * (r if lora.alpha is None else lora.alpha),
        "lora_dropout": lora.dropout, "use_dora": lora.module is DoRA,
        "bias": "all" if opened else "none", "inference_mode": True,
        "target_modules": sorted(name.removeprefix(PREFIX).removesuffix(A)
                                 for name in names.values() if name.endswith(A)),
        "base_model_name_or_path": base or None}
    write_adapter(folder / VISUAL, model.visual.state_dict(prefix="visual."))
    weights.write(folder / ADAPTER, {theirs: trained[ours] for ours, theirs in names.items()},
                  {"format": "pt"})
    replace_file(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def peft_names(model: VLModel, task: str = "") -> dict[str, str]:
    """Our name of what the row trains in the language model -> PEFT's."""
    table, names = names_table(model.lm.config), {}
    for name in model.trained():
        place, _, tail = name.partition(f".tune.{task}." if task else ".tune.")
        if not name.startswith("lm.") or not tail and ".tune." in name:
            continue                                        # the embedding, or another task's
        place = place.removesuffix(".bias")
        end = ".base_layer.bias" if place in model.installed else ".bias"    # PEFT wraps Linears
        end = TAILS[tail] if tail else end
        names[name] = PREFIX + weights.to_published(place.removeprefix("lm."), table)[0] + end
    return names


# --------------------------------------------------------------------------------- from PEFT

def from_peft(folder: Path, lm_folder: str, path: Path) -> tuple[str, str]:
    """Writes a PEFT folder, and the visual embedding if it lies beside, as an adapter file.

    Returns --method and --set of the row that it fits; BadInput for what no row can hold.
    """
    content, source, beside = read_json(folder / CONFIG), folder / ADAPTER, {}
    with reading(folder / CONFIG):
        check(content, FIELDS)
        known = FREE | {name.rstrip("?") for name in FIELDS}
        odd = [name for name, value in content.items() if value and name not in known]
        assert not odd, f"no row can say {', '.join(odd)}: train without"
    tensors = weights.read(source if source.exists() else folder)    # how to convert a .bin
    if (folder / VISUAL).exists():
        beside = weights.read(folder / VISUAL)
    with reading(source):
        for name in tensors:                                # before anything of that size is made
            if name.endswith(A):
                rank = tensors.shape(name)[0]
                assert rank == content["r"], f"{name} has rank {rank}, not {content['r']}"
        method, changes = row_of(content, list(tensors), published_lm.read_config(lm_folder))
        model = build(lm_folder, runs.widths(beside) or [1], method, changes)
    trained, names = model.trained(), peft_names(model)
    if not beside:
        trained = {name: trained[name] for name in names}
    table = [(theirs, ours) for ours, theirs in names.items()]
    table += [("visual", "visual"), (f"{PREFIX}final_logits_bias", None)]    # old files' zeros
    weights.load(trained, ChainMap(beside, tensors), table, where=str(source))
    write_adapter(path, trained, method, changes)
    return method, changes


def row_of(content: dict, tensors: list[str], config: t5.Config) -> tuple[str, str]:
    """--method and --set of the row that makes the same function of the same tensors."""
    sites = set()
    for name in tensors:
        if name.endswith(A):
            published = name.removeprefix(PREFIX).removesuffix(A)
            ours, _ = weights.to_ours(published, names_table(config)) or ([], False)
            assert ours, f"{name} fits nothing in this language model: give an adapter of this one"
            # "encoder.blocks.3.self_attn.f.q" is a place of the site "encoder.self_attn.q"
            sites.add(re.sub(r"\.blocks\.\d+|\.f(?=\.)", "", ours[0]))
    method = "dora" if content.get("use_dora") else "lora"
    default = methods.methods(config.is_t5)[method]
    r, alpha, dropout = content["r"], content["lora_alpha"], content.get("lora_dropout") or 0
    if content.get("use_rslora"):
        alpha *= r ** 0.5                                   # alpha / sqrt(r) is their scale
    changes = [f"{site}={method}" for site in sorted(sites - default.at.keys())]
    changes += [f"{site}=none" for site in default.at if site not in sites]
    changes += [f"r={r}", f"alpha={alpha:.12g}", f"dropout={dropout:.12g}"]
    if default.open and content.get("bias") != "all":       # BART's; T5 has no biases
        changes.append("open=none")
    return method, ",".join(changes)


# ------------------------------------------------------------------------------------ merging

def probe(lm: t5.EncoderDecoder, name: str, ctx: Context) -> tuple[Tensor, Tensor]:
    """W' (out, in) and b' (out) of a Linear and what is installed behind it.

    A function f(x) = W' x + b' is known from a few questions, whatever it is made of:

        b' = f(0),    column i of W' = f(e_i) - b'          e_i: 1 at i, else 0

    What stands behind a feed-forward's activation, h' = T h, goes into wo: f(h) = W_wo T h + b.
    """
    linear = lm.get_submodule(name)
    assert isinstance(linear, t5.Linear), f"{name} is no Linear: what stands there stays beside it"
    zero = linear.weight.new_zeros(1, linear.in_features)
    x = torch.cat([zero, torch.eye(linear.in_features).to(zero)])[None]     # 1, 1 + in, in
    if name.endswith(".wo"):
        hidden = lm.get_submodule(name.replace(".wo", ".hidden"))
        x = hidden(x, x.new_zeros(*x.shape[:2], hidden.in_features), ctx)
    y = linear(x, ctx)[0]                                                   # 1 + in, out
    return (y[1:] - y[0]).T, y[0]


@torch.no_grad()
def merge(model: VLModel, lm_folder: str, folder: Path, task: str = "") -> None:
    """Writes the language model, what is installed merged into its weights, as a published folder.

    BadInput, and nothing written, if the result is another function. Rows of added tokens are left
    out: they are frozen, and resize draws the same again.
    """
    # In float64 a difference is a mistake, not rounding; W' is rounded once, when it is written.
    model, merged = model.double().eval(), published_lm.load_lm(lm_folder).double()
    tuned = dict(model.lm.named_parameters())               # norms and biases may be opened, too
    with reading("this row cannot be merged"):
        ctx = model.context((task,), torch.device("cpu"))
        for place in model.installed:
            name = place.removeprefix("lm.").replace(".hidden", ".wo")
            tuned[f"{name}.weight"], tuned[f"{name}.bias"] = probe(model.lm, name, ctx)
        for name, p in merged.named_parameters():
            p.copy_(tuned[name][:len(p)])
        tensors = weights.published(merged, names_table(merged.config))     # before it is resized
        # Both models answer two random texts with random visual tokens.
        generator, c = torch.Generator().manual_seed(0), model.lm.config
        text = torch.randint(c.vocab, (2, 20), generator=generator)
        inputs = text[:, :12], text[:, 12:], torch.randn(2, 5, c.d, generator=generator).double()
        want, got = model.lm(*inputs, ctx), merged.resize(c.vocab)(*inputs)             # 2, 8, V
        far = (got - want).abs().max() / want.abs().max()
        assert far < 1e-9, (f"its logits would differ by {far:.2g}: what it adds is not linear "
                            "in x, adds a bias without a place, or trains rows of added tokens")
    write_adapter(folder / VISUAL, model.float().visual.state_dict(prefix="visual."))
    for pattern in COPIED:
        for path in Path(lm_folder).glob(pattern):
            shutil.copy(path, folder)
    config = read_json(Path(lm_folder) / "config.json")
    config = {name: value for name, value in config.items() if "dtype" not in name}   # now fp32
    replace_file(folder / "config.json", json.dumps(config, indent=1) + "\n")
    weights.write(folder / weights.WHOLE, {name: t.float() for name, t in tensors.items()},
                  {"format": "pt"})


# ------------------------------------------------------------------------------- command line

@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.peft", description="Runs to and from PEFT.")
    parser.add_argument("source", help="run folder; with --lm, a folder of PEFT")
    parser.add_argument("target", type=Path, help="folder to write; with --lm, an adapter file")
    parser.add_argument("--task", default="", help="whose modules, where there is one a task")
    parser.add_argument("--merge", action="store_true", help="LoRA, DoRA or (IA)3 into the weights")
    parser.add_argument("--lm", help="read PEFT's folder, which adapts this language model")
    args = parser.parse_args(argv)
    with reading(args.target):
        assert not args.target.exists(), "it exists: name another one, or delete it"
    if args.lm:
        method, changes = from_peft(Path(args.source), args.lm, args.target)
        print(f"python train.py --lm {args.lm} --init {args.target} --method {method} "
              f"--set {changes}")
        return
    config, path = runs.read_config(args.source, device="cpu"), f"{args.source}/adapter.safetensors"
    with reading(args.source):
        assert not (config.pretrained or config.train_clip or config.control == "random-lm"), \
            "it is more than an adapter of a published language model"
    held = weights.read(path)
    model = build(config.lm, runs.widths(held), config.method, config.set, tuple(task_list(config)))
    weights.load(model.trained(), held, where=path)
    with reading("--task"):
        known = model.tasks if model.per_task else ("",)
        assert args.task in known, f"it should be one of {', '.join(map(repr, known))}"
    if args.merge:
        merge(model, config.lm, args.target, args.task)
    else:
        export(model, args.target, config.lm, args.task)


if __name__ == "__main__":
    main()
