"""Does a run that is killed at any moment and resumed leave the bytes of an undisturbed one?

    python -m tests.kills                   # 60 kills in five kinds of run, about 10 minutes
    python -m tests.kills --kills 6 --scenarios pictures t5 --seed 3

Every scenario is a first run on small random models, in an empty folder: it writes its world, packs
its features, trains, validates and tests. A SIGKILL falls at a random moment; then --resume, or,
where there was no run yet, the same command. At the end everything but time and memory is compared.
"""
import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

import clip_encoder
import t5
import train
from support import features
from support.tokenizer import load_tokenizer
from world import moving, pretrain_clip, pretrain_lm, scenes

OUT = "out/run"
EVERY = ("--batch", "32", "--lr", "1e-3", "--beams", "2", "--device", "cpu", "--out", OUT,
         "--epochs", "2", "--log-every", "5", "--save-every", "3", "--dropout", "0.1")
SCENARIOS = {
    "pictures": (),
    "clips": ("--tasks", "how2qa,yc2c,vqa", "--keep", "best", "--epochs", "3"),
    "a module a task": ("--method", "adapter-multiple"),
    "CLIP trained": ("--features", "none", "--train-clip", "yes", "--tasks", "vqa,nlvr"),
    "t5": ("--method", "lora", "--tasks", "vqa,gqa,caption"),
}


def write_models(root: Path) -> None:
    """Small random language models and a CLIP, in the published layout."""
    torch.manual_seed(0)
    counts = pretrain_lm.word_counts(Random(0), 100)
    for kind, write in (("bart", pretrain_lm.write_bpe), ("t5", pretrain_lm.write_unigram)):
        (root / kind).mkdir(parents=True)
        write(root / kind, counts)
        c = pretrain_lm.lm_config(kind, len(load_tokenizer(root / kind)), positions=258)
        c = replace(c, d=32, heads=4, d_kv=8, ffn=32, layers=(1, 1))
        pretrain_lm.save_lm(t5.EncoderDecoder(c).init_weights(), kind, root / kind, {})
    (root / "clip").mkdir()
    pretrain_clip.save_clip(clip_encoder.ViT(**pretrain_clip.SHAPE), root / "clip", {})


def start(folder: Path, argv: list[str]) -> int:
    """train.py in a process of its own, working in `folder`, with a small world; its id."""
    process = os.fork()                                    # PyTorch need not be imported again
    if process:
        return process
    os.chdir(folder)
    for number, name in ((1, "said"), (2, "errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    write_pictures, write_clips = scenes.write, moving.write
    scenes.write = lambda out: write_pictures(out, pictures=100, items=100, progress=False)
    moving.write = lambda out: write_clips(out, clips=20, progress=False)
    features.SECONDS = 0                                   # index.json behind every batch
    code = 0
    try:
        train.main(argv)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        code = 1
    except BaseException as error:                         # a bug of ours: the campaign fails
        print(f"Traceback: {error!r}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(folder: Path, models: Path, scenario: str) -> list[str]:
    """--resume, if there is a run to go on with."""
    if (folder / OUT / "config.json").exists():
        return ["--resume", OUT]
    lm = "t5" if scenario == "t5" else "bart"
    return [*EVERY, "--lm", f"{models}/{lm}", "--clip", f"{models}/clip", *SCENARIOS[scenario]]


def finish(folder: Path, models: Path, scenario: str) -> None:
    """Runs to the end."""
    _, status = os.waitpid(start(folder, command(folder, models, scenario)), 0)
    assert status == 0, (folder / "errors").read_text()[-2000:]


def killed(folder: Path, models: Path, scenario: str, training: bool, seconds: float) -> bool:
    """SIGKILL so many seconds after the start, or behind the first state that training saves.
    False if the run was faster: it is finished."""
    started, state = time.time(), folder / OUT / "last" / "state.safetensors"
    process, done, status = start(folder, command(folder, models, scenario)), 0, 0
    while training and not done and not (state.exists() and state.stat().st_mtime > started):
        time.sleep(0.001)
        done, status = os.waitpid(process, os.WNOHANG)
    time.sleep(seconds)
    if not done:
        done, status = os.waitpid(process, os.WNOHANG)
    if not done:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert status == 0, (folder / "errors").read_text()[-2000:]
    return not done


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a run leaves, without the time and memory that it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("said", "errors", "results.md", ".lock",
                                                "before.safetensors"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    results = json.loads(found[f"{OUT}/results.json"])
    del results["seconds"], results["memory"]
    found[f"{OUT}/results.json"] = json.dumps(results).encode()
    return found


def campaign(root: Path, scenario: str, kills: int, seed: int) -> None:
    """Kills one scenario so often, and compares."""
    models, moment = root / "models", Random(f"{scenario} {seed}")
    whole, cut = root / scenario / "undisturbed", root / scenario / "0"
    whole.mkdir(parents=True)
    cut.mkdir()
    started = time.time()
    finish(whole, models, scenario)
    expected, begun = contents(whole), (whole / OUT / "config.json").stat().st_mtime
    spans = {False: begun - started, True: time.time() - begun}
    while kills:
        training = moment.random() < 0.67                  # the others: world, packing, model
        if killed(cut, models, scenario, training, moment.random() * spans[training]):
            kills -= 1
        else:
            compare(contents(cut), expected)               # it came through: a new one
            cut = cut.with_name(str(int(cut.name) + 1))
            cut.mkdir()
    finish(cut, models, scenario)
    compare(contents(cut), expected)


def together(root: Path) -> None:
    """Two first runs at once, without a word about data or --out: two folders, one data set."""
    models = root / "models"
    given = command(root, models, "pictures")
    del given[given.index("--out"):given.index("--out") + 2]
    processes = [start(root, given) for _ in range(2)]
    ends = [os.waitpid(process, 0)[1] for process in processes]
    assert ends == [0, 0], (root / "errors").read_text()[-2000:]
    one, two = ((root / "out" / f"vlpet-large{more}") for more in ("", "-2"))
    for name in ("log.jsonl", "predictions/vqa.json", "predictions/caption.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    left = [path.name for path in (root / "datasets").iterdir()]
    assert sorted(left) == [".world.lock", "world"] and len(list(
        (root / "datasets/world/features").iterdir())) == 1


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    differ = [name for name in found.keys() | expected.keys()
              if found.get(name) != expected.get(name)]
    assert not differ, f"not what an undisturbed run leaves: {', '.join(sorted(differ))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        write_models(Path(root) / "models")
        together(Path(root))
        print("two first runs at once: two folders, one data set", flush=True)
        for n, scenario in enumerate(args.scenarios):
            kills = len(range(n, args.kills, len(args.scenarios)))
            started = time.monotonic()
            campaign(Path(root), scenario, kills, args.seed)
            print(f"{scenario}: {kills} kills, identical, {time.monotonic() - started:.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
