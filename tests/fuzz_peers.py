"""What do others read in a file that ours has accepted? Each raises if it is something else.

json, safetensors, Pillow, numpy, h5py, zipfile and tokenizers are asked about the very bytes that
tests/fuzz.py damaged. A peer takes the folder and what our reader made of it.
"""
import io
import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import tiny
import tokenizers
import torch
import transformers
from PIL import Image, ImageOps, ImageSequence
from safetensors.torch import load_file

import data
from clip_encoder import MEAN, STD
from support import features, weights
from support.readers import find_files
from support.tokenizer import Tokenizer
from tools import peft

TEXT = "<s>What  colour is\nthe cat's 2nd small STAR?<mask> caf\u00e9 </s><pad> \u6771"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8-sig"))


# ----------------------------------------------------------------------------------- annotations

def records(path: Path, split: str) -> list[dict]:
    if path.suffix == ".jsonl":
        return json.loads("[" + re.sub(r"\}\s*\{", "}, {", path.read_text("utf-8-sig")) + "]")
    found = read_json(path)
    if isinstance(found, dict):                   # Karpathy's file: the records of all splits
        found = [record for record in found["images"]
                 if record["split"].replace("restval", "train") == split]
    return found


def said(task: str, record: dict) -> tuple:
    """(id, text, pictures, {answer: score}) of a record of the built-in data."""
    if task in ("vqa", "gqa"):
        label = record["label"] if isinstance(record["label"], dict) else {record["label"]: 1}
        return record["question_id"], record["sent"], (record["img_id"],), label
    if task == "nlvr":
        answer = "true" if record["label"] in (1, "True") else "false"
        pair = record["identifier"].rpartition("-")[0]
        images = tuple(record.get(name, f"{pair}-{name}") for name in ("img0", "img1"))
        return record["identifier"], record["sent"], images, {answer: 1}
    if task == "caption":
        captions = {sentence["raw"].strip(): 1 for sentence in record["sentences"]}
        return record["cocoid"], "", (Path(record["filename"]).stem,), captions
    video, ts, span, place = record["vid_name"], record.get("ts"), "", ""
    if ts not in (None, "", "NaN-NaN"):
        start, end = map(float, ts.split("-") if isinstance(ts, str) else ts)
        span, place = f"({start:.10g}, {end:.10g})", f":{start:.10g}-{end:.10g}"
    if task in ("tvqa", "how2qa"):
        names = ["a0", "a1", "a2", "a3", "a4"][:5 if task == "tvqa" else 4]
        choices = [f"{name}: {record[name].strip('. ')}." for name in names]
        text = " ".join([record["q"].strip(), *filter(None, [span]), *choices])
        index = record.get("answer_idx")
        return record["qid"], text, (video,), {} if index in (None, []) else {f"a{index}": 1}
    name, text = record.get("clip_id"), span if task == "tvc" else ""
    captions = {described["desc"].strip(): 1 for described in record.get("descs") or []}
    return video + place if name is None else name, text, (video,), captions


def annotations(folder: Path, found: dict) -> None:
    """Every answer of every example stands so in a record, and the other way round."""
    for (task, split), examples in found.items():
        ours, theirs = set(), set()
        for ex in examples:
            name = str(ex.id).partition("#")[0]
            ours |= {(name, ex.text, ex.images, *answer) for answer in ex.targets.items()}
        _, paths = find_files(data.TASKS[task].layouts, split, folder)
        for path in paths[:-1] if data.TASKS[task].clips else paths:      # the last: subtitles
            for record in records(path, split):
                name, text, images, answers = said(task, record)
                theirs |= {(str(name), text, images, *answer) for answer in answers.items()
                           if answer[1]}
        assert ours == theirs, f"{task} {split}: {ours ^ theirs}"


# ------------------------------------------------------------------------- weights and tokenisers

def model(folder: Path, module: torch.nn.Module, table: weights.Table) -> None:
    """Every tensor of a model is what the library reads under its published name."""
    held = load_file(folder / weights.WHOLE)
    for name, tensor in weights.published(module, table).items():
        if name in held:                          # but for BART's zeros where there is no head
            assert torch.equal(tensor, held[name].float()), name


def shards(folder: Path, found: weights.Tensors) -> None:
    held = {}
    for file in set(read_json(folder / weights.INDEX)["weight_map"].values()):
        held |= load_file(folder / file)
    assert tiny.same_state(dict(found), held)


def adapter(folder: Path, found: weights.Tensors) -> None:
    """An adapter file holds the numbers of PEFT's files, whatever they are called there."""
    theirs = load_file(folder / peft.ADAPTER) | load_file(folder / peft.VISUAL)
    numbers = [sorted(tensor.float().numpy().tobytes() for tensor in held.values())
               for held in (found, theirs)]
    assert numbers[0] == numbers[1]


def tokens(folder: Path, found: Tokenizer) -> None:
    """A text's ids are the library's, unless it refuses the file: it checks more fields."""
    if any(b"\r" in path.read_bytes() for path in folder.glob("*.txt")):
        return                                    # alone it ends a line for Python, not for others
    ours = found.encode(TEXT)[0 if found.bos_id is None else 1:-1]
    theirs = ours
    with suppress(Exception):
        if (folder / "tokenizer.json").exists():
            library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").exists():
            library = transformers.BertTokenizer.from_pretrained(folder).backend_tokenizer
        else:
            library = transformers.BartTokenizer.from_pretrained(folder).backend_tokenizer
        theirs = library.encode(TEXT, add_special_tokens=False).ids
    assert ours == theirs


# -------------------------------------------------------------------------- pictures and features

def pixels(image: Image.Image, side: int) -> torch.Tensor:
    with suppress(Exception):                     # a broken EXIF is as good as none
        image = ImageOps.exif_transpose(image)
    x = np.asarray(image.convert("RGB").resize((side, side), Image.BICUBIC), np.float32) / 255
    x = (x - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(x).permute(2, 0, 1)


def pictures(folder: Path, found: dict[str, list]) -> None:
    """Each picture, and each frame of a clip, is what Pillow alone gives."""
    for name, frames in found.items():
        path, theirs = folder / name, []
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with Image.open(file) as image:
                theirs += [pixels(frame, frames[0].size(1))
                           for frame in ImageSequence.Iterator(image)]
        assert len(theirs) == len(frames) and all(map(torch.equal, frames, theirs)), name


def published(folder: Path, found: features.Features) -> None:
    """Rows are what h5py or numpy reads; behind a short clip, zeros."""
    assert "link" not in found.ids, "a link out of the folder was followed"
    for name in found.ids:
        if (folder / f"{name}.npz").exists():
            theirs = np.load(folder / f"{name}.npz", allow_pickle=False)["features"]
        else:
            with h5py.File(folder / f"{name}.h5") as file:
                theirs = file[name]["features"][()]
        (ours,) = found.stack([name]).numpy()
        assert np.array_equal(ours[:len(theirs)], theirs.astype(np.float16).astype(np.float32))
        assert not ours[len(theirs):].any(), name


def packed(folder: Path, found: features.Features) -> None:
    index = read_json(folder / features.INDEX)
    kept = [name for name in index["ids"] if name not in index["skipped"]]
    rows = [index["ids"].index(name) for name in kept]
    theirs = np.load(folder / features.ROWS, allow_pickle=False)[rows].astype(np.float32)
    assert found.ids == kept and np.array_equal(found.stack(kept).numpy(), theirs)


# ------------------------------------------------------------------------------------- the others

def run(folder: Path, found: tuple, saved: dict[int, dict]) -> None:
    """A digest guards a run's numbers: they are those that were written at that step."""
    step, state, trained, scores = found
    assert tiny.same_state(state, saved[step]) and tiny.same_state(trained, saved[max(saved)])
    assert all(type(mean) in (int, float) for mean in scores.values()), scores


def unpacked(folder: Path, found: tuple[bytes, dict[str, bytes]]) -> None:
    with zipfile.ZipFile(io.BytesIO(found[0])) as archive:
        theirs = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist()
                  if name.rpartition("/")[2] in found[1]}
    assert found[1].items() <= theirs.items()
