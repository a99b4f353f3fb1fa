"""The loop: a whole run on a small world with random tiny models, its folder, resuming, errors."""
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from house import ROOT

import clip_encoder
import config as configs
import data
import t5
import train
from config import Config
from support import features, resume, runs, weights
from support.gate import BadInput
from support.published_clip import load_clip
from support.tokenizer import load_tokenizer
from world import moving, pretrain_clip, pretrain_lm, scenes

STEPS_AN_EPOCH = 36
EXACT = ("--log-every", "5", "--dropout", "0.1")     # of runs that are compared: dropout is drawn


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a world of 100 pictures and 78 clips, and random models in the published
    layout."""
    root = tmp_path_factory.mktemp("small")
    scenes.write(root / "world", pictures=100, items=100, progress=False)
    moving.write(root / "world", clips=20, progress=False)
    torch.manual_seed(0)
    counts = pretrain_lm.word_counts(Random(0), 100)
    for kind in ("bart", "t5"):
        (root / kind).mkdir()
        write = pretrain_lm.write_bpe if kind == "bart" else pretrain_lm.write_unigram
        write(root / kind, counts)
        c = pretrain_lm.lm_config(kind, len(load_tokenizer(root / kind)), positions=258)
        c = replace(c, d=32, heads=4, d_kv=8, ffn=32, layers=(1, 1))
        pretrain_lm.save_lm(t5.EncoderDecoder(c).init_weights(), kind, root / kind, {})
    (root / "clip").mkdir()
    pretrain_clip.save_clip(clip_encoder.ViT(**pretrain_clip.SHAPE), root / "clip", {})
    return root


def arguments(small: Path, out: Path, *more: str) -> list[str]:
    return ["--data", f"{small}/world", "--lm", f"{small}/bart", "--clip", f"{small}/clip",
            "--out", str(out), "--epochs", "2", "--batch", "32", "--lr", "1e-3", "--beams", "2",
            "--device", "cpu", *more]


@pytest.fixture(scope="session")
def done(small, tmp_path_factory):
    """The run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(arguments(small, out, *EXACT))
    return out


def test_a_run_leaves_its_folder(small, done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "log.jsonl", "adapter.safetensors", "last", "predictions", "submissions",
        "results.json", "results.md", ".lock"}
    assert {p.name for p in (done / "submissions").iterdir()} == {
        "vqa.json", "gqa.json", "nlvr.csv", "caption.json"}
    lines = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [*range(5, 71, 5), 2 * STEPS_AN_EPOCH]
    assert [line["epoch"] for line in lines if "validation" in line] == [0, 1]
    results = json.loads((done / "results.json").read_text())
    scores = [next(iter(results[task].values())) for task in scenes.TASKS]
    assert results["average"] == pytest.approx(sum(scores) / 4)
    assert f"{results['average']:.2f}" in (done / "results.md").read_text()
    for task in scenes.TASKS:
        answers = json.loads((done / "predictions" / f"{task}.json").read_text())
        assert [a["id"] for a in answers] == [
            ex.id for ex in data.load_examples(task, "test", small / "world")]
    held = weights.read(done / "adapter.safetensors")
    assert all(".tune." in n or n.startswith("visual.") or "norm" in n for n in held)
    total = sum(held[n].numel() for n in held)
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
    old = json.loads((done / "results.json").read_text())
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
    with pytest.raises(SystemExit, match="no task has questions to submit"):
        train.main(["--test", str(again), "--split", "submit", "--tasks", "nlvr"])
    shutil.copytree(small / "world", tmp_path / "world")
    shutil.copy(tmp_path / "world/vqa/karpathy_test.json", tmp_path / "world/vqa/test.json")
    train.main(["--test", str(again), "--split", "submit", "--data", f"{tmp_path}/world"])
    assert "caption is left out" in (shown := capsys.readouterr().out) and "without scores" in shown
    rows = json.loads((again / "submissions" / "vqa-submit.json").read_text())
    assert rows and rows[0].keys() == {"question_id", "answer"}
    with pytest.raises(SystemExit, match="--split needs --test"):
        train.main(["--split", "val"])


def same_run(a: Path, b: Path) -> None:
    """All that two runs leave is equal, but for the seconds and the folder's name."""
    x, y = (runs.read(folder / "adapter.safetensors") for folder in (a, b))
    assert set(x) == set(y) and all(torch.equal(x[n], y[n]) for n in x)
    for name in ("log.jsonl", *(f"predictions/{task}.json" for task in scenes.TASKS)):
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


def die() -> None:
    raise KeyboardInterrupt


def test_resuming_is_exact(small, done, tmp_path, monkeypatch):
    """Killed in the middle of the second epoch and resumed = undisturbed, to the last bit."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train.VLModel, "loss", at_call(STEPS_AN_EPOCH + 10, train.VLModel.loss, die))
        with pytest.raises(SystemExit, match="--resume"):
            train.main(arguments(small, out, *EXACT, "--save-every", "7"))
    assert not (out / "adapter.safetensors").exists()
    (out / "last" / ".state.safetensors.1.tmp").touch()          # a killed process leaves these
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    train.main(["--resume", str(out)])
    same_run(out, done)


@pytest.mark.parametrize("kind, where, step", [
    (signal.SIGTERM, "loss", 45), (signal.SIGINT, "loss", 36), (signal.SIGTERM, "validate", 36),
    (signal.SIGINT, "test", 72)])
def test_who_is_asked_to_stop_loses_nothing(small, done, tmp_path, monkeypatch, kind, where, step):
    """A step is ended and saved; validation and test are cut short, for they can be repeated."""
    out, room = tmp_path / "out", train.VLModel if where == "loss" else train
    with monkeypatch.context() as patch:
        patch.setattr(room, where, at_call(step if where == "loss" else 1, getattr(room, where),
                                           lambda: os.kill(os.getpid(), kind)))
        with pytest.raises(SystemExit, match=f"stopped: go on with .*--resume {out}"):
            train.main(arguments(small, out, *EXACT))
    assert runs.read(out / "last" / "state.safetensors").metadata["step"] == str(step)
    assert "validation" not in (out / "log.jsonl").read_text() or where != "validate"
    assert signal.getsignal(kind) in (signal.SIG_DFL, signal.default_int_handler)
    train.main(["--resume", str(out)])
    same_run(out, done)


def test_one_process_a_run(small, done, tmp_path, monkeypatch):
    """A name is taken by making the folder; a run belongs to one process; a folder without
    config.json is no run yet."""
    with resume.alone(done, True), pytest.raises(SystemExit, match="another process is at work"):
        train.main(["--resume", str(done)])
    monkeypatch.chdir(tmp_path)
    configuration = configs.resolve(Config(data=str(small / "world"), tasks="vqa"))
    names = [resume.free_name(configuration).out for _ in range(2)]
    assert names == ["out/vlpet-large", "out/vlpet-large-2"]
    begun = Path("begun")
    (begun / "last").mkdir(parents=True)
    (begun / "last" / "state.safetensors").touch()
    (begun / ".config.json.7.tmp").touch()
    train.main(arguments(small, begun, "--tasks", "vqa", "--epochs", "0"))
    assert (begun / "results.json").exists() and not (begun / ".config.json.7.tmp").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="mine: it exists: name another --out"):
        train.main(arguments(small, tmp_path / "mine"))


# ------------------------------------------------------------------------------- damaged folders

@pytest.fixture(scope="session")
def cut(small, tmp_path_factory):
    """A run that was stopped in its second epoch: states of steps 36 and 43, a best epoch."""
    out = tmp_path_factory.mktemp("cut") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.VLModel, "loss", at_call(STEPS_AN_EPOCH + 7, train.VLModel.loss,
                                                     lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            train.main(arguments(small, out, "--keep", "best", "--method", "bitfit", "--tasks",
                                 ",".join(scenes.TASKS), *EXACT))
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
    more = tmp = path.with_name("other")
    for changed, metadata in (
            (fewer, {}), (tensors, {"step": "9"}), (tensors, {"step": "-1"}),
            (tensors, {"step": "many"}), (tensors, {"identity": "{}"}), (tensors, {"config": "["}),
            (tensors | {first: tensors[first][:-1]}, {}),
            (tensors | {first: tensors[first].half()}, {}),
            (tensors | {first: tensors[first] * torch.nan}, {}),
            (tensors | {"random/cpu": torch.zeros(5, dtype=torch.uint8)}, {})):
        weights.write(more, changed, held.metadata | metadata)
        yield tmp.read_bytes()
    more.unlink()


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
    for content in damages(state):
        state.write_bytes(content)
        assert load() == 36
        assert "state.safetensors" in (shown := capsys.readouterr().out)
        assert "; the state before it is used" in shown and "again" not in shown
    state.unlink()                                        # a kill between two renamings
    assert load() == 36
    state.write_bytes(whole[:-1])
    before.write_bytes(before.read_bytes()[:-1])
    with pytest.raises(BadInput, match="before.safetensors is missing, cut short"):
        load()


def test_a_damaged_run_goes_on_or_says_why(small, cut, tmp_path, capsys):
    """Resumed from the state before, in another process and working folder, it ends as if
    undisturbed; what cannot be mended is named."""
    undisturbed = tmp_path / "undisturbed"
    train.main(arguments(small, undisturbed, "--keep", "best", "--method", "bitfit", "--tasks",
                         ",".join(scenes.TASKS), *EXACT))
    log = (cut / "log.jsonl").read_bytes()
    for name, content, named in (
            ("last/state.safetensors", b"x", None),
            ("last/best.safetensors", b"x", "best.safetensors is missing, cut short"),
            ("log.jsonl", log[:50] + b"\xff" + log[50:], "log.jsonl"),
            ("log.jsonl", None, "log.jsonl"),
            ("last/best.safetensors", None, "best.safetensors is missing, cut short"),
            ("config.json", b"[]", "config.json")):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(cut, out)
        if content is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(content)
        if named:
            with pytest.raises(SystemExit, match=named) as error:
                train.main(["--resume", str(out)])
            assert "\n" not in str(error.value)
        else:
            again = [sys.executable, f"{ROOT}/train.py", "--resume", str(out)]
            # One thread, as here: with two, sums round otherwise.
            ended = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert not ended.returncode and "the state before it is used" in ended.stdout, ended
            same_run(out, undisturbed)


def test_a_damaged_adapter_is_never_tested(done, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(done, again)
    path = again / "adapter.safetensors"
    for content in damages(path):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="adapter.safetensors"):
            runs.read(path)
    for more in (["--test", str(again)], ["--init", str(again)]):
        with pytest.raises(SystemExit, match="adapter.safetensors: it is damaged") as error:
            train.main(more)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- still the same?

def flip_weights(folder: Path, part: str) -> None:
    held = weights.read(folder / "model.safetensors")
    tensors = {name: held[name].flip(0) if part in name else held[name].clone() for name in held}
    weights.write(folder / "model.safetensors", tensors, held.metadata)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = [
    (lambda here: flip_weights(here / "bart", ".fc1."), "the language model changed"),
    (lambda here: edit(here / "bart/config.json", '"gelu"', '"relu"'), "its config.json changed"),
    (lambda here: edit(here / "bart/merges.txt", "\n", "\n\n"), "the tokenizer changed"),
    (lambda here: flip_weights(here / "clip", ".fc1."), "pictures through another CLIP"),
    (lambda here: edit(here / "run/config.json", '"warmup": 0.1', '"warmup": 0.2'),
     "config.json has been changed: warmup was 0.1, now it is 0.2"),
    (lambda here: edit(here / "world/vqa/karpathy_test.json", "what", "which"),
     "the test data changed"),
]


@pytest.mark.parametrize("change, named", CHANGES, ids=[named for _, named in CHANGES])
def test_what_a_run_was_trained_with_is_remembered(small, tmp_path, change, named):
    """By --resume, --test and, as far as it matters there, --init."""
    for name in ("bart", "clip", "world"):
        shutil.copytree(small / name, tmp_path / name)
    given = arguments(tmp_path, tmp_path / "run", "--tasks", "vqa", "--epochs", "1")
    train.main(given)
    change(tmp_path)
    for again in ("--resume", "--test"):
        with pytest.raises(SystemExit, match=named) as error:
            train.main([again, str(tmp_path / "run")])
        assert "\n" not in str(error.value)
    if named.endswith(("model changed", "tokenizer changed")):
        with pytest.raises(SystemExit, match=named):
            train.main([*given, "--out", str(tmp_path / "new"), "--init", str(tmp_path / "run")])


def test_other_training_data_is_another_run(small, cut, tmp_path):
    """Where a run goes on, questions, answers and features must be those it began with."""
    shutil.copytree(cut, tmp_path / "run")
    shutil.copytree(next((small / "world/features").iterdir()), tmp_path / "packed")
    np.load(tmp_path / "packed/features.npy", mmap_mode="r+")[:] += 1
    edit(tmp_path / "run/config.json", '"features": ""', f'"features": "{tmp_path}/packed"')
    with pytest.raises(SystemExit, match="the features of the first examples changed"):
        train.main(["--resume", str(tmp_path / "run")])
    shutil.copy(cut / "config.json", tmp_path / "run/config.json")
    shutil.copytree(small / "world", tmp_path / "world")
    edit(tmp_path / "run/config.json", f"{small}/world", f"{tmp_path}/world")
    path = tmp_path / "world/vqa/karpathy_train.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps(records + [records[0] | {"question_id": 10**6}]))
    with pytest.raises(SystemExit, match="the training data changed"):
        train.main(["--resume", str(tmp_path / "run")])


def test_a_step_that_is_no_number_ends_the_run(small, tmp_path, monkeypatch):
    """Nothing of it is saved."""
    loss, calls, out = train.VLModel.loss, [], tmp_path / "out"

    def bad(self, batch):
        calls.append(1)
        return loss(self, batch) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(train.VLModel, "loss", bad)
    with pytest.raises(SystemExit, match="step 5, .*the loss is nan.*--lr"):
        train.main(arguments(small, out, "--save-every", "1", "--log-every", "1"))
    assert runs.read(out / "last" / "state.safetensors").metadata["step"] == "4"
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    assert not (out / "adapter.safetensors").exists()


def test_folders_that_cannot_be_written(small, done, tmp_path, monkeypatch, capsys):
    """Said before the work; a test's scores are printed all the same."""
    replace_file = runs.replace_file
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(SystemExit, match="cannot be written to: name another --out"):
            train.main(arguments(small, tmp_path / "out" / "run"))
        with pytest.raises(SystemExit, match="cannot be written to: name another --out"):
            train.main(["--resume", str(done)])

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runs, "replace_file", full)
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    train.main(["--test", str(done)])
    assert "**average**" in (shown := capsys.readouterr().out)
    assert "the answers are not kept: [Errno 28] No space left" in shown
    monkeypatch.setattr(runs, "replace_file", replace_file)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_same_seed_same_run_other_seed_other_run(small, done, tmp_path):
    one = ("--epochs", "1", "--tasks", "vqa")
    files = []
    for seed in ("7", "7", "8"):
        out = tmp_path / f"{len(files)}"
        train.main(arguments(small, out, *one, "--seed", seed))
        files.append((out / "adapter.safetensors").read_bytes().split(b'"seed')[0][-1:]
                     + b"".join(t.numpy().tobytes() for t in
                                weights.read(out / "adapter.safetensors").values()))
    assert files[0] == files[1] != files[2]


def test_a_row_with_modules_for_each_task_resumes_exactly(small, tmp_path, monkeypatch):
    """An idle task's moments are saved and come back; a task that had no batch yet has none."""
    row = ("--method", "adapter-half-shared", "--set", "r=2", "--epochs", "1")
    train.main(arguments(small, tmp_path / "whole", *row))
    with monkeypatch.context() as patch:
        patch.setattr(train.VLModel, "loss", at_call(9, train.VLModel.loss, die))
        with pytest.raises(SystemExit, match="--resume"):
            train.main(arguments(small, tmp_path / "cut", *row, "--save-every", "2"))
    train.main(["--resume", str(tmp_path / "cut")])
    a, b = (weights.read(tmp_path / d / "adapter.safetensors") for d in ("whole", "cut"))
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert any(n.endswith("tune.net.down.gqa.weight") for n in a)


def test_changes_and_beginnings(small, done, tmp_path, capsys):
    """--set changes the row, --init begins with what another run trained."""
    changed = ("--set", "r=12,decoder=none", "--tasks", "vqa")
    train.main(arguments(small, tmp_path / "a", *changed, "--epochs", "1"))
    assert "vlpet-large with r=12,decoder=none: lr 0.001 (recipe 0.003)" in capsys.readouterr().out
    held = weights.read(tmp_path / "a" / "adapter.safetensors")
    assert held["lm.encoder.blocks.0.ffn.tune.net.down.weight"].shape == (12, 32)
    assert not any("decoder" in n for n in held)
    for file in ("a", "a/adapter.safetensors"):
        train.main(arguments(small, tmp_path / f"b{len(file)}", *changed, "--init",
                             str(tmp_path / file), "--epochs", "0", "--seed", "5"))
        again = weights.read(tmp_path / f"b{len(file)}" / "adapter.safetensors")
        assert all(torch.equal(again[n], held[n]) for n in held)
    with pytest.raises(SystemExit, match="trained with --method vlpet-large .*install the same"):
        train.main(arguments(small, tmp_path / "c", *changed, "--init", str(done)))
    assert not (tmp_path / "c").exists()


def test_pictures_in_the_model(small, tmp_path):
    """--features none gives what packed features give (fp16 apart); a trained CLIP is counted and
    saved, and a frozen one is neither."""
    short = ("--epochs", "1", "--tasks", "vqa,nlvr", "--method", "adapter")
    losses = {}
    for name, more in (("packed", ()), ("pixels", ("--features", "none"))):
        train.main(arguments(small, tmp_path / name, *short, *more, "--log-every", "4"))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[0])["loss"]["vqa"]
        assert not any(n.startswith("clip.") for n in weights.read(
            tmp_path / name / "adapter.safetensors"))
    assert losses["packed"] == pytest.approx(losses["pixels"], rel=1e-3)
    train.main(arguments(small, tmp_path / "trained", *short, "--features", "none",
                         "--train-clip", "yes"))
    counts = {name: json.loads((tmp_path / name / "results.json").read_text())
              for name in ("pixels", "trained")}
    tower = load_clip(small / "clip")            # what a loss on the grid can reach
    clip = sum(p.numel() for n, p in tower.named_parameters()
               if not n.startswith(tower.pooled_only))
    for kind in ("trainable", "total"):
        assert counts["trained"][kind] - counts["pixels"][kind] == clip
    held = weights.read(tmp_path / "trained" / "adapter.safetensors")
    before, names = dict(tower.named_parameters()), [n for n in held if n.startswith("clip.")]
    assert names and not any(torch.equal(held[n], before[n.removeprefix("clip.")]) for n in names)
    again = train.test_run(runs.read_config(str(tmp_path / "trained")))
    assert again["average"] == counts["trained"]["average"]


def test_a_packed_folder_serves_without_pictures(small, done, tmp_path):
    packed, = (small / "world" / "features").iterdir()
    train.main(arguments(small, tmp_path / "out", "--features", str(packed), "--images", "nowhere",
                         *EXACT))
    a, b = (weights.read(d / "adapter.safetensors") for d in (tmp_path / "out", done))
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_pre_training_on_pictures(small, tmp_path):
    """A full run is a language model and a visual embedding that any method starts from."""
    train.main(arguments(small, tmp_path / "full", "--method", "full", "--epochs", "1",
                         "--tasks", "vqa,caption"))
    full = weights.read(tmp_path / "full" / "adapter.safetensors")
    train.main(arguments(small, tmp_path / "a", "--pretrained", str(tmp_path / "full"),
                         "--epochs", "0", "--tasks", "vqa"))
    started = weights.read(tmp_path / "a" / "adapter.safetensors")
    assert all(torch.equal(started[n], full[n]) for n in started if ".tune." not in n)
    assert any("norm" in n for n in started) and any(n.startswith("visual.") for n in started)
    config = runs.read_config(str(tmp_path / "a"))
    assert torch.equal(train.setup(config).model.lm.shared.weight, full["lm.shared.weight"])
    with pytest.raises(SystemExit, match="--pretrained .*it trained vlpet-large, not the whole"):
        train.main(arguments(small, tmp_path / "b", "--pretrained", str(tmp_path / "a")))


@pytest.mark.parametrize("lm", ["bart", "t5"])
def test_clips(small, tmp_path, lm):
    """Video tasks from VALUE's files and published features, through the same loop."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "video" / "ann"
    (tmp_path / "npz").mkdir()
    for i in range(8):
        frames = torch.randn(3 + 9 * i, 24, generator=generator)
        np.savez(tmp_path / "npz" / f"v{i}.npz", features=frames.numpy())
    features.convert(tmp_path / "npz", tmp_path / "packed")
    said = [{"vid_name": f"v{i}", "sub": [{"text": "a red circle", "start": 0, "end": 9}]}
            for i in range(8)]
    asked = [{"vid_name": f"v{i}", "qid": i, "q": "what is red ?", "ts": "0-9", "answer_idx": i % 5,
              "a0": "cross", "a1": "circle", "a2": "star", "a3": "square", "a4": "triangle"}
             for i in range(8)]
    told = [{"vid_name": f"v{i}", "duration": 9, "ts": [0, 9], "clip_id": i,
             "descs": [{"desc": "a red circle", "desc_id": i}]} for i in range(8)]
    for task, records in (("tvqa", asked), ("tvc", told)):
        (folder / task).mkdir(parents=True)
        for split in ("train", "val", "test_public"):
            (folder / task / f"{task}_{split}_release.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in records))
    (folder / "tv_subtitles.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said))
    train.main(["--data", str(tmp_path), "--lm", f"{small}/{lm}", "--clip", f"{small}/clip",
                "--features", str(tmp_path / "packed"), "--out", str(tmp_path / "out"), "--tasks",
                "tvqa,tvc", "--epochs", "1", "--batch", "4", "--device", "cpu"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tvqa"].keys() == {"accuracy"} and "cider" in results["tvc"]
    assert sorted(p.name for p in (tmp_path / "out" / "submissions").rglob("*.json*")) == [
        "tvc_test_predictions.jsonl", "tvqa_test_predictions.json"]
    assert runs.read_config(str(tmp_path / "out")).lr == 7e-4                 # BART video's recipe


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
    with pytest.raises(SystemExit, match="--resume"):
        train.main(arguments(small, out, *again))
    monkeypatch.setattr(resume.Log, "put", put)
    assert runs.read(out / "last" / "best.safetensors").metadata["epoch"] == "1"
    with pytest.raises(SystemExit, match="not finished: go on with python train.py --resume"):
        train.main(["--test", str(out)])
    train.main(["--resume", str(out)])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "mean" in line]
    assert [(x["step"], x["epoch"], x["mean"]) for x in found] == [
        (steps, 0, 1.0), (2 * steps, 1, 3.0), (3 * steps, 2, 3.0)]
    assert found[0]["validation"].keys() == set(tasks)
    held = runs.read(out / "adapter.safetensors")
    assert held.metadata["epoch"] == "1" and held.metadata["mean"] == "3.0"
    best, last = (weights.read(out / "last" / f"{name}.safetensors") for name in ("best", "state"))
    assert all(torch.equal(held[n], best[n]) for n in best)
    assert not any(torch.equal(held[n], last[f"weight/{n}"]) for n in best if ".tune." in n)
    train.main(arguments(small, tmp_path / "undisturbed", *again))
    same = weights.read(tmp_path / "undisturbed" / "adapter.safetensors")
    assert set(held) == set(same) and all(torch.equal(held[n], same[n]) for n in held)
    assert not means


def test_steps_instead_of_epochs(small, tmp_path, capsys):
    """One task alone for as long as four; what there is, and what is little, is said."""
    given = arguments(small, tmp_path / "out", "--tasks", "vqa", "--log-every", "1")
    given[given.index("--epochs")] = "--steps"
    given[given.index("--steps") + 1] = "7"
    train.main(given)
    shown = capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["epoch"] for line in lines if "mean" in line] == [0, 1]    # 4 steps an epoch
    assert "examples: vqa 100; 4 steps an epoch, 7 in all" in shown
    assert "7 steps are too few" in shown
    assert "a batch of vqa (32) is more than a tenth of its 100 examples" in shown


def test_no_frames_and_no_subtitles(small, tmp_path):
    """What a control hides can be anything; and without the control it matters."""
    config, _ = configs.parse(arguments(small, tmp_path / "out", "--tasks", "tvqa"))

    def logits(control: str, turned: bool, said: str | None) -> torch.Tensor:
        run = train.setup(configs.resolve(replace(config, control=control)))
        if turned:
            run.features = {task: features.Shuffled(found, 1)
                            for task, found in run.features.items()}
            if control == "no-frames":
                run.features = {task: features.Hidden(found, 0)
                                for task, found in run.features.items()}
        examples = train.load_split(run.config, "train")["tvqa"][:8]
        if said:
            examples = [replace(ex, context=ex.context and said) for ex in examples]
        return run.model.eval()(train.collate(run, examples))

    with torch.no_grad():
        plain = logits("", False, None)
        assert not torch.allclose(plain, logits("", True, None), atol=1e-4)
        blank = logits("no-frames", False, None)
        assert torch.equal(blank, logits("no-frames", True, None))
        assert not torch.allclose(plain, blank, atol=1e-4)
        silent = logits("no-subtitles", False, None)
        assert torch.equal(silent, logits("no-subtitles", False, "a red star"))
        assert not torch.allclose(plain[:, 0], silent[:, 0], atol=1e-4)


def test_pictures_and_clips_together(small, tmp_path):
    """Eight tasks in one run; where widths differ, each has a visual embedding of its own, and the
    run is tested on some of its tasks alone."""
    every = ("--tasks", ",".join(scenes.TASKS + moving.TASKS), "--epochs", "1", "--method",
             "adapter-multiple")
    train.main(arguments(small, tmp_path / "one", *every))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert {*scenes.TASKS, *moving.TASKS} <= results.keys()
    assert not any(".more." in n for n in weights.read(tmp_path / "one" / "adapter.safetensors"))
    (tmp_path / "npz").mkdir()
    for name in json.loads((small / "world" / "video" / "stories.json").read_text()):
        np.savez(tmp_path / "npz" / f"{name}.npz", features=np.random.rand(9, 24))
    features.convert(tmp_path / "npz", tmp_path / "clips")
    features.extract(load_clip(small / "clip"), small / "world" / "images",
                     tmp_path / "pictures")
    both = f"{tmp_path}/pictures,{tmp_path}/clips"
    train.main(arguments(small, tmp_path / "two", *every, "--features", both))
    held = weights.read(tmp_path / "two" / "adapter.safetensors")
    assert held.shape("visual.feat.weight") == (32, 128)
    assert held.shape("visual.more.24.feat.weight") == (32, 24)
    whole = json.loads((tmp_path / "two" / "results.json").read_text())
    config = runs.read_config(str(tmp_path / "two"))
    part = train.test_run(replace(config, tasks="how2qa", features=f"{tmp_path}/clips"),
                          given=("tasks", "features"))
    assert part["how2qa"] == whole["how2qa"]
    with pytest.raises(SystemExit, match="has no clips for tvqa"):
        train.main(arguments(small, tmp_path / "three", *every, "--features",
                             f"{tmp_path}/pictures"))


def test_controls_hide_what_they_say(small, tmp_path, monkeypatch):
    """The batches that a run trains on: not the frames, others' frames, not the subtitles."""
    batches, loss = {}, train.VLModel.loss

    def keep(self, batch):
        batches.setdefault(control, []).append(batch)
        return loss(self, batch)

    monkeypatch.setattr(train.VLModel, "loss", keep)
    for control in ("", "no-frames", "blind", "no-subtitles"):
        train.main(arguments(small, tmp_path / f"out{control}", "--tasks", "tvqa", "--epochs", "1",
                             "--control", control))
    for plain, none, other in zip(*(batches[k] for k in ("", "no-frames", "blind"))):
        assert torch.equal(plain.input_ids, none.input_ids)
        assert torch.equal(plain.labels, other.labels)
        assert plain.seen.any(1).all() and not none.seen.any()
        assert plain.feats.shape != other.feats.shape or not torch.equal(plain.feats, other.feats)
    tokens = {k: sum((b.input_ids != 1).sum().item() for b in batches[k]) for k in batches}
    assert tokens["no-subtitles"] < 0.9 * tokens[""] == 0.9 * tokens["blind"]


def test_a_test_split_without_answers(small, tmp_path, capsys):
    """As a benchmark with a server publishes it: val is scored, and the server's file written."""
    shutil.copytree(small / "world" / "video", tmp_path / "video")
    for task, field in (("tvqa", "answer_idx"), ("tvc", "descs")):
        path = tmp_path / "video" / "ann" / task / f"{task}_test_public_release.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(
            {k: v for k, v in line.items() if k != field}) + "\n" for line in lines))
    train.main(arguments(small, tmp_path / "out", "--data", str(tmp_path), "--tasks", "tvqa,tvc",
                         "--epochs", "1"))
    assert "The validation split is scored instead" in capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "predictions" / "tvqa-val.json").read_text())
    assert [x["id"] for x in said] == [ex.id for ex in data.load_examples("tvqa", "val", tmp_path)]
    train.main(["--test", str(tmp_path / "out"), "--split", "submit"])
    path = tmp_path / "out" / "submissions" / "tvqa" / "tvqa_test_predictions.json"
    sent = json.loads(path.read_text())
    assert sent.keys() == {ex.id for ex in data.load_examples("tvqa", "submit", tmp_path)}


def test_other_data_brings_its_own_clips(small, tmp_path):
    """--test RUN --data OTHER: not the folders that the run was trained on."""
    shutil.copytree(small / "world" / "video", tmp_path / "one" / "video")
    moving.write(tmp_path / "two", clips=30, seed=1, progress=False)
    out = tmp_path / "out"
    train.main(arguments(small, out, "--data", str(tmp_path / "one"), "--tasks", "how2qa",
                         "--epochs", "0"))
    shutil.rmtree(tmp_path / "one")
    train.main(["--test", str(out), "--data", str(tmp_path / "two")])
    said = json.loads((out / "predictions" / "how2qa.json").read_text())
    new = data.load_examples("how2qa", "test", tmp_path / "two")
    assert [x["id"] for x in said] == [ex.id for ex in new]
    (tmp_path / "npz").mkdir()
    for name in json.loads((tmp_path / "two" / "video" / "stories.json").read_text()):
        np.savez(tmp_path / "npz" / f"{name}.npz", features=np.random.rand(9, 48))
    features.convert(tmp_path / "npz", tmp_path / "wide")
    with pytest.raises(SystemExit, match="through another CLIP"):
        train.main(["--test", str(out), "--data", str(tmp_path / "two"), "--features",
                    str(tmp_path / "wide")])
    with pytest.raises(SystemExit, match="trained without pictures"):
        train.main(["--test", str(out), "--data", str(small / "world"), "--tasks", "vqa"])


@pytest.mark.parametrize("said, asked, complaint", [
    ("a " * 5000, "what?", "train_00001.* takes .* positions"),
    ("a", "what " * 700, "train_00001.* its question and choices take")])
def test_a_text_that_cannot_fit_is_named_before_training(small, tmp_path, said, asked, complaint):
    shutil.copytree(small / "world" / "video", tmp_path / "video")
    ann = tmp_path / "video" / "ann"
    for path, field, value in ((ann / "how2_subtitles.jsonl", "sub", said),
                               (ann / "how2qa" / "how2qa_train_release.jsonl", "q", asked)):
        first, *rest = path.read_text().splitlines()
        record = json.loads(first)
        record[field] = value if field == "q" else [{"text": value, "start": 0, "end": 20}]
        path.write_text("\n".join([json.dumps(record), *rest]) + "\n")
    with pytest.raises(SystemExit, match=complaint):
        train.main(arguments(small, tmp_path / "out", "--data", str(tmp_path), "--tasks", "how2qa"))
    assert not (tmp_path / "out").exists()


def test_clips_are_packed_again_when_they_change(small, tmp_path):
    """Also behind a link."""
    shutil.copytree(small / "world" / "video" / "clips", tmp_path / "real")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    config = configs.resolve(configs.parse(arguments(
        small, tmp_path / "out", "--tasks", "tvqa", "--data", str(tmp_path), "--clips",
        str(tmp_path / "clips")))[0])
    before = features.load_features(config)["tvqa"]
    assert features.load_features(config)["tvqa"].folders == before.folders
    shutil.copy(tmp_path / "real" / "train_00001.webp", tmp_path / "real" / "train_00002.webp")
    after = features.load_features(config)["tvqa"]
    assert torch.equal(*after.stack(["train_00001", "train_00002"]))
    assert not torch.equal(*before.stack(["train_00001", "train_00002"]))


def test_clips_have_their_own_language_model_and_recipe(small, tmp_path):
    config = Config(data=str(small / "world"), clip=f"{small}/clip", out=str(tmp_path))
    assert configs.resolve(config).lm == "weights/tiny-bart"
    assert configs.resolve(replace(config, tasks="tvqa")).lm == "weights/tiny-bart-video"
    assert configs.resolve(replace(config, tasks="vqa,tvqa")).lm == "weights/tiny-bart-video"
    shutil.copytree(small / "world" / "video", tmp_path / "video")
    half = replace(config, data=str(tmp_path))          # clips of ours beside pictures of others
    assert configs.recipe(replace(half, tasks="tvqa"), False)["batch"] == 16
    assert configs.recipe(replace(half, tasks="vqa"), False)["batch"] == 500
    assert configs.recipe(replace(half, tasks="vqa,tvqa"), False)["batch"] == 50


@pytest.mark.parametrize("lm, method", [("t5", "vlpet-small"), ("t5", "hyperformer"),
                                        ("bart", "full"), ("bart", "prompt-multiple")])
def test_other_rows_and_dialects_train(small, tmp_path, lm, method):
    out = tmp_path / "out"
    train.main(arguments(small, out, "--lm", f"{small}/{lm}", "--method", method, "--epochs", "1",
                         "--precision", "bf16" if lm == "t5" else "fp32"))
    assert (out / "results.json").exists()


@pytest.mark.parametrize("control", ["blind", "random-lm", "random-clip"])
def test_controls(small, tmp_path, control):
    out = tmp_path / "out"
    train.main(arguments(small, out, "--control", control, "--epochs", "1", "--tasks", "vqa"))
    assert json.loads((out / "config.json").read_text())["control"] == control


def test_blind_sees_another_picture_always_the_same(small):
    config = configs.resolve(configs.parse(arguments(small, small / "x"))[0])
    packed = features.load_features(config)["vqa"]
    blind = features.Shuffled(packed, 3)
    ids = packed.ids[:50]
    assert torch.equal(blind.stack(ids), features.Shuffled(packed, 3).stack(ids))
    same = (blind.stack(ids) == packed.stack(ids)).flatten(1).all(1).sum()
    assert same <= 3


def test_learning_rate_warms_up_and_falls():
    c = Config(lr=1.0, warmup=0.1)
    rates = [train.learning_rate(s, 100, c) for s in range(101)]
    assert rates[0] == rates[100] == 0 and rates[5] == 0.5 and rates[10] == 1 and rates[55] == 0.5


BAD = [
    (["--method", "vlpet"], "vlpet-large"), (["--tasks", "vqa,vga"], "'vga'"),
    (["--boxes", "real"], "'grid'"), (["--lr", "-1"], "--lr"), (["--lm", "nowhere"], "nowhere"),
    (["--clip", "nowhere"], "nowhere"), (["--control", "deaf"], "'blind'"),
    (["--data", "nowhere"], "nowhere"), (["--dropout", "2"], "--dropout"),
    (["--lr", "nan"], "--lr"), (["--warmup", "-1"], "--warmup"), (["--device", "tpu"], "'cuda'"),
    (["--images", "nowhere"], "nowhere"), (["--test", "nowhere"], "--test"),
    (["--control", "no-frames"], "show clips"),
    (["--tasks", "tvqa,vqa", "--control", "no-subtitles"], "show clips"),
    (["--tasks", "tvqa", "--control", "no-frames", "--frames", "all"], "--frames real"),
    (["--tasks", "tvqa", "--clips", "nowhere"], "nowhere"),
    (["--train-clip", "yes"], "--features none"), (["--features", "nowhere"], "nowhere"),
    (["--features", "x", "--control", "random-clip"], "random-clip"),
    (["--pretrained", "nowhere"], "nowhere"),
    (["--pretrained", "x", "--control", "random-lm"], "no control"),
    (["--tasks", "tvqa", "--features", "none"], "for pictures"), (["--frames", "some"], "'real'"),
    (["--set", "rr=3"], "rr=3"), (["--set", "r"], "FIELD=VALUE"), (["--set", "r=x"], "--set r=x"),
    (["--set", "decoder.ffn=adapter+small"], "tokens to come"), (["--init", "nowhere"], "nowhere"),
    (["--set", "encoder.cross_attn=lora"], "no site 'encoder.cross_attn'"),
    (["--set", "open=all+noses"], "noses"),
]


@pytest.mark.parametrize("more, named", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_settings_are_one_sentence(small, tmp_path, more, named):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as error:
        train.main(arguments(small, out, *more))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("argv", [["--epochs", "few"], ["--colour", "red"], ["--task-names", "1"]])
def test_wrong_flags_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(argv)
    assert error.value.code == 2 and argv[0] in capsys.readouterr().err


def test_bad_data_leaves_nothing_behind(small, tmp_path):
    shutil.copytree(small / "world", tmp_path / "world")
    here = arguments(small, tmp_path / "out", "--data", f"{tmp_path}/world")

    def complaint() -> str:
        with pytest.raises(SystemExit) as error:
            train.main(here)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    file = tmp_path / "world" / "vqa" / "karpathy_train.json"
    text = file.read_text()
    file.write_text(text[:-20])
    assert "karpathy_train.json" in complaint()
    records = json.loads(text)
    records[3]["img_id"] = "COCO_nowhere"
    file.write_text(json.dumps(records))
    assert "COCO_nowhere" in complaint()
    file.unlink()
    assert "karpathy_train.json" in complaint()
    file.write_text(text)
    (tmp_path / "world" / "images" / "broken.jpg").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "world" / "features")
    assert "broken.jpg" in complaint()
    index, = (tmp_path / "world" / "features").rglob("index.json")
    assert json.loads(index.read_text())["done"] == 0


def test_a_finished_run_is_not_overwritten(small, done):
    before = (done / "adapter.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="exists"):
        train.main(arguments(small, done, "--seed", "1"))
    assert (done / "adapter.safetensors").read_bytes() == before


def test_out_inside_a_file(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file"):
        train.main(arguments(small, tmp_path / "file" / "out"))


def test_a_changed_configuration_is_named(done, tmp_path):
    config = json.loads((done / "config.json").read_text())
    for broken, named in ((config | {"colour": 1}, "colour"), (config | {"lr": "1"}, "--lr"),
                          ({}, "method")):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(SystemExit, match=named):
            train.main(["--test", str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="config.json"):
        train.main(["--test", str(tmp_path)])


def test_no_run_there(tmp_path):
    for flag in ("--test", "--resume"):
        with pytest.raises(SystemExit, match="config.json: No such file"):
            train.main([flag, str(tmp_path / "nothing")])
