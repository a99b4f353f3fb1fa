"""How do pictures and clips become one file of features, and how is it read?

A frozen CLIP always says the same about a picture, so it is asked once. A packed folder holds

    features.npy    (pictures, 36, F) or (clips, 64, F) in fp16, read through a memory map
    index.json      settings; the id of each row; how many rows are done, and of these the bytes of
                    each file, the real frames of each clip, and what was left out, and why

A picture gives 36 tokens, a clip CLIP's vector of each of 64 frames: zeros follow a short clip, a
long one is max-pooled in time. COCO's features are 18 GB: they are never held whole. A run that was
killed is gone on with and ends with the same bytes: a batch always has the same members.

    python -m tools.pack --clip weights/tiny-clip --images pictures/ --out packed/

Axes: M pictures or clips, B batch, N tokens, F feature width.
"""
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from clip_encoder import GRID, randomized
from data import TASKS
from support.gate import BadInput, Number, check, lock, read_json, reading, replace_file
from support.pictures import (ANIMATED, FRAMES, PUBLISHED, STILL, check_finite, list_clips,
                              list_files, nfc, read_clip, read_picture, read_published, size)
from support.published_clip import load_clip
from support.weights import fingerprint

PICTURES, CLIPS = "pictures", "clips"      # what a task shows
INDEX, ROWS = "index.json", "features.npy"
BATCH = 64                                 # pictures through CLIP: others can change a last digit
SECONDS = 20                               # from one index.json to the next: what a kill costs
torch.backends.cudnn.allow_tf32 = False    # CLIP's convolutions in fp32 on a GPU, too


def default_device(device: str) -> str:
    """The device that is named, or a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------- packing

@torch.no_grad()
def extract(tower, folder: str | Path, out: str | Path, *, clips: bool = False,
            resize: str = "stretch", on_error: str = "stop", device: str = "") -> dict[str, str]:
    """Asks a CLIP tower about every picture (or clip) below a folder; else as `pack`."""
    device = default_device(device)
    tower = tower.to(device).eval()
    settings = {"clip": fingerprint(tower), "resize": resize, "size": tower.size}
    if clips:
        return pack(out, list_clips(folder), settings | {"frames": FRAMES}, tower.config["out"],
                    lambda path: read_clip(path, tower, resize), list, on_error)
    return pack(out, list_files(folder), settings | {"grid": GRID}, tower.features,
                lambda path: read_picture(path, tower.size, resize),
                lambda batch: tower.encode(torch.stack(batch).to(device)), on_error)


def convert(folder: str | Path, out: str | Path, on_error: str = "stop") -> dict[str, str]:
    """Packs published features, an HDF5 file a picture or an npz file a clip; else as `pack`."""
    files = list_files(folder, PUBLISHED)
    clips = [path for path in files.values() if path.suffix.lower() == ".npz"]
    settings = {"source": "npz", "frames": FRAMES} if clips else {"source": "hdf5", "grid": GRID}
    with reading(folder):
        assert len(clips) in (0, len(files)), "pictures' .h5 lie beside clips' .npz: divide them"
        assert clips or find_spec("h5py"), "h5py is missing: pip install h5py"
    for path in files.values():                          # the first that can be read says how wide
        first = attempt(path, read_published, path)
        if isinstance(first, Tensor):
            read = partial(read_published, width=first.size(1))
            return pack(out, files, settings, first.size(1), read, list, on_error)
    raise BadInput(f"none of {len(files)} files can be read; {first}")


def pack(out: str | Path, files: dict[str, Path], settings: dict, width: int,
         read: Callable[[Path], Tensor], encode: Callable[[list[Tensor]], Iterable[Tensor]],
         on_error: str = "stop") -> dict[str, str]:
    """Writes a packed folder, or goes on with one that was begun; returns id -> why left out.

    files: id -> file, in the rows' order. settings: all else that the numbers depend on; clips have
    "frames" among them. width: F. read: a file -> a tensor, in threads. encode: a batch of these ->
    their rows (at most N, F). on_error: an unreadable file ends the run ("stop") or is left out.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    index = begin(out, files, settings)
    if index["done"] < len(files):
        with open(out / ROWS, "ab") as file:
            lock(file, wait=True)                        # a second process waits here, and then
            index = begin(out, files, settings)          # finds the work done
            with reading(out):
                assert (out / INDEX).exists() or file.tell() == 0, \
                    f"{ROWS} without {INDEX} lies there: name another --out"
            for half in out.glob(f".{INDEX}.*"):         # left by a kill
                half.unlink()
            replace_file(out / INDEX, json.dumps(index))
            fill(out, index, list(files.values()), width, read, encode, on_error)
    return index["skipped"]


def begin(out: Path, files: dict[str, Path], settings: dict) -> dict:
    """The index that a run before left, or a new one; of other files or settings: BadInput."""
    if not (out / INDEX).exists():
        return {"settings": settings, "ids": list(files), "done": 0, "sizes": [], "frames": [],
                "skipped": {}}
    index, remedy = read_index(out), "name another --out, or delete this folder"
    with reading(out):
        was = index["settings"]
        assert was == settings, f"it was begun with {was}, and now it is {settings}: {remedy}"
        for was, now in zip_longest(index["ids"], files):
            assert was == now, f"it was begun with file {was!r} where {now!r} is now: {remedy}"
        for path, was in zip(files.values(), index["sizes"]):
            assert was == size(path), f"{path} has changed since it was packed: {remedy}"
    return index


def fill(out: Path, index: dict, paths: list[Path], width: int, read: Callable, encode: Callable,
         on_error: str) -> None:
    """Packs what is missing; threads read the next batch while this one is encoded."""
    if index["done"] == 0:
        shape = (len(paths), index["settings"].get("frames", GRID * GRID), width)
        with reading(out):
            assert 2 * math.prod(shape) <= shutil.disk_usage(out).free, "its disk lacks the room"
        open_memmap(out / ROWS, "w+", np.float16, shape)                    # zeros
    rows, threads, saved = open_rows(out, index, "r+"), ThreadPoolExecutor(), time.monotonic()
    starts = tqdm(range(index["done"], len(paths), BATCH), f"features, {BATCH} each", leave=False)

    def read_batch(start: int) -> Iterable[Tensor | Exception]:
        return threads.map(lambda path: attempt(path, read, path), paths[start:start + BATCH])

    later = read_batch(index["done"])
    try:
        for start in starts:
            found, later = list(later), read_batch(start + BATCH)
            good = [x for x in found if isinstance(x, Tensor)]
            encoded = iter(encode(good) if good else [])
            for n, row in enumerate(found, start):
                if isinstance(row, Tensor):
                    row = next(encoded)
                elif on_error == "skip":
                    index["skipped"][index["ids"][n]] = str(row)
                    row = torch.zeros(0, width)
                else:
                    raise BadInput(f"{row}: mend it, or pack with tools.pack --on-error skip")
                with reading(paths[n]):
                    check_finite(row)
                rows[n, :len(row)] = row.half().cpu()
                rows[n, len(row):] = 0                   # a killed run may have left something
                index["sizes"].append(size(paths[n]))
                if "frames" in index["settings"]:
                    index["frames"].append(len(row))
            index["done"] += len(found)
            if time.monotonic() > saved + SECONDS or index["done"] == len(paths):
                rows.flush()                             # they are there before the index says so
                replace_file(out / INDEX, json.dumps(index))
                saved = time.monotonic()
    finally:
        starts.close()
        threads.shutdown(cancel_futures=True)


def attempt(path: Path, make: Callable, *given) -> Tensor | Exception:
    """make(*given), or what is wrong with the file."""
    try:
        with reading(path):
            return make(*given)
    except (BadInput, OSError) as error:
        return error


# ------------------------------------------------------------------------- reading a packed folder

def read_index(folder: Path) -> dict:
    with reading(folder / INDEX):
        index = read_json(folder / INDEX)
        settings, ids, done, sizes, frames, skipped = check(index, {
            "settings": dict, "ids": [str], "done": Number(0, whole=True), "sizes": [int],
            "frames": [Number(0, FRAMES, whole=True)], "skipped": dict})
        assert done == len(sizes) <= len(ids) == len(set(ids)) and set(skipped) <= set(ids) and \
            len(frames) == (done if "frames" in settings else 0), \
            "its entries disagree: delete the folder and pack again"
    return index


def open_rows(folder: Path, index: dict, mode: str = "r") -> np.ndarray:
    """features.npy (M, N, F) as a memory map."""
    with reading(folder / ROWS):
        rows = open_memmap(folder / ROWS, "r")           # "r+" would make a short file longer
        shape = len(index["ids"]), index["settings"].get("frames", GRID * GRID)
        assert rows.dtype == np.float16 and rows.shape[:-1] == shape, \
            f"{rows.dtype} {rows.shape} is not what {INDEX} says: delete the folder and pack again"
        return open_memmap(folder / ROWS, mode)


def free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def device_of(tower) -> torch.device:
    return next(tower.parameters()).device


class Features:
    """Packed folders, one or several of the same settings: `ids`, `settings`, `tokens` (N),
    `folders`, `stack`, `frames`."""

    def __init__(self, *folders: str | Path):
        self.folders = ", ".join(map(str, folders))
        self.held, self.settings = {}, {}      # id -> its row (N, F) on disk, its frames, number
        self.files, self.table = [], None      # of each folder all rows; these on the device
        for folder in map(Path, folders):
            index = read_index(folder)
            with reading(folder):
                assert index["done"] == len(index["ids"]), "not finished: give its command again"
                rows = np.asarray(open_rows(folder, index))
                settings = index["settings"] | {"width": rows.shape[2]}
                self.tokens, self.settings = rows.shape[1], self.settings or settings
                assert settings == self.settings, f"{settings}, but the others' are {self.settings}"
                real = index["frames"] or [None] * len(rows)                # None: of a picture
                first = sum(map(len, self.files))
                self.files.append(rows)
                for number, (name, row, frames) in enumerate(zip(index["ids"], rows, real), first):
                    if name not in index["skipped"]:
                        assert name not in self.held, f"another folder holds {name!r}, too"
                        self.held[name] = row, frames, number
        self.ids = list(self.held)

    def grids(self, ids: list[str]) -> list[tuple[int, int]]:
        """Rows and columns of each: a picture's cells are a square, a clip's frames a row."""
        side = math.isqrt(self.tokens)
        return [(1, self.tokens) if "frames" in self.settings else (side, side)] * len(ids)

    def to(self, device: str) -> None:
        """Copies all rows to a GPU with room for twice as much: a thread reads 3,000 pictures a
        second, and an H100 trains on 28,000."""
        if sum(rows.nbytes for rows in self.files) <= free_memory(device) / 2:
            self.table = torch.cat([torch.tensor(rows, device=device) for rows in self.files])

    def stack(self, ids: list[str]) -> Tensor:
        """The tokens of these pictures or clips (B, N, F) in fp32; zeros after a clip's end."""
        if self.table is not None:
            return self.table[[self.held[nfc(name)][2] for name in ids]].float()
        x = np.empty((len(ids), self.tokens, self.settings["width"]), np.float32)
        with reading(self.folders):
            for row, name in zip(x, ids):
                row[:] = self.held[nfc(name)][0]         # read and cast in one pass
                assert np.isfinite(row.sum()), f"NaN or inf in the features of {name!r}: pack again"
        return torch.from_numpy(x)

    def frames(self, ids: list[str]) -> list[int] | None:
        """How many of the tokens of each of these clips are real frames; None of pictures."""
        return [self.held[nfc(name)][1] for name in ids] if "frames" in self.settings else None


class Pixels:
    """Pictures (id -> file, or what Pillow opens) from disk, for a CLIP that is in the model."""

    tokens = GRID * GRID                                 # what CLIP makes of a picture

    def __init__(self, tower, pictures: dict[str, Path], resize: str = "stretch"):
        self.tower, self.held = tower, {nfc(name): path for name, path in pictures.items()}
        self.ids = list(self.held)
        self.settings = {"clip": fingerprint(tower), "resize": resize, "width": tower.features}
        self.threads = ThreadPoolExecutor()

    def to(self, device: str) -> None:
        self.tower.to(device)

    def read(self, ids: list[str]) -> list[Tensor]:
        read = partial(read_picture, side=self.tower.size, resize=self.settings["resize"])
        return list(self.threads.map(read, [self.held[nfc(name)] for name in ids]))

    def grids(self, ids: list[str]) -> list[tuple[int, int]]:
        return [(GRID, GRID)] * len(ids)

    def stack(self, ids: list[str]) -> Tensor:
        """Their pixels (B, 3, H, W)."""
        return torch.stack(self.read(ids))


class Seen(Pixels):
    """Pictures that a frozen CLIP looks at when they are asked for: `stack` hands out features."""

    @torch.no_grad()
    def stack(self, ids: list[str]) -> Tensor:
        return self.tower.encode(super().stack(ids).to(device_of(self.tower)))     # B, 36, F


class Padded(Seen):
    """All cells of CLIP-ViL's padded pictures, 12 x 20 of wide ones, 20 x 12 of upright ones."""

    tokens = 240

    def __init__(self, tower, pictures: dict[str, Path]):
        super().__init__(tower, pictures, "pad")
        self.shapes = {}                                 # id -> rows, columns, once it was read

    def grids(self, ids: list[str]) -> list[tuple[int, int]]:
        return [self.shapes[nfc(name)] for name in ids]

    @torch.no_grad()
    def stack(self, ids: list[str]) -> Tensor:
        cells = []
        for name, picture in zip(ids, self.read(ids)):   # one by one: their shapes differ
            picture = picture.to(device_of(self.tower))
            grid = self.tower.grid(picture[None])                           # 1, F, rows, columns
            self.shapes[nfc(name)] = tuple(grid.shape[2:])
            cells.append(grid[0].flatten(1).T)                              # 240, F
        return torch.stack(cells)


def control(features: Features | Pixels, config) -> Features | Pixels:
    """blind: some other picture's, always the same one's; no-frames: no frame of a clip is real."""
    shown, ids = copy(features), features.ids
    if config.control == "blind":
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(ids), generator=generator).tolist()
        shown.held = {name: features.held[ids[i]] for name, i in zip(ids, order)}
    if config.control == "no-frames":
        shown.held = {name: (row, 0, number) for name, (row, _, number) in features.held.items()}
    return shown


# ---------------------------------------------------------------------------- what a run is shown

def load_tower(config):
    """The CLIP of a run."""
    tower = load_clip(config.clip)
    if config.control == "random-clip":
        torch.manual_seed(0)
        tower = randomized(tower)
    return tower


def load_features(config, cells: bool = False, pictures: dict[str, Path] | None = None,
                  resize: str = "stretch") -> dict[str, Features | Pixels]:
    """Of each task, the features of its pictures or clips: packed once for each CLIP and state of
    their folder, or given as packed folders; or the pictures themselves (these, or the folder's),
    resized so. cells: CLIP-ViL's, always padded."""
    kinds = {task: CLIPS if TASKS[task].clips else PICTURES for task in config.tasks.split(",")}
    if pictures:
        kinds = {task: kind for task, kind in kinds.items() if kind == PICTURES}
    if pictures or config.features == "none":
        tower, pictures = load_tower(config), pictures or list_files(config.images)
        if cells:
            found = {PICTURES: Padded(tower, pictures)}
        elif config.train_clip:
            found = {PICTURES: Pixels(tower, pictures, resize)}
        else:
            found = {PICTURES: Seen(tower, pictures, resize)}
    elif config.features:
        found = open_packed(config.features)
    else:
        tower = load_tower(config)
        found = {kind: pack_once(config, tower, kind) for kind in dict.fromkeys(kinds.values())}
    with reading(f"--features {config.features}"):
        for task, kind in kinds.items():
            assert kind in found, f"it has no {kind} for {task}: name a packed folder of them, too"
    for source in found.values():
        source.to(default_device(config.device))
    return {task: control(found[kind], config) for task, kind in kinds.items()}


def open_packed(text: str) -> dict[str, Features]:
    """The packed folders of --features, a comma between them (which a folder's name may hold)."""
    found = {}
    for folder in [text] if Path(text).is_dir() else text.split(","):
        kind = CLIPS if "frames" in read_index(Path(folder))["settings"] else PICTURES
        found.setdefault(kind, []).append(folder)
    return {kind: Features(*folders) for kind, folders in found.items()}


def pack_once(config, tower, kind: str) -> Features:
    """The packed folder of all pictures or clips; written where it is missing."""
    folder, endings = (config.clips, ANIMATED) if kind == CLIPS else (config.images, STILL)
    files, home = list_files(folder, endings).values(), Path(config.data) / "features"
    # However --data is spelled, and wherever all of it moves, the pack is the same one.
    state = [ROWS, fingerprint(tower), os.path.relpath(folder, config.data)]
    state += [(str(path.relative_to(folder)), size(path)) for path in files]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    packed = home / f"{Path(config.clip).stem}-{digest}"
    with reading(home):
        assert packed.exists() or os.access(home if home.exists() else config.data, os.W_OK), \
            "it cannot be written: pack elsewhere (python -m tools.pack) and name it by --features"
    extract(tower, folder, packed, clips=kind == CLIPS, device=config.device)
    return Features(packed)


def sources(features: dict[str, Features | Pixels]) -> dict[str, dict]:
    """Of pictures and clips, pictures first, how the features were made and how wide they are."""
    found = {CLIPS if "frames" in some.settings else PICTURES: some.settings
             for some in features.values()}
    return {kind: found[kind] for kind in (PICTURES, CLIPS) if kind in found}


def check_pictures(config, examples: dict[str, list], features: dict[str, Features | Pixels]):
    """Every picture and clip that an example names must have features."""
    for task, found in examples.items():
        names = chain.from_iterable(example.images for example in found)
        lost = set(map(nfc, names)) - set(features[task].ids)
        kind, folder = (CLIPS, config.clips) if TASKS[task].clips else (PICTURES, config.images)
        with reading(folder if config.features in ("", "none") else config.features):
            assert not lost, (f"{len(lost)} of the {kind} that {task} shows are missing, first "
                              f"{min(lost)!r} (named like its file, without the ending)")
