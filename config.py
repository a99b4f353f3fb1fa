"""What does a run depend on?

Config is the whole answer: `train.py`'s command line is made from its fields, and a run's folder
holds it. What it leaves open is looked up in RECIPES, the published settings of VL-Adapter and
VL-PET.

    python train.py --help           # all fields, all recipes
    python -m pytest tests/test_train.py
"""
import argparse
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import get_args

import torch

import adapters
import data
import methods as rows
import t5

WORLD = "data/world"
LMS = {False: "weights/tiny-bart", True: "weights/tiny-bart-video"}      # does a task show clips?
CONTROLS = ("", "blind", "no-frames", "no-subtitles", "random-lm", "random-clip")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. A value of None is looked up in RECIPES; dropout is the language
    model's."""
    method: str = "vlpet-large"          # a row of adapters.py's table
    set: str = ""                        # changes of the row (rows.row): r=48,decoder=none
    tasks: str = "vqa,gqa,nlvr,caption"
    data: str = WORLD                    # folder in the published formats; the built-in one is
    #                                      written where it is missing
    images: str = ""                     # folder of pictures; "": the data folder's images/
    clips: str = ""                      # folder of clips; "": the data folder's video/clips/
    lm: str = ""                         # folder of a T5 or BART; "": LMS
    clip: str = "weights/tiny-clip"      # folder or file of a CLIP image tower
    features: str = ""                   # "": of the pictures, packed once; packed folders, a comma
    #                                      between, of pictures and of clips; none: pictures
    #                                      themselves, CLIP in the model
    train_clip: bool = False             # needs --features none
    pretrained: str = ""                 # run folder of row full: its language model and visual
    #                                      embedding are what the method starts from
    out: str = ""                        # run folder; "": out/<method>, numbered if it is taken
    epochs: int | None = None
    batch: int | None = None             # of vqa; other tasks have their share of it
    lr: float | None = None
    task_names: bool | None = None       # "vqa: " before the text
    warmup: float = 0.1                  # share of all steps
    weight_decay: float = 0.01
    clip_norm: float = 5.0
    dropout: float | None = None
    boxes: str = "grid"                  # "zero": as the papers' code feeds them
    frames: str = "real"                 # "all": padding frames are seen, as in the papers' code
    precision: str = "fp32"              # or bf16 (autocast)
    beams: int = 5                       # of captions and of what is asked about clips
    seed: int = 42
    device: str = ""                     # "": cuda if there is one, else cpu
    init: str = ""                       # begin with the weights of a run folder, an adapter file
    #                                      or a folder of the PEFT library
    control: str = ""                    # blind: pictures shuffled among the examples; no-frames,
    #                                      no-subtitles: of clips; random-lm, random-clip: without
    #                                      pre-trained weights
    log_every: int = 50                  # steps
    save_every: int = 500                # steps, and at the end of an epoch


# (data, dialect) -> row -> (lr, batch, epochs, task names in the text); * is any text, "" is
# every other row. Image and video are VL-Adapter's and VL-PET's published settings (LST's for full,
# adapter and lora on T5); those of the built-in world, still and moving, are ours. Where pictures
# and clips are mixed, it is the clips' recipe. Nothing was published for DoRA and (IA)3 (here like
# LoRA), nor for video on T5 (here like BART).
RECIPES = {
    ("world", "bart"): {"full": (1e-3, 64, 1, True), "": (3e-3, 64, 1, True)},
    ("world", "t5"): {"full": (1e-3, 64, 1, True), "": (3e-3, 64, 1, True)},
    ("moving", "bart"): {"full": (1e-3, 16, 2, True), "": (3e-3, 16, 2, True)},
    ("image", "bart"): {
        "full": (1e-4, 500, 20, False), "hyperformer": (1e-3, 500, 20, False),
        "adapter-multiple": (3e-4, 500, 20, False), "adapter-half-shared": (3e-4, 500, 20, False),
        "*-multiple": (1e-3, 500, 20, False), "": (1e-3, 500, 20, True)},
    ("image", "t5"): {"full": (1e-4, 300, 20, True), "": (3e-4, 300, 20, True)},
    ("video", "bart"): {"full": (3e-5, 50, 7, True), "vlpet-*": (7e-4, 50, 20, True),
                        "*+*": (7e-4, 50, 20, True), "": (3e-4, 50, 7, True)},
}
RECIPES["video", "t5"], RECIPES["moving", "t5"] = (
    RECIPES["video", "bart"], RECIPES["moving", "bart"])


# What a number may be: from, to (both allowed).
RANGES = {"epochs": (0, 10**6), "batch": (1, 10**6), "lr": (1e-9, 10.0), "warmup": (0.0, 1.0),
          "weight_decay": (0.0, 1.0), "clip_norm": (1e-9, 1e9), "dropout": (0.0, 0.99),
          "beams": (1, 100), "seed": (0, 2**63 - 1), "log_every": (1, 10**9),
          "save_every": (1, 10**9)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(config: Config) -> Config:
    """Checks a configuration and fills what it leaves open; ValueError names flag and remedy."""
    def one_of(name: str, allowed) -> None:
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{flag(name)} is {value!r}; allowed are "
                             f"{', '.join(map(repr, allowed))}")

    for f in fields(Config):
        value, kinds = getattr(config, f.name), get_args(f.type) or (f.type,)
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            raise ValueError(f"{flag(f.name)} is {value!r}; it must be a {kinds[0].__name__}")
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:              # also true for nan
            raise ValueError(f"{flag(name)} is {value}; it must be from {low:g} to {high:g}")
    for task in config.tasks.split(","):
        if task not in data.TASKS:
            raise ValueError(f"--tasks names {task!r}; the tasks are {', '.join(data.TASKS)}")
    one_of("boxes", ("grid", "zero"))
    one_of("frames", ("real", "all"))
    one_of("precision", ("fp32", "bf16"))
    one_of("control", CONTROLS)
    one_of("device", ("", "cpu", "cuda"))
    if config.features == "none" and shows_clips(config):
        raise ValueError("--features none is for pictures: clips are packed")
    if config.train_clip and config.features != "none":
        raise ValueError("--train-clip yes needs --features none: packed features never change")
    if config.control == "random-clip" and config.features not in ("", "none"):
        raise ValueError("--control random-clip needs pictures, not packed --features")
    if config.control.startswith("random") and config.pretrained:
        raise ValueError(f"--control {config.control} beside --pretrained would be no control")
    if config.control.startswith("no-"):
        if not all(data.TASKS[task].clips for task in config.tasks.split(",")):
            raise ValueError(f"--control {config.control} is for tasks that show clips")
        if config.control == "no-frames" and config.frames == "all":
            raise ValueError("--control no-frames needs --frames real")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', but this PyTorch sees no CUDA device: leave it out")
    config = replace(config, lm=config.lm or LMS[shows_clips(config)])
    c = t5.read_config(config.lm)
    one_of("method", adapters.methods(c.is_t5))
    rows.row(config.method, c.is_t5, config.set)            # says what is wrong with --set
    filled = {k: v for k, v in recipe(config, c.is_t5).items() if getattr(config, k) is None}
    return replace(
        config, **filled, dropout=c.dropout if config.dropout is None else config.dropout,
        images=config.images or f"{config.data}/images",
        clips=config.clips or f"{config.data}/video/clips", out=config.out or free_folder(config))


def shows_clips(config: Config) -> bool:
    """Does one of the tasks?"""
    return any(data.TASKS[task].clips for task in config.tasks.split(","))


def recipe(config: Config, is_t5: bool) -> dict:
    """The recipe's lr, batch, epochs and task_names for this backbone, data and row."""
    halves = {("", "video")[data.TASKS[task].clips] for task in config.tasks.split(",")}
    is_world = config.data == WORLD or all(
        (Path(config.data) / half / "world.json").is_file() for half in halves)
    kind = {(True, False): "world", (True, True): "moving", (False, False): "image",
            (False, True): "video"}[is_world, shows_clips(config)]
    table = RECIPES[kind, "t5" if is_t5 else "bart"]
    found = next(name for name in table if not name or fnmatchcase(config.method, name))
    return dict(zip(("lr", "batch", "epochs", "task_names"), table[found]))


def recipes() -> str:
    """All of RECIPES as a table, for --help."""
    lines = ["recipes (each value can be set by its flag):",
             f"  {'data':8}{'dialect':9}{'row':22}{'lr':>8}{'batch':>7}{'epochs':>8}  task-names"]
    lines += [f"  {kind:8}{dialect:9}{name or 'every other':22}{lr:8g}{batch:7}{epochs:8}  "
              f"{'yes' if names else 'no'}" for (kind, dialect), table in RECIPES.items()
              for name, (lr, batch, epochs, names) in table.items()]
    return "\n".join(lines) + "\n\n" + rows.grammar()


def free_folder(config: Config) -> str:
    """out/<method>-<control>, or with the first number behind it that is not taken."""
    name = f"out/{config.method}" + f"-{config.control}" * bool(config.control)
    numbered = (f"{name}-{i}" if i > 1 else name for i in count(1))
    return next(path for path in numbered if not Path(path).exists())


def parse(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The command line, made from Config's fields; `given` holds those that it names."""
    parser = argparse.ArgumentParser(description="Train and test a method.", epilog=recipes(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = (get_args(f.type) or (f.type,))[0]                # int | None -> int
        known = ("the language model's" if f.name == "dropout" else "by recipe" if f.default is None
                 else f"default {f.default!r}")
        parser.add_argument(flag(f.name), type=yes_or_no if kind is bool else kind, help=known,
                            default=argparse.SUPPRESS, metavar=kind.__name__)
    parser.add_argument("--resume", metavar="RUN", help="run folder to go on with")
    parser.add_argument("--test", metavar="RUN", help="run folder to test again")
    parser.add_argument("--split", default="test", choices=("val", "test", "submit"),
                        help="with --test: submit is what a benchmark's server scores")
    args = parser.parse_args(argv)
    args.given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    return Config(**args.given), args


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"
