"""What does a run depend on?

Config is the whole answer: train.py's command line is made from its fields, and a run's folder
holds it. What it leaves open is looked up in RECIPES, the published settings.

    python train.py --help           # all fields, all recipes
    python -m pytest tests/test_config.py
"""
import argparse
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import torch

import data
import methods
import t5
from support import published_lm
from support.gate import Number, check, reading

WORLD = "datasets/world"
TINY_BART, TINY_BART_VIDEO = "weights/tiny-bart", "weights/tiny-bart-video"
COUNT = Number(1, 10**9, whole=True)


def option(default: object, told: str, want: object = str) -> field:
    """A field of Config: its default, what --help says about it, what it may be beside None."""
    return field(default=default, metadata={"help": told, "want": want})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. None: looked up in RECIPES, or read off data and model."""
    method: str = option("vlpet-large", "a row of the table in methods.py")
    set: str = option("", "changes of the row, see below: r=48,decoder=none")
    tasks: str = option("vqa,gqa,nlvr,caption", "comma between; also snli or tvqa,how2qa,tvc,yc2c")
    data: str = option(WORLD, "folder in the published formats; if built-in, written if missing")
    images: str = option("", "folder of pictures; default: the data folder's images/")
    clips: str = option("", "folder of clips; default: the data folder's video/clips/")
    lm: str = option("", "folder of a T5, BART or BERT; default: a tiny BART of weights/")
    clip: str = option("weights/tiny-clip", "folder or file of a CLIP image tower")
    features: str = option("", "packed folders of tools/pack.py, comma between; none: the "
                           "pictures themselves, CLIP in the model; default: packed once")
    train_clip: bool = option(False, "open CLIP, too (needs --features none)", bool)
    pretrained: str = option("", "run folder of row full: the method starts from what it trained")
    out: str = option("", "run folder; default: out/<method>, numbered if it is taken")
    epochs: int | None = option(None, "times that every example is seen (by recipe)",
                                Number(0, 10**6, whole=True))
    steps: int | None = option(None, "steps in all instead: one task as long as four", COUNT)
    batch: int | None = option(None, "of vqa; other tasks have a share of it (by recipe)", COUNT)
    accumulate: int = option(1, "parts that a batch is computed in: the same step, less memory",
                             COUNT)
    lr: float | None = option(None, "highest learning rate (by recipe)", Number(1e-9, 10))
    task_names: bool | None = option(None, "put \"vqa: \" before the text (by recipe)", bool)
    warmup: float = option(0.1, "share of all steps in which the learning rate rises", Number(0, 1))
    weight_decay: float = option(0.01, "of matrices", Number(0, 1))
    clip_norm: float = option(5.0, "longer gradients are shortened to it", Number(1e-9, 1e9))
    dropout: float | None = option(None, "default: the language model's own", Number(0, 0.99))
    boxes: str = option("grid", "of visual tokens; zero: as in the papers' code", {"grid", "zero"})
    frames: str = option("real", "of clips; all: padding too, as the papers' code", {"real", "all"})
    subtitles: str = option("", "of clips: all of the video's, as the papers, or of the span asked "
                            "about; default: all, of built-in clips span", {"", "all", "span"})
    precision: str = option("fp32", "of matrix products; or tf32, or bf16 (autocast; so are frozen "
                            "matrices kept)", {"fp32", "tf32", "bf16"})
    compile: bool = option(False, "the training loss by torch.compile: minutes once, then faster",
                           bool)
    checkpoint: bool = option(False, "the encoder's activations are not kept but computed again in "
                              "the backward pass: a third more time, much less memory", bool)
    answers: str = option("", "yes: an answer is chosen among those of the training data, not "
                          "written; or a JSON file that lists the answers of one task")
    beams: int = option(5, "of captions and of answers about clips", Number(1, 100, whole=True))
    keep: str = option("", "which epoch is tested: last, or best (mean of the validation scores); "
                       "default: last, for clips best", {"", "last", "best"})
    seed: int = option(42, "of everything that is drawn", Number(0, 2**63 - 1, whole=True))
    device: str = option("", "cpu or cuda; default: cuda if there is one", {"", "cpu", "cuda"})
    init: str = option("", "begin with the weights of a run folder or an adapter file")
    control: str = option("", "blind: pictures shuffled among the examples; no-frames, "
                          "no-subtitles: of clips; random-lm, random-clip: not pre-trained", {
                              "", "blind", "no-frames", "no-subtitles", "random-lm", "random-clip"})
    log_every: int = option(50, "steps", COUNT)
    save_every: int = option(500, "steps, and at the end of an epoch", COUNT)


# (data, dialect) -> row -> (lr, batch, epochs, task names in the text); * is any text, "" is
# every other row. Image and video are VL-Adapter's and VL-PET's published settings (LST's for full,
# adapter and lora on T5); those of the built-in world, still and moving, are ours. Where pictures
# and clips are mixed, it is the clips' recipe. Nothing was published for DoRA and (IA)3 (here like
# LoRA), nor for video on T5 (here like BART). bert is CLIP-ViL's VQA: of its adapters, only these
# are published, and --warmup 0.05 --clip-norm 1 belong to them.
RECIPES = {
    ("world", "bart"): {"full": (1e-3, 64, 1, True), "": (3e-3, 64, 1, True)},
    ("moving", "bart"): {"full": (1e-3, 16, 2, True), "": (3e-3, 16, 2, True)},
    ("image", "bart"): {
        "full": (1e-4, 500, 20, False), "hyperformer": (1e-3, 500, 20, False),
        "adapter-multiple": (3e-4, 500, 20, False), "adapter-half-shared": (3e-4, 500, 20, False),
        "*-multiple": (1e-3, 500, 20, False), "": (1e-3, 500, 20, True)},
    ("image", "t5"): {"full": (1e-4, 300, 20, True), "": (3e-4, 300, 20, True)},
    ("image", "bert"): {"full": (5e-5, 256, 5, False), "": (5e-4, 256, 5, False)},
    ("video", "bart"): {"full": (3e-5, 50, 7, True), "vlpet-*": (7e-4, 50, 20, True),
                        "*+*": (7e-4, 50, 20, True), "": (3e-4, 50, 7, True)},
}
for kind, dialect in (("world", "t5"), ("world", "bert"), ("moving", "t5"), ("video", "t5")):
    RECIPES[kind, dialect] = RECIPES[kind, "bart"]


# -------------------------------------------------------------------------- checked and complete

def shipped(name: str) -> str:
    """What weights/ holds is found beside the code, too, wherever a program is started."""
    beside = Path(__file__).parent / name
    return str(beside) if not Path(name).exists() and beside.exists() else name


def task_list(config: Config) -> list[str]:
    return config.tasks.split(",")


def shows_clips(config: Config) -> bool:
    """Does one of the tasks?"""
    return any(data.TASKS[task].clips for task in task_list(config))


def resolve(config: Config) -> Config:
    """Checks a configuration and fills what it leaves open, but for `out`."""
    for f in fields(Config):
        with reading(flag(f.name)):
            name = f.name if f.default is not None else f"{f.name}?"
            check(vars(config), {name: f.metadata["want"]})
    with reading("--tasks"):
        for task in task_list(config):
            assert task in data.TASKS, f"no {task!r}; the tasks are {', '.join(data.TASKS)}"
    with reading("settings that do not go together"):
        check_together(config)
    default_lm = TINY_BART_VIDEO if shows_clips(config) else TINY_BART
    config = replace(config, lm=shipped(config.lm or default_lm), clip=shipped(config.clip))
    lm = published_lm.read_config(config.lm)
    with reading(config.lm):
        assert config.answers or lm.layers[1], "it has no decoder to write with: add --answers yes"
    methods.row(config.method, lm.is_t5, config.set)        # says what is wrong with it
    known = recipe(config, lm) | {
        "dropout": lm.dropout, "keep": "best" if shows_clips(config) else "last",
        "subtitles": "span" if built_in(config) else "all",
        "images": f"{config.data}/images", "clips": f"{config.data}/video/clips"}
    given = {name for name in known if getattr(config, name) not in (None, "")}
    return replace(config, **{name: known[name] for name in known.keys() - given})


def check_together(c: Config) -> None:
    clips = [data.TASKS[task].clips for task in task_list(c)]
    assert c.features != "none" or not any(clips), "--features none is for pictures, not for clips"
    assert not c.train_clip or c.features == "none", "--train-clip yes needs --features none"
    assert c.control != "random-clip" or c.features in ("", "none"), \
        "--control random-clip needs pictures, not packed --features"
    assert not (c.control.startswith("random") and c.pretrained), \
        f"--control {c.control} beside --pretrained would be no control"
    assert not c.control.startswith("no-") or all(clips), f"--control {c.control} is for clips"
    assert c.control != "no-frames" or c.frames == "real", "--control no-frames needs --frames real"
    written = [task for task in task_list(c) if not data.TASKS[task].answers]
    assert not c.answers or not written, f"--answers: those of {', '.join(written)} are written"
    assert c.steps is None or c.epochs is None, "--steps or --epochs, one of them"
    assert c.device != "cuda" or torch.cuda.is_available(), "this PyTorch sees no --device cuda"


def built_in(config: Config) -> bool:
    """Is it the built-in world that the tasks are about?"""
    folder = Path(config.data)
    halves = [folder / "video" if data.TASKS[task].clips else folder for task in task_list(config)]
    return config.data == WORLD or all((half / "world.json").is_file() for half in halves)


def recipe(config: Config, lm: t5.Config) -> dict:
    """The recipe's lr, batch, epochs and task_names for this backbone, data and row."""
    still, moving = ("world", "moving") if built_in(config) else ("image", "video")
    dialect = "t5" if lm.is_t5 else "bart"
    if lm.layers[1] == 0:                                   # it has no decoder
        dialect = "bert"
    table = RECIPES[moving if shows_clips(config) else still, dialect]
    row = next(row for row in table if not row or fnmatchcase(config.method, row))
    found = dict(zip(("lr", "batch", "epochs", "task_names"), table[row]))
    if config.steps is not None:
        del found["epochs"]
    return found


# -------------------------------------------------------------------------------- command line

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The command line, made from Config's fields; `given` holds those that it names."""
    parser = argparse.ArgumentParser(description="Train and test a method.", epilog=recipes(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        told = f.metadata["help"] + (f" (default {f.default})" if f.default else "")
        kind = (get_args(f.type) or (f.type,))[0]           # int | None -> int
        parser.add_argument(flag(f.name), type=yes_or_no if kind is bool else kind,
                            help=told, default=argparse.SUPPRESS, metavar=kind.__name__)
    parser.add_argument("--resume", metavar="RUN", help="run folder to go on with")
    parser.add_argument("--test", metavar="RUN", help="run folder to test again")
    parser.add_argument("--split", default="test", choices=("val", "test", "submit"),
                        help="with --test: submit is what a benchmark's server scores")
    args = parser.parse_args(argv)
    args.given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    # Settings that a finished run may still be given; all others stay as they were.
    free = ["device"] if args.resume else ["device", "tasks", "images", "clips", "features", "data"]
    with reading("--test, --resume and --split"):
        assert not (args.resume and args.test), "give one of --test and --resume"
        assert args.test or args.split == "test", "--split needs --test RUN"
        assert not (args.resume or args.test) or args.given.keys() <= set(free), \
            f"all settings come from the run's folder: add at most {', '.join(map(flag, free))}"
    return Config(**args.given), args


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def recipes() -> str:
    """All of RECIPES as a table, for --help, and what --set knows."""
    lines = ["recipes (each value can be set by its flag):",
             f"  {'data':8}{'dialect':9}{'row':22}{'lr':>8}{'batch':>7}{'epochs':>8}  task-names"]
    for (kind, dialect), table in RECIPES.items():
        for row, (lr, batch, epochs, names) in table.items():
            lines.append(f"  {kind:8}{dialect:9}{row or 'every other':22}{lr:8g}{batch:7}"
                         f"{epochs:8}  {'yes' if names else 'no'}")
    return "\n".join([*lines, "", methods.grammar()])
