"""features.py: packed folders against the tower itself, against kills, and against h5py's files."""
import json
import os
import shutil
import weakref
from dataclasses import replace
from itertools import count
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import clip_encoder
from support import features
from support import weights
from clip_encoder import ViT, pixels
from support.published_clip import HUGGING_FACE
from support.features import INDEX, Features, Recipe, convert, extract, pack
from killing import contents, kill_often, spawn

SHARDS = ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return ViT(width=32, layers=2, heads=4, patch=4, size=24, out=20).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_folder(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    weights.write(folder / "model.safetensors", weights.published(vit, HUGGING_FACE))
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in two folders, and a file that is none. Sorted: a b d deep/c e f g."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.PNG", "deep/c.jpg", "e.jpeg", "d.png", "f.png", "g.png")):
        picture(30 + i, 26, i).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def close(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() < within


# --------------------------------------------------------------------------------- a whole folder

@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_extract(vit, folder, tmp_path, resize):
    out = tmp_path / "packed" / "pictures"
    assert extract(vit, folder, out, resize, batch=2, shard=3) == []
    packed = Features(out)
    assert packed.ids == list("abdcefg") and len(packed) == 7 and packed.width == 32
    assert packed.settings == {"grid": 6, "resize": resize, "size": 24,
                               "clip": weights.fingerprint(vit)}
    got = packed.stack(["c", "a", "c", "g"])
    assert got.dtype == torch.float32 and got.shape == (4, 36, 32)
    want = [pixels(Image.open(folder / n), 24, resize) for n in ("deep/c.jpg", "a.PNG", "g.png")]
    assert close(got[[0, 1, 3]], vit.encode(torch.stack(want)), 5e-3)                       # fp16
    assert torch.equal(got[0], got[2]) and packed.stack([]).shape == (0, 36, 32)
    assert sorted(contents(out)) == [".lock", *SHARDS, INDEX]
    with safe_open(out / SHARDS[1], "pt") as file:            # safetensors' own reader takes it
        assert file.get_slice("features").get_dtype() == "F16"
        assert torch.equal(file.get_tensor("features").float(), packed.stack(list("cef")))
    with pytest.raises(ValueError, match="pictures.*'zebra'"):
        packed.stack(["a", "zebra"])


def test_shards_and_batches_change_nothing_but_rounding(vit, folder, tmp_path):
    for name, sizes in (("a", dict(batch=64, shard=100)), ("b", dict(batch=1, shard=2))):
        extract(vit, folder, tmp_path / name, **sizes)
    a, b = Features(tmp_path / "a"), Features(tmp_path / "b")
    assert a.ids == b.ids and close(a.stack(a.ids), b.stack(a.ids), 5e-3)
    assert (len(a.shards), len(b.shards)) == (1, 4)


def test_copies_are_computed_once(vit, folder, tmp_path):
    shutil.copy(folder / "a.PNG", folder / "z.png")
    shutil.copy(folder / "a.PNG", folder / "deep" / "y.png")
    extract(vit, folder, tmp_path / "out", batch=2, shard=3)
    packed, index = Features(tmp_path / "out"), json.loads((tmp_path / "out" / INDEX).read_text())
    assert packed.ids == list("abdcyefgz") and index["shape"] == [7, 36, 32]
    x = packed.stack(["a", "y", "z", "b"])
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) and not torch.equal(x[0], x[3])


def test_several_folders(vit, folder, tmp_path):
    (tmp_path / "more").mkdir()
    for name in "xy":
        picture(20, 20, ord(name)).save(tmp_path / "more" / f"{name}.png")
    extract(vit, folder, tmp_path / "1", batch=2, shard=3)
    extract(vit, tmp_path / "more", tmp_path / "2")
    both, one, two = Features([tmp_path / "1", tmp_path / "2"]), *map(
        Features, (tmp_path / "1", tmp_path / "2"))
    assert both.ids == [*"abdcefgxy"] and both.settings == one.settings
    assert torch.equal(both.stack(["y", "g", "x"]),
                       torch.cat([two.stack(["y"]), one.stack(["g"]), two.stack(["x"])]))
    with pytest.raises(ValueError, match="'a' is in .*1"):
        Features([tmp_path / "1", tmp_path / "1"])
    extract(vit, tmp_path / "more", tmp_path / "3", resize="crop")
    with pytest.raises(ValueError, match="3 holds .*crop.*stretch"):
        Features([tmp_path / "1", tmp_path / "3"])


# ------------------------------------------------------------------------------------------- kills

SLOW = ("features", 0.01)                          # seconds that reading a picture takes longer


@pytest.fixture(scope="module")
def large(clip_folder, tmp_path_factory):
    """Arguments for 90 pictures, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("large")
    (root / "in").mkdir()
    for i in range(90):
        picture(16, 16, i % 80).save(root / "in" / f"{i:02}.png")
    arguments = ["--clip", str(clip_folder), "--images", str(root / "in"), "--batch", "3",
                 "--shard", "32", "--out"]
    process = spawn(*SLOW, *arguments, str(root / "out"))
    process.join()
    assert process.exitcode == 0
    return arguments, contents(root / "out")


def test_killed_at_random_moments(large, tmp_path):
    early, in_a_shard = zip(*kill_often(*SLOW, *large, tmp_path / "out", 5))
    assert any(early) and any(in_a_shard)


def test_two_processes_at_once(large, tmp_path):
    both = [spawn(*SLOW, *large[0], str(tmp_path / "out")) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(tmp_path / "out") == large[1]


def counting(vit, monkeypatch) -> list[int]:
    """The sizes of the batches that go through the tower from now on."""
    sizes, encode = [], vit.encode
    monkeypatch.setattr(vit, "encode", lambda x: sizes.append(len(x)) or encode(x))
    return sizes


@pytest.mark.parametrize("where, batches", [
    (0, [2, 1]), (7, [2, 1]), (-3 * 2304, [2, 1]), (-3 * 2304 + 1, [2, 1]), (-2304 - 1, [2, 1]),
    (-2304, [1]), (-2303, [1]), (-1, [1]), (None, [1])])
def test_cut_anywhere_and_on_from_there(vit, folder, tmp_path, monkeypatch, where, batches):
    """A begun shard of three rows (2304 bytes each), batches of two: whole batches are kept."""
    extract(vit, folder, tmp_path / "out", batch=2, shard=3)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / SHARDS[1]).unlink()
    (tmp_path / "out" / INDEX).unlink()
    (tmp_path / "out" / "00001.unfinished").write_bytes(whole[SHARDS[1]][:where])
    sizes = counting(vit, monkeypatch)
    extract(vit, folder, tmp_path / "out", batch=2, shard=3)
    assert contents(tmp_path / "out") == whole and sizes == batches


def test_done_is_done(vit, folder, tmp_path, monkeypatch):
    extract(vit, folder, tmp_path / "out", batch=2, shard=3)
    whole, sizes = contents(tmp_path / "out"), counting(vit, monkeypatch)
    assert extract(vit, folder, tmp_path / "out", batch=2, shard=3) == []
    assert contents(tmp_path / "out") == whole and sizes == []


# ------------------------------------------------------------------------------- what is different

def begun(vit, folder, out, finished: int = 3) -> None:
    """A folder with so many finished shards, and a row of the next."""
    extract(vit, folder, out, batch=1, shard=2)
    (out / INDEX).unlink()
    for n in range(finished, 4):
        path = out / f"{n:05}.safetensors"
        if n == finished:
            (out / f"{n:05}.unfinished").write_bytes(path.read_bytes()[:-2304])
        path.unlink()


@pytest.mark.parametrize("finished", [0, 1])
@pytest.mark.parametrize("change, words", [
    (dict(resize="crop"), "resize 'stretch'.*'crop'"), (dict(batch=2), "batch 1 .now 2"),
    (dict(shard=3), "shard 2 .now 3"), (None, "clip '\\w{16}' .now '")])
def test_other_settings(vit, folder, tmp_path, finished, change, words):
    begun(vit, folder, tmp_path / "out", finished)
    before = contents(tmp_path / "out")
    tower = vit if change else clip_encoder.randomized(vit)
    with pytest.raises(ValueError, match=f"out was begun with {words}.*delete the folder"):
        extract(tower, folder, tmp_path / "out", **dict(batch=1, shard=2) | (change or {}))
    assert contents(tmp_path / "out") == before


def remove(folder):
    (folder / "d.png").unlink()


def replace_one(folder):
    picture(9, 9).save(folder / "d.png")


def add(folder):
    picture(9, 9).save(folder / "c2.png")


@pytest.mark.parametrize("change, culprit", [
    (remove, "c.jpg"), (replace_one, "d.png"), (add, "c2.png")])
def test_other_pictures(vit, folder, tmp_path, change, culprit):
    """a b | d c | e f | g: finished shards that hold others are an error, a begun one is redone."""
    begun(vit, folder, tmp_path / "late", 2)
    begun(vit, folder, tmp_path / "early", 1)
    change(folder)
    with pytest.raises(ValueError, match=f"late/00001.*differs: [^ ]*{culprit}.*delete"):
        extract(vit, folder, tmp_path / "late", batch=1, shard=2)
    extract(vit, folder, tmp_path / "early", batch=1, shard=2)
    extract(vit, folder, tmp_path / "fresh", batch=1, shard=2)
    assert contents(tmp_path / "early") == contents(tmp_path / "fresh")


def test_fewer_and_more_pictures(vit, folder, tmp_path):
    extract(vit, folder, tmp_path / "out", batch=1, shard=2)
    (folder / "g.png").rename(tmp_path / "g.png")
    with pytest.raises(ValueError, match="00003.safetensors is no part of 6 rows"):
        extract(vit, folder, tmp_path / "out", batch=1, shard=2)
    (folder / "f.png").unlink()
    (tmp_path / "out" / "00003.safetensors").unlink()
    with pytest.raises(ValueError, match="00002.*differs: fewer"):
        extract(vit, folder, tmp_path / "out", batch=1, shard=2)


def test_a_folder_of_something_else(vit, folder, tmp_path):
    weights.write(tmp_path / "out" / "model.safetensors", {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match="model.safetensors holds no packed features"):
        extract(vit, folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="model.safetensors is a file"):
        extract(vit, folder, tmp_path / "out" / "model.safetensors")
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}.*features.py"):
            Features(path)


def test_damage(vit, folder, tmp_path):
    out = tmp_path / "out"
    extract(vit, folder, out, batch=2, shard=3)
    whole = contents(out)
    (out / SHARDS[1]).write_bytes(whole[SHARDS[1]][:-1])
    with pytest.raises(ValueError, match="00001.safetensors is damaged"):
        extract(vit, folder, out, batch=2, shard=3)
    with pytest.raises(ValueError, match="00001.safetensors is truncated"):
        Features(out).stack(["e"])
    (out / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match="00001.safetensors is missing: pack again"):
        Features(out)
    (out / INDEX).write_text(whole[INDEX].decode()[:-5])
    with pytest.raises(ValueError, match="index.json is no index"):
        Features(out)
    extract(vit, folder, out, batch=2, shard=3)
    assert contents(out) == whole


# --------------------------------------------------------------------------------- broken pictures

def break_pictures(folder):
    whole = (folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(whole[:len(whole) // 2])
    (folder / "bad \" é.jpg").write_bytes(b"nothing")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")


def test_a_broken_picture_stops(vit, folder, tmp_path):
    whole = (folder / "d.png").read_bytes()
    break_pictures(folder)
    with pytest.raises(ValueError, match="bad.*cannot be read.*go on.*skip"):
        extract(vit, folder, tmp_path / "out", batch=1)
    for bad in folder.glob("bad*"):
        bad.unlink()
    (folder / "dangling.png").unlink()
    with pytest.raises(ValueError, match="d.png cannot be read"):
        extract(vit, folder, tmp_path / "out", batch=1)
    (folder / "d.png").write_bytes(whole)
    extract(vit, folder, tmp_path / "out", batch=1)
    extract(vit, folder, tmp_path / "fresh", batch=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_broken_picture_is_skipped(vit, folder, tmp_path, batch):
    extract(vit, folder, tmp_path / "whole")
    break_pictures(folder)
    out = tmp_path / "out"
    skipped = extract(vit, folder, out, batch=batch, shard=3, on_error="skip")
    packed, whole = Features(out), Features(tmp_path / "whole")
    assert skipped == ["bad \" é", "d", "dangling"] == packed.skipped
    assert packed.ids == list("abcefg")
    assert close(packed.stack(list("abcefg")), whole.stack(list("abcefg")), 5e-3)
    assert extract(vit, folder, out, batch=batch, shard=3, on_error="skip") == skipped
    with pytest.raises(ValueError, match="left out when .*00000.*delete that shard.*skip"):
        extract(vit, folder, out, batch=batch, shard=3)


def test_stopped_and_then_skipped(vit, folder, tmp_path):
    break_pictures(folder)
    with pytest.raises(ValueError, match="cannot be read"):
        extract(vit, folder, tmp_path / "out", batch=1)
    for name in ("out", "fresh"):
        extract(vit, folder, tmp_path / name, batch=1, on_error="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_extract_refuses(vit, folder, tmp_path, monkeypatch):
    for kwargs, words in ((dict(resize="pad"), "pad"), (dict(on_error="ask"), "ask"),
                          (dict(batch=0), "batch is 0"), (dict(shard=-1), "shard -1")):
        with pytest.raises(ValueError, match=words):
            extract(vit, folder, tmp_path / "out", **kwargs)
    picture(9, 9).save(folder / "deep" / "a.png")
    with pytest.raises(ValueError, match="a.PNG and .*deep.a.png"):
        extract(vit, folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no files that end in .jpg"):
        extract(vit, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        extract(vit, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "deep" / "a.png").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 7 * 2303))
    with pytest.raises(OSError, match="out needs 0.0 GB more.*another disk"):
        extract(vit, folder, tmp_path / "out")


def test_numbers_that_fp16_cannot_hold(vit, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "encode", lambda x: torch.full((len(x), 36, 32), 7e4))
    with pytest.raises(ValueError, match="a.PNG.*fp16"):
        extract(vit, folder, tmp_path / "out")


# ------------------------------------------------------------------------------------------ memory

def random_recipe(batch: int, shard: int, shape: tuple[int, int] = (36, 8)) -> Recipe:
    return Recipe({}, shape, str, lambda path: torch.full(shape, float(path.name) / 64),
                  lambda x: x, batch, shard)


def test_packing_holds_two_batches(tmp_path):
    alive, most, numbers = weakref.WeakSet(), [0], count()

    def read(path):
        x = torch.full((36, 8), float(next(numbers) % 9))
        alive.add(x)
        most[0] = max(most[0], len(alive))
        return x

    files = {str(i): Path(str(i)) for i in range(400)}
    pack(tmp_path / "out", files, replace(random_recipe(4, 100), read=read))
    assert 4 <= most[0] <= 13


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_reading_copies_only_what_was_asked_for(tmp_path):
    """512 MB of rows that nothing ever wrote (a hole in a file); 20 of them are asked for."""
    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    recipe = random_recipe(4, 4000, (32, 2048))
    files = {str(i): Path(str(i)) for i in range(20)}
    pack(tmp_path / "out", files, recipe)
    names = [str(i) for i in range(4000)]
    head = features.header(recipe, names)
    with open(tmp_path / "out" / SHARDS[0], "wb") as file:
        file.write(head)
        file.truncate(len(head) + 4000 * recipe.row_bytes())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index |= {"shape": [4000, 32, 2048], "ids": {n: int(n) for n in names}}
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    before, packed = own_memory(), Features(tmp_path / "out")
    assert packed.stack([str(200 * i) for i in range(20)]).sum() == 0
    assert own_memory() - before < 40


# ------------------------------------------------------------------------------ published features

def write_hdf5(h5py, folder: Path, name: str, grid: np.ndarray, key: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file[key or f"{name}/features"] = grid


@pytest.fixture
def published(tmp_path):
    """Nine files as VL-Adapter's extraction writes them, and all grids (9, 49, 16)."""
    h5py = pytest.importorskip("h5py")
    grids = np.random.default_rng(0).normal(size=(9, 49, 16)).astype(np.float32) * 10
    for n, grid in enumerate(grids):
        write_hdf5(h5py, tmp_path / "h5" / f"train{n % 2}", f"COCO_{n}", grid)
    return h5py, tmp_path / "h5", torch.from_numpy(grids)


def test_convert(published, tmp_path):
    _, folder, grids = published
    assert convert(folder, tmp_path / "out", batch=2, shard=4) == []
    packed, names = Features(tmp_path / "out"), [f"COCO_{n}" for n in range(9)]
    want = golden_files.pool(grids, 6).half()
    assert sorted(packed.ids) == names and torch.equal(packed.stack(names), want.float())
    # by hand: token 7 (row 1, column 1) is the maximum of cells (1, 1), (1, 2), (2, 1), (2, 2)
    assert torch.equal(packed.stack(["COCO_3"])[0, 7],
                       grids[3, [8, 9, 15, 16]].amax(0).half().float())
    whole = contents(tmp_path / "out")
    assert len(whole) == 5
    (tmp_path / "out" / INDEX).unlink()
    (tmp_path / "out" / SHARDS[2]).unlink()
    (tmp_path / "out" / "00002.unfinished").write_bytes(whole[SHARDS[2]][:-5])
    convert(folder, tmp_path / "out", batch=2, shard=4)
    assert contents(tmp_path / "out") == whole


def test_convert_finds_fault(published, tmp_path):
    h5py, folder, _ = published
    cut = (folder / "train0" / "COCO_0.h5").read_bytes()
    (folder / "train0" / "COCO_0.h5").write_bytes(cut[:1000])
    for name, grid, key in (("other", np.zeros((49, 16)), "elsewhere/features"),
                            ("flat", np.zeros(16), None), ("five", np.zeros((25, 16)), None),
                            ("boxes", np.zeros((50, 16)), None), ("wide", np.ones((49, 8)), None),
                            ("text", np.array(b"no numbers"), None)):
        write_hdf5(h5py, folder / "train0", name, grid, key)
    bad = {"COCO_0", "other", "flat", "five", "boxes", "wide", "text"}
    with pytest.raises(ValueError, match="COCO_0.h5 cannot be read"):
        convert(folder, tmp_path / "out", batch=2)
    assert set(convert(folder, tmp_path / "out", batch=2, on_error="skip")) == bad
    packed = Features(tmp_path / "out")
    assert sorted(packed.ids) == [f"COCO_{n}" for n in range(1, 9)]
    for path in folder.rglob("*.h5"):
        if path.stem not in bad or path.stem == "COCO_0":
            path.unlink()
    for name, words in (("five", "square grid"), ("wide", "another size"), ("other", "KeyError")):
        write_hdf5(h5py, tmp_path / name, "a", np.zeros((49, 16)))
        shutil.copy(folder / "train0" / f"{name}.h5", tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.h5 cannot be read .*{words}"):
            convert(tmp_path / name, tmp_path / f"{name}_out")
    (tmp_path / "wide" / "a.h5").write_bytes(b"")
    (tmp_path / "wide" / "wide.h5").unlink()
    with pytest.raises(ValueError, match="none of the 1 HDF5 files of .*wide can be read"):
        convert(tmp_path / "wide", tmp_path / "wide_out")


def test_convert_without_h5py(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match="h5py, which is missing: pip install h5py"):
        convert(tmp_path, tmp_path / "out")
    assert features.main(["--hdf5", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "pip install h5py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ command line

def test_command_line(clip_folder, folder, published, tmp_path, capsys):
    args = ["--clip", str(clip_folder), "--images", str(folder), "--out"]
    assert features.main([*args, str(tmp_path / "out"), "--batch", "4", "--shard", "5"]) == 0
    assert len(Features(tmp_path / "out")) == 7 and len(contents(tmp_path / "out")) == 4
    break_pictures(folder)
    capsys.readouterr()
    assert features.main([*args, str(tmp_path / "new")]) == 1
    assert "bad" in capsys.readouterr().err.splitlines()[-1]
    assert features.main([*args, str(tmp_path / "new"), "--on-error", "skip"]) == 0
    assert "3 unreadable" in capsys.readouterr().err
    assert features.main(["--clip", "nowhere", *args[2:], str(tmp_path / "new")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert features.main(["--hdf5", str(published[1]), "--out", str(tmp_path / "h")]) == 0
    assert len(Features(tmp_path / "h")) == 9
    for wrong in (["--images", "x"], ["--images", "x", "--hdf5", "y"], ["--clip", "x"],
                  ["--hdf5", "x", "--clip", "y"]):
        with pytest.raises(SystemExit):
            features.main([*wrong, "--out", "z"])


def test_shard_file_of_ours_is_theirs(tmp_path):
    """The header written by hand says what safetensors' own writer says."""
    pack(tmp_path / "out", {str(i): Path(str(i)) for i in range(5)}, random_recipe(2, 5))
    x = torch.arange(5).half()[:, None, None].expand(5, 36, 8).contiguous() / 64
    save_file({"features": x}, tmp_path / "theirs.safetensors")
    ours, theirs = weights.read(tmp_path / "out" / SHARDS[0]), weights.read(
        tmp_path / "theirs.safetensors")
    assert torch.equal(ours["features"], theirs["features"])
    size = 5 * 36 * 8 * 2
    assert (tmp_path / "out" / SHARDS[0]).read_bytes()[-size:] == \
        (tmp_path / "theirs.safetensors").read_bytes()[-size:]
