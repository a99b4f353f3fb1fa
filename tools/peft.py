"""How does a tuned model go to other programs, and an adapter of theirs come here?

    python -m tools.peft out/lora FOLDER                       # LoRA or DoRA, for the PEFT library
    python -m tools.peft out/lora-multiple FOLDER --task vqa   # one task's modules
    python -m tools.peft out/lora FOLDER --merge               # a published model, LoRA in W
    python -m tools.peft FOLDER lora.safetensors --lm LM       # PEFT's folder, for train.py --init
    python -m pytest tests/test_peft.py

PEFT's folder: adapter_config.json says what stands where, adapter_model.safetensors holds the
tensors, under the transformers model's names behind "base_model.model.":

    ours                              PEFT's
    <Linear>.tune.net.down.weight     <its published name>.lora_A.weight             r, in
    <Linear>.tune.net.up.weight       <its published name>.lora_B.weight             out, r
    <Linear>.tune.m                   <its published name>.lora_magnitude_vector     out (DoRA)
    <Linear or norm>.bias             <its published name>[.base_layer].bias         bias "all"

A merged folder is a published one: config.json, model.safetensors, the tokeniser's files. Neither
has a place for the visual embedding: it lies beside, in visual_embedding.safetensors, which is an
adapter file of row frozen.
"""
import argparse
import json
import re
import shutil
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
# Fields of Add that PEFT's config has words for, or that only say how training began.
SAID = ("r", "reduction", "alpha", "scale", "dropout", "module", "std", "zero")

# Of a published folder, beside its config and weights.
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
          "merges.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json")


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


def visual(model: VLModel) -> dict[str, Tensor]:
    return {name: t for name, t in model.trained().items() if name.startswith("visual.")}


def write_adapter(path: Path, tensors: dict[str, Tensor], method: str, changes: str) -> None:
    """A file for train.py --init, with what it wants to know."""
    config = {"method": method, "set": changes, "tasks": "", "train_clip": False}
    weights.write(path, tensors, {"config": json.dumps(config)})


# ----------------------------------------------------------------------------------- to PEFT

def export(model: VLModel, folder: Path, base: str = "", task: str = "") -> None:
    """Writes the installed LoRA or DoRA row as a PEFT folder, the visual embedding beside it.

    base: folder or name of the published language model. task: whose modules, where there is one
    a task. BadInput, and nothing written, for what PEFT's format cannot say.
    """
    with reading("PEFT's format"):
        said = peft_config(model, task)
    names, trained = peft_names(model, task), model.trained()
    targets = [name.removeprefix(PREFIX).removesuffix(A) for name in names.values()
               if name.endswith(A)]
    config = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", **said,
              "target_modules": sorted(targets), "use_rslora": False, "fan_in_fan_out": False,
              "modules_to_save": None, "init_lora_weights": True, "inference_mode": True,
              "base_model_name_or_path": base or None}
    write_adapter(folder / VISUAL, visual(model), "frozen", "")
    weights.write(folder / ADAPTER, {theirs: trained[ours] for ours, theirs in names.items()},
                  {"format": "pt"})
    replace_file(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def peft_config(model: VLModel, task: str) -> dict:
    """The installed row in PEFT's words; AssertionError for what they cannot say."""
    adds, opened = list(set(model.method.at.values())), model.method.open
    lora = Add(reads="x", linear=True, per_task="all" if task else None)
    if len(adds) == 1 and adds[0].module in (Adapter, DoRA):
        lora = replace(lora, **{name: getattr(adds[0], name) for name in SAID})
    linears = [module for module in model.installed.values() if isinstance(module, t5.Linear)]
    ranks = {lora.width(linear.out_features) for linear in linears}
    # Whole descriptions are compared, so that no field of Add, old or new, is forgotten.
    same = adds == [lora] and len(linears) == len(model.installed) and len(ranks) == 1
    assert same and opened in ((), ("biases",)), (
        "it can say LoRA or DoRA, dense and with s 1, behind Linears, with one r, alpha and "
        f"dropout, and all biases or none; this row is {model.method.formula}, at "
        f"{', '.join(model.method.at) or 'no site'}, and opens {'+'.join(opened) or 'nothing'}")
    (r,) = ranks
    return {"r": r, "lora_alpha": lora.scale * (r if lora.alpha is None else lora.alpha),
            "lora_dropout": lora.dropout, "use_dora": lora.module is DoRA,
            "bias": "all" if opened else "none"}


def peft_names(model: VLModel, task: str = "") -> dict[str, str]:
    """Our name of what the row trains in the language model -> PEFT's."""
    table, names = names_table(model.lm.config), {}
    tune = f".tune.{task}." if task else ".tune."
    for name, p in model.lm.named_parameters("lm"):
        module, _, tail = name.partition(tune)
        if not p.requires_grad or not tail and ".tune." in name:
            continue                                        # frozen, or another task's
        module = module.removesuffix(".bias")
        if tail:
            end = TAILS[tail]
        elif module in model.installed:
            end = ".base_layer.bias"                        # PEFT wraps the Linears that it adapts
        else:
            end = ".bias"
        names[name] = PREFIX + weights.to_published(module.removeprefix("lm."), table)[0] + end
    return names


# --------------------------------------------------------------------------------- from PEFT

def from_peft(folder: Path, lm_folder: str, path: Path) -> tuple[str, str]:
    """Writes a PEFT folder as an adapter file. Returns --method and --set of the row that it fits.

    The visual embedding comes along where it lies beside. BadInput for what no row can hold.
    """
    content, source, beside = read_json(folder / CONFIG), folder / ADAPTER, {}
    with reading(folder / CONFIG):
        check(content, FIELDS)
        known = FREE | {name.rstrip("?") for name in FIELDS}
        odd = [f"{name} {value!r}" for name, value in content.items()
               if value and name not in known]
        assert not odd, f"{', '.join(odd)} is nothing that a row can say: train without it"
    if not source.exists() and source.with_suffix(".bin").exists():
        source = source.with_suffix(".bin")                 # a pickle: read says how to convert it
    tensors = weights.read(source)
    if (folder / VISUAL).exists():
        beside = weights.read(folder / VISUAL)
    with reading(source):
        method, changes = row_of(content, list(tensors), published_lm.read_config(lm_folder))
        model = build(lm_folder, runs.widths(beside) or [1], method, changes)
    names, trained = peft_names(model), model.trained()
    table = [(theirs, ours) for ours, theirs in names.items()]
    table.append((f"{PREFIX}final_logits_bias", None))      # in old files, but never trained
    filled = {name: trained[name] for name in names}
    weights.load(filled, tensors, table, where=str(source))
    if beside:
        weights.load(visual(model), beside, where=str(folder / VISUAL))
        filled |= visual(model)
    write_adapter(path, filled, method, changes)
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

    What stands behind a feed-forward's activation, h' = T h, goes into the Linear that reads it:
    f(h) = W_wo T h + b.
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

    lm_folder: the published model that was tuned. The vocabulary stays as it was there, so that
    the tokeniser's files fit: rows of added tokens are frozen, and resize draws the same again.
    BadInput, and nothing written, if the result is another function.
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
        assert far < 1e-9, (
            f"its logits would differ by {far:.2g} of the largest: what is installed is not linear "
            "in x, adds a bias that this model has no place for, or trains rows of added tokens")
    config = read_json(Path(lm_folder) / "config.json")
    config = {name: value for name, value in config.items() if "dtype" not in name}   # now fp32
    replace_file(folder / "config.json", json.dumps(config, indent=1) + "\n")
    for name in COPIED:
        if (Path(lm_folder) / name).exists():
            shutil.copy(Path(lm_folder) / name, folder / name)
    write_adapter(folder / VISUAL, visual(model.float()), "frozen", "")
    weights.write(folder / weights.WHOLE, {name: t.float() for name, t in tensors.items()},
                  {"format": "pt"})


# ------------------------------------------------------------------------------- command line

@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.peft", description="Runs to and from PEFT.")
    parser.add_argument("source", help="run folder of train.py; with --lm, a folder of PEFT")
    parser.add_argument("target", type=Path, help="folder to write; with --lm, an adapter file")
    parser.add_argument("--task", default="", help="whose modules, where there is one a task")
    parser.add_argument("--merge", action="store_true", help="write a published language model "
                        "with LoRA, DoRA or (IA)3 in its weights")
    parser.add_argument("--lm", help="read PEFT's folder, which adapts this language model")
    args = parser.parse_args(argv)
    with reading(args.target):
        assert not args.target.exists(), "it exists: name another one, or delete it"
    if args.lm:
        method, changes = from_peft(Path(args.source), args.lm, args.target)
        print(f"begin with it: python train.py --lm {args.lm} --init {args.target} "
              f"--method {method} --set {changes}")
        return
    config, path = runs.read_config(args.source, device="cpu"), f"{args.source}/adapter.safetensors"
    with reading(args.source):
        more = config.pretrained or config.train_clip or config.control == "random-lm"
        assert not more, ("with --pretrained, --train-clip yes or --control random-lm it is more "
                          "than an adapter of a published language model")
    held = weights.read(path)
    model = build(config.lm, runs.widths(held), config.method, config.set,
                  tuple(task_list(config)))
    weights.load(model.trained(), held, where=path)
    with reading("--task"):
        assert not model.per_task or args.task in model.tasks, \
            f"there is one module a task: name one of {', '.join(model.tasks)}"
        assert model.per_task or not args.task, "no task has a module of its own: leave it out"
    if args.merge:
        merge(model, config.lm, args.target, args.task)
    else:
        export(model, args.target, config.lm, args.task)


if __name__ == "__main__":
    main()
