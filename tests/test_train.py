"""The loop: a whole run on a small world with random tiny models, its folder, resuming, errors."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Event

import kills
import numpy as np
import pytest
import torch
from house import ROOT
from tiny import same_state

import config as configs
import data
import train
from config import Config
from support import features, resume, runs, weights
from support.gate import BadInput
from support.published_clip import load_clip
from tools import ask
from world import moving, scenes

STEPS_AN_EPOCH = 36
EXACT = ("--log-every", "5", "--dropout", "0.1")     # of runs that are compared: dropout is drawn


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a world of 100 pictures and 78 clips, and random models in the published
    layout."""
    root = tmp_path_factory.mktemp("small")
    scenes.write(root / "world", pictures=100, items=100, progress=False)
    moving.write(root / "world", clips=20, progress=False)
    kills.write_models(root)
    return root


def arguments(small: Path, out: Path, *more: str) -> list[str]:
    return ["--data", f"{small}/world", "--lm", f"{small}/bart", "--clip", f"{small}/clip",
            "--out", str(out), "--epochs", "2", "--batch", "32", "--lr", "1e-3", "--beams", "2",
            "--device", "cpu", *more]


def refused(named: str, argv: list[str]) -> None:
    """train.py ends with one sentence."""
    with pytest.raises(SystemExit, match=named) as error:
        train.main(argv)
    assert "\n" not in str(error.value)


def content(path: Path) -> object:
    """Of a file of JSON, or of JSON lines."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else \
        json.loads(text)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return dict(runs.read(folder / "adapter.safetensors"))


@pytest.fixture(scope="session")
def done(small, tmp_path_factory):
    """The run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(arguments(small, out, *EXACT))
    return out


def test_a_run_leaves_its_folder(small, done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "log.jsonl", "adapter.safetensors", "last", "predictions", "submissions",
        "results.json", "results.md", "report.html", ".lock"}
    assert {p.name for p in (done / "submissions").iterdir()} == {
        "vqa.json", "gqa.json", "nlvr.csv", "caption.json"}
    lines = content(done / "log.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [*range(5, 71, 5), 2 * STEPS_AN_EPOCH]
    assert [line["epoch"] for line in lines if "validation" in line] == [0, 1]
    results = content(done / "results.json")
    scores = [next(iter(results[task].values())) for task in scenes.TASKS]
    assert results["average"] == pytest.approx(sum(scores) / 4)
    assert f"{results['average']:.2f}" in (done / "results.md").read_text()
    for task in scenes.TASKS:
        assert [a["id"] for a in content(done / f"predictions/{task}.json")] == [
            ex.id for ex in data.load_examples(task, "test", small / "world")]
    held = trained(done)
    assert all(".tune." in n or n.startswith("visual.") or "norm" in n for n in held)
    total = sum(tensor.numel() for tensor in held.values())
    assert total == results["trainable"] < results["total"] / 2


def test_the_adapter_file_gives_the_same_numbers(done, tmp_path, monkeypatch):
    """Tested where it was trained, answers go into the run's folder; a folder without last/, as
    the shipped one, stays as it is."""
    again = tmp_path / "again"
    (again / "last").mkdir(parents=True)
    for name in ("config.json", "adapter.safetensors"):
        shutil.copy(done / name, again / name)
    new = train.test_run(runs.read_config(str(again)))
    for name in ("predictions/caption.json", "predictions/vqa.json"):
        assert (again / name).read_text() == (done / name).read_text()
    (again / "last").rmdir()
    before = sorted(again.rglob("*"))
    monkeypatch.chdir(tmp_path)
    train.main(["--test", str(again), "--tasks", "nlvr"])
    assert sorted(again.rglob("*")) == before
    assert (tmp_path / "out" / "again" / "predictions" / "nlvr.json").exists()
    old = content(done / "results.json")
    assert {k: v for k, v in old.items() if k in new} == new and "average" in new


def test_other_splits(small, done, tmp_path, capsys):
    """val is scored, submit is only answered; the test's files stay as they were."""
    again = tmp_path / "again"
    shutil.copytree(done, again)
    before = (again / "results.json").read_bytes()
    train.main(["--test", str(again), "--split", "val"])
    assert "**average**" in capsys.readouterr().out
    assert (again / "submissions" / "nlvr-val.csv").exists()
    assert (again / "results.json").read_bytes() == before
    submit = ["--test", str(again), "--split", "submit"]
    refused("no task has questions to submit", [*submit, "--tasks", "nlvr"])
    shutil.copytree(small / "world", tmp_path / "world")
    shutil.copy(tmp_path / "world/vqa/karpathy_test.json", tmp_path / "world/vqa/test.json")
    train.main([*submit, "--data", f"{tmp_path}/world"])
    assert "caption is left out" in (shown := capsys.readouterr().out) and "average" not in shown
    rows = content(again / "submissions" / "vqa-submit.json")
    assert rows and rows[0].keys() == {"question_id", "answer"}


def same_run(a: Path, b: Path, tasks: tuple[str, ...] = scenes.TASKS) -> None:
    """All that two runs leave is equal, but for the seconds and the folder's name."""
    assert same_state(trained(a), trained(b))
    for name in ("log.jsonl", *(f"predictions/{task}.json" for task in tasks)):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert not list(a.rglob(".*.tmp"))


def at_call(number: int, function, happens):
    """The function, where something happens before one of its calls."""
    calls = []

    def wrapped(*given):
        calls.append(1)
        if len(calls) == number:
            happens()
        return function(*given)
    return wrapped


def stop(argv: list[str], number: int, kind: int = signal.SIGINT, where: str = "loss") -> None:
    """A run that gets a signal in one of its steps, or at the first call of another function."""
    room = train.VLModel if where == "loss" else train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, where, at_call(number, getattr(room, where),
                                           lambda: os.kill(os.getpid(), kind)))
        refused(f"stopped: go on with .*--resume {argv[argv.index('--out') + 1]}", argv)


@pytest.mark.parametrize("kind, where, step", [
    (signal.SIGTERM, "loss", 45), (signal.SIGINT, "loss", 36), (signal.SIGTERM, "validate", 36),
    (signal.SIGINT, "test", 72)])
def test_who_is_asked_to_stop_loses_nothing(small, done, tmp_path, kind, where, step):
    """A step is ended and saved; validation and test are cut short, for they can be repeated. What
    a killed process leaves, too, is put away."""
    out, before = tmp_path / "out", signal.getsignal(kind)
    stop(arguments(small, out, *EXACT), step if where == "loss" else 1, kind, where)
    assert runs.read(out / "last" / "state.safetensors").metadata["step"] == str(step)
    assert "validation" not in (out / "log.jsonl").read_text() or where != "validate"
    assert signal.getsignal(kind) == before
    assert not (out / "adapter.safetensors").exists() or where == "test"
    (out / "last" / ".state.safetensors.1.tmp").touch()
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    train.main(["--resume", str(out)])
    same_run(out, done)


def die() -> None:
    raise KeyboardInterrupt


def test_resuming_from_the_middle_is_exact(small, done, tmp_path, monkeypatch):
    """Cut short in a step of the second epoch, which goes back to what was saved last."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_finite", at_call(STEPS_AN_EPOCH + 10, train.check_finite, die))
        refused("--resume", arguments(small, tmp_path / "out", *EXACT, "--save-every", "7"))
    train.main(["--resume", str(tmp_path / "out")])
    same_run(tmp_path / "out", done)


def test_one_process_a_run(small, done, tmp_path, monkeypatch):
    """A name is taken by making the folder; a run belongs to one process; a folder without
    config.json is no run yet."""
    with resume.alone(runs.Run(Config(out=str(done)), None, None, {}), True):
        refused("another process is at work", ["--resume", str(done)])
    monkeypatch.chdir(tmp_path)
    names = [resume.take_folder(Config(control=control)).out for control in ("", "", "blind")]
    assert names == ["out/vlpet-large", "out/vlpet-large-2", "out/vlpet-large-blind"]
    begun = Path("begun")
    (begun / "last").mkdir(parents=True)
    (begun / "last" / "state.safetensors").touch()
    (begun / ".config.json.7.tmp").touch()
    train.main(arguments(small, begun, "--tasks", "vqa", "--epochs", "0"))
    assert (begun / "results.json").exists() and not (begun / ".config.json.7.tmp").exists()


# ------------------------------------------------------------------------------- damaged folders

CUT = ("--keep", "best", "--method", "bitfit")


@pytest.fixture(scope="session")
def cut(small, tmp_path_factory):
    """A run that was stopped in its second epoch: states of steps 36 and 43, a best epoch."""
    out = tmp_path_factory.mktemp("cut") / "out"
    stop(arguments(small, out, *CUT, *EXACT), STEPS_AN_EPOCH + 7)
    return out


def damages(path: Path) -> Iterator[bytes]:
    """What can become of a file of tensors: cut short, a bit flipped, other content."""
    whole, moment = path.read_bytes(), Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 7, 8, header - 1, header, len(whole) // 2, len(whole) - 1):
        yield whole[:length]
    yield whole + b"\0"
    for _ in range(40):
        for place in (moment.randrange(header), moment.randrange(header, len(whole))):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << moment.randrange(8)
            yield bytes(flipped)
    held = weights.read(path)
    tensors = {name: held[name].clone() for name in held}
    first = next(name for name in tensors if name.endswith("bias"))
    fewer = {name: tensor for name, tensor in tensors.items() if name != first}
    other = path.with_name("other")
    for changed, metadata in (
            (fewer, {}), (tensors, {"step": "9"}), (tensors, {"step": "-1"}),
            (tensors, {"step": "many"}), (tensors, {"identity": "{}"}), (tensors, {"config": "["}),
            (tensors | {first: tensors[first][:-1]}, {}),
            (tensors | {first: tensors[first].half()}, {}),
            (tensors | {first: tensors[first] * torch.nan}, {}),
            (tensors | {"random/cpu": torch.zeros(5, dtype=torch.uint8)}, {})):
        weights.write(other, changed, held.metadata | metadata)
        yield other.read_bytes()
    other.unlink()


def test_a_damaged_state_is_seen(small, cut, tmp_path, capsys):
    """The state before it is used, with a sentence; where both are damaged, that is said."""
    out = tmp_path / "out"
    shutil.copytree(cut, out)
    config = runs.read_config(str(out))
    run = train.setup(config)
    state, before = (out / "last" / f"{name}.safetensors" for name in ("state", "before"))
    whole, total = state.read_bytes(), 2 * STEPS_AN_EPOCH

    def load() -> int:
        log = resume.Log(out / "log.jsonl")
        return resume.load_last(run, train.make_optimizer(run.model, config), total, log)

    assert load() == 43 and "used" not in capsys.readouterr().out
    for damaged in damages(state):
        state.write_bytes(damaged)
        assert load() == 36
        assert "state.safetensors" in (shown := capsys.readouterr().out)
        assert "; the state before it is used" in shown and "again" not in shown
    state.unlink()                                        # a kill between two renamings
    assert load() == 36
    state.write_bytes(whole[:-1])
    before.write_bytes(before.read_bytes()[:-1])
    with pytest.raises(BadInput, match="before.safetensors is missing, cut short"):
        load()


def test_a_damaged_run_goes_on_or_says_why(small, cut, tmp_path):
    """Resumed from the state before, in another process and working folder, it ends as if
    undisturbed; what cannot be mended is named."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    log = (cut / "log.jsonl").read_bytes()
    for name, damaged in (("last/best.safetensors", b"x"), ("last/best.safetensors", None),
                          ("log.jsonl", log[:50] + b"\xff" + log[50:]), ("log.jsonl", None),
                          ("config.json", b"[]"), ("last/state.safetensors", b"x")):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(cut, out)
        (out / name).unlink()
        if damaged is not None:
            (out / name).write_bytes(damaged)
        if "state" not in name:
            refused(name, ["--resume", str(out)])
    # One thread, as here: with two, sums round otherwise.
    ended = subprocess.run([sys.executable, f"{ROOT}/train.py", "--resume", str(out)], cwd=tmp_path,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                           text=True)
    assert not ended.returncode and "the state before it is used" in ended.stdout, ended
    train.main(arguments(small, undisturbed, *CUT, *EXACT))
    same_run(out, undisturbed)


def test_a_damaged_adapter_is_never_tested(done, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(done, again)
    path = again / "adapter.safetensors"
    for damaged in damages(path):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="adapter.safetensors"):
            runs.read(path)
    for flag in "--test", "--init":
        refused("adapter.safetensors: it is damaged", [flag, str(again)])


# ------------------------------------------------------------------------------- still the same?

def flip_weights(folder: Path, part: str) -> None:
    held = weights.read(folder / "model.safetensors")
    tensors = {name: held[name].flip(0) if part in name else held[name].clone() for name in held}
    weights.write(folder / "model.safetensors", tensors, held.metadata)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_features(here: Path) -> None:
    for path in (here / "world/features").glob("*/features.npy"):
        np.load(path, mmap_mode="r+")[:] += 1


TRAIN, BOTH = "world/vqa/karpathy_train.json", ("--resume", "--test")
CHANGES = [
    (lambda here: flip_weights(here / "bart", ".fc1."), "language model was", (*BOTH, "--init")),
    (lambda here: edit(here / "bart/merges.txt", "\n", "\n\n"), "tokenizer was",
     (*BOTH, "--init")),
    (lambda here: edit(here / "bart/config.json", '"gelu"', '"relu"'), "its config.json was", BOTH),
    (lambda here: flip_weights(here / "clip", ".fc1."), "clip of pictures was", BOTH),
    (lambda here: edit(here / "run/config.json", '"warmup": 0.1', '"warmup": 0.2'),
     "warmup was 0.1, now it is 0.2", BOTH),
    (lambda here: edit(here / "world/vqa/karpathy_test.json", "what", "which"), "test data was",
     BOTH),
    (lambda here: edit(here / TRAIN, "what", "which"), "training data was", ["--resume"]),
    (other_features, "features of the first examples was", ["--resume"]),
]


@pytest.mark.parametrize("change, named, flags", CHANGES, ids=[row[1] for row in CHANGES])
def test_what_a_run_was_trained_with_is_remembered(small, tmp_path, change, named, flags):
    for name in ("bart", "clip", "world"):
        shutil.copytree(small / name, tmp_path / name)
    given, run = ("--tasks", "vqa", "--epochs", "1"), str(tmp_path / "run")
    train.main(arguments(tmp_path, tmp_path / "run", *given))
    change(tmp_path)
    for flag in flags:
        new = arguments(tmp_path, tmp_path / "new", *given) if flag == "--init" else []
        refused(named, [*new, flag, run])


def test_a_step_that_is_no_number_ends_the_run(small, tmp_path, monkeypatch):
    """Nothing of it is saved."""
    loss, calls, out = train.VLModel.loss, [], tmp_path / "out"

    def bad(self, batch):
        calls.append(1)
        return loss(self, batch) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(train.VLModel, "loss", bad)
    refused("step 5, .*the loss is nan.*--lr",
            arguments(small, out, "--save-every", "1", "--log-every", "1"))
    assert runs.read(out / "last" / "state.safetensors").metadata["step"] == "4"
    assert len(content(out / "log.jsonl")) == 4 and not (out / "adapter.safetensors").exists()


def test_folders_that_cannot_be_written(small, done, tmp_path, monkeypatch, capsys):
    """Said before the work; a test's scores are printed all the same."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        for argv in arguments(small, tmp_path / "out" / "run"), ["--resume", str(done)]:
            refused("cannot be written to: name another --out", argv)

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runs, "replace_file", full)
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    train.main(["--test", str(done)])
    assert "**average**" in (shown := capsys.readouterr().out) and "No space left" in shown
    assert all(path.read_bytes() == content for path, content in before.items())


def test_same_seed_same_run_other_seed_other_run(small, tmp_path):
    for name, seed in ("a", "7"), ("b", "7"), ("c", "8"):
        train.main(arguments(small, tmp_path / name, "--epochs", "1", "--tasks", "vqa", "--seed",
                             seed))
    a, b, c = (trained(tmp_path / name) for name in "abc")
    assert same_state(a, b) and not same_state(a, c)


def test_a_row_with_modules_for_each_task_resumes_exactly(small, tmp_path):
    """An idle task's moments are saved and come back; a task that had no batch yet has none."""
    row = ("--method", "adapter-half-shared", "--set", "r=2", "--epochs", "1")
    train.main(arguments(small, tmp_path / "whole", *row))
    stop(arguments(small, tmp_path / "cut", *row), 8)
    train.main(["--resume", str(tmp_path / "cut")])
    held = trained(tmp_path / "cut")
    assert same_state(held, trained(tmp_path / "whole"))
    assert any(n.endswith("tune.net.down.gqa.weight") for n in held)


def test_changes_and_beginnings(small, done, tmp_path, capsys):
    """--set changes the row, --init begins with what another run trained."""
    changed = ("--set", "r=12,decoder=none", "--tasks", "vqa")
    train.main(arguments(small, tmp_path / "a", *changed, "--epochs", "1"))
    assert "vlpet-large r=12,decoder=none: lr 0.001" in capsys.readouterr().out
    held = trained(tmp_path / "a")
    assert held["lm.encoder.blocks.0.ffn.tune.net.down.weight"].shape == (12, 32)
    assert not any("decoder" in n for n in held)
    for out, file in ("b", "a"), ("c", "a/adapter.safetensors"):
        train.main(arguments(small, tmp_path / out, *changed, "--init", str(tmp_path / file),
                             "--epochs", "0", "--seed", "5"))
        assert same_state(trained(tmp_path / out), held)
    refused("trained with --method vlpet-large .*install the same",
            arguments(small, tmp_path / "d", *changed, "--init", str(done)))
    assert not (tmp_path / "d").exists()


def test_pictures_in_the_model(small, tmp_path):
    """--features none gives what packed features give (fp16 apart); a trained CLIP is counted and
    saved, and a frozen one is neither."""
    short = ("--epochs", "1", "--tasks", "vqa,nlvr", "--method", "adapter", "--log-every", "4")
    pixels, losses, found = ("--features", "none"), {}, {}
    for name, more in {"packed": (), "pixels": pixels,
                       "trained": (*pixels, "--train-clip", "yes")}.items():
        train.main(arguments(small, tmp_path / name, *short, *more))
        losses[name] = content(tmp_path / name / "log.jsonl")[0]["loss"]["vqa"]
        found[name] = content(tmp_path / name / "results.json")
    assert losses["packed"] == pytest.approx(losses["pixels"], rel=1e-3)
    tower = load_clip(small / "clip")            # what a loss on the grid can reach
    clip = sum(p.numel() for n, p in tower.named_parameters()
               if not n.startswith(tower.pooled_only))
    for kind in ("trainable", "total"):
        assert found["trained"][kind] - found["pixels"][kind] == clip
    held, before = trained(tmp_path / "trained"), dict(tower.named_parameters())
    names = [n for n in held if n.startswith("clip.")]
    assert names and not any(torch.equal(held[n], before[n.removeprefix("clip.")]) for n in names)
    assert held.keys() - set(names) == trained(tmp_path / "pixels").keys()
    again = train.test_run(runs.read_config(str(tmp_path / "trained")))
    assert again["average"] == found["trained"]["average"]


def test_pictures_are_packed_once_however_their_folder_is_spelled(small, done, monkeypatch):
    packs = sorted((small / "world" / "features").iterdir())
    monkeypatch.chdir(small)
    config = runs.read_config(str(done))
    features.load_features(replace(config, data="world", images="world/images"))
    assert sorted((small / "world" / "features").iterdir()) == packs


def test_a_packed_folder_serves_without_pictures(small, done, tmp_path):
    packed, = (small / "world" / "features").iterdir()
    train.main(arguments(small, tmp_path / "out", "--features", str(packed), "--images", "nowhere",
                         *EXACT))
    assert same_state(trained(tmp_path / "out"), trained(done))


def test_a_run_on_cropped_pictures_is_asked_about_cropped_ones(small, tmp_path, capsys):
    images, packed = small / "world" / "images", tmp_path / "packed"
    features.extract(load_clip(small / "clip"), images, packed, resize="crop")
    train.main(arguments(small, tmp_path / "out", "--features", str(packed), "--tasks", "vqa",
                         "--epochs", "0"))
    picture = str(sorted(images.iterdir())[0])
    ask.main(["--run", str(tmp_path / "out"), "--image", picture, "how many?"])
    assert "vqa: how many?" in capsys.readouterr().out


def test_pre_training_on_pictures(small, tmp_path):
    """A full run is a language model and a visual embedding that any method starts from."""
    train.main(arguments(small, tmp_path / "full", "--method", "full", "--epochs", "1",
                         "--tasks", "vqa,caption"))
    full = trained(tmp_path / "full")
    train.main(arguments(small, tmp_path / "a", "--pretrained", str(tmp_path / "full"),
                         "--epochs", "0", "--tasks", "vqa"))
    started = trained(tmp_path / "a")
    assert all(torch.equal(started[n], full[n]) for n in started if ".tune." not in n)
    assert any("norm" in n for n in started) and any(n.startswith("visual.") for n in started)
    config = runs.read_config(str(tmp_path / "a"))
    assert torch.equal(train.setup(config).model.lm.shared.weight, full["lm.shared.weight"])
    # One that chooses its answers has no decoder, and heads that it did not begin with.
    train.main(arguments(small, tmp_path / "c", "--pretrained", str(tmp_path / "full"), "--method",
                         "norms", "--epochs", "0", "--tasks", "vqa", "--answers", "yes"))
    chosen = trained(tmp_path / "c")
    assert any(n.startswith("answers.") for n in chosen)
    assert all(torch.equal(chosen[n], full[n]) for n in chosen if not n.startswith("answers."))
    refused("--pretrained .*it trained vlpet-large, not the whole",
            arguments(small, tmp_path / "b", "--pretrained", str(tmp_path / "a")))


def test_the_best_epoch_is_tested(small, tmp_path, monkeypatch):
    """The first one with the best mean of the validation scores, whatever comes later; exactly so
    after a kill just when it was kept."""
    tasks = ("how2qa", "yc2c", "vqa")
    examples = {task: data.load_examples(task, "train", small / "world") for task in tasks}
    steps = data.steps_per_epoch(examples, 32)
    means = [1.0, 3.0] + [3.0, 3.0] + [1.0, 3.0, 3.0]    # killed; resumed; undisturbed
    validate, put, out = train.validate, resume.Log.put, tmp_path / "out"

    def told(run, vals):
        assert vals.keys() == set(tasks)
        line = validate(run, vals)
        assert line["mean"] == sum(line["validation"].values()) / 3
        return line | {"mean": means.pop(0)}

    def dies(self, line):
        if "mean" in line and len(means) == 5:           # its weights are kept already
            raise KeyboardInterrupt
        put(self, line)

    monkeypatch.setattr(train, "validate", told)
    monkeypatch.setattr(resume.Log, "put", dies)
    again = ["--tasks", ",".join(tasks), "--epochs", "3"]
    refused("--resume", arguments(small, out, *again))
    monkeypatch.setattr(resume.Log, "put", put)
    assert runs.read(out / runs.BEST).metadata["epoch"] == "1"
    refused("not finished: go on with python train.py --resume", ["--test", str(out)])
    train.main(["--resume", str(out)])
    found = [line for line in content(out / "log.jsonl") if "mean" in line]
    assert [(x["step"], x["epoch"], x["mean"]) for x in found] == [
        (steps, 0, 1.0), (2 * steps, 1, 3.0), (3 * steps, 2, 3.0)]
    held, last = trained(out), runs.read(out / "last" / "state.safetensors")
    metadata = runs.read(out / "adapter.safetensors").metadata
    assert metadata["epoch"] == "1" and metadata["mean"] == "3.0"
    assert same_state(held, dict(runs.read(out / runs.BEST)))
    assert not any(torch.equal(held[n], last[f"weight/{n}"]) for n in held if ".tune." in n)
    train.main(arguments(small, tmp_path / "undisturbed", *again))
    assert same_state(held, trained(tmp_path / "undisturbed")) and not means


def test_steps_instead_of_epochs(small, tmp_path, capsys):
    """One task alone for as long as four; what there is, and what is little, is said."""
    given = arguments(small, tmp_path / "out", "--tasks", "vqa", "--log-every", "1")
    place = given.index("--epochs")
    given[place:place + 2] = "--steps", "7"
    train.main(given)
    lines, shown = content(tmp_path / "out" / "log.jsonl"), capsys.readouterr().out
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["epoch"] for line in lines if "mean" in line] == [0, 1]    # 4 steps an epoch
    assert "vqa: 100 examples, 32 a batch (more than a tenth: " in shown
    assert "4 steps an epoch, 7 in all, too few to learn from: give more --steps" in shown


def test_the_next_batch_is_made_while_a_step_computes(monkeypatch):
    """The batch behind is made before it is asked for. All come, in order."""
    run = runs.Run(Config(device="cpu"), None, None, {}, {})
    made = {i: Event() for i in range(4)}

    def collate(run, asked, key, share):
        made[asked[0]].set()
        return asked
    monkeypatch.setattr(train, "collate", collate)
    plan, came = [("vqa", [i]) for i in made], []
    for task, asked, shares in train.fetch(run, {"vqa": list(made)}, plan, epoch=0):
        came += asked
        assert task == "vqa" and shares == [asked] and made[min(asked[0] + 1, 3)].wait(10)
    assert came == list(made)


def test_controls_hide_what_they_say(small, tmp_path):
    """What a control hides can be anything; and without the control it matters."""
    config, _ = configs.parse(arguments(small, tmp_path / "out", "--tasks", "tvqa"))

    def logits(control: str, other_clips: bool = False, said: str = "") -> torch.Tensor:
        run = train.setup(configs.resolve(replace(config, control=control)))
        if other_clips:
            blind = features.control(run.features["tvqa"], replace(config, control="blind"))
            run.features["tvqa"] = features.control(blind, run.config) if control else blind
        examples = train.load_split(run.config, "train")["tvqa"][:8]
        if said:
            examples = [replace(ex, context=ex.context and said) for ex in examples]
        with torch.no_grad():
            return run.model.eval()(train.collate(run, examples))

    plain, blank, silent = logits(""), logits("no-frames"), logits("no-subtitles")
    assert torch.equal(logits("blind"), logits("", other_clips=True))
    assert torch.equal(blank, logits("no-frames", other_clips=True))
    assert torch.equal(silent, logits("no-subtitles", said="a red star"))
    for other in blank, silent, logits("blind"):
        assert not torch.allclose(plain[:, 0], other[:, 0], atol=1e-4)


def npz_of(stories: Path, to: Path, width: int) -> str:
    """Published features of these clips, packed."""
    (to / f"npz{width}").mkdir()
    for name in content(stories / "video" / "stories.json"):
        np.savez(to / f"npz{width}" / f"{name}.npz", features=np.random.rand(9, width))
    features.convert(to / f"npz{width}", to / f"packed{width}")
    return str(to / f"packed{width}")


def test_pictures_and_clips_together(small, tmp_path):
    """Eight tasks in one run; where widths differ, each has a visual embedding of its own, and the
    run is tested on some of its tasks alone."""
    every = ("--tasks", ",".join(scenes.TASKS + moving.TASKS), "--epochs", "1", "--method",
             "adapter-multiple")
    train.main(arguments(small, tmp_path / "one", *every))
    results = content(tmp_path / "one" / "results.json")
    assert {*scenes.TASKS, *moving.TASKS} <= results.keys()
    assert not any(".more." in n for n in trained(tmp_path / "one"))
    clips, pictures = npz_of(small / "world", tmp_path, 24), f"{tmp_path}/pictures"
    features.extract(load_clip(small / "clip"), small / "world" / "images", pictures)
    train.main(arguments(small, tmp_path / "two", *every, "--features", f"{pictures},{clips}"))
    held = trained(tmp_path / "two")
    assert held["visual.feat.weight"].shape == (32, 128)
    assert held["visual.more.24.feat.weight"].shape == (32, 24)
    config = runs.read_config(str(tmp_path / "two"))
    part = train.test_run(replace(config, tasks="how2qa", features=clips),
                          given=("tasks", "features"))
    assert part["how2qa"] == content(tmp_path / "two" / "results.json")["how2qa"]
    refused("has no clips for tvqa",
            arguments(small, tmp_path / "three", *every, "--features", pictures))


def test_a_test_split_without_answers(small, tmp_path, capsys):
    """As a benchmark with a server publishes it: val is scored, and the server's file written."""
    shutil.copytree(small / "world" / "video", tmp_path / "video")
    for task, field in (("tvqa", "answer_idx"), ("tvc", "descs")):
        path = tmp_path / "video" / "ann" / task / f"{task}_test_public_release.jsonl"
        lines = [{k: v for k, v in line.items() if k != field} for line in content(path)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.main(arguments(small, tmp_path / "out", "--data", str(tmp_path), "--tasks", "tvqa,tvc",
                         "--epochs", "1"))
    assert "The validation split is scored instead" in capsys.readouterr().out
    said = content(tmp_path / "out" / "predictions" / "tvqa-val.json")
    assert [x["id"] for x in said] == [ex.id for ex in data.load_examples("tvqa", "val", tmp_path)]
    train.main(["--test", str(tmp_path / "out"), "--split", "submit"])
    sent = content(tmp_path / "out" / "submissions" / "tvqa" / "tvqa_test_predictions.json")
    assert sent.keys() == {ex.id for ex in data.load_examples("tvqa", "submit", tmp_path)}


def test_other_data_brings_its_own_clips(small, tmp_path):
    """--test RUN --data OTHER: not the folders that the run was trained on."""
    shutil.copytree(small / "world" / "video", tmp_path / "one" / "video")
    moving.write(tmp_path / "two", clips=30, seed=1, progress=False)
    out = tmp_path / "out"
    train.main(arguments(small, out, "--data", str(tmp_path / "one"), "--tasks", "how2qa",
                         "--epochs", "0"))
    shutil.rmtree(tmp_path / "one")
    other = ["--test", str(out), "--data", str(tmp_path / "two")]
    train.main(other)
    assert [x["id"] for x in content(out / "predictions" / "how2qa.json")] == [
        ex.id for ex in data.load_examples("how2qa", "test", tmp_path / "two")]
    wide = npz_of(tmp_path / "two", tmp_path, 48)
    refused("clip of clips was .*, now it is None", [*other, "--features", wide])
    refused("trained without pictures",
            ["--test", str(out), "--data", str(small / "world"), "--tasks", "vqa"])


@pytest.mark.parametrize("said, asked, complaint", [
    ("a " * 5000, "what?", "train_00001.* takes .* positions"),
    ("a", "what " * 700, "train_00001.* its question and choices take")])
def test_a_text_that_cannot_fit_is_named_before_training(small, tmp_path, said, asked, complaint):
    shutil.copytree(small / "world" / "video", tmp_path / "video")
    for name, changes in (
            ("how2_subtitles.jsonl", {"sub": [{"text": said, "start": 0, "end": 20}]}),
            ("how2qa/how2qa_train_release.jsonl", {"q": asked})):
        path = tmp_path / "video" / "ann" / name
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n")
    refused(complaint,
            arguments(small, tmp_path / "out", "--data", str(tmp_path), "--tasks", "how2qa"))
    assert not (tmp_path / "out").exists()


def test_a_digest_is_of_everything_in_a_file():
    x = torch.zeros(2, 3)
    files = [{"a": x}, {"b": x}, {"a": x.view(3, 2)}, {"a": x.int()}, {"a": x + 1}]
    digests = [runs.digest_all(tensors, {}) for tensors in files]
    assert len({*digests, runs.digest_all(files[0], {"step": "1"})}) == 6


def test_a_tokeniser_of_another_model_is_named(small, tmp_path):
    lm = Path(shutil.copytree(small / "bart", tmp_path / "lm"))
    (lm / "vocab.json").write_text(json.dumps(content(lm / "vocab.json") | {"zebra": 9999}))
    refused("tokeniser has ids up to 9999", arguments(small, tmp_path / "out", "--lm", str(lm)))


def test_answers_are_chosen(small, tmp_path):
    """Such a run trains, resumes exactly, is tested and asked; its file says what it can answer."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    given = ("--answers", "yes", "--tasks", "vqa,gqa,nlvr", "--epochs", "1", *EXACT)
    train.main(arguments(small, whole, *given))
    stop(arguments(small, out, *given), 8)
    train.main(["--resume", str(out)])
    same_run(out, whole, ("vqa", "gqa", "nlvr"))
    held = runs.read(out / "adapter.safetensors")
    known, results = json.loads(held.metadata["answers"]), content(out / "results.json")
    assert known["nlvr"] == ["false", "true"] and len(known["vqa"]) == held.shape(
        "answers.vqa.3.bias")[0]
    for task, listed in known.items():
        assert {x["answer"] for x in content(out / f"predictions/{task}.json")} <= {*listed}
    config = runs.read_config(str(out))
    assert train.test_run(config).items() <= results.items()
    run = train.setup(config, held)
    runs.load_trained(run, held, out / "adapter.safetensors")
    found = ask.answers(run, train.load_split(config, "test")["nlvr"][0])
    assert {text for text, _ in found} == {"false", "true"}
    assert sum(p for _, p in found) == pytest.approx(1)


def test_answers_of_a_list(small, tmp_path):
    """Of one task; another list is another run."""
    path, vqa = tmp_path / "list.json", ("--tasks", "vqa", "--epochs", "1")
    given = arguments(small, tmp_path / "out", *vqa, "--answers", str(path))
    for wrong in ([], ["a", "a"], ["a", 1], {"a": 1}):
        path.write_text(json.dumps(wrong))
        refused("list.json: it should be a list of different answers", given)
    path.write_text('["yes", "red", "no"]')
    refused("of one task", [*given, "--tasks", "vqa,gqa"])
    train.main(given)
    metadata = runs.read(tmp_path / "out/adapter.safetensors").metadata
    assert json.loads(metadata["answers"]) == {"vqa": ["yes", "red", "no"]}
    path.write_text('["yes", "no", "red"]')
    refused("list of answers was", ["--resume", str(tmp_path / "out")])


@pytest.mark.parametrize("lm, method, tasks", [
    ("t5", "vlpet-small", "tvqa,tvc"), ("t5", "hyperformer", "vqa,gqa,caption"),
    ("bart", "full", "vqa,nlvr"), ("bart", "prompt-multiple", "vqa,caption")])
def test_other_rows_and_dialects_train(small, tmp_path, lm, method, tasks):
    train.main(arguments(small, tmp_path / "out", "--lm", f"{small}/{lm}", "--method", method,
                         "--epochs", "1", "--tasks", tasks, "--precision",
                         "bf16" if lm == "t5" else "fp32"))
    assert {*tasks.split(",")} <= content(tmp_path / "out" / "results.json").keys()


def test_compiled(small, tmp_path, monkeypatch):
    """--compile yes: whole graphs for every task and size of batch, the short last ones, too."""
    compile_whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda loss, fullgraph: compile_whole(
        loss, fullgraph=fullgraph, backend="eager"))       # Inductor would take minutes
    logs = []
    for told in "yes", "no":
        torch.compiler.reset()
        out = tmp_path / told
        train.main(arguments(small, out, "--compile", told, "--epochs", "1", "--dropout", "0",
                             "--method", "adapter"))
        logs.append(content(out / "log.jsonl"))
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.parametrize("control", ["random-lm", "random-clip"])
def test_controls(small, done, tmp_path, control):
    """What is random is not what is published."""
    train.main(arguments(small, tmp_path / "out", "--control", control, "--epochs", "0", "--tasks",
                         "vqa"))
    old, new = (runs.read(folder / "adapter.safetensors").metadata for folder in (
        done, tmp_path / "out"))
    lm, other_lm = (json.loads(held["identity"])["language model"] for held in (old, new))
    assert (lm != other_lm) == (control == "random-lm")
    assert (old["features"] != new["features"]) == (control == "random-clip")


def test_learning_rate_warms_up_and_falls():
    c = Config(lr=1.0, warmup=0.1)
    rates = [train.learning_rate(s, 100, c) for s in range(101)]
    assert rates[0] == rates[100] == 0 and rates[5] == 0.5 and rates[10] == 1 and rates[55] == 0.5


BAD = [
    (["--method", "vlpet"], "vlpet-large"), (["--lm", "nowhere"], "nowhere"),
    (["--clip", "nowhere"], "nowhere"), (["--data", "nowhere"], "nowhere"),
    (["--lr", "nan"], "--lr"), (["--device", "tpu"], "'cuda'"),
    (["--images", "nowhere"], "nowhere"), (["--test", "nowhere"], "run's folder: add at most"),
    (["--split", "val"], "--split needs --test"),
    (["--answers", "yes"], "of caption are written"),
    (["--answers", "yes", "--tasks", "vqa,tvqa"], "of tvqa are written"),
    (["--control", "no-frames"], "is for clips"),
    (["--tasks", "tvqa,vqa", "--control", "no-subtitles"], "is for clips"),
    (["--tasks", "tvqa", "--control", "no-frames", "--frames", "all"], "--frames real"),
    (["--tasks", "tvqa", "--clips", "nowhere"], "nowhere"),
    (["--train-clip", "yes"], "--features none"), (["--features", "nowhere"], "nowhere"),
    (["--features", "x", "--control", "random-clip"], "random-clip"),
    (["--pretrained", "nowhere"], "nowhere"),
    (["--pretrained", "x", "--control", "random-lm"], "no control"),
    (["--tasks", "tvqa", "--features", "none"], "for pictures"), (["--init", "nowhere"], "nowhere"),
    (["--set", "rr=3"], "rr=3"), (["--set", "encoder.cross_attn=lora"], "'encoder.cross_attn'"),
]


@pytest.mark.parametrize("more, named", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_settings_are_one_sentence(small, tmp_path, more, named):
    refused(re.escape(named), arguments(small, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--epochs", "few"], ["--colour", "red"], ["--task-names", "1"]])
def test_wrong_flags_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(argv)
    assert error.value.code == 2 and argv[0] in capsys.readouterr().err


def test_bad_data_leaves_nothing_behind(small, tmp_path):
    shutil.copytree(small / "world", tmp_path / "world")
    here = arguments(small, tmp_path / "out", "--data", f"{tmp_path}/world")
    file = tmp_path / "world" / "vqa" / "karpathy_train.json"
    text, records = file.read_text(), content(file)
    records[3]["img_id"] = "COCO_nowhere"
    for damaged, named in ((text[:-20], "karpathy_train.json"),
                           (json.dumps(records), "COCO_nowhere")):
        file.write_text(damaged)
        refused(named, here)
    file.write_text(text)
    (tmp_path / "world" / "images" / "broken.jpg").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "world" / "features")
    refused("broken.jpg", here)
    assert not (tmp_path / "out").exists()
    index, = (tmp_path / "world" / "features").rglob("index.json")
    assert content(index)["done"] == 0


def test_a_run_folder_is_free(small, done, tmp_path):
    """A finished run is not overwritten, nor whatever else lies there."""
    before = (done / "adapter.safetensors").read_bytes()
    refused("exists", arguments(small, done, "--seed", "1"))
    assert (done / "adapter.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    refused("mine: it exists: name another --out", arguments(small, tmp_path / "mine"))
    refused("is a file", arguments(small, tmp_path / "mine" / "file" / "out"))


def test_a_changed_configuration_is_named(done, tmp_path):
    config = content(done / "config.json")
    for broken, named in ((config | {"colour": 1}, "colour"), (config | {"lr": "1"}, "--lr"),
                          ({}, "method"), (3, "config.json")):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        refused(named, ["--test", str(tmp_path)])
    for flag in ("--test", "--resume"):
        refused("config.json: No such file", [flag, str(tmp_path / "nothing")])
