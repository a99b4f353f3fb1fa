"""Damages everything that is read from outside: a sentence, or a result, but never a traceback.

    python -m tests.fuzz --inputs 5000 --seed 0        # the table, and every failure

An input is a copy of a good file or folder with one thing broken: bytes flipped, cut, put in or
taken out, or a value of its JSON made another. It is read by the function that a user's command
calls. Right is a BadInput or an OSError in one line, or a result (whose numbers are finite); wrong
is any other exception, and more than five seconds.
"""
import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

import data
from support import features, pictures, runs
from support.gate import BadInput
from support.published_clip import load_clip
from support.published_lm import load_lm
from support.tokenizer import load_tokenizer
from world import moving, scenes

ROOT = Path(__file__).resolve().parent.parent
ODD = (None, True, -1, 0, 1e300, 10 ** 30, float("nan"), "", "x", "\ud83d", [], {}, [[]],
       "a" * 9999)


def sources(folder: Path) -> dict[str, tuple]:
    """kind -> (a good file or folder, the files to damage in it, what reads it)."""
    world = folder / "world"
    scenes.write(world, pictures=100, items=100, progress=False)
    moving.write(world, clips=20, progress=False)
    (folder / "pictures").mkdir()
    for number, ending in enumerate(("jpg", "png")):
        Image.effect_noise((40, 30), 50).convert("RGB").save(folder / f"pictures/{number}.{ending}")
    tower = load_clip(ROOT / "weights/tiny-clip")
    features.extract(tower, folder / "pictures", folder / "packed")
    (folder / "npz").mkdir()
    np.savez(folder / "npz/v.npz", features=np.ones((5, 8), np.float32))

    def annotations(path: Path) -> None:
        for task in data.TASKS:
            for split in data.SPLITS:
                data.load_examples(task, split, path)

    def packed(path: Path) -> None:
        found = features.Features(path)
        assert found.stack(found.ids).isfinite().all()

    def run(path: Path) -> None:
        runs.read_config(str(path))
        runs.read(path / "adapter.safetensors")

    def look(path: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            features.extract(tower, path, out, on_error="skip")

    def published(path: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            features.convert(path, out)

    def clips(path: Path) -> None:
        for clip in pictures.list_clips(path).values():
            features.attempt(clip, lambda file: list(pictures.read_frames(file, 48)), clip)

    def names(pattern: str, of: Path) -> list[str]:
        return [str(path.relative_to(of)) for path in sorted(of.glob(pattern))]

    weights = ROOT / "weights"
    records = names("[vGnC]*/*.json", world) + names("video/ann/**/*.jsonl", world)
    return {
        "annotations": (world, records, annotations),
        "BART": (weights / "tiny-bart", ["config.json", "model.safetensors"], load_lm),
        "T5": (weights / "tiny-t5", ["config.json", "model.safetensors"], load_lm),
        "CLIP": (weights / "tiny-clip", ["config.json", "model.safetensors"], load_clip),
        "BPE": (weights / "tiny-bart", ["vocab.json", "merges.txt"], load_tokenizer),
        "unigram": (weights / "tiny-t5", ["tokenizer.json"], load_tokenizer),
        "packed": (folder / "packed", ["index.json", "features.npy"], packed),
        "run": (weights / "tiny-vlpet", ["config.json", "adapter.safetensors"], run),
        "pictures": (folder / "pictures", ["0.jpg", "1.png"], look),
        "npz": (folder / "npz", ["v.npz"], published),
        "clips": (world / "video/clips", names("*.webp", world / "video/clips")[:3], clips)}


def damage(content: bytes, name: str, rng: Random) -> bytes:
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.6:
        return damaged_json(content, name, rng)
    where, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 100))
    if rng.random() < 0.5:
        where = rng.randrange(min(200, len(content) + 1))      # headers are at the beginning
    kind = rng.choice(("flip", "cut", "insert", "drop"))
    if kind == "cut":
        return content[:where]
    if kind == "insert":
        return content[:where] + rng.randbytes(length) + content[where:]
    if kind == "drop":
        return content[:where] + content[where + length:]
    return content[:where] + rng.randbytes(1) + content[where + 1:]


def damaged_json(content: bytes, name: str, rng: Random) -> bytes:
    lines = name.endswith(".jsonl")
    text = content.decode()
    whole = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    at = whole
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(ODD)
        break
    if lines:
        return "".join(json.dumps(line) + "\n" for line in whole).encode()
    return json.dumps(whole).encode()


def campaign(inputs: int, seed: int) -> tuple[Counter, list[str]]:
    """(kind, verdict) -> how many; what failed, in words."""
    rng, found, failures = Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as home:
        kinds = sources(Path(home))
        copies = {}
        for kind, (good, _, _) in kinds.items():
            copies[kind] = Path(home) / "damaged" / kind.replace(" ", "-")
            shutil.copytree(good, copies[kind])
        for number in range(inputs):
            kind = rng.choice(list(kinds))
            good, names, read = kinds[kind]
            name = rng.choice(names)
            content, path = (good / name).read_bytes(), copies[kind] / name
            path.write_bytes(damage(content, name, rng))
            start = time.process_time()
            try:
                read(copies[kind])
                verdict = "read"
            except (BadInput, OSError) as told:
                verdict = "refused" if "\n" not in str(told) else "FAILED"
            except Exception as bug:  # noqa: BLE001 (that is what is looked for)
                verdict = "FAILED"
                failures.append(f"{number} {kind} {name}: {type(bug).__name__}: {bug}"[:300])
            if time.process_time() - start > 5:
                failures.append(f"{number} {kind} {name}: {time.process_time() - start:.1f} s")
            found[kind, verdict] += 1
            path.write_bytes(content)
    return found, failures


def main() -> None:
    parser = argparse.ArgumentParser(description="Damages what is read from outside.")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, failures = campaign(args.inputs, args.seed)
    for kind in dict.fromkeys(kind for kind, _ in found):
        print(f"{kind:14} refused {found[kind, 'refused']:5}  read {found[kind, 'read']:5}  "
              f"failed {found[kind, 'FAILED']:3}")
    print(*failures, sep="\n")


if __name__ == "__main__":
    main()
