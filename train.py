"""How is a method trained and tested?

One visible loop (VL-Adapter, section 4; VL-PET, section 4): tasks are mixed in proportion to their
size, a batch belongs to one task, only what the method's row opens is trained.

    python train.py                                  # vlpet-large on the built-in data, minutes
    python train.py --method adapter --seed 43       # another row, another seed
    python train.py --resume out/vlpet-large         # go on after an interruption, exactly
    python train.py --test out/vlpet-large           # load the adapter-only file, test again
    python -m pytest tests/test_train.py

A run folder holds config.json, log.jsonl (a line an interval), adapter.safetensors (what was
trained, nothing else), last/ (what an exact resume needs), predictions/<task>.json, results.json
and results.md.
"""
import argparse
import json
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from tqdm import tqdm

import adapters
import clip_encoder
import data
import metrics
import t5
import tokenizer
import weights
import world
from model import VLModel, vocabulary

WORLD = "data/world"
CONTROLS = ("", "blind", "random-lm", "random-clip")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. A value of None is looked up in RECIPES."""
    method: str = "vlpet-large"          # a row of adapters.py's table
    tasks: str = "vqa,gqa,nlvr,caption"
    data: str = WORLD                    # folder in the published formats; the built-in one is
    #                                      written where it is missing
    images: str = ""                     # folder of pictures; "": the data folder's images/
    lm: str = "weights/tiny-bart"        # folder of a T5 or BART
    clip: str = "weights/tiny-clip"      # folder or file of a CLIP image tower
    out: str = ""                        # run folder; "": out/<method>
    epochs: int | None = None
    batch: int | None = None             # of vqa; other tasks have their share of it
    lr: float | None = None
    task_names: bool | None = None       # "vqa: " before the text
    warmup: float = 0.1                  # share of all steps
    weight_decay: float = 0.01
    clip_norm: float = 5.0
    dropout: float | None = None
    boxes: str = "grid"                  # "zero": as the papers' code feeds them
    precision: str = "fp32"              # or bf16 (autocast)
    beams: int = 5                       # of captions
    seed: int = 42
    device: str = ""                     # "": cuda if there is one, else cpu
    control: str = ""                    # blind: pictures shuffled among the examples;
    #                                      random-lm, random-clip: without pre-trained weights
    log_every: int = 50                  # steps
    save_every: int = 500                # steps, and at the end of an epoch


# (data, dialect) -> row -> (lr, batch, epochs, task names in the text); "" is every other row.
# spec: VL-Adapter's and VL-PET's published settings; the world's were found on its validation set.
RECIPES = {
    ("world", "bart"): {"full": (1e-3, 64, 3, True), "": (3e-3, 64, 3, True)},
    ("world", "t5"): {"full": (1e-3, 64, 3, True), "": (3e-3, 64, 3, True)},
    ("image", "bart"): {"full": (1e-4, 500, 20, False), "": (1e-3, 500, 20, True)},
    ("image", "t5"): {"full": (1e-4, 300, 20, True), "": (3e-4, 300, 20, True)},
}


def is_world(config: Config) -> bool:
    return config.data == WORLD or (Path(config.data) / "world.json").is_file()


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(config: Config) -> Config:
    """Checks a configuration and fills what it leaves open."""
    def one_of(name: str, allowed) -> None:
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{flag(name)} is {value!r}; allowed are "
                             f"{', '.join(map(repr, allowed))}")

    names = config.tasks.split(",")
    if bad := [t for t in names if t not in data.TASKS]:
        raise ValueError(f"--tasks names {bad[0]!r}; the tasks are {', '.join(data.TASKS)}")
    one_of("boxes", ("grid", "zero"))
    one_of("precision", ("fp32", "bf16"))
    one_of("control", CONTROLS)
    for name in ("epochs", "batch", "lr", "beams", "log_every", "save_every", "clip_norm"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"{flag(name)} is {getattr(config, name)}; it must be positive")
    c = t5.read_config(config.lm)
    one_of("method", adapters.methods(c.rms))
    rows = RECIPES["world" if is_world(config) else "image", "t5" if c.rms else "bart"]
    recipe = dict(zip(("lr", "batch", "epochs", "task_names"), rows.get(config.method, rows[""])))
    filled = {k: v for k, v in recipe.items() if getattr(config, k) is None}
    return replace(
        config, **filled, dropout=c.dropout if config.dropout is None else config.dropout,
        images=config.images or f"{config.data}/images",
        out=config.out or f"out/{config.method}{'-' * bool(config.control)}{config.control}",
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


# ------------------------------------------------------------------------------- what is needed

def prepare(config: Config) -> clip_encoder.Features:
    """Writes the built-in data set and extracts the pictures' features, each of them once."""
    if config.data == WORLD:
        world.write(WORLD)
    tower = clip_encoder.load(config.clip)
    if config.control == "random-clip":
        torch.manual_seed(0)
        tower = clip_encoder.randomized(tower)
    # The fingerprint of the weights in the name: features of another tower are never mistaken.
    name = f"{Path(config.clip).stem}-{clip_encoder.fingerprint(tower)}.safetensors"
    packed = Path(config.data) / "features" / name
    if not packed.exists():
        clip_encoder.extract(tower, config.images, packed, device=config.device)
    return clip_encoder.Features(packed)


def build(config: Config, features: clip_encoder.Features) -> tuple[VLModel, tokenizer.Tokenizer]:
    """The frozen language model with the method installed, and its tokenizer."""
    torch.manual_seed(config.seed)
    lm = t5.load(config.lm, dropout=config.dropout)
    if config.control == "random-lm":
        lm.init_weights()
    lm.resize(vocabulary(lm.config))
    m = VLModel(lm, features.width)
    m.install(adapters.method(config.method, lm.config.rms))
    return m.to(config.device), tokenizer.load(config.lm)


class Shuffled:
    """Features that hand out some other picture's, always the same one: a blind control."""

    def __init__(self, features: clip_encoder.Features, seed: int):
        order = torch.randperm(len(features.ids), generator=torch.Generator().manual_seed(seed))
        self.other = {a: features.ids[i] for a, i in zip(features.ids, order.tolist())}
        self.features, self.ids, self.width = features, features.ids, features.width

    def stack(self, ids: list[str]) -> torch.Tensor:
        return self.features.stack([self.other.get(i, i) for i in ids])


def load_split(config: Config, split: str, features) -> dict[str, list[data.Example]]:
    """The examples of every task; each picture they name must have features."""
    examples, known = {}, set(features.ids)
    for task in config.tasks.split(","):
        examples[task] = data.load(task, split, config.data)
        if lost := {i for ex in examples[task] for i in ex.images} - known:
            raise ValueError(
                f"{task} {split}: {len(lost)} pictures have no features, the first is "
                f"{min(lost)!r}: put them into {config.images} and delete {config.data}/features")
    return examples


# ------------------------------------------------------------------------------- testing

@torch.no_grad()
def predict(m: VLModel, tok, features, examples: list[data.Example], config: Config) -> list[str]:
    """One answer an example, decoded as its task asks (data.TASKS)."""
    m.eval()
    task = data.TASKS[examples[0].task]
    choices = [tok.encode(c)[0 if tok.bos_id is None else 1] for c in data.CHOICES]
    size, answers = 2 * data.batch_size(examples[0].task, config.batch), []
    # Texts of one length share a batch: less padding to decode over.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].text))
    for i in tqdm(range(0, len(order), size), f"test {examples[0].task}", leave=False):
        batch = data.collate([examples[j] for j in order[i:i + size]], tok, features,
                             task_names=config.task_names, boxes=config.boxes).to(config.device)
        with autocast(config):
            if task.decode == "choice":
                answers += [data.CHOICES[c] for c in m.choose(batch, choices).tolist()]
            else:
                ids = m.generate(batch, config.beams if task.decode == "beam" else 1)
                # The rows behind the tokenizer's own (added tokens) have no text.
                answers += [tok.decode([i for i in row if i < len(tok)]) for row in ids.tolist()]
    back = dict(zip(order, answers))
    return [back[i] for i in range(len(examples))]


def test(m: VLModel, tok, features, config: Config, split: str = "test") -> dict:
    """Scores of every task on a split, and their average; writes predictions/ and results."""
    results, out = {}, Path(config.out)
    for task, examples in load_split(config, split, features).items():
        answers = predict(m, tok, features, examples, config)
        results[task] = metrics.score(task, answers, examples)
        save_json(out / "predictions" / f"{task}.json",
                  [{"id": ex.id, "answer": a} for ex, a in zip(examples, answers)])
    results["average"] = sum(next(iter(s.values())) for s in results.values()) / len(results)
    return results


def report(config: Config, results: dict, counts: list, seconds: float) -> str:
    """The results as a table in Markdown."""
    _, trainable, total = counts[-1]
    lines = ["| task | metric | score |", "|---|---|---|"]
    lines += [f"| {task} | {name} | {value:.2f} |" for task, scores in results.items()
              if task != "average" for name, value in scores.items()]
    lines += [f"| **average** | headline metrics | **{results['average']:.2f}** |", "",
              f"{config.method}: trained {trainable:,} of {total:,} parameters "
              f"({100 * trainable / total:.2f} %), seed {config.seed}, {seconds:.0f} s"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- run folders

def save_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(path.name + ".tmp")
    making.write_text(json.dumps(content, indent=1))
    making.replace(path)


def save_last(out: Path, m: VLModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """last/: trained weights, the optimiser's moments, random states, the step; replaced whole."""
    making, last = out / "last.tmp", out / "last"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    tensors = {f"weight/{n}": t for n, t in m.trained().items()}
    for name, p in m.named_parameters():
        tensors |= {f"{k}/{name}": v for k, v in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    weights.write(making / "state.safetensors", tensors)
    save_json(making / "step.json", {"step": step})
    shutil.rmtree(last, ignore_errors=True)
    making.replace(last)


def load_last(out: Path, m: VLModel, optimizer: torch.optim.Optimizer) -> int:
    """Puts last/ back and returns the step to go on from."""
    if not (out / "last" / "step.json").is_file():
        raise FileNotFoundError(f"{out}/last is missing: there is nothing to resume; start afresh")
    state = weights.read(out / "last" / "state.safetensors")
    parts = defaultdict(dict)
    for key in state:
        kind, name = key.split("/")
        parts[name][kind] = state[key]
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.requires_grad:
                p.copy_(parts[name].pop("weight"))
                if parts[name]:
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device)
                                          for k, v in parts[name].items()}
    torch.set_rng_state(state["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in state:
        torch.cuda.set_rng_state(state["random/cuda"])
    return json.loads((out / "last" / "step.json").read_text())["step"]


# ------------------------------------------------------------------------------- the loop

def autocast(config: Config):
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


def make_optimizer(m: VLModel, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only (the papers' code decays norm weights too, by mistake)."""
    trained = [p for p in m.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-6)


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up from 0, then linear to 0."""
    warm = max(1, int(total * config.warmup))
    return config.lr * min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))


def train(m: VLModel, tok, features, config: Config, resume: bool = False) -> None:
    out, examples = Path(config.out), load_split(config, "train", features)
    optimizer = make_optimizer(m, config)
    per_epoch = data.steps_per_epoch(examples, config.batch)
    total = per_epoch * config.epochs
    first = load_last(out, m, optimizer) if resume else 0
    lines = (out / "log.jsonl").read_text().splitlines(True) if resume else []
    log = open(out / "log.jsonl", "w")
    log.writelines(line for line in lines if json.loads(line)["step"] <= first)
    losses, started = defaultdict(list), time.time()
    bar = tqdm(total=total, initial=first, desc=f"train {config.method}")
    for epoch in range(first // per_epoch, config.epochs):
        m.train()                                           # frozen layers keep their dropout
        plan = data.batches(examples, config.batch, epoch, config.seed)
        begin = max(0, first - epoch * per_epoch)
        for step, (task, rows) in enumerate(islice(plan, begin, None), epoch * per_epoch + begin):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config)
            batch = data.collate([examples[task][i] for i in rows], tok, features,
                                 task_names=config.task_names, boxes=config.boxes,
                                 seed_key=(config.seed, epoch)).to(config.device)
            with autocast(config):
                loss = m.loss(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(m.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()                           # None: idle modules stand still
            losses[task].append(loss.detach())
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == total:
                mean = {t: torch.stack(v).mean().item() for t, v in losses.items()}
                line = {"step": step + 1, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"],
                        "grad_norm": norm.item(), "seconds": round(time.time() - started, 1)}
                print(json.dumps(line | {"loss": mean}), file=log, flush=True)
                bar.set_postfix({t: f"{v:.2f}" for t, v in mean.items()})
                losses.clear()
            if (step + 1) % config.save_every == 0 or (step + 1) % per_epoch == 0:
                save_last(out, m, optimizer, step + 1)
    bar.close()
    log.close()
    weights.write(out / "adapter.safetensors", m.trained(),
                  {"config": json.dumps(asdict(config)), "method": config.method})


# ------------------------------------------------------------------------------- command line

def parse(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The command line, made from Config's fields."""
    parser = argparse.ArgumentParser(description="Train and test a method.")
    for f in fields(Config):
        kind = (get_args(f.type) or (f.type,))[0]                # int | None -> int
        parser.add_argument(flag(f.name), type=yes_or_no if kind is bool else kind,
                            default=f.default, metavar=kind.__name__,
                            help="by recipe" if f.default is None else f"default {f.default!r}")
    parser.add_argument("--resume", metavar="RUN", help="run folder to go on with")
    parser.add_argument("--test", metavar="RUN", help="run folder to test again")
    args = parser.parse_args(argv)
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)}), args


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def read_run(folder: str) -> Config:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no run folder")
    return replace(Config(**json.loads(path.read_text())), out=str(folder))


def run(config: Config, resume: bool = False, only_test: bool = False) -> dict:
    """Trains (unless only_test) and tests; returns the results."""
    started, out = time.time(), Path(config.out)
    features = prepare(config)
    m, tok = build(config, features)
    if config.control == "blind":
        features = Shuffled(features, config.seed)
    counts = m.counts()
    print(f"{'part':18}{'trainable':>12}{'total':>12}{'%':>9}")
    for part, trainable, total in counts:
        print(f"{part:18}{trainable:12,}{total:12,}{100 * trainable / max(1, total):9.4f}")
    if only_test:
        m.load_trained(out / "adapter.safetensors")
    else:
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / "config.json", asdict(config))
        train(m, tok, features, config, resume)
    results = test(m, tok, features, config)
    table = report(config, results, counts, time.time() - started)
    save_json(out / "results.json", results | {
        "trainable": counts[-1][1], "total": counts[-1][2], "seconds": time.time() - started})
    (out / "results.md").write_text(table + "\n")
    print(table)
    return results


def main(argv: list[str] | None = None) -> None:
    config, args = parse(argv)
    try:
        if args.resume or args.test:
            run(read_run(args.resume or args.test), bool(args.resume), bool(args.test))
        else:
            run(resolve(config))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; go on with --resume")


if __name__ == "__main__":
    main()
