"""How do pictures and clips become one file of features, and how is it read?

A frozen CLIP always says the same about a picture, so it is asked once. A packed folder holds

    features.npy    (pictures, 36, F) or (clips, 64, F) in fp16, read through a memory map
    index.json      settings; the id of each row; how many rows are done, and of these the bytes of
                    each file, the real frames of each clip, and what was left out, and why

A picture gives 36 tokens, the papers' 6 x 6 grid. A clip gives CLIP's one vector of each of 64
frames: zeros follow a short clip, a long one is max-pooled in time. COCO's 123,000 pictures are
18 GB of features: they are never held whole. The command of a run that was killed goes on where it
was, and ends with the same bytes: a batch always has the same members.

    python -m tools.pack --clip weights/tiny-clip --images pictures/ --out packed/
    python -m pytest tests/test_features.py

Axes: M pictures or clips, B batch, N tokens, T frames of a clip, F feature width.
"""
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clip_encoder import GRID, randomized
from data import TASKS
from support.gate import BadInput, Number, check, read_json, reading, replace_file
from support.pictures import (FRAMES, PUBLISHED, check_finite, list_clips, list_files, nfc,
                              read_clip, read_picture, read_published, size)
from support.published_clip import load_clip
from support.weights import fingerprint

try:
    import fcntl
except ImportError:
    fcntl = None                           # Windows: start one run a folder at a time

PICTURES, CLIPS = "pictures", "clips"      # what a task shows
INDEX, ROWS = "index.json", "features.npy"
BATCH = 64                                 # pictures through CLIP: others can change a last digit
SECONDS = 20                               # from one index.json to the next: what a kill costs


# ------------------------------------------------------------------------------------- packing

@torch.no_grad()
def extract(tower, folder: str | Path, out: str | Path, *, clips: bool = False,
            resize: str = "stretch", on_error: str = "stop", device: str = "") -> dict[str, str]:
    """Asks a CLIP tower about every picture (or clip) below a folder; else as `pack`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tower = tower.to(device).eval()
    settings = {"clip": fingerprint(tower), "resize": resize, "size": tower.size}
    if clips:
        turn = Lock()
        return pack(out, list_clips(folder), settings | {"frames": FRAMES}, tower.config["out"],
                    lambda path: read_clip(path, tower, resize, turn), list, on_error)
    return pack(out, list_files(folder), settings | {"grid": GRID}, tower.features,
                lambda path: read_picture(path, tower.size, resize),
                lambda batch: tower.encode(torch.stack(batch).to(device)), on_error)


def convert(folder: str | Path, out: str | Path, on_error: str = "stop") -> dict[str, str]:
    """Packs published features, an HDF5 file a picture or an npz file a clip; else as `pack`."""
    files, settings = list_files(folder, PUBLISHED), {"source": "hdf5", "grid": GRID}
    kinds = {path.suffix.lower() == ".npz" for path in files.values()}
    if kinds == {True}:
        settings = {"source": "npz", "frames": FRAMES}
    with reading(folder):
        assert len(kinds) == 1, "it holds pictures' .h5 and clips' .npz: pack each kind alone"
        assert kinds == {True} or find_spec("h5py"), "h5py is missing: pip install h5py"
    for path in files.values():                          # the first that can be read says how wide
        found = attempt(path, read_published, path)
        if isinstance(found, Tensor):
            width = found.size(1)
            return pack(out, files, settings, width, partial(read_published, width=width), list,
                        on_error)
    raise BadInput(f"none of {len(files)} files can be read; {found}")


def pack(out: str | Path, files: dict[str, Path], settings: dict, width: int,
         read: Callable[[Path], Tensor], encode: Callable[[list[Tensor]], Iterable[Tensor]],
         on_error: str = "stop") -> dict[str, str]:
    """Writes a packed folder, or goes on with one that was begun; returns id -> why left out.

    files: id -> file, in the rows' order. settings: all else that the numbers depend on; "frames"
    among them: these are clips. width: F. read: a file -> a tensor, in threads. encode: a batch of
    these -> of each, its row (at most N, F). on_error: a file that cannot be read ends the run
    ("stop") or leaves zeros ("skip").
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    index = begin(out, files, settings)
    if index["done"] < len(files):
        with open(out / ROWS, "ab") as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)         # a second process waits here, and then
            index = begin(out, files, settings)          # finds the work done
            for half in out.glob(f".{INDEX}.*"):         # left by a kill
                half.unlink()
            save_index(out, index)
            fill(out, index, list(files.values()), width, read, encode, on_error)
    return index["skipped"]


def begin(out: Path, files: dict[str, Path], settings: dict) -> dict:
    """The index that a run before left, or a new one; of other files or settings: BadInput."""
    remedy = "name another --out, or delete this folder"
    foreign = (out / ROWS).exists() and size(out / ROWS) > 0     # ours are empty before the index
    with reading(out):
        if not (out / INDEX).exists():
            assert not foreign, f"{ROWS} lies there without {INDEX}: {remedy}"
            return {"settings": settings, "ids": list(files), "done": 0, "sizes": [], "frames": [],
                    "skipped": {}}
        index = read_index(out)
        for key in index["settings"] | settings:
            was, now = index["settings"].get(key), settings.get(key)
            assert was == now, f"it was begun with {key} {was!r}, and now it is {now!r}: {remedy}"
        for was, now in zip_longest(index["ids"], files):
            assert was == now, f"it was begun with file {was!r} where {now!r} is now: {remedy}"
        for path, was in zip(files.values(), index["sizes"]):
            assert was == size(path), f"{path} has changed since it was packed: {remedy}"
    return index


def fill(out: Path, index: dict, paths: list[Path], width: int, read: Callable, encode: Callable,
         on_error: str) -> None:
    """Packs what is missing; threads read the next batch while this one is encoded."""
    rows, saved = writable_rows(out, index, width), time.monotonic()
    threads = ThreadPoolExecutor(min(32, os.cpu_count() or 1))

    def read_batch(start: int) -> Iterator[Tensor | Exception]:
        return threads.map(lambda path: attempt(path, read, path), paths[start:start + BATCH])

    bar = tqdm(total=len(paths), initial=index["done"], desc="features", unit=" rows", leave=False)
    later = read_batch(index["done"])
    try:
        for start in range(index["done"], len(paths), BATCH):
            found, later = list(later), read_batch(start + BATCH)
            wrong = [error for error in found if isinstance(error, Exception)]
            if wrong and on_error == "stop":
                raise BadInput(f"{wrong[0]}: replace or remove it and give the same command again, "
                               "or leave it out with --on-error skip of tools.pack")
            good = [n for n, x in enumerate(found, start) if isinstance(x, Tensor)]
            made = {}
            if good:
                made = dict(zip(good, encode([found[n - start] for n in good])))
            for n, error in enumerate(found, start):
                if n not in made:
                    index["skipped"][index["ids"][n]] = str(error)
                row = made.get(n, torch.zeros(0, width))
                with reading(paths[n]):
                    check_finite(row)
                rows[n, :len(row)] = row.half().cpu()
                rows[n, len(row):] = 0                   # a killed run may have left something
                index["sizes"].append(size(paths[n]))
                if "frames" in index["settings"]:
                    index["frames"].append(len(row))
            index["done"] += len(found)
            bar.update(len(found))
            if time.monotonic() > saved + SECONDS or index["done"] == len(paths):
                rows.flush()                             # they are there before the index says so
                save_index(out, index)
                saved = time.monotonic()
    finally:
        bar.close()
        threads.shutdown(cancel_futures=True)


def save_index(folder: Path, index: dict) -> None:
    replace_file(folder / INDEX, json.dumps(index))


def attempt(path: Path, make: Callable, *given) -> Tensor | Exception:
    """make(*given), or what is wrong with the file."""
    try:
        with reading(path):
            return make(*given)
    except (BadInput, OSError) as error:
        return error


def writable_rows(folder: Path, index: dict, width: int) -> np.ndarray:
    """features.npy (M, N, F) as a memory map: zeros at first."""
    if index["done"]:
        open_rows(folder, index)                         # "r+" would make a short file longer
        return np.lib.format.open_memmap(folder / ROWS, "r+")
    shape = (len(index["ids"]), index["settings"].get("frames", GRID * GRID), width)
    need, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
    with reading(folder):
        assert need <= free, (f"it needs {need / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB "
                              "left: pack into a folder on another disk")
    return np.lib.format.open_memmap(folder / ROWS, "w+", np.float16, shape)


# ------------------------------------------------------------------------- reading a packed folder

def read_index(folder: Path) -> dict:
    with reading(folder / INDEX):
        assert (folder / INDEX).is_file(), "it is missing: pack with python -m tools.pack"
        index = read_json(folder / INDEX)
        settings, ids, done, sizes, frames, skipped = check(index, {
            "settings": dict, "ids": [str], "done": Number(0, whole=True), "sizes": [int],
            "frames": [Number(0, FRAMES, whole=True)], "skipped": dict})
        assert done == len(sizes) <= len(ids) == len(set(ids)) and set(skipped) <= set(ids) and \
            len(frames) == (done if "frames" in settings else 0), \
            "its entries disagree: delete the folder and pack again"
    return index


def open_rows(folder: Path, index: dict) -> np.ndarray:
    """features.npy (M, N, F) as a memory map that cannot be written to."""
    with reading(folder / ROWS):
        rows = np.lib.format.open_memmap(folder / ROWS, mode="r")
        shape = len(index["ids"]), index["settings"].get("frames", GRID * GRID)
        assert rows.dtype == np.float16 and rows.shape[:-1] == shape, \
            f"{rows.dtype} {rows.shape} is not what {INDEX} says: delete the folder and pack again"
    return rows


class Features:
    """Packed folders: `ids`, `width` (F), `tokens` (N), `settings`, `folders`, `skipped`, `stack`,
    `frames`. folders: one, or several that were packed with the same settings."""

    def __init__(self, folders: str | Path | list[str | Path]):
        if isinstance(folders, (str, Path)):
            folders = [folders]
        self.folders = ", ".join(map(str, folders))
        self.rows, self.real = {}, {}                    # id -> its row (N, F) on disk; its frames
        self.skipped, kinds = {}, []
        for folder in map(Path, folders):
            index = read_index(folder)
            ids, self.settings = index["ids"], index["settings"]
            with reading(folder):
                assert index["done"] == len(ids), "it is not finished: give its command again"
                rows = open_rows(folder, index)
                _, self.tokens, self.width = rows.shape
                kinds.append(self.settings | {"width": self.width})
                assert kinds[0] == kinds[-1], f"it holds {kinds[-1]}, another folder {kinds[0]}"
                here = {name: row for name, row in zip(ids, np.asarray(rows))
                        if name not in index["skipped"]}
                twice = sorted(self.rows.keys() & here.keys())
                assert not twice, f"another folder holds {twice[0]!r}, too: rename one and pack it"
            self.rows |= here
            self.real |= {name: n for name, n in zip(ids, index["frames"]) if name in here}
            self.skipped |= index["skipped"]
        self.ids = list(self.rows)

    def spelt(self, ids: list[str]) -> list[str]:
        """These ids as they are spelt here; BadInput if one is unknown."""
        names = list(map(nfc, ids))
        with reading(self.folders):
            for name in names:
                assert name in self.rows, (f"nothing of {name!r} among its {len(self.ids)}: pack a "
                                           "folder that holds it")
        return names

    def stack(self, ids: list[str]) -> Tensor:
        """The tokens of these pictures or clips (B, N, F) in fp32; zeros behind a clip's end."""
        x = np.empty((len(ids), self.tokens, self.width), np.float32)
        with reading(self.folders):
            for row, name in zip(x, self.spelt(ids)):
                row[:] = self.rows[name]                 # read and cast in one pass
                assert np.isfinite(row.sum()), f"NaN or inf in the features of {name!r}: pack again"
        return torch.from_numpy(x)

    def frames(self, ids: list[str]) -> list[int] | None:
        """How many of the tokens of each of these clips are real frames; None of pictures."""
        return [self.real[name] for name in self.spelt(ids)] if self.real else None


class Pixels:
    """Pictures straight from disk, for a CLIP that stands in the model: `ids`, `width`, `stack`.

    pictures: id -> file (or what Pillow opens). tokens: what the tower makes of each.
    """

    def __init__(self, tower, pictures: dict[str, Path]):
        self.tower, self.pictures = tower, {nfc(name): path for name, path in pictures.items()}
        self.ids, self.width, self.tokens = list(self.pictures), tower.features, GRID * GRID
        self.settings = {"clip": fingerprint(tower), "resize": "stretch"}
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def stack(self, ids: list[str]) -> Tensor:
        """Their pixels (B, 3, H, W)."""
        read = partial(read_picture, side=self.tower.size)
        paths = [self.pictures[nfc(name)] for name in ids]
        return torch.stack(list(self.threads.map(read, paths)))


class Shuffled:
    """Features that hand out some other picture's, always the same one: a blind control."""

    def __init__(self, features: Features, seed: int):
        order = torch.randperm(len(features.ids), generator=torch.Generator().manual_seed(seed))
        self.other = {name: features.ids[i] for name, i in zip(features.ids, order.tolist())}
        self.features = features

    def __getattr__(self, name: str):
        return getattr(self.features, name)              # ids, width, tokens, settings

    def stack(self, ids: list[str]) -> Tensor:
        return self.features.stack([self.other[nfc(name)] for name in ids])

    def frames(self, ids: list[str]) -> list[int] | None:
        return self.features.frames([self.other[nfc(name)] for name in ids])


class Hidden(Shuffled):
    """Clips none of whose frames is real, so that nothing of them is seen: a control."""

    def frames(self, ids: list[str]) -> list[int]:
        return [0] * len(ids)


# ---------------------------------------------------------------------------- what a run is shown

def visual_kind(task: str) -> str:
    """What a task shows: PICTURES or CLIPS."""
    return CLIPS if TASKS[task].clips else PICTURES


def folder_of(config, kind: str) -> str:
    return config.clips if kind == CLIPS else config.images


def load_tower(config):
    """The CLIP of a run."""
    tower = load_clip(config.clip)
    if config.control == "random-clip":
        torch.manual_seed(0)
        tower = randomized(tower)
    return tower


def load_features(config) -> dict[str, Features | Pixels]:
    """Of each task, the features of its pictures or clips: packed once for each CLIP and state of
    their folder, or given as packed folders; or the pictures themselves."""
    kinds = {task: visual_kind(task) for task in config.tasks.split(",")}
    if config.features == "none":
        found = {PICTURES: Pixels(load_tower(config), list_files(config.images))}
    elif config.features:
        found = open_given(config.features)
    else:
        tower = load_tower(config)
        found = {kind: pack_once(config, tower, kind) for kind in dict.fromkeys(kinds.values())}
    with reading(f"--features {config.features}"):
        for task, kind in kinds.items():
            assert kind in found, f"it has no {kind} for {task}: name a packed folder of them, too"
    return {task: found[kind] for task, kind in kinds.items()}


def open_given(text: str) -> dict[str, Features]:
    """The packed folders of --features, a comma between them (which a folder's name may hold)."""
    folders = [text] if Path(text).is_dir() else text.split(",")
    clips = [folder for folder in folders if "frames" in read_index(Path(folder))["settings"]]
    pictures = [folder for folder in folders if folder not in clips]
    return {kind: Features(some) for kind, some in ((PICTURES, pictures), (CLIPS, clips)) if some}


def pack_once(config, tower, kind: str) -> Features:
    """The packed folder of all pictures or clips; written where it is missing."""
    folder, home = folder_of(config, kind), Path(config.data) / "features"
    files = list_clips(folder) if kind == CLIPS else list_files(folder)
    state = [ROWS, fingerprint(tower), *((str(path), size(path)) for path in files.values())]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    packed = home / f"{Path(config.clip).stem}-{digest}"
    with reading(home):
        assert packed.exists() or os.access(home if home.exists() else config.data, os.W_OK), \
            "it cannot be written: pack elsewhere (python -m tools.pack) and name it by --features"
    extract(tower, folder, packed, clips=kind == CLIPS, device=config.device)
    return Features(packed)


def sources(features: dict[str, Features | Pixels]) -> dict[str, dict]:
    """Of PICTURES and CLIPS, pictures first, how the features were made and how wide they are."""
    found = {visual_kind(task): some.settings | {"width": some.width}
             for task, some in features.items()}
    return {kind: found[kind] for kind in (PICTURES, CLIPS) if kind in found}


def check_same(metadata: dict[str, str], features: dict[str, Features | Pixels], hint: str) -> None:
    """A run must be shown what it was trained on. metadata: of its adapter file."""
    with reading("features"):
        before = json.loads(metadata.get("features", "{}"))
        for kind, now in sources(features).items():
            assert kind in before, f"this run was trained without {kind}: ask it about others"
            was = before[kind]
            for key in ("clip", "resize", "width"):
                assert key not in was or was[key] == now.get(key), (
                    f"this run saw {kind} through another CLIP ({key}: {was[key]}, now "
                    f"{now.get(key)}): {hint}")


def check_pictures(config, examples: dict[str, list], features: dict[str, Features | Pixels]
                   ) -> None:
    """Every picture and clip that an example names must have features."""
    for task, found in examples.items():
        kind, there, lost = visual_kind(task), set(features[task].ids), set()
        for example in found:
            lost.update(nfc(name) for name in example.images if nfc(name) not in there)
        where = folder_of(config, kind) if config.features in ("", "none") else config.features
        with reading(where):
            assert not lost, (f"{len(lost)} {kind} that examples of {task} name are not there, the "
                              f"first is {min(lost)!r}: put or pack them there (the name is the "
                              "file's, without the ending)")
