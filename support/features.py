"""How do pictures become one packed folder, and how is it read?

A frozen tower always says the same about a picture, so it is asked once. The answers, 36 tokens of
fp16 a picture (the papers' grids, pooled before packing), lie in one folder:

    00000.safetensors, 00001.safetensors, ...    "features" (4096, 36, F) each, the last one fewer
    index.json                                   settings, shape, picture -> row; written last

COCO's 123,000 pictures are 18 GB of it, so nothing is ever held whole: a shard is written batch by
batch and read through a memory map. A run that was killed, at any moment, goes on where it was when
its command is given again, and ends with the same bytes: a batch always has the same members.

    python -m support.features --clip weights/tiny-clip --images pictures/ --out packed/
    python -m support.features --hdf5 published/ --out packed/         # the papers' own features
    python -m support.features --clip weights/tiny-clip --clips clips/ --out packed/   # see clips.py
    python -m support.features --npz published/ --out packed/
    python -m pytest tests/test_features.py

Axes: B batch, N tokens (a grid, row by row, or a clip's frames), F feature width.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from support import weights
from clip_encoder import GRID, ResNet, ViT, pool
from support.published_clip import load_clip
from support.clips import FRAMES, PICTURES, count_real, decode, frame_files, list_clips, named, read_clip, read_npz

try:
    import fcntl
except ImportError:                        # Windows: there, start one run a folder at a time
    fcntl = None

BATCH, SHARD = 64, 4096                    # pictures; a shard of RN101's features is 604 MB
INDEX = "index.json"
HDF5, NPZ = (".h5", ".hdf5"), (".npz",)


@dataclass(frozen=True)
class Recipe:
    """How files become rows of fp16."""
    settings: dict                                   # of what made the rows, in words
    shape: tuple[int, int]                           # N, F
    key: Callable[[Path], str]                       # files with one key are one row
    read: Callable[[Path], Tensor | str]             # in threads: a file, or why it cannot be read
    encode: Callable[[Tensor], Tensor]               # B of what was read, stacked -> B, N, F
    batch: int                                       # rows computed together
    shard: int                                       # rows of a file

    def all_settings(self) -> dict:
        """All that the bytes depend on: another batch can change a last digit."""
        return self.settings | {"shape": [*self.shape], "batch": self.batch, "shard": self.shard}

    def row_bytes(self) -> int:
        return 2 * math.prod(self.shape)


def list_files(folder: str | Path, endings: tuple[str, ...] = PICTURES) -> dict[str, Path]:
    """Id (file name without ending) -> file, for all such files below the folder, sorted."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one with {', '.join(endings)}.")
    found = named([(p, p.stem) for p in Path(folder).rglob("*") if p.suffix.lower() in endings
                       and not p.name.startswith(".")])
    if not found:
        raise ValueError(f"{folder} holds no files that end in {', '.join(endings)}.")
    return found


# -------------------------------------------------------------- pictures and clips through a tower

def content(path: Path) -> str:
    """16 hex digits of the bytes of a file, or of a clip's frames in order: copies are one row."""
    try:
        if path.is_dir():
            frames = "".join(map(content, frame_files(path)))
            return hashlib.sha256(frames.encode()).hexdigest()[:16]
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return str(path)                                     # read will say what is wrong with it


@torch.no_grad()
def extract(clip: ViT | ResNet, folder: str | Path, out: str | Path, resize: str = "stretch",
            batch: int = BATCH, on_error: str = "stop", device: str | None = None,
            shard: int = SHARD, clips: bool = False) -> list[str]:
    """The 36 tokens of every picture below `folder` -> the packed folder `out` for `Features`.

    clips: of every clip there, CLIP's vectors of its frames. A picture (or clip with a frame) that
    cannot be read ends the run (on_error "stop"; replace it and go on) or is left out ("skip").
    Returns the ids that were left out. What `out` already holds is kept if it was made with the
    same settings from the same files; otherwise ValueError says what differs.
    """
    if resize not in ("stretch", "crop"):
        raise ValueError(f"resize is 'stretch' or 'crop', not {resize!r}.")
    files = list_clips(folder) if clips else list_files(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = clip.to(device).eval()
    settings = {"clip": weights.fingerprint(clip), "resize": resize, "size": clip.size}
    if clips:
        read = partial(read_clip, tower=clip, resize=resize, turn=Lock())
        return pack(out, files, Recipe(
            settings | {"frames": FRAMES}, (FRAMES, clip.config["out"]), content, read,
            lambda rows: rows, batch, shard), on_error)
    return pack(out, files, Recipe(
        settings | {"grid": GRID}, (GRID * GRID, clip.features), content,
        partial(decode, size=clip.size, resize=resize), lambda x: clip.encode(x.to(device)),
        batch, shard), on_error)


# ------------------------------------------------------------------- the papers' published features

def read_grid(path: Path, open_file: Callable, like: tuple | None = None) -> Tensor | str:
    """<id>.h5 with <id>/features (n * n, F), row by row -> (F, n, n), or what is wrong with it."""
    try:
        with open_file(path) as file:
            x = torch.from_numpy(file[f"{path.stem}/features"][()]).float()          # n * n, F
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    n = math.isqrt(len(x)) if x.dim() == 2 else 0
    if n < GRID or n * n != len(x):
        return f"features {tuple(x.shape)} are no square grid of at least {GRID} x {GRID} cells"
    grid = x.T.unflatten(1, (n, n))                                                  # F, n, n
    if like and grid.shape != like:
        return f"features of another size than the first file's: {tuple(x.shape)}"
    return grid


def convert(folder: str | Path, out: str | Path, batch: int = BATCH, on_error: str = "stop",
            shard: int = SHARD) -> list[str]:
    """One HDF5 file a picture (VL-Adapter's 7 x 7 grids of RN101) -> a packed folder, as `extract`.

    Files are told apart by their names alone: reading 49 GB twice would double the time.
    """
    try:
        import h5py
    except ImportError:
        raise ModuleNotFoundError("HDF5 files are read by h5py, which is missing: "
                                  "pip install h5py") from None
    files = list_files(folder, HDF5)
    first = first_read(files, partial(read_grid, open_file=h5py.File), f"HDF5 files of {folder}")
    return pack(out, files, Recipe(
        {"source": "hdf5", "grid": GRID}, (GRID * GRID, len(first)), lambda path: path.stem,
        partial(read_grid, open_file=h5py.File, like=first.shape), pool, batch, shard), on_error)


def convert_npz(folder: str | Path, out: str | Path, batch: int = BATCH, on_error: str = "stop",
                shard: int = SHARD) -> list[str]:
    """One .npz file a clip, with "features" (T, F) -> a packed folder, as `extract`."""
    files = list_files(folder, NPZ)
    _, width = first_read(files, read_npz, f"npz files of {folder}").shape
    return pack(out, files, Recipe(
        {"source": "npz", "frames": FRAMES}, (FRAMES, width), content,
        partial(read_npz, width=width), lambda x: x, batch, shard), on_error)


def first_read(files: dict[str, Path], read: Callable[[Path], Tensor | str], kind: str) -> Tensor:
    """The first file that can be read, which says what shape all must have."""
    whole = (x for x in map(read, files.values()) if not isinstance(x, str))
    if (first := next(whole, None)) is None:
        path = next(iter(files.values()))
        raise ValueError(f"none of the {len(files)} {kind} can be read; {path}: {read(path)}.")
    return first


# ----------------------------------------------------------------------------------------- packing

@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the folder while it is written; a second process waits. A killed owner lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{out} is being written by another process: waiting", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pack(out: str | Path, files: dict[str, Path], recipe: Recipe,
         on_error: str = "stop") -> list[str]:
    """Writes what is missing of a packed folder. files: id -> file. Returns the ids left out."""
    out, sources, lost = Path(out), {}, set()        # sources: key -> file, the rows; lost: keys
    frames: list[int] = []                           # of clips: how many of each row are real
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is 'stop' or 'skip', not {on_error!r}.")
    if min(recipe.batch, recipe.shard) < 1:
        raise ValueError(f"batch is {recipe.batch} and shard {recipe.shard}: give at least 1.")
    if out.is_file():
        raise FileExistsError(f"{out} is a file, but features are packed into a folder: give "
                              "another name.")
    with alone(out), ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        check_settings(out, recipe)
        keys = identify(files, recipe, threads)
        for name, key in keys.items():
            sources.setdefault(key, files[name])
        check_room(out, len(sources), recipe)
        with tqdm(total=len(sources), unit=" rows") as bar:
            for n, some in enumerate(slices(sources, recipe.shard)):
                path = out / f"{n:05}.safetensors"
                write_shard(path, some, recipe, on_error, threads, bar)
                rows = weights.read(path)["features"]
                frames += count_real(rows) if "frames" in recipe.settings else []
                gone = rows[:, 0, 0].isnan().tolist()
                lost |= {key for key, yes in zip(some, gone) if yes}
                if lost and on_error == "stop":
                    raise ValueError(f"{sources[min(lost)]} was left out when {path} was made: "
                                     "delete that shard to try again, or give --on-error skip.")
        row = {key: n for n, key in enumerate(sources)}
        index = {"settings": recipe.settings, "shard": recipe.shard,
                 "shape": [len(sources), *recipe.shape],
                 "skipped": [name for name, key in keys.items() if key in lost],
                 "ids": {name: row[key] for name, key in keys.items() if key not in lost}}
        index |= {"frames": frames} if frames else {}
        unfinished = out / f"{INDEX}.unfinished"
        unfinished.write_text(json.dumps(index, indent=0), encoding="utf-8")
        os.replace(unfinished, out / INDEX)
    return index["skipped"]


def slices(items: dict, size: int) -> Iterator[dict]:
    """A dict cut into dicts of `size`."""
    rest = iter(items.items())
    while some := dict(islice(rest, size)):
        yield some


def identify(files: dict[str, Path], recipe: Recipe, threads: ThreadPoolExecutor) -> dict[str, str]:
    """Id -> key."""
    keys: dict[str, str] = {}
    with tqdm(total=len(files), desc="looking for copies", leave=False) as bar:
        for some in slices(files, 1024):
            keys |= zip(some, threads.map(recipe.key, some.values()))
            bar.update(len(some))
    return keys


def write_shard(path: Path, sources: dict[str, Path], recipe: Recipe, on_error: str,
                threads: ThreadPoolExecutor, bar: tqdm) -> None:
    """Writes a shard, goes on with a begun one or keeps a finished one. sources: key -> file."""
    paths, head = list(sources.values()), header(recipe, list(sources))
    if path.exists():
        check_shard(path, head, sources, recipe)
        bar.update(len(paths))
        return
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "a+b") as file:
        done = cut(file, head, recipe)
        bar.update(done)
        for some, results in read_ahead(paths[done:], recipe, threads):
            file.write(encoded(some, results, recipe, on_error).numpy().tobytes())
            bar.update(len(some))
        file.flush()
        os.fsync(file.fileno())                                   # survives a power cut, too
    os.replace(unfinished, path)


def cut(file: BinaryIO, head: bytes, recipe: Recipe) -> int:
    """Cuts a begun shard behind its last whole batch, and says how many rows that leaves.

    The header, which comes first, tells all that the rows depend on: if it is the one expected,
    the file's length is all there is to know. If it is not, the shard begins afresh.
    """
    file.seek(0)
    if file.read(len(head)) != head:
        file.truncate(0)
        file.write(head)
        return 0
    batches = (file.seek(0, os.SEEK_END) - len(head)) // (recipe.batch * recipe.row_bytes())
    file.truncate(len(head) + batches * recipe.batch * recipe.row_bytes())
    return batches * recipe.batch


def read_ahead(paths: list[Path], recipe: Recipe, threads: ThreadPoolExecutor
               ) -> Iterator[tuple[list[Path], list[Tensor | str]]]:
    """Batches of files and what was read; threads read the next one while this one is computed."""
    later: list[tuple[Path, Future]] = []
    for start in range(0, len(paths) + recipe.batch, recipe.batch):   # the last round reads nothing
        now, later = later, [(path, threads.submit(recipe.read, path))
                             for path in paths[start:start + recipe.batch]]
        if now:
            yield [path for path, _ in now], [job.result() for _, job in now]


def encoded(paths: list[Path], results: list[Tensor | str], recipe: Recipe,
            on_error: str) -> Tensor:
    """The rows of a batch (B, N, F) in fp16; a file that cannot be read is a row of NaN."""
    good = [n for n, result in enumerate(results) if not isinstance(result, str)]
    if on_error == "stop" and len(good) < len(results):
        path, why = next((p, r) for p, r in zip(paths, results) if isinstance(r, str))
        raise ValueError(f"{path} cannot be read ({why}): replace or remove it and go on with the "
                         "same command, or leave it out with --on-error skip of features.py.")
    rows = torch.full((len(paths), *recipe.shape), math.nan, dtype=torch.float16)
    if good:
        rows[good] = recipe.encode(torch.stack([results[n] for n in good])).half().cpu()
    if bad := [n for n in good if not rows[n].isfinite().all()]:
        raise ValueError(f"the features of {paths[bad[0]]} are no numbers that fp16 holds: use "
                         "another tower.")
    return rows


# --------------------------------------------------------------------------- what is there already

def header(recipe: Recipe, keys: list[str]) -> bytes:
    """The beginning of a safetensors file: 8 bytes of length, JSON, blanks up to 8 n."""
    text = json.dumps({
        "__metadata__": {"settings": json.dumps(recipe.all_settings()), "keys": json.dumps(keys)},
        "features": {"dtype": "F16", "shape": [len(keys), *recipe.shape],
                     "data_offsets": [0, len(keys) * recipe.row_bytes()]}}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def metadata(path: Path) -> dict:
    """What `header` wrote, of a file of any length; {} if that is not what the file begins with."""
    with open(path, "rb") as file:
        try:
            length, = struct.unpack("<Q", file.read(8))
            text = file.read(min(length, path.stat().st_size))
            return {k: json.loads(v) for k, v in json.loads(text)["__metadata__"].items()}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            return {}


def check_settings(out: Path, recipe: Recipe) -> None:
    """ValueError unless all shards, finished or not, were made with the recipe's settings."""
    settings = recipe.all_settings()
    for path in sorted(p for p in out.iterdir() if p.suffix in (".safetensors", ".unfinished")):
        theirs = metadata(path).get("settings")
        if theirs is None and path.suffix == ".safetensors":
            raise ValueError(f"{path} holds no packed features: name another --out.")
        if theirs and theirs != settings:
            differ = ", ".join(f"{k} {theirs.get(k)!r} (now {settings.get(k)!r})"
                               for k in theirs | settings if theirs.get(k) != settings.get(k))
            raise ValueError(f"{out} was begun with {differ}: give the same again, name another "
                             "--out, or delete the folder.")


def check_shard(path: Path, head: bytes, sources: dict[str, Path], recipe: Recipe) -> None:
    """ValueError unless a finished shard holds these rows, all of them."""
    with open(path, "rb") as file:
        same = file.read(len(head)) == head
    if not same:
        old = [*metadata(path)["keys"], ""]
        odd = next((p for key, (new, p) in zip(old, sources.items()) if key != new), "fewer now")
        raise ValueError(f"{path} was made from other files than there are now (the first that "
                         f"differs: {odd}): name another --out, or delete {path.parent}.")
    if path.stat().st_size != len(head) + len(sources) * recipe.row_bytes():
        raise ValueError(f"{path} is damaged (of another length than it says): delete it and go "
                         "on with the same command.")


def check_room(out: Path, rows: int, recipe: Recipe) -> None:
    """The disk takes it all, and no shard lies there that would be none of ours."""
    shards = {f"{n:05}" for n in range(math.ceil(rows / recipe.shard))}
    there = [p for p in out.iterdir() if p.suffix in (".safetensors", ".unfinished")]
    if odd := sorted(p for p in there if p.stem not in shards | {INDEX}):
        raise ValueError(f"{odd[0]} is no part of {rows} rows: were pictures taken away? Delete it "
                         "or name another --out.")
    need = rows * recipe.row_bytes() - sum(p.stat().st_size for p in there)
    if need > (free := shutil.disk_usage(out).free):
        raise OSError(f"{out} needs {need / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB "
                      "left: name an --out on another disk.")


# ----------------------------------------------------------------------------------------- reading

class Features:
    """Packed folders, mapped: `ids`, `width` (F), `settings`, `skipped`, `stack`, `frames`.

    folders: one, or several that were packed with the same settings.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path]):
        folders = [folders] if isinstance(folders, str | Path) else folders
        self.folders = ", ".join(map(str, folders))
        self.shards: list[Path] = []
        self.opened: dict[int, Tensor] = {}                       # shard -> its rows, M, N, F
        self.place: dict[str, tuple[int, int]] = {}               # id -> shard, row in it
        self.real: dict[str, int] = {}                            # id of a clip -> frames
        self.skipped: list[str] = []
        kinds = []
        for folder in map(Path, folders):
            index = read_index(folder)
            rows, *shape = index["shape"]
            kinds.append(index["settings"] | {"shape": shape})
            if kinds[0] != kinds[-1]:
                raise ValueError(f"{folder} holds features of another kind ({kinds[-1]}) than "
                                 f"{folders[0]} ({kinds[0]}): pack both with the same settings.")
            if twice := self.place.keys() & index["ids"].keys():
                raise ValueError(f"{min(twice)!r} is in {folder} and in a folder before it: rename "
                                 "one of the pictures and pack again.")
            first, size = len(self.shards), index["shard"]
            self.shards += [folder / f"{n:05}.safetensors" for n in range(math.ceil(rows / size))]
            self.place |= {i: (first + row // size, row % size) for i, row in index["ids"].items()}
            if index["frames"]:
                self.real |= {i: index["frames"][row] for i, row in index["ids"].items()}
            self.skipped += index["skipped"]
        if gone := [path for path in self.shards if not path.exists()]:
            raise FileNotFoundError(f"{gone[0]} is missing: pack again, which keeps the others.")
        self.settings, self.shape = index["settings"], tuple(shape)
        self.ids, self.width = list(self.place), shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def stack(self, ids: list[str]) -> Tensor:
        """The tokens of these pictures or clips (B, N, F) in fp32; zeros behind a clip's end."""
        self.check(ids)
        out = torch.empty(len(ids), *self.shape)
        for row, (shard, n) in zip(out, (self.place[i] for i in ids)):
            if shard not in self.opened:
                self.opened[shard] = weights.read(self.shards[shard])["features"]
            row.copy_(self.opened[shard][n])                      # read and cast in one pass
        return out

    def frames(self, ids: list[str]) -> list[int] | None:
        """How many of the tokens of each of these clips are real frames; None of pictures."""
        self.check(ids)
        return [self.real[i] for i in ids] if "frames" in self.settings else None

    def check(self, ids: list[str]) -> None:
        if lost := [i for i in ids if i not in self.place]:
            raise ValueError(f"{self.folders} has no {'clip' if self.real else 'picture'} "
                             f"{lost[0]!r} among its {len(self)}: pack a folder that holds it.")


class Pixels:
    """Pictures straight from disk, for a CLIP that stands in the model: `ids`, `width`, `stack`.

    pictures: id -> file (or what PIL opens). tokens: what the tower makes of each.
    """

    def __init__(self, tower: ViT | ResNet, pictures: dict[str, Path]):
        self.tower, self.pictures, self.ids = tower, pictures, list(pictures)
        self.width, self.tokens = tower.features, GRID * GRID
        self.settings = {"clip": weights.fingerprint(tower), "resize": "stretch"}
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def stack(self, ids: list[str]) -> Tensor:
        """Their pixels (B, 3, H, W); ValueError names a picture that cannot be read."""
        found = list(self.threads.map(
            lambda i: decode(self.pictures[i], self.tower.size, "stretch"), ids))
        for i, pixels in zip(ids, found):
            if isinstance(pixels, str):
                raise ValueError(f"picture {i} cannot be read ({pixels}): replace or remove it")
        return torch.stack(found)


def read_index(folder: Path) -> dict:
    """index.json of a packed folder."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no packed folder or not finished; "
                                "write it with features.py.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = {k: index[k] for k in ("settings", "shard", "shape", "skipped", "ids")}
        return found | {"frames": index["frames"] if "frames" in found["settings"] else None}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no index of packed features: delete it and pack again, which "
                         "keeps the shards.") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Packs features of pictures or clips in a folder.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder with jpg and png pictures; needs --clip")
    source.add_argument("--clips", help="folder with a folder or a gif a clip; needs --clip")
    source.add_argument("--hdf5", help="folder with published features, an .h5 file a picture")
    source.add_argument("--npz", help="folder with published features, an .npz file a clip")
    parser.add_argument("--clip", help="folder or .safetensors file of a CLIP tower")
    parser.add_argument("--out", required=True, help="packed folder to write or to go on with")
    parser.add_argument("--resize", choices=("stretch", "crop"), default="stretch")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures or clips at once")
    parser.add_argument("--shard", type=int, default=SHARD, help="pictures or clips a file")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop")
    args = parser.parse_args(argv)
    if bool(args.images or args.clips) != bool(args.clip):
        parser.error("--clip goes with --images or --clips")
    try:
        if args.clip:
            skipped = extract(load_clip(args.clip), args.images or args.clips, args.out, args.resize,
                              args.batch, args.on_error, None, args.shard, bool(args.clips))
        else:
            run = convert if args.hdf5 else convert_npz
            skipped = run(args.hdf5 or args.npz, args.out, args.batch, args.on_error, args.shard)
    except (ImportError, OSError, ValueError) as error:
        print(f"features.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("features.py: interrupted; the same command goes on", file=sys.stderr)
        return 1
    if skipped:
        print(f"{len(skipped)} unreadable files left out: {', '.join(skipped)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
