"""How does a clip become 64 vectors?

One vector a frame, CLIP's own answer to the picture (ViT-B/32's, F = 512, in the papers' video
tasks), and 64 frames a clip: a shorter one is followed by zeros, a longer one keeps the maximum of
each of 64 equal, if need be overlapping, shares of its time. A clip comes as a folder of frames, as
an animated GIF or WebP, or as published vectors in an .npz file. `features.py` packs them:

    python -m support.features --clip weights/tiny-clip --clips clips/ --out packed/
    python -m support.features --npz published/ --out packed/
    python -m pytest tests/test_clips.py

Axes: T frames of a clip, F feature width, M clips.
"""
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d

from clip_encoder import ResNet, ViT, pixels

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error,
              Image.DecompressionBombError)


def decode(path, size: int, resize: str) -> Tensor | str:
    """The pixels of a file, or why they cannot be had."""
    try:
        with Image.open(path) as image:
            return pixels(image, size, resize)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"

FRAMES, AT_ONCE = 64, 16                   # frames of a row; frames that go through a tower at once
PICTURES, ANIMATED = (".jpg", ".jpeg", ".png"), (".gif", ".webp")


# ----------------------------------------------------------------------------------------- finding

def list_clips(folder: str | Path) -> dict[str, Path]:
    """Id -> clip, for all clips below the folder, sorted by path.

    A clip is an animated file (id: its name without ending), or a folder with pictures in it (id:
    its name). A folder with nothing in it that is or holds a clip counts as one, too: it was
    meant to be one, and is better complained about than missed.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one that holds a folder of frames "
                                f"or a {' or '.join(ANIMATED)} file a clip.")
    clips: list[tuple[Path, str]] = []
    for here, below, files in os.walk(folder, followlinks=True):
        files = [Path(here, name) for name in files]
        animated = [path for path in files if path.suffix.lower() in ANIMATED]
        clips += [(path, path.stem) for path in animated]
        stills = any(path.suffix.lower() in PICTURES for path in files)
        if Path(here) != Path(folder) and (stills or not (below or animated)):
            clips.append((Path(here), Path(here).name))
    found = named(clips)
    if not found:
        raise ValueError(f"{folder} holds no clips: each is a folder of frames in it, or a "
                         f"{' or '.join(ANIMATED)} file.")
    return found


def named(paths: list[tuple[Path, str]]) -> dict[str, Path]:
    """Id -> path, sorted by path; ValueError if two have one id."""
    found: dict[str, Path] = {}
    for path, name in sorted(paths):
        if name in found:
            raise ValueError(f"{found[name]} and {path} would have the same id, {name!r} (the name "
                             "without its ending): rename one.")
        found[name] = path
    return found


def frame_files(path: Path) -> list[Path]:
    """The files that a clip is made of, in the order of time: 2.jpg before 10.jpg."""
    if not path.is_dir():
        return [path]

    def moment(file: Path) -> tuple[str, str]:
        return re.sub(r"\d+", lambda digits: digits[0].zfill(20), file.name), file.name
    return sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=moment)


# ----------------------------------------------------------------------------------------- reading

def frames(path: Path, size: int, resize: str) -> Iterator[Tensor | str]:
    """The pixels (3, size, size) of a clip's frames, up to the first that cannot be had: why."""
    if path.is_dir():
        for file in frame_files(path):
            x = decode(file, size, resize)
            yield f"frame {file.name}: {x}" if isinstance(x, str) else x
            if isinstance(x, str):
                return
        return
    n = 0
    try:
        # Between two frames, PIL would take the cut for the end: a GIF's last byte says otherwise.
        if path.suffix.lower() == ".gif" and path.read_bytes().rstrip(b"\0")[-1:] != b";":
            raise OSError("the GIF breaks off, it has no end mark")
        with Image.open(path) as image:
            for n in range(image.n_frames):
                image.seek(n)
                yield pixels(image, size, resize)
    except (*UNREADABLE, IndexError) as error:          # PIL raises the last one at GIFs cut short
        yield f"frame {n + 1}: {type(error).__name__}: {error}"


def read_clip(path: Path, tower: ViT | ResNet, resize: str, turn: Lock) -> Tensor | str:
    """A clip -> its row (FRAMES, F), or what is wrong with it.

    Frames are decoded in many threads, and the tower answers one at a time (`turn`). It always
    gets AT_ONCE frames of one clip: long clips need no more memory, and neighbours change nothing.
    """
    rest, answers = frames(path, tower.size, resize), []
    device = next(tower.parameters()).device
    while some := list(islice(rest, AT_ONCE)):
        if isinstance(some[-1], str):
            return some[-1]
        with turn, torch.no_grad():                    # no_grad holds for the thread that says it
            answers.append(tower.encode(torch.stack(some).to(device), pooled=True).float().cpu())
    return fit(torch.cat(answers)) if answers else f"no frames in it ({', '.join(PICTURES)})"


def read_npz(path: Path, width: int | None = None) -> Tensor | str:
    """<id>.npz with "features" (T, F) -> its row (FRAMES, F), or what is wrong with it.

    width: the F that is wanted. Pickled arrays are refused: they can run anything.
    """
    try:
        with np.load(path) as file:
            if "features" not in file:
                return f"it has no 'features', only {', '.join(file) or 'nothing'}"
            x = file["features"]
            if not np.issubdtype(x.dtype, np.floating):
                return f"features of type {x.dtype}, not floating point"
            x = torch.from_numpy(x.astype(np.float32))
    except (OSError, EOFError, AttributeError, TypeError, ValueError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:
        return f"{type(error).__name__}: {error}"
    if x.dim() != 2 or 0 in x.shape or width not in (None, x.shape[1]):
        return (f"features of shape {tuple(x.shape)}, not (frames, {width or 'width'}) with at "
                "least one frame")
    return fit(x)


# --------------------------------------------------------------------------------------------- rows

def fit(x: Tensor) -> Tensor | str:
    """The vectors of T frames (T, F) -> a row (FRAMES, F) of fp16, or why they do not fit.

    Places behind the last frame hold the zero of negative sign, -0.0, and frames the other one,
    which computes the same: so a finished row itself tells how many of its frames are real.
    """
    if not x.half().isfinite().all():
        return "features that are not finite in fp16 (nan, inf or beyond 65504)"
    if len(x) > FRAMES:
        x = adaptive_max_pool1d(x.T, FRAMES).T                                       # FRAMES, F
    row = torch.full((FRAMES, x.shape[1]), -0.0, dtype=torch.float16)
    row[:len(x)] = x.half() + 0.0                      # -0.0 + 0.0 is 0.0
    return row


def count_real(rows: Tensor) -> list[int]:
    """How many frames of each row (M, FRAMES, F) are real."""
    first = rows[:, :, 0]                                                            # M, FRAMES
    return ((first != 0) | ~first.signbit()).sum(1).tolist()
