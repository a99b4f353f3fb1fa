"""How is a method trained and tested?

One visible loop (VL-Adapter, section 4; VL-PET, section 4): tasks are mixed in proportion to their
size, a batch belongs to one task, only what the method's row opens is trained.

    python train.py                                  # vlpet-large on the built-in data, minutes
    python train.py --method adapter --seed 43       # another row, another seed
    python train.py --resume out/vlpet-large         # go on after an interruption, exactly
    python train.py --test out/vlpet-large           # load the adapter-only file, test again
    python -m pytest tests/test_train.py

A run folder holds config.json, log.jsonl (a line an interval), adapter.safetensors (what was
trained, nothing else), last/ (what an exact resume needs, and the best epoch's weights where there
are clips), predictions/<task>.json, results.json and results.md, submissions/ (what each
benchmark's server takes).
"""
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import clip_encoder
import data
from tools import peft as interchange
from support import metrics
from world import moving
from support import records
import methods as rows
import t5
from support import tokenizer
from support import weights
from world import scenes as world
from support.clips import frame_files, list_clips
from config import WORLD, Config, flag, parse, recipe, resolve, shows_clips
from support.features import INDEX, Features, Pixels, extract, list_files, read_index
from model import VLModel, vocabulary, widths


# ------------------------------------------------------------------------------- what is needed

def load_tower(config: Config):
    """The CLIP of a run."""
    tower = clip_encoder.load(config.clip)
    if config.control == "random-clip":
        torch.manual_seed(0)
        tower = clip_encoder.randomized(tower)
    return tower


PICTURES, CLIPS = "pictures", "clips"


def show(task: str) -> str:
    """What a task shows: PICTURES or CLIPS."""
    return CLIPS if data.TASKS[task].clips else PICTURES


def prepare(config: Config) -> dict[str, Features | Pixels]:
    """Of each task, the features of its pictures or clips: extracted once for each CLIP and state
    of their folder, or given as packed folders; or the pictures themselves."""
    tasks = config.tasks.split(",")
    if config.features == "none":
        found = {PICTURES: Pixels(load_tower(config), list_files(config.images))}
    elif config.features:
        folders = defaultdict(list)
        for folder in config.features.split(","):
            settings = read_index(Path(folder))["settings"]
            folders[CLIPS if "frames" in settings else PICTURES].append(folder)
        found = {shown: Features(some) for shown, some in folders.items()}
    else:
        tower = load_tower(config)
        found = {shown: pack_once(config, tower, shown)
                 for shown in dict.fromkeys(show(task) for task in tasks)}
    if lost := [task for task in tasks if show(task) not in found]:
        raise ValueError(f"--features {config.features} has no {show(lost[0])} for {lost[0]}: name "
                         "a packed folder of them, too")
    return {task: found[show(task)] for task in tasks}


def pack_once(config: Config, tower, shown: str) -> Features:
    """The packed folder of all PICTURES or CLIPS; written where it is missing."""
    source, clips = folder_of(config, shown), shown == CLIPS
    files = ([p for clip in list_clips(source).values() for p in frame_files(clip)] if clips else
             list_files(source).values())
    state = [clip_encoder.fingerprint(tower), *((str(p), p.stat().st_size) for p in files)]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    packed = Path(config.data) / "features" / f"{Path(config.clip).stem}-{digest}"
    if not (packed / INDEX).exists():
        extract(tower, source, packed, device=device_of(config), clips=clips)
    return Features(packed)


def folder_of(config: Config, shown: str) -> str:
    return config.clips if shown == CLIPS else config.images


def sources(features: dict[str, Features | Pixels]) -> dict[str, dict]:
    """Of PICTURES and CLIPS, pictures first, how the features were made and how wide they are."""
    found = {show(task): some.settings | {"width": some.width} for task, some in features.items()}
    return {shown: found[shown] for shown in (PICTURES, CLIPS) if shown in found}


def check_tower(held: dict[str, str], features: dict[str, Features | Pixels], hint: str) -> None:
    """A run must be shown what it was trained on. held: metadata of its adapter file."""
    before = json.loads(held.get("features", "{}"))
    for shown, now in sources(features).items():
        if shown not in before:
            raise ValueError(f"this run was trained without {shown}: ask it about others")
        was = before[shown]
        if other := [k for k in ("clip", "resize", "width") if k in was and was[k] != now.get(k)]:
            raise ValueError(f"this run saw {shown} through another CLIP ({', '.join(other)}: "
                             f"{was[other[0]]}, now {now.get(other[0])}): {hint}")


def device_of(config: Config) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def build(config: Config, features: dict[str, Features | Pixels],
          held: weights.Tensors | None = None) -> tuple[VLModel, tokenizer.Tokenizer]:
    """The frozen language model with the method installed, and its tokenizer. held: the adapter
    file that it will load, which may have more tasks and see more widths than are shown now."""
    torch.manual_seed(config.seed)
    lm = t5.load(config.lm, dropout=config.dropout)
    if config.control == "random-lm":
        lm.init_weights()
    lm.resize(vocabulary(lm.config))
    tasks, wide = config.tasks, [found["width"] for found in sources(features).values()]
    if held is not None:
        tasks, wide = json.loads(held.metadata["config"])["tasks"], widths(held)
    tower = next(iter(features.values())).tower if config.features == "none" else None
    m = VLModel(lm, wide, tower)
    if config.pretrained:
        begun = weights.read(Path(config.pretrained) / "adapter.safetensors")
        c = json.loads(begun.metadata["config"])
        if c["method"] != "full" or c["set"]:
            raise ValueError(f"--pretrained {config.pretrained} trained {c['method']}, not the "
                             "whole model: name a run of --method full")
        if c["train_clip"] and config.features != "none":
            raise ValueError(f"--pretrained {config.pretrained} trained CLIP, too: packed features "
                             "are from before that, use --features none")
        started = {n: p for n, p in m.named_parameters() if n in begun or not n.startswith("clip.")}
        weights.load(started, begun, where=f"--pretrained {config.pretrained}")
    method = rows.row(config.method, lm.config.is_t5, config.set)
    if config.train_clip:
        method = replace(method, open=(*method.open, "clip"))
    m.install(method, tuple(tasks.split(",")))
    return m.to(device_of(config)), tokenizer.load(config.lm)


def begin_with(m: VLModel, path: Path) -> None:
    """Fills what the row trains from a run folder, an adapter-only file or PEFT's folder."""
    if (path / "adapter_config.json").exists():
        if not interchange.load(m, path):
            print(f"{path} has no visual embedding: it starts afresh")
        return
    path = path / "adapter.safetensors" if path.is_dir() else path
    c = json.loads(weights.read(path).metadata.get("config", "{}"))
    if c and rows.row(c["method"], m.lm.config.is_t5, c["set"]) != m.method:
        raise ValueError(f"{path} was trained with --method {c['method']}"
                         f"{' --set ' * bool(c['set'])}{c['set']}: install the same row")
    m.load_trained(path)


class Shuffled:
    """Features that hand out some other picture's, always the same one: a blind control."""

    def __init__(self, features: Features, seed: int):
        order = torch.randperm(len(features.ids), generator=torch.Generator().manual_seed(seed))
        self.other = {a: features.ids[i] for a, i in zip(features.ids, order.tolist())}
        self.features = features

    def __getattr__(self, name: str):
        return getattr(self.features, name)                               # ids, width, tokens

    def stack(self, ids: list[str]) -> torch.Tensor:
        return self.features.stack([self.other.get(i, i) for i in ids])

    def frames(self, ids: list[str]) -> list[int] | None:
        return self.features.frames([self.other.get(i, i) for i in ids])


class Hidden(Shuffled):
    """Clips none of whose frames is real, so that nobody sees them: a control."""

    def frames(self, ids: list[str]) -> list[int]:
        return [0] * len(ids)


def load_examples(config: Config, split: str, tasks: list[str] | None = None
                  ) -> dict[str, list[data.Example]]:
    """The examples of every task, or of these; of split submit, of the tasks that have one."""
    found, tasks = {}, config.tasks.split(",") if tasks is None else tasks
    for task in tasks:
        try:
            found[task] = data.load(task, split, config.data)
            if config.control == "no-subtitles":
                found[task] = [replace(ex, context="") for ex in found[task]]
        except ValueError as why:
            if split != "submit":
                raise
            print(f"{task} is left out: {why}")
    if tasks and not found:
        raise ValueError(f"no task has questions to submit answers for in {config.data}")
    return found


def check_pictures(config: Config, examples: dict[str, list[data.Example]],
                   features: dict[str, Features | Pixels]) -> None:
    """Every picture and clip that an example names must have features."""
    for task, some in examples.items():
        if lost := {i for ex in some for i in ex.images} - set(features[task].ids):
            packed = config.features not in ("", "none")
            where = features[task].folders if packed else folder_of(config, show(task))
            raise ValueError(f"{task}: {len(lost)} {show(task)} that its examples name are not in "
                             f"{where}, the first is {min(lost)!r}: put or pack them there (the "
                             "name is the file's, without the ending)")


def check_texts(config: Config, examples: dict[str, list[data.Example]], tok,
                c: t5.Config) -> None:
    """The longest text of each task must fit: better now than in the middle of training."""
    for task, some in examples.items():
        for ex in max(some, key=lambda ex: len(ex.text)), max(some, key=data.length):
            ids = data.text_ids(ex, tok, config.task_names)
            if c.positions and len(ids) > c.positions - 2:
                raise ValueError(f"{task} {ex.id!r}: its text takes {len(ids)} tokens, and "
                                 f"{config.lm} has {c.positions - 2} positions: take another --lm")


# ------------------------------------------------------------------------------- testing

def choice_tokens(tok) -> list[int]:
    """The first tokens of "false" and "true" (behind <s>, where there is one)."""
    return [tok.encode(c)[0 if tok.bos_id is None else 1] for c in data.CHOICES]


def answer_text(tok, ids: list[int]) -> str:
    """Text of generated ids; the rows behind the tokenizer's own (added tokens) have none."""
    return tok.decode([i for i in ids if i < len(tok)])


def collate(examples: list[data.Example], tok, features, config: Config,
            seed_key: tuple | None = None) -> data.Batch:
    """The batch of examples of one task."""
    return data.collate(examples, tok, features[examples[0].task], task_names=config.task_names,
                        boxes=config.boxes, frames=config.frames, seed_key=seed_key
                        ).to(device_of(config))


@torch.no_grad()
def predict(m: VLModel, tok, features, examples: list[data.Example], config: Config) -> list[str]:
    """One answer an example of a task, decoded as it asks (data.TASKS)."""
    m.eval()
    task = data.TASKS[examples[0].task]
    choices, answers = choice_tokens(tok), []
    size = 2 * data.batch_size(examples[0].task, config.batch)
    # Texts of one length share a batch: less padding to decode over.
    order = sorted(range(len(examples)), key=lambda i: data.length(examples[i]))
    for i in tqdm(range(0, len(order), size), f"test {examples[0].task}", leave=False):
        batch = collate([examples[j] for j in order[i:i + size]], tok, features, config)
        with autocast(config):
            if task.decode == "choice":
                answers += [data.CHOICES[c] for c in m.choose(batch, choices).argmax(-1).tolist()]
            else:
                ids = m.generate(batch, config.beams if task.decode == "beam" else 1)
                answers += [answer_text(tok, row) for row in ids.tolist()]
    back = dict(zip(order, answers))
    return [back[i] for i in range(len(examples))]


def test(m: VLModel, tok, features, examples: dict[str, list], config: Config,
         split: str = "test") -> dict:
    """Scores of every task, and the average of their headlines ("submit" has neither); writes
    predictions/ and submissions/."""
    results = {}
    for task, some in examples.items():
        answers, name = predict(m, tok, features, some, config), task
        if split != "submit":
            results[task] = metrics.score(task, answers, some)
        if split != "test":
            name = f"{task}-{split}"
        save_json(Path(config.out) / "predictions" / f"{name}.json",
                  [{"id": ex.id, "answer": a} for ex, a in zip(some, answers)])
        try:
            data.submission(task, answers, some, Path(config.out) / "submissions" / name)
        except ValueError as why:                # a data set of one's own may have other ids
            print(f"{task}: no submission file was written: {why}")
    if results:
        results["average"] = average(results)
    return results


def average(results: dict[str, dict[str, float]]) -> float:
    """Of the tasks' headlines, which come first."""
    return sum(next(iter(scores.values())) for scores in results.values()) / len(results)


def validate(m: VLModel, tok, features, examples: dict[str, list], config: Config) -> dict:
    """{"validation": a headline a task, "mean": their mean}."""
    scores = {task: metrics.score(task, predict(m, tok, features, some, config), some)
              for task, some in examples.items()}
    return {"validation": {task: next(iter(s.values())) for task, s in scores.items()},
            "mean": average(scores)}


def report(config: Config, results: dict, counts: list, seconds: float, split: str) -> str:
    """The results as a table in Markdown."""
    _, trainable, total = counts[-1]
    name = config.method + f" ({config.set})" * bool(config.set)
    name += f" ({config.control})" * bool(config.control)
    lines = ["| task | metric | score |", "|---|---|---|"]
    lines += [f"| {task} | {name} | {value:.2f} |" for task, scores in results.items()
              if task != "average" for name, value in scores.items()]
    lines += [f"| **average** | headline metrics | **{results['average']:.2f}** |", "",
              f"{name}: trained {trainable:,} of {total:,} parameters "
              f"({100 * trainable / total:.2f} %), seed {config.seed}, split {split}, "
              f"{seconds:.0f} s"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- run folders

def save_text(path: Path, text: str) -> None:
    """Written beside and moved over: the name never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(text, encoding="utf-8")
    os.replace(making, path)


def save_json(path: Path, content) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")


def save_last(out: Path, m: VLModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """last/: trained weights, the optimiser's moments, random states and the step, in one file."""
    tensors = {f"weight/{n}": t for n, t in m.trained().items()}
    for name, p in m.named_parameters():
        tensors |= {f"{k}/{name}": v for k, v in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    weights.write(out / "last" / "state.safetensors", tensors, {"step": str(step)})


def load_last(out: Path, m: VLModel, optimizer: torch.optim.Optimizer) -> int:
    """Puts last/ back and returns the step to go on from."""
    path = out / "last" / "state.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: nothing was saved yet, start the run afresh")
    state = weights.read(path)
    weights.load({f"weight/{n}": t for n, t in m.trained().items()},
                 {k: state[k] for k in state if k.startswith("weight/")}, where=str(path))
    for name, p in m.named_parameters():
        moments = {k: state[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                   if f"{k}/{name}" in state}
        if moments:
            optimizer.state[p] = {k: t if k == "step" else t.to(p.device)
                                  for k, t in moments.items()}
    torch.set_rng_state(state["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in state:
        torch.cuda.set_rng_state(state["random/cuda"])
    return int(state.metadata["step"])


def open_log(path: Path, first: int):
    """log.jsonl, without the lines behind the step that the run goes on from."""
    lines = path.read_text().splitlines(True) if first else []
    log = open(path, "w")
    log.writelines(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= first)
    return log


# ------------------------------------------------------------------------------- the loop

def autocast(config: Config):
    return torch.autocast(device_of(config), torch.bfloat16, enabled=config.precision == "bf16")


def make_optimizer(m: VLModel, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices only (the papers' code decays norm weights too, by mistake)."""
    trained = [p for p in m.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-6)


def learning_rate(step: int, total: int, config: Config) -> float:
    """Linear warm-up from 0 over the first `warmup` of all steps, then linear to 0."""
    warm = int(total * config.warmup)
    return config.lr * (step / warm if step < warm else (total - step) / max(1, total - warm))


def train(m: VLModel, tok, features, examples: dict[str, list], vals: dict[str, list],
          config: Config, resume: bool = False) -> None:
    """Leaves what was trained in adapter.safetensors: as it is after the last epoch; given `vals`,
    after the epoch with the best mean of the validation scores."""
    out, optimizer = Path(config.out), make_optimizer(m, config)
    per_epoch = data.steps_per_epoch(examples, config.batch)
    total = per_epoch * config.epochs
    first = load_last(out, m, optimizer) if resume else 0
    if not resume:
        save_last(out, m, optimizer, 0)                          # whatever happens can be resumed
    losses, started, best = defaultdict(list), time.time(), out / "last" / "best.safetensors"
    with (open_log(out / "log.jsonl", first) as log,
          tqdm(total=total, initial=first, desc=f"train {config.method}") as bar):
        for epoch in range(first // per_epoch, config.epochs):
            m.train()                                       # frozen layers keep their dropout
            plan = data.batches(examples, config.batch, epoch, config.seed)
            begin = max(first, epoch * per_epoch)
            for step, (task, chosen) in enumerate(islice(plan, begin % per_epoch, None), begin):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, config)
                batch = collate([examples[task][i] for i in chosen], tok, features, config,
                                seed_key=(config.seed, epoch))
                with autocast(config):
                    loss = m.loss(batch)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(m.parameters(), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()                       # to None: idle modules stand still
                losses[task].append(loss.detach())
                bar.update()
                done = step + 1
                if done % config.log_every == 0 or done == total:
                    mean = {t: torch.stack(v).mean().item() for t, v in losses.items()}
                    line = {"step": done, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"],
                            "grad_norm": norm.item(), "seconds": round(time.time() - started, 1)}
                    print(json.dumps(line | {"loss": mean}), file=log, flush=True)
                    bar.set_postfix({t: f"{v:.2f}" for t, v in mean.items()})
                    losses.clear()
                if done % per_epoch == 0 and vals:
                    line = {"step": done, "epoch": epoch} | validate(m, tok, features, vals, config)
                    print(json.dumps(line), file=log, flush=True)
                    if not best.exists() or line["mean"] > best_mean(best):
                        save_trained(best, m, features, config, line)
                if done % config.save_every == 0 or done % per_epoch == 0:
                    save_last(out, m, optimizer, done)
    found = weights.read(best).metadata if vals and best.exists() else {}
    if found:
        m.load_trained(best)
        print(f"best mean of the validation scores: {float(found['mean']):.2f}, of epoch "
              f"{int(found['epoch']) + 1} of {config.epochs}")
    save_trained(out / "adapter.safetensors", m, features, config, found)


def best_mean(path: Path) -> float:
    return float(weights.read(path).metadata["mean"])


def save_trained(path: Path, m: VLModel, features, config: Config, found: dict) -> None:
    """An adapter-only file; its metadata says how it was made."""
    weights.write(path, m.trained(), {
        "config": json.dumps(asdict(config)), "method": config.method,
        "features": json.dumps(sources(features)),
        **{name: str(found[name]) for name in ("epoch", "mean") if name in found}})


# ------------------------------------------------------------------------------- command line

def read_run(folder: str, **given) -> Config:
    """The configuration of a run folder, with what is given instead of its own."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no run folder")
    content = records.read_json(path)
    known = {f.name for f in fields(Config)}
    if not isinstance(content, dict) or (odd := content.keys() ^ known):
        raise ValueError(f"{path} is no configuration of this version: its fields should be those "
                         f"of config.py, but differ in {', '.join(sorted(odd))}")
    config = Config(**content)
    if "data" in given:
        if config.features not in ("", "none") and "features" not in given:
            raise ValueError("--data beside --test: this run was trained on packed --features, so "
                             "name the other data's, too")
        given = {"images": "", "clips": ""} | given
    return resolve(replace(config, out=str(folder), **given))


def run(config: Config, resume: bool = False, only_test: bool = False,
        split: str = "test") -> dict:
    """Trains (unless only_test) and tests. No run folder is made before all annotations are read,
    all pictures found and the model is built."""
    started, out = time.time(), Path(config.out)
    if config.data == WORLD:
        world.write(WORLD)
        if shows_clips(config):
            moving.write(WORLD)
    examples = {} if only_test else load_examples(config, "train")
    try:
        tests = load_examples(config, split)
    except data.Unanswered as why:
        print(f"{why} The validation split is scored instead; what their server scores comes from "
              f"python train.py --test {out} --split submit")
        tests, split = load_examples(config, "val"), "val"
    vals = {}
    if config.epochs > 1 and not only_test:               # clips: the best epoch is tested
        clips = [task for task in config.tasks.split(",") if show(task) == CLIPS]
        vals = load_examples(config, "val", clips)
    features = prepare(config)
    for some in (examples, tests, vals):
        check_pictures(config, some, features)
    held = None
    if only_test:
        held = weights.read(out / "adapter.safetensors")
        check_tower(held.metadata, features, "give back the CLIP or the features that it had")
    m, tok = build(config, features, held)
    for some in (examples, tests, vals):
        check_texts(config, some, tok, m.lm.config)
    if hide := {"blind": Shuffled, "no-frames": Hidden}.get(config.control):
        features = {task: hide(found, config.seed) for task, found in features.items()}
    counts = m.counts()
    default = recipe(config, m.lm.config.is_t5)
    print(config.method + f" with {config.set}" * bool(config.set) + ": " + ", ".join(
        f"{k} {getattr(config, k)}" + f" (recipe {v})" * (getattr(config, k) != v)
        for k, v in default.items()))
    print(f"{'part':18}{'trainable':>12}{'total':>12}{'%':>9}")
    for part, trainable, total in counts:
        print(f"{part:18}{trainable:12,}{total:12,}{100 * trainable / max(1, total):9.4f}")
    if only_test:
        m.load_trained(out / "adapter.safetensors")
    else:
        if config.init:
            begin_with(m, Path(config.init))
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / "config.json", asdict(config))
        train(m, tok, features, examples, vals, config, resume)
    results = test(m, tok, features, tests, config, split)
    if not results:
        print(f"answers without scores are in {out / 'submissions'}")
        return results
    seconds = time.time() - started
    table = report(config, results, counts, seconds, split)
    if not only_test:
        save_json(out / "results.json", results | {
            "trainable": counts[-1][1], "total": counts[-1][2], "seconds": round(seconds, 1),
            "split": split})
        save_text(out / "results.md", table + "\n")
    print(table)
    return results


def main(argv: list[str] | None = None) -> None:
    config, args = parse(argv)
    try:
        if args.resume or args.test:
            # A trained run may be shown other data; what it is stays as it was.
            free = ("device",) if args.resume else (
                "device", "tasks", "images", "clips", "features", "data")
            if args.resume and args.test or args.given.keys() - set(free):
                raise ValueError("--test and --resume take all settings from the run's folder: "
                                 "give one of them, and beside it at most "
                                 f"{', '.join(map(flag, free))}")
            config = read_run(args.resume or args.test, **args.given)
        elif args.split != "test":
            raise ValueError("--split needs --test RUN: training ends with a test of split test")
        else:
            config = resolve(config)
            if file := next((p for p in Path(config.out).parents if p.is_file()), None):
                raise NotADirectoryError(f"{file} is a file, so {config.out} cannot be made: name "
                                         "another --out")
            if Path(config.out).exists():
                raise FileExistsError(f"{config.out} exists: name another --out, delete it, or go "
                                      f"on with --resume {config.out}")
        run(config, bool(args.resume), bool(args.test), args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        going_on = f"; go on with python train.py --resume {config.out}"
        sys.exit("train.py: interrupted" + going_on * (Path(config.out) / "last").exists())


if __name__ == "__main__":
    main()
