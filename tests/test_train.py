"""The loop: a whole run on a small world with random tiny models, its folder, resuming, errors."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

import clip_encoder
import data
import pretrain
import t5
import tokenizer
import train
import weights
import world

STEPS_AN_EPOCH = 36


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a world of 100 pictures and random models in the published layout."""
    root = tmp_path_factory.mktemp("small")
    world.write(root / "world", pictures=100, items=100, progress=False)
    torch.manual_seed(0)
    counts = pretrain.word_counts(Random(0), 100)
    for kind in ("bart", "t5"):
        (root / kind).mkdir()
        (pretrain.write_bpe if kind == "bart" else pretrain.write_unigram)(root / kind, counts)
        c = pretrain.lm_config(kind, len(tokenizer.load(root / kind)))
        c = replace(c, d=32, heads=4, d_kv=8, ffn=32, layers=(1, 1))
        pretrain.save_lm(t5.EncoderDecoder(c).init_weights(), kind, root / kind, {})
    (root / "clip").mkdir()
    pretrain.save_clip(clip_encoder.ViT(**pretrain.SHAPE), root / "clip", {})
    return root


def arguments(small: Path, out: Path, *more: str) -> list[str]:
    return ["--data", f"{small}/world", "--lm", f"{small}/bart", "--clip", f"{small}/clip",
            "--out", str(out), "--epochs", "2", "--batch", "32", "--lr", "1e-3", "--beams", "2",
            "--device", "cpu", *more]


@pytest.fixture(scope="session")
def done(small, tmp_path_factory):
    """The run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(arguments(small, out, "--log-every", "5"))
    return out


def test_a_run_leaves_its_folder(small, done):
    assert {p.name for p in done.iterdir()} == {
        "config.json", "log.jsonl", "adapter.safetensors", "last", "predictions", "results.json",
        "results.md"}
    lines = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == 2 * STEPS_AN_EPOCH and lines[-1]["loss"]
    results = json.loads((done / "results.json").read_text())
    scores = [next(iter(results[task].values())) for task in data.TASKS]
    assert results["average"] == pytest.approx(sum(scores) / 4)
    assert f"{results['average']:.2f}" in (done / "results.md").read_text()
    for task in data.TASKS:
        answers = json.loads((done / "predictions" / f"{task}.json").read_text())
        assert [a["id"] for a in answers] == [
            ex.id for ex in data.load(task, "test", small / "world")]
    held = weights.read(done / "adapter.safetensors")
    assert all(".tune." in n or n.startswith("visual.") or "norm" in n for n in held)
    total = sum(held[n].numel() for n in held)
    assert total == results["trainable"] < results["total"] / 2


def test_the_adapter_file_gives_the_same_numbers(done, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(done, again)
    for name in ("results.json", "results.md", "last", "predictions"):
        (shutil.rmtree if (again / name).is_dir() else Path.unlink)(again / name)
    new = train.run(train.read_run(str(again)), only_test=True)
    for name in ("predictions/caption.json", "predictions/vqa.json"):
        assert (again / name).read_text() == (done / name).read_text()
    old = json.loads((done / "results.json").read_text())
    assert {k: v for k, v in old.items() if k in new} == new and "average" in new


def test_resuming_is_exact(small, done, tmp_path, monkeypatch):
    """Killed in the middle of the second epoch and resumed = undisturbed, to the last bit."""
    out, loss, calls = tmp_path / "out", train.VLModel.loss, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == STEPS_AN_EPOCH + 10:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(train.VLModel, "loss", dies)
    with pytest.raises(SystemExit, match="--resume"):
        train.main(arguments(small, out, "--log-every", "5", "--save-every", "7"))
    assert not (out / "adapter.safetensors").exists()
    train.main(["--resume", str(out)])
    a, b = (weights.read(d / "adapter.safetensors") for d in (out, done))
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    steps = [json.loads(x)["step"] for x in (out / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 2 * STEPS_AN_EPOCH


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


@pytest.mark.parametrize("lm, method", [("t5", "vlpet-small"), ("t5", "adapter"), ("bart", "full")])
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
    features = train.prepare(train.resolve(train.parse(arguments(small, small / "x"))[0]))
    blind = train.Shuffled(features, 3)
    ids = features.ids[:50]
    assert torch.equal(blind.stack(ids), train.Shuffled(features, 3).stack(ids))
    same = (blind.stack(ids) == features.stack(ids)).flatten(1).all(1).sum()
    assert same <= 3


def test_learning_rate_warms_up_and_falls():
    c = train.Config(lr=1.0, warmup=0.1)
    rates = [train.learning_rate(s, 100, c) for s in range(101)]
    assert rates[0] == rates[100] == 0 and rates[5] == 0.5 and rates[10] == 1 and rates[55] == 0.5


BAD = [
    (["--method", "vlpet"], "vlpet-large"), (["--tasks", "vqa,vga"], "'vga'"),
    (["--boxes", "real"], "'grid'"), (["--lr", "-1"], "--lr"), (["--lm", "nowhere"], "nowhere"),
    (["--clip", "nowhere"], "nowhere"), (["--control", "deaf"], "'blind'"),
    (["--data", "nowhere"], "nowhere"), (["--dropout", "2"], "--dropout"),
    (["--lr", "nan"], "--lr"), (["--warmup", "-1"], "--warmup"), (["--device", "tpu"], "'cuda'"),
    (["--images", "nowhere"], "nowhere"), (["--test", "nowhere"], "--test"),
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
    assert not list((tmp_path / "world" / "features").iterdir())


def test_a_finished_run_is_not_overwritten(small, done, monkeypatch, tmp_path):
    before = (done / "adapter.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="exists"):
        train.main(arguments(small, done, "--seed", "1"))
    assert (done / "adapter.safetensors").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    config = train.Config()
    assert train.free_folder(config) == "out/vlpet-large"
    Path("out/vlpet-large").mkdir(parents=True)
    assert train.free_folder(config) == "out/vlpet-large-2"


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


def test_a_cut_adapter_file(done, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(done, again)
    file = again / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="adapter.safetensors"):
        train.main(["--test", str(again)])
    with pytest.raises(SystemExit, match="config.json is missing"):
        train.main(["--test", str(tmp_path / "nothing")])
