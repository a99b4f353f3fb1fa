"""features.py, pictures.py, pack.py: against the tower itself, by hand, against kills and lies."""
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import unicodedata
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import golden_files
import numpy as np
import pytest
import torch
from PIL import Image

from clip_encoder import ViT, pixels, randomized
from support import features, weights
from support.features import INDEX, ROWS, Features, Pixels, convert, extract
from support.gate import BadInput, lock
from support.pictures import frame_files, list_clips, list_files, read_frames
from support.published_clip import HUGGING_FACE, load_clip
from tools import pack


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)                                 # 0 is the control's
    return ViT(width=32, layers=2, heads=4, patch=4, size=24, out=20).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_folder(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    weights.write(folder / "model.safetensors", weights.published(vit, HUGGING_FACE))
    (folder / "config.json").write_text('{"num_attention_heads": 4, "num_hidden_layers": 2}')
    return folder


def picture(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    """Few colours, so that a GIF keeps them all."""
    generator = np.random.default_rng(seed)
    palette = generator.integers(0, 256, (16, 3), dtype=np.uint8)
    return Image.fromarray(palette[generator.integers(0, 16, (height, width))])


def save(path: Path, seed: int = 0, **sides: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **sides).save(path)


def save_clip(path: Path, count: int) -> None:
    """Frames 1, 2, ... of a folder (10.png sorts before 2.png), or of an animated file."""
    if not path.suffix:
        for n in range(count):
            save(path / f"{n + 1}.png", n)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = map(picture, range(count))
    more = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=40, **more)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in two folders, and a file that is none. Sorted: a b d deep/c e f g."""
    for i, name in enumerate(("b.png", "a.PNG", "deep/c.jpg", "e.jpeg", "d.png", "f.png", "g.png")):
        save(tmp_path / "in" / name, i, width=30 + i)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


LENGTHS = {"long": 64, "short": 3, "gif": 5, "s01": 12, "webp": 4}           # sorted by path


@pytest.fixture
def clips(tmp_path):
    for name, count in {"short": 3, "show/s01": 12, "long": 70, "show/gif.gif": 5,
                        "webp.webp": 4}.items():
        save_clip(tmp_path / "clips" / name, count)
    return tmp_path / "clips"


@pytest.fixture
def packed(vit, folder, tmp_path):
    """The seven pictures, packed."""
    assert extract(vit, folder, tmp_path / "out") == {}
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuses(words: str, exception=BadInput):
    return pytest.raises(exception, match=f"(?s){words}")


@pytest.mark.parametrize("resize, batch", [("stretch", 64), ("crop", 2)])
def test_pictures(vit, folder, tmp_path, monkeypatch, resize, batch):
    monkeypatch.setattr(features, "BATCH", batch)
    extract(vit, folder, tmp_path / "out", resize=resize)
    found, names = Features(tmp_path / "out"), "a.PNG b.png d.png deep/c.jpg e.jpeg f.png g.png"
    assert found.ids == list("abdcefg") and found.tokens == 36 and found.frames(["a"]) is None
    assert found.settings == {"clip": weights.fingerprint(vit), "resize": resize, "size": 24,
                              "grid": 6, "width": 32}
    x = torch.stack([pixels(Image.open(folder / n), 24, resize) for n in names.split()])
    want = torch.cat([vit.encode(some) for some in x.split(batch)]).half()
    assert torch.equal(found.stack(["c", "a", "c"]), want[[3, 0, 3]].float())
    assert contents(tmp_path / "out").keys() == {INDEX, ROWS}
    assert np.array_equal(np.load(tmp_path / "out" / ROWS), want.numpy())
    with refuses("out: .*'zebra'"):
        found.stack(["a", "zebra"])


def test_clips(vit, clips, tmp_path, monkeypatch):
    sizes, encode = [], vit.encode
    monkeypatch.setattr(vit, "encode", lambda x, pooled: sizes.append(len(x)) or encode(x, pooled))
    extract(vit, clips, tmp_path / "out", clips=True)
    assert max(sizes) == 16 and sum(sizes) == 70 + 3 + 5 + 12 + 4
    found = Features(tmp_path / "out")
    assert found.ids == list(LENGTHS) and found.tokens == 64 and found.settings["width"] == 20
    assert found.frames(["gif", "long"]) == [5, 64]
    x = torch.stack([pixels(picture(n), 24) for n in range(70)])
    for name, count in LENGTHS.items():
        row, = found.stack([name])
        frames = torch.cat([encode(some, True) for some in x[:max(count, 6)].split(16)])
        if name == "long":         # 70 frames: share i is frames [70 i / 64] to [70 (i + 1) / 64]
            frames = torch.cat([encode(some, True) for some in x.split(16)])      # rounded up
            shares = [frames[i * 70 // 64:-(-(i + 1) * 70 // 64)] for i in range(64)]
            assert torch.equal(row, torch.stack([share.amax(0) for share in shares]).half().float())
        else:
            assert (row[:count] - frames[:count]).abs().max() < 2e-3
            assert not row[count:].any()
    frames = encode(x[:12], True)
    assert torch.equal(found.stack(["s01"])[0, :12], frames.half().float())


def test_several_folders(vit, packed, tmp_path):
    for name in "xy":
        save(tmp_path / "more" / f"{name}.png", ord(name))
    extract(vit, tmp_path / "more", tmp_path / "2")
    extract(vit, tmp_path / "more", tmp_path / "3", resize="crop")
    both, one, two = Features(packed, tmp_path / "2"), Features(packed), Features(tmp_path / "2")
    assert both.ids == [*"abdcefgxy"] and both.settings == one.settings
    assert torch.equal(both.stack(["y", "g"]), torch.cat([two.stack(["y"]), one.stack(["g"])]))
    with refuses("out: another folder holds 'a', too"):
        Features(packed, packed)
    with refuses("3: .*crop.*others.* .*stretch"):
        Features(packed, tmp_path / "3")


def test_controls(vit, clips, tmp_path):
    extract(vit, clips, tmp_path / "out", clips=True)
    real = Features(tmp_path / "out")
    blind, hidden = (features.control(real, SimpleNamespace(control=control, seed=3))
                     for control in ("blind", "no-frames"))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3)).tolist()
    others = [real.ids[i] for i in order]
    assert others != real.ids and blind.settings == real.settings and blind.ids == real.ids
    assert torch.equal(blind.stack(real.ids), real.stack(others))
    assert blind.frames(real.ids) == real.frames(others)
    assert hidden.frames(["long", "gif"]) == [0, 0]


def test_held_on_the_device(packed, tmp_path, monkeypatch, vit):
    """Where all rows fit, they are copied once, and handed out from there alike."""
    save(tmp_path / "more" / "x.png", 3)
    extract(vit, tmp_path / "more", tmp_path / "2")
    disk, held = (Features(packed, tmp_path / "2") for _ in range(2))
    held.to("cpu")
    assert held.table is None                              # it is there already
    monkeypatch.setattr(features, "free_memory", lambda device: 2**30)
    held.to("cpu")
    assert held.table.shape == (len(disk.ids), 36, disk.settings["width"])
    config = SimpleNamespace(control="blind", seed=3)
    for one, two in (disk, held), (features.control(disk, config), features.control(held, config)):
        assert torch.equal(one.stack(["x", "b", "x", "a"]), two.stack(["x", "b", "x", "a"]))


def pack_until(argv: list[str], events: int) -> None:
    """A process of its own: killed at this event, which are reads and what is just to be saved."""
    turn, count = threading.Lock(), iter(range(1, 10 ** 9))
    features.BATCH, features.SECONDS = 3, -1

    def counted(function):
        def wrapped(*given, **named):
            with turn:
                if next(count) == events:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)
        return wrapped
    for name in ("read_picture", "read_clip", "replace_file"):
        setattr(features, name, counted(getattr(features, name)))
    torch.set_num_threads(1)
    pack.main(argv)


def spawn(argv: list[str], events: int = -1) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "support.features"])
    process = context.Process(target=pack_until, args=(argv, events))
    process.start()
    return process


@pytest.mark.parametrize("kind", ["--images", "--clips"])
def test_killed_at_random_moments(clip_folder, tmp_path, kind):
    for n in range(36):
        if kind == "--images":
            save(tmp_path / "in" / f"{n:02}.png", n)
        else:
            save_clip(tmp_path / "in" / f"{n:02}", 2 + n % 3)
    argv = ["--clip", str(clip_folder), kind, str(tmp_path / "in"), "--out"]
    (tmp_path / "whole").mkdir()
    with open(tmp_path / "whole" / ROWS, "ab") as file:  # three wait for this one, then take turns
        lock(file)
        all_of_them = [spawn([*argv, str(tmp_path / "whole")]) for _ in range(3)]
        all_of_them[0].join(1.5)
        assert all_of_them[0].is_alive() and not (tmp_path / "whole" / INDEX).exists()
    generator, done = random.Random(0), [0]
    for _ in range(3):
        process = spawn([*argv, str(tmp_path / "out")], generator.randint(8, 18))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done.append(json.loads((tmp_path / "out" / INDEX).read_text())["done"])
        with refuses("not finished: give its command again"):
            Features(tmp_path / "out")
    assert done == sorted(done) and 0 < done[-1] < 36
    all_of_them.append(spawn([*argv, str(tmp_path / "out")]))
    for process in all_of_them:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(Features(tmp_path / "out").ids) == 36


@pytest.mark.parametrize("change, words", [
    (lambda f: dict(resize="crop"), "begun with .*'stretch'.*, and now it is .*'crop'"),
    (lambda f: dict(tower=True), r"begun with .*'clip': '\w{16}'"),
    (lambda f: (f / "d.png").unlink(), "begun with file 'd' where 'c' is now"),
    (lambda f: save(f / "h.png"), "begun with file None where 'h' is now"),
    (lambda f: save(f / "d.png", width=99), "d.png has changed")])
def test_other_settings_or_files(vit, folder, packed, change, words):
    before, changed = contents(packed), change(folder) or {}
    tower = randomized(vit) if changed.pop("tower", False) else vit
    with refuses(f"out: .*{words}.*name another --out, or delete"):
        extract(tower, folder, packed, **changed)
    assert contents(packed) == before


def test_done_is_done(vit, folder, packed, monkeypatch):
    before = contents(packed)
    monkeypatch.setattr(vit, "encode", None)
    monkeypatch.setattr(features, "open", None, raising=False)           # also on a read-only disk
    assert extract(vit, folder, packed) == {} and contents(packed) == before


def test_a_place_that_cannot_be_packed_into(vit, folder, packed, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / ROWS, np.ones(3))
    with refuses("other: features.npy without index.json"):
        extract(vit, folder, tmp_path / "other")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=16127))
    with refuses("new: its disk lacks the room"):
        extract(vit, folder, tmp_path / "new")
    change_index(done=5, sizes=json.loads((packed / INDEX).read_text())["sizes"][:5])(packed)
    cut_in_half(packed / ROWS)
    with refuses("features.npy: "):                      # numpy would make it longer
        extract(vit, folder, packed)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def break_pictures(folder: Path) -> None:
    cut_in_half(folder / "d.png")
    (folder / "bad \" é.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")


def test_stop(vit, folder, tmp_path, monkeypatch):
    """What is mended goes on to the bytes of an undisturbed run."""
    monkeypatch.setattr(features, "BATCH", 2)
    extract(vit, folder, tmp_path / "fresh")
    whole = (folder / "d.png").read_bytes()
    cut_in_half(folder / "d.png")
    with refuses("d.png: .*: mend it, or pack with tools.pack --on-error skip"):
        extract(vit, folder, tmp_path / "new")
    (folder / "d.png").write_bytes(whole)
    (tmp_path / "new" / f".{INDEX}.9.tmp").write_text("left by a kill")
    extract(vit, folder, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


def test_rows_that_a_kill_left_are_written_over(vit, folder, packed):
    change_index(done=2, sizes=json.loads((packed / INDEX).read_text())["sizes"][:2])(packed)
    cut_in_half(folder / "d.png")
    extract(vit, folder, packed, on_error="skip")
    assert not np.load(packed / ROWS)[2].any()


def test_skip(vit, folder, packed, tmp_path):
    break_pictures(folder)
    for _ in range(2):
        skipped = extract(vit, folder, tmp_path / "new", on_error="skip")
        assert list(skipped) == ["bad \" é", "d", "dangling"] and "d.png" in skipped["d"]
    some, whole = Features(tmp_path / "new"), Features(packed)
    assert some.ids == list("abcefg")
    assert (some.stack(some.ids) - whole.stack(some.ids)).abs().max() < 5e-3
    zeros = ~np.load(tmp_path / "new" / ROWS).any((1, 2))
    assert zeros.tolist() == [False, False, True, True, True, False, False, False, False]
    with refuses("'d'"):
        some.stack(["d"])


@pytest.mark.parametrize("clip, culprit", [
    ("long", "long/33.png"), ("gif", "show/gif.gif"), ("webp", "webp.webp")])
def test_a_broken_clip(vit, clips, tmp_path, clip, culprit):
    cut_in_half(clips / culprit)
    with refuses(f"{culprit}: "):
        extract(vit, clips, tmp_path / "out", clips=True)
    assert list(extract(vit, clips, tmp_path / "out", clips=True, on_error="skip")) == [clip]
    found, others = Features(tmp_path / "out"), {**LENGTHS}
    del others[clip]
    assert found.ids == list(others) and found.frames(found.ids) == list(others.values())


def test_a_gif_cut_anywhere(tmp_path, vit):
    """Between two frames, too, where Pillow alone would see a shorter clip."""
    save_clip(tmp_path / "a.gif", 4)
    assert len(list(read_frames(tmp_path / "a.gif", 24))) == 4
    whole = (tmp_path / "a.gif").read_bytes()
    for cut in range(0, len(whole), 3):
        (tmp_path / "a.gif").write_bytes(whole[:cut])
        with refuses("a.gif: "):
            extract(vit, tmp_path, tmp_path / "out", clips=True)


def test_numbers_that_fp16_cannot_hold(vit, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "encode", lambda x: torch.full((len(x), 36, 32), 7e4))
    with refuses("a.PNG: .*fp16"):
        extract(vit, folder, tmp_path / "out", on_error="skip")


def test_which_pictures_are_found(folder):
    """Linked folders, not back to where one came from; nothing that computers leave."""
    save(folder.parent / "store" / "deep" / "z.jpg")
    (folder / "linked").symlink_to(folder.parent / "store")
    (folder.parent / "store" / "deep" / "back").symlink_to(folder)            # a loop
    for name in ("._a.png", "deep/._c.jpg", ".thumbnails/t.png", "__MACOSX/a.png", "@eaDir/a.png"):
        save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    assert list(list_files(folder)) == list("abdcefgz")


def test_which_clips_are_found(clips):
    """Rubbish is neither a clip nor a frame; frames are in the order of time."""
    for name in ("._v9.gif", "short/._1.jpg", ".checkpoints/1.png", "short/.checkpoints/1.png",
                 "__MACOSX/short/1.png"):
        save(clips / name)
    os.mkfifo(clips / "short" / "0.png")
    (clips / "short" / "back").symlink_to(clips)
    found = list_clips(clips)
    assert list(found) == list(LENGTHS)
    names = ["1.png", "2.png", "3.png", "9.jpg", "10.jpg", "f1_2.png", "f1_11.png", "f02_1.png"]
    for name in reversed(names[3:]):
        save(clips / "short" / name)
    assert [path.name for path in frame_files(found["short"])] == names


def test_nothing_or_two_of_a_name(folder, clips, tmp_path):
    save(folder / "deep" / "a.jpg")
    save_clip(clips / "long.gif", 2)
    (tmp_path / "empty").mkdir()
    for find, twice, words in ((list_files, folder, "a.PNG and .*deep/a.jpg share id 'a'"),
                               (list_clips, clips, "clips/long and .*long.gif share id 'long'")):
        with refuses(words):
            find(twice)
        with refuses("empty: it holds none of "):
            find(tmp_path / "empty")
        with refuses("nowhere", FileNotFoundError):
            find(tmp_path / "nowhere")


def test_accents(vit, tmp_path):
    """A file's name and an annotation may spell one letter as one sign or as two."""
    one, two = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    for name, other in ((one, two), (two, one)):
        save(tmp_path / name / f"{name}.png")
        extract(vit, tmp_path / name, tmp_path / f"{name}.out")
        found, files = Features(tmp_path / f"{name}.out"), list_files(tmp_path / name)
        assert torch.equal(found.stack([other]), found.stack([name]))
        assert torch.equal(*(Pixels(vit, files).stack([n]) for n in (name, other)))
    save(tmp_path / one / f"{two}.jpg")
    with refuses("share id"):
        list_files(tmp_path / one)


def header(shape: tuple, dtype: str = "<f2") -> bytes:
    """What stands at the head of a .npy file."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def change_index(**changes):
    return lambda out: (out / INDEX).write_text(json.dumps(
        json.loads((out / INDEX).read_text()) | changes))


@pytest.mark.parametrize("harm, words", [
    (lambda out: cut_in_half(out / ROWS), "features.npy: "),
    (lambda out: (out / ROWS).write_bytes(header((10**11, 36, 32))), "features.npy: "),
    (lambda out: np.save(out / ROWS, np.ones((7, 36, 32))), r"float64 \(7, 36, 32\) is not what"),
    (lambda out: np.save(out / ROWS, np.ones((6, 36, 32), np.float16)), "is not what index.json"),
    (lambda out: np.save(out / ROWS, np.array([{}])), "features.npy: "),
    (lambda out: cut_in_half(out / INDEX), "index.json: "),
    (change_index(done=6), "index.json: its entries disagree"),
    (change_index(ids=[*"abdceff"]), "index.json: its entries disagree"),
    (change_index(done=5, sizes=[1] * 5), "out: not finished"),
    (change_index(settings={"frames": 64}, frames=[1] * 7), "is not what index.json")])
def test_damage(packed, harm, words):
    harm(packed)
    with refuses(words):
        Features(packed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite(packed, value):
    rows = np.load(packed / ROWS, mmap_mode="r+")
    rows[3, 35, 31] = value
    rows.flush()
    found = Features(packed)
    assert found.stack([*"abd"]).isfinite().all()
    with refuses("out: NaN or inf in the features of 'c'"):
        found.stack([*"abdc"])


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    grids = np.random.default_rng(0).normal(size=(5, 49, 16)).astype(np.float32) * 10
    (tmp_path / "h5" / "deep").mkdir(parents=True)
    bad = {"a": b"cut", "five": np.zeros((25, 16)), "boxes": np.zeros((50, 16)), "g": np.zeros(16),
           "text": np.array(b"no numbers"), "wide": np.ones((49, 8)),
           "whole": np.ones((49, 16), int), "inf": np.full((49, 16), -np.inf),
           "other": np.zeros((49, 16))}
    for name, x in [*bad.items(), *((f"deep/COCO_{n}", grid) for n, grid in enumerate(grids))]:
        path = tmp_path / "h5" / f"{name}.h5"
        if isinstance(x, bytes):
            path.write_bytes(x)
            continue
        with h5py.File(path, "w") as file:
            file["elsewhere" if name == "other" else f"{path.stem}/features"] = x
    with h5py.File(tmp_path / "h5" / "lie.h5", "w") as file:
        file.create_dataset("lie/features", (10**11, 16), chunks=(1, 16), dtype="f4")
    with refuses("a.h5: .*mend it"):
        convert(tmp_path / "h5", tmp_path / "out")
    skipped = convert(tmp_path / "h5", tmp_path / "out", "skip")
    assert skipped.keys() == {*bad, "lie"} and "do not fit" in skipped["lie"]
    assert "no square" in skipped["five"] and "rows, 16" in skipped["wide"]
    found, names = Features(tmp_path / "out"), [f"COCO_{n}" for n in range(5)]
    assert found.ids == names
    assert found.settings == {"source": "hdf5", "grid": 6, "width": 16}
    want = golden_files.pool(torch.from_numpy(grids), 6).half().float()
    assert torch.equal(found.stack(names), want)
    # by hand: token 7 (row 1, column 1) is the maximum of cells (1, 1), (1, 2), (2, 1), (2, 2)
    token = grids[3, [8, 9, 15, 16]].max(0).astype(np.float16)
    assert np.array_equal(found.stack(["COCO_3"])[0, 7], token)
    for name in ("whole", "wide", "other"):
        (tmp_path / "h5" / f"{name}.h5").unlink()
    shutil.rmtree(tmp_path / "h5" / "deep")
    with refuses("none of 7 files can be read; .*text.h5"):
        convert(tmp_path / "h5", tmp_path / "none", "skip")


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with refuses("h5py is missing: pip install h5py", SystemExit):
        pack.main(["--published", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "b.npz").write_bytes(b"")
    with refuses("divide them"):
        convert(tmp_path, tmp_path / "out")


def test_npz(tmp_path):
    """Clips of 5, 64 and 130 frames; then every file that is refused."""
    generator, folder = np.random.default_rng(0), tmp_path / "npz"
    given = {n: generator.normal(size=(n, 24)).astype(np.float32) for n in (5, 64, 130)}
    (folder / "show").mkdir(parents=True)
    np.savez_compressed(folder / "v5.npz", features=given[5])
    np.savez(folder / "show" / "v64.npz", features=given[64].astype(np.float16))
    np.savez(folder / "show" / "v130.npz", features=np.asfortranarray(given[130]))
    one, whole = np.ones((3, 24), np.float32), (folder / "show" / "v130.npz").read_bytes()
    for name, x in {"flat": one[0], "no": one[:0], "wide": one[:, :8], "deep": one[None],
                    "nan": one * np.nan, "text": np.array(["a"]), "int": one.astype(int),
                    "pickled": np.array([{}], object),
                    "inf": np.where(np.arange(99)[:, None] == 3, -np.inf, one[:1])}.items():
        np.savez(folder / f"x_{name}.npz", features=x)
    np.savez(folder / "x_other.npz", feats=one)
    flipped = whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:]
    for name, data in {"junk": b"nothing", "empty": b"", "cut": whole[:1000], "end": whole[:-3],
                       "bare": header((3, 24)), "flip": flipped}.items():
        (folder / f"x_{name}.npz").write_bytes(data)
    for name, shape in (("lie", (10**11, 24)), ("less", (2, 24))):
        with zipfile.ZipFile(folder / f"x_{name}.npz", "w") as archive:
            archive.writestr("features.npy", header(shape, "<f4") + one.tobytes())
    bad = sorted(path.stem for path in folder.glob("x_*"))
    skipped = convert(folder, tmp_path / "out", "skip")
    assert len(bad) == 18 and sorted(skipped) == bad
    for name, words in (("wide", "(3, 8), not real numbers (rows, 24)"), ("inf", "fp16"),
                        ("other", "no 'features', only ['feats.npy']"), ("int", "type int64")):
        assert words in skipped[f"x_{name}"]
    found = Features(tmp_path / "out")
    assert sorted(found.ids) == ["v130", "v5", "v64"] and found.settings["width"] == 24
    assert found.frames(["v130", "v5", "v64"]) == [64, 5, 64]
    five, full, more = found.stack(["v5", "v64", "v130"]).numpy()
    assert np.array_equal(five[:5], given[5].astype(np.float16)) and not five[5:].any()
    assert np.array_equal(full, given[64].astype(np.float16))
    for i in range(64):                                   # shares of 130 / 64 frames, overlapping
        share = given[130][i * 130 // 64:-(-(i + 1) * 130 // 64)]
        assert np.array_equal(more[i], share.max(0).astype(np.float16))


@pytest.fixture
def config(clip_folder, folder, clips, tmp_path):
    return SimpleNamespace(tasks="vqa,tvqa", features="", clip=str(clip_folder), control="",
                           images=str(folder), clips=str(clips), data=str(tmp_path), device="cpu",
                           train_clip=True)


def test_packed_once_and_given(config, clips, tmp_path):
    found = features.load_features(config)
    assert found["vqa"].ids == list("abdcefg") and found["tvqa"].ids == list(LENGTHS)
    assert list(features.sources(found)) == ["pictures", "clips"]
    again = features.load_features(config)
    assert [again[task].folders for task in again] == [found[task].folders for task in found]
    save(clips / "short" / "2.png", 9, width=30)
    assert features.load_features(config)["tvqa"].folders != found["tvqa"].folders
    config.features = f"{found['tvqa'].folders},{found['vqa'].folders}"
    given = features.load_features(config)
    assert torch.equal(given["vqa"].stack(["a"]), found["vqa"].stack(["a"]))
    config.tasks, config.features = "vqa", str(tmp_path / "a, b")
    shutil.copytree(found["vqa"].folders, config.features)
    assert features.load_features(config)["vqa"].ids == found["vqa"].ids
    config.tasks, config.control = "vqa,tvqa", "random-clip"
    with refuses("a, b: it has no clips for tvqa"):
        features.load_features(config)
    assert not torch.equal(features.load_tower(config).cls, load_clip(config.clip).cls)


def test_pictures_as_they_are(config, folder):
    config.features, config.tasks = "none", "vqa"
    shown = features.load_features(config)
    assert torch.equal(shown["vqa"].stack(["c"])[0], pixels(Image.open(folder / "deep/c.jpg"), 24))
    cut_in_half(folder / "a.PNG")
    with refuses("a.PNG: "):
        shown["vqa"].stack(["b", "a"])


def test_every_picture_must_be_there(config):
    found = features.load_features(config)
    examples = {task: [SimpleNamespace(images=images) for images in names]
                for task, names in {"vqa": ["a", "bg"], "tvqa": [["long"]]}.items()}
    features.check_pictures(config, examples, found)
    examples["tvqa"] += [SimpleNamespace(images=["zebra", "yak"])]
    with refuses("2 of the clips that tvqa shows are missing, first 'yak'"):
        features.check_pictures(config, examples, found)


def test_command_line(clip_folder, folder, tmp_path, capsys):
    argv = ["--clip", str(clip_folder), "--images", str(folder), "--out", str(tmp_path / "out")]
    break_pictures(folder)
    with refuses("^pack.py: .*bad.*skip", SystemExit):
        pack.main(argv)
    pack.main([*argv, "--on-error", "skip"])
    assert "3 unreadable files left out: bad \" é, d, dangling" in capsys.readouterr().out
    with refuses("^pack.py: nowhere", SystemExit):
        pack.main(["--clip", "nowhere", *argv[2:]])
    for wrong in (["--images", "x"], ["--images", "x", "--clips", "y", "--clip", "z"],
                  ["--clip", "x"], ["--published", "x", "--clip", "y"]):
        with pytest.raises(SystemExit, match="2"):
            pack.main([*wrong, "--out", "z"])
