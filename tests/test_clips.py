"""clips.py and features.py: clips against the tower itself, against hand-worked rows, and kills."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import clips
from support import features
from support import weights
from clip_encoder import ViT, pixels
from support.published_clip import HUGGING_FACE
from support.clips import count_real, fit, frame_files, list_clips, read_npz
from support.features import INDEX, Features, convert_npz, extract
from killing import contents, kill_often


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


def picture(seed: int, side: int = 24) -> Image.Image:
    """Few colours, so that a GIF keeps them all."""
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    return Image.fromarray(palette[rng.integers(0, 16, (side, side))])


def write_frames(folder: Path, seeds) -> None:
    folder.mkdir(parents=True)
    for n, seed in enumerate(seeds):
        picture(seed).save(folder / f"{n + 1}.png")              # 10.png sorts before 2.png


def write_animated(path: Path, seeds) -> None:
    first, *rest = map(picture, seeds)
    first.save(path, save_all=True, append_images=rest, duration=40,
               **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.fixture
def folder(tmp_path):
    """Five clips: 3, 12 and 70 frames in folders, 5 in a GIF, 4 in a WebP."""
    root = tmp_path / "in"
    write_frames(root / "short", range(3))
    write_frames(root / "show" / "s01.e02", range(12))
    write_frames(root / "long", range(70))
    write_animated(root / "show" / "gif.gif", range(5))
    write_animated(root / "webp.webp", range(4))
    (root / "notes.txt").write_text("no clip")
    return root


def vectors(vit, count: int) -> torch.Tensor:
    return vit.encode(torch.stack([pixels(picture(i), 24) for i in range(count)]), pooled=True)


LENGTHS = {"long": 64, "short": 3, "gif": 5, "s01.e02": 12, "webp": 4}       # sorted by path


# --------------------------------------------------------------------------------- a whole folder

@pytest.mark.parametrize("batch, shard", [(64, 4096), (1, 2)])
def test_extract(vit, folder, tmp_path, batch, shard):
    out = tmp_path / "out"
    assert extract(vit, folder, out, batch=batch, shard=shard, clips=True) == []
    packed, names = Features(out), list(LENGTHS)
    assert packed.ids == names and packed.width == 20
    assert packed.frames(names[::-1]) == list(LENGTHS.values())[::-1]
    x = packed.stack(names)
    assert x.shape == (5, 64, 20) and x.dtype == torch.float32
    for row, (name, count) in zip(x, LENGTHS.items()):
        assert not row[count:].any()
        if name != "long":
            assert (row[:count] - vectors(vit, count)).abs().max() < 2e-3              # fp16
    # 70 frames, by hand: share i is frames [70 i / 64] to [70 (i + 1) / 64] rounded up
    frames = vectors(vit, 70)
    want = torch.stack([frames[i * 70 // 64:-(-(i + 1) * 70 // 64)].amax(0) for i in range(64)])
    assert (x[0] - want).abs().max() < 2e-3
    with pytest.raises(ValueError, match="no clip 'zebra'"):
        packed.frames(["zebra"])


def test_neighbours_change_nothing(vit, folder, tmp_path):
    for name, batch in (("a", 1), ("b", 3)):
        extract(vit, folder, tmp_path / name, batch=batch, clips=True)
    a, b = Features(tmp_path / "a"), Features(tmp_path / "b")
    assert torch.equal(a.stack(a.ids), b.stack(a.ids))


def test_pictures_have_no_frames(vit, folder, tmp_path):
    extract(vit, folder / "short", tmp_path / "out")
    assert Features(tmp_path / "out").frames(["1", "2"]) is None
    assert "frames" not in json.loads((tmp_path / "out" / INDEX).read_text())


def test_order_of_time(tmp_path):
    names = ["9.jpg", "10.jpg", "f1_2.png", "f1_11.png", "f02_1.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [p.name for p in frame_files(tmp_path)] == names


def test_a_frame_goes_through_once_and_few_at_a_time(vit, folder, tmp_path, monkeypatch):
    sizes, encode = [], vit.encode
    monkeypatch.setattr(vit, "encode", lambda x, pooled: sizes.append(len(x)) or encode(x, pooled))
    extract(vit, folder, tmp_path / "out", clips=True)
    assert max(sizes) == clips.AT_ONCE and sum(sizes) == 70 + 3 + 5 + 12 + 4
    whole = contents(tmp_path / "out")
    extract(vit, folder, tmp_path / "out", clips=True)
    assert sum(sizes) == 94 and contents(tmp_path / "out") == whole


def test_frames_are_counted_again_after_a_kill(vit, folder, tmp_path):
    """Killed between the last shard and the index: only the rows tell."""
    extract(vit, folder, tmp_path / "out", clips=True)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    extract(vit, folder, tmp_path / "out", clips=True)
    assert contents(tmp_path / "out") == whole


def test_a_changed_frame_is_noticed(vit, folder, tmp_path):
    extract(vit, folder, tmp_path / "out", clips=True)
    picture(99).save(folder / "long" / "33.png")
    with pytest.raises(ValueError, match="made from other files.*differs: .*long"):
        extract(vit, folder, tmp_path / "out", clips=True)


# ------------------------------------------------------------------------------------------- kills

def test_killed_at_random_moments(clip_folder, tmp_path):
    for n in range(40):
        write_frames(tmp_path / "in" / f"v{n:02}", range(n, n + 3 + n % 5))
    arguments = ["--clip", str(clip_folder), "--clips", str(tmp_path / "in"), "--batch", "2",
                 "--shard", "15", "--out"]
    assert features.main([*arguments, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    kills = kill_often("clips", 0.002, arguments, contents(tmp_path / "whole"), out, 3)
    assert any(early for early, _ in kills)
    assert Features(out).frames(["v00", "v04", "v39"]) == [3, 7, 7]


# ----------------------------------------------------------------------------------- broken clips

def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("clip, harm, words", [
    ("long", lambda f: cut_in_half(f / "long" / "33.png"), "long cannot be read .frame 33.png: "),
    ("gif", lambda f: cut_in_half(f / "show" / "gif.gif"), "gif.gif cannot be read .frame "),
    ("webp", lambda f: cut_in_half(f / "webp.webp"), "webp.webp cannot be read .frame "),
    ("empty", lambda f: (f / "empty").mkdir(), "empty cannot be read .no frames"),
    ("short", lambda f: [p.unlink() for p in (f / "short").iterdir()],
     "short cannot be read .no frames")])
def test_a_broken_clip(vit, folder, tmp_path, clip, harm, words):
    harm(folder)
    with pytest.raises(ValueError, match=words):
        extract(vit, folder, tmp_path / "out", clips=True)
    assert extract(vit, folder, tmp_path / "out", on_error="skip", clips=True) == [clip]
    packed, others = Features(tmp_path / "out"), {**LENGTHS}
    others.pop(clip, None)
    assert packed.ids == list(others) and packed.frames(packed.ids) == list(others.values())


def test_a_gif_cut_anywhere(tmp_path):
    """Between two frames, too, where PIL alone would see a shorter clip."""
    write_animated(tmp_path / "a.gif", range(4))
    whole = (tmp_path / "a.gif").read_bytes()
    for cut in range(0, len(whole), 3):
        (tmp_path / "a.gif").write_bytes(whole[:cut])
        last = list(clips.frames(tmp_path / "a.gif", 24, "stretch"))[-1]
        assert isinstance(last, str) and last.startswith("frame ")


def test_list_clips_refuses(folder, tmp_path):
    write_animated(folder / "long.gif", range(2))
    with pytest.raises(ValueError, match="long and .*long.gif would have the same id, 'long'"):
        list_clips(folder)
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "1.png")
    with pytest.raises(ValueError, match="flat holds no clips: each is a folder of frames"):
        list_clips(tmp_path / "flat")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        list_clips(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------ rows, by hand

def test_fit():
    x = torch.arange(128.)[:, None] * torch.tensor([1, -1])
    assert torch.equal(fit(x), torch.stack([torch.arange(1, 128, 2), -torch.arange(0, 128, 2)],
                                           1).half())
    assert torch.equal(fit(x[:64]), x[:64].half())
    # zeros of either sign, and what rounds to them, are frames where they stand for frames
    for frame in (0.0, -0.0, -1e-9):
        row = fit(torch.full((7, 2), frame))
        assert not row.any() and count_real(row[None]) == [7]
    assert count_real(torch.stack([fit(x[:1]), fit(x[:64]), fit(x)])) == [1, 64, 64]
    for bad in (float("nan"), float("inf"), 7e4):
        assert "not finite" in fit(torch.tensor([[1, bad]]))


# ------------------------------------------------------------------------------ published features

@pytest.fixture
def published(tmp_path):
    """Clips of 5, 64 and 130 frames."""
    rng = np.random.default_rng(0)
    found = {f"v{n}": rng.normal(size=(n, 512)).astype(np.float32) for n in (5, 64, 130)}
    (tmp_path / "npz" / "show").mkdir(parents=True)
    for n, (name, x) in enumerate(found.items()):
        where = tmp_path / "npz" / ("show" if n else "") / f"{name}.npz"
        np.savez_compressed(where, features=x.astype(np.float16) if n == 1 else x)
    return tmp_path / "npz", found


def test_convert_npz(published, tmp_path):
    folder, found = published
    assert convert_npz(folder, tmp_path / "out", batch=2, shard=2) == []
    packed = Features(tmp_path / "out")
    assert packed.frames(["v130", "v5", "v64"]) == [64, 5, 64] and packed.width == 512
    five, sixty_four, more = packed.stack(["v5", "v64", "v130"]).numpy()
    assert np.array_equal(five[:5], found["v5"].astype(np.float16)) and not five[5:].any()
    assert np.array_equal(sixty_four, found["v64"].astype(np.float16))
    for i in range(64):                                   # shares of 130 / 64 frames, overlapping
        share = found["v130"][i * 130 // 64:-(-(i + 1) * 130 // 64)]
        assert np.array_equal(more[i], share.max(0).astype(np.float16))
    whole = contents(tmp_path / "out")
    for name in (INDEX, "00001.safetensors"):
        (tmp_path / "out" / name).unlink()
    convert_npz(folder, tmp_path / "out", batch=2, shard=2)
    assert contents(tmp_path / "out") == whole


def test_convert_npz_finds_fault(published, tmp_path):
    folder, found = published
    one = np.ones((3, 512), np.float32)
    bad = {"flat": (dict(features=one[0]), "shape .512,., not .frames, 512"),
           "none": (dict(features=one[:0]), "shape .0, 512., not .*at least one frame"),
           "wide": (dict(features=one[:, :8]), "shape .3, 8., not .frames, 512"),
           "deep": (dict(features=one[None]), "shape .1, 3, 512."),
           "other": (dict(feats=one), "no 'features', only feats"),
           "nan": (dict(features=one * np.nan), "not finite"),
           "inf": (dict(features=np.where(one > 0, -np.inf, 0)), "not finite"),
           "text": (dict(features=np.array(["a"])), "type <U1"),
           "whole": (dict(features=one.astype(int)), "type int64"),
           "pickled": (dict(features=np.array([{}], object)), "allow_pickle"),
           "junk": (b"nothing", "pickle|Error"), "empty": (b"", "EOFError|No data")}
    for name, (content, words) in bad.items():
        path = folder / f"{name}.npz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        with pytest.raises(ValueError, match=rf"(?s){name}.npz cannot be read .*({words})"):
            convert_npz(folder, tmp_path / name)
        path.rename(tmp_path / path.name)
    np.save(tmp_path / "bare.npy", one)
    (tmp_path / "bare.npy").rename(folder / "bare.npz")
    whole = (folder / "show" / "v64.npz").read_bytes()
    for n, cut in enumerate((10, 1000, len(whole) - 3)):
        (folder / f"cut{n}.npz").write_bytes(whole[:cut])
    (folder / "flip.npz").write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    for name in bad:
        (tmp_path / f"{name}.npz").rename(folder / f"{name}.npz")
    skipped = convert_npz(folder, tmp_path / "out", on_error="skip")
    assert set(skipped) == {*bad, "bare", "cut0", "cut1", "cut2", "flip"}
    packed = Features(tmp_path / "out")
    assert sorted(packed.ids) == sorted(found) and packed.frames(["v5", "v130"]) == [5, 64]
    assert isinstance(read_npz(folder / "nowhere.npz"), str)


# ------------------------------------------------------------------------------------ command line

def test_command_line(clip_folder, folder, published, tmp_path, capsys):
    args = ["--clip", str(clip_folder), "--clips", str(folder), "--out", str(tmp_path / "out")]
    assert features.main(args) == 0 and len(Features(tmp_path / "out")) == 5
    assert features.main(["--npz", str(published[0]), "--out", str(tmp_path / "npz_out")]) == 0
    assert len(Features(tmp_path / "npz_out")) == 3
    cut_in_half(folder / "short" / "2.png")
    assert features.main([*args[:-1], str(tmp_path / "new")]) == 1
    assert "short cannot be read (frame 2.png" in capsys.readouterr().err.splitlines()[-1]
    for wrong in (["--clips", "x"], ["--npz", "x", "--clip", "y"],
                  ["--clips", "x", "--npz", "y", "--clip", "z"]):
        with pytest.raises(SystemExit):
            features.main([*wrong, "--out", "z"])
