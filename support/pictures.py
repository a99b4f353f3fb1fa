"""How are pictures, clips and published features found in a folder, and read?

A picture is a .jpg or .png file. A clip is a folder of these, or an animated .gif or .webp file.
Published features are VL-Adapter's HDF5 file a picture, or an npz file a clip. The id of each is
its name without the ending. What computers leave in folders is passed over.

Axes: T frames of a clip, F feature width.
"""
import math
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from threading import Lock
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d

from clip_encoder import GRID, pixels, pool
from support.gate import reading

FRAMES = 64                                # vectors of a clip
AT_ONCE = 16                               # frames that go through CLIP together
STILL, ANIMATED, PUBLISHED = (".jpg", ".jpeg", ".png"), (".gif", ".webp"), (".h5", ".hdf5", ".npz")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP")   # whatever the name says: PostScript starts a program
RUBBISH = ("__MACOSX", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN")
TURN = Lock()                              # for CLIP, and Python 3.11 parses one header at a time
nfc = partial(normalize, "NFC")            # a Mac writes e and an accent, annotations one letter


# ----------------------------------------------------------------------------------- finding

def inside(folder: Path) -> list[Path]:
    """What lies in a folder, sorted: nothing hidden, no rubbish, no pipes or devices. A link to
    nowhere was meant to be a file: better complained about than missed."""
    return [path for path in sorted(folder.iterdir())
            if path.name[0] != "." and path.name not in RUBBISH
            and (path.is_dir() or path.is_file() or not path.exists())]


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files and folders below; links are followed, but not back to a folder `above`."""
    here = folder.resolve()
    if here not in above:
        for path in inside(folder):
            yield path
            if path.is_dir():
                yield from walk(path, (*above, here))


def list_files(folder: str | Path, endings: tuple[str, ...] = STILL) -> dict[str, Path]:
    """Id -> file, for all files below the folder with these endings, sorted; of clips' endings,
    for folders of frames, too, whose id is the whole name."""
    found = {}
    with reading(folder):
        for path in sorted(walk(Path(folder))):
            name, wanted = nfc(path.stem), path.suffix.lower() in endings
            if path.is_dir():
                name, wanted = nfc(path.name), endings == ANIMATED and frame_files(path)
            if wanted:
                assert name not in found, f"{found[name]} and {path} share id {name!r}: rename one"
                found[name] = path
        assert found, f"it holds none of {', '.join(endings)}"
    return found


list_clips = partial(list_files, endings=ANIMATED)


def frame_files(clip: Path) -> list[Path]:
    """The pictures in a folder, in the order of time: 2.jpg before 10.jpg."""
    return sorted((path for path in inside(clip) if path.suffix.lower() in STILL),
                  key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(20), path.name))


def size(path: Path) -> int:
    """Bytes of a file, or of a clip's frames together; a link to nowhere has none."""
    files = frame_files(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


# ----------------------------------------------------------------------------------- reading

def read_picture(path: Path, side: int, resize: str = "stretch") -> Tensor:
    with reading(path), Image.open(path, formats=FORMATS) as image:
        return pixels(image, side, resize)                                  # 3, side, side


def read_frames(path: Path, side: int, resize: str = "stretch") -> Iterator[Tensor]:
    """The frames (3, side, side) of a clip, one after the other."""
    if path.is_dir():
        for file in frame_files(path):
            yield read_picture(file, side, resize)
        return
    # For Pillow, a GIF that is cut between two frames is a shorter clip; but its end mark is gone.
    assert path.suffix.lower() != ".gif" or path.read_bytes().rstrip(b"\0").endswith(b";"), \
        "the GIF breaks off, it has no end mark"
    with Image.open(path, formats=FORMATS) as image:
        for n in range(getattr(image, "n_frames", 1)):
            image.seek(n)
            yield pixels(image, side, resize)


@torch.no_grad()                                         # holds for the thread that it is called in
def read_clip(path: Path, tower, resize: str) -> Tensor:
    """CLIP's vectors of a clip (at most 64, F). Many threads decode frames, and the tower takes 16
    frames of one clip at a time: long clips need no more memory, and neighbours change nothing."""
    frames, vectors = read_frames(path, tower.size, resize), []
    device = next(tower.parameters()).device
    while some := list(islice(frames, AT_ONCE)):
        with TURN:
            vectors.append(tower.encode(torch.stack(some).to(device), pooled=True).float().cpu())
    return fit(torch.cat(vectors))


def fit(x: Tensor) -> Tensor:
    """The vectors of T frames (T, F) -> (at most 64, F): of a long clip, the maximum of each of 64
    equal, if need be overlapping, shares of its time."""
    check_finite(x)                                      # before: a maximum can hide -inf
    return x if len(x) <= FRAMES else adaptive_max_pool1d(x.T, FRAMES).T


def check_finite(x: Tensor) -> None:
    assert x.half().isfinite().all(), "NaN, inf or numbers beyond 65504, which fp16 cannot hold"


def read_published(path: Path, width: int | None = None) -> Tensor:
    """<id>.h5 with <id>/features (n * n, F) of a picture -> (36, F), or <id>.npz with "features"
    (T, F) of a clip -> (at most 64, F). width: the F that is wanted."""
    clip = path.suffix.lower() == ".npz"
    x = read_npz(path) if clip else read_hdf5(path)
    assert x.dtype.kind == "f" and x.ndim == 2 and x.size and width in (None, x.shape[1]), \
        f"features of type {x.dtype} and shape {x.shape}, not real numbers (rows, {width or 'F'})"
    x = torch.from_numpy(x.astype(np.float32))
    if clip:
        return fit(x)
    n = math.isqrt(len(x))
    assert n >= GRID and n * n == len(x), f"{len(x)} cells are no square of at least 6 x 6"
    check_finite(x)
    return pool(x.T.unflatten(1, (n, n))[None])[0]


# A header can claim any number of rows. Neither reader fills more memory than the file can.

def read_npz(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        assert "features.npy" in archive.namelist(), f"no 'features', only {archive.namelist()}"
        file = BytesIO(archive.read("features.npy"))
    with TURN:
        x = np.lib.format.read_array(file)               # refuses Python's objects: no pickles
    assert not file.read(1), "its header says fewer rows than there are"
    return x


def read_hdf5(path: Path) -> np.ndarray:
    import h5py                                          # needed for nothing else
    with h5py.File(path) as file:
        x = file[f"{path.stem}/features"]
        assert x.file == file and not x.external and not x.is_virtual, \
            "its features lie in another file"
        most = 1100 * path.stat().st_size                # gzip makes zeros 1,030 times smaller
        assert x.nbytes <= most, f"features of shape {x.shape} do not fit in a file of this size"
        return x[()]
