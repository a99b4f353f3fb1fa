"""What is read from outside? A table: of each kind a good folder, who reads it, who compares.

tests/fuzz.py damages these folders; tests/fuzz_peers.py holds what other readers find in them.
"""
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import fuzz_peers as peers
import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import t5
import train
from answers import AnswerHead
from config import Config, resolve
from model import VLModel
from support import features, pictures, published_lm, resume, runs, weights
from support.gate import reading
from support.published_clip import HUGGING_FACE, load_clip
from support.tokenizer import load_tokenizer
from tools import fetch, peft
from world import moving, scenes

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
TASKS = ("vqa", "gqa", "nlvr", "caption", "tvqa", "how2qa", "tvc", "yc2c")
ELSEWHERE = "../../elsewhere"                 # from the damaged folder: nobody may look there


class Kind(NamedTuple):
    good: Path                     # the folder as it should be
    files: list[str]               # those of its files that are damaged
    read: Callable                 # (folder, an empty folder to write to) -> what was read
    peer: Callable                 # (folder, that): raises if others read something else


def read_examples(folder: Path, out: Path) -> dict:
    return {(task, split): data.load_examples(task, split, folder)
            for task in TASKS for split in ("train", "val", "test")}


def clip_vil(lm: torch.nn.Module) -> VLModel:
    head = AnswerHead(lm.config.d, lm.config.eps, ["yes", "no", "2"], "bce")
    return VLModel(lm, 8, answers={"vqa": head})


def write_bert(folder: Path) -> None:
    """CLIP-ViL's, with its visual embedding, answer head and list of answers."""
    config = t5.bert(16, 2, 24, 2, vocab=99, positions=40, grid=(3, 3))
    model = clip_vil(t5.EncoderDecoder(config))
    tensors = weights.published(model.lm, published_lm.table(model.lm.config))
    visual = weights.published(model.visual, published_lm.VISUAL)
    tensors |= {f"encoder.visn_fc.visn_{name}": tensor for name, tensor in visual.items()}
    head = model.answers["vqa"].state_dict()
    tensors |= {f"answer_head.logit_fc.{name}": tensor for name, tensor in head.items()}
    weights.write(folder / weights.WHOLE, tensors)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
        "vocab_size": 99, "num_hidden_layers": 2, "max_position_embeddings": 40}))
    signs = [f"{front}{sign}" for front in ("", "##") for sign in "thecatsmlr?<>/\u6771"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, "colour", "what", "star"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "all_ans.json").write_text(json.dumps([{"ans": a} for a in ("yes", "no", "2")]))


def read_bert(folder: Path, out: Path) -> torch.nn.Module:
    model = clip_vil(published_lm.load_lm(folder))
    published_lm.begin_clip_vil(model.visual, model.answers, folder)
    assert all(p.isfinite().all() for p in model.parameters())
    return model.lm


def write_shards(folder: Path) -> None:
    home = {f"layer.{i}": f"{i % 2}.safetensors" for i in range(4)}
    for file in ("0.safetensors", "1.safetensors"):
        save_file({n: torch.rand(5, 4) for n in home if home[n] == file}, folder / file)
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": home}))


def write_clips(folder: Path) -> None:
    """A GIF, a WebP, and a folder of frames that lie on their side."""
    frames = [Image.effect_noise((40, 30), 50).convert("RGB") for _ in range(3)]
    for name in ("0.gif", "1.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    (folder / "2").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for frame, name in zip(frames, ("0.jpg", "1.png", "2.png")):
        frame.save(folder / "2" / name, exif=exif)


def read_frames(find: Callable, folder: Path, out: Path) -> dict[str, list]:
    found = {}
    for path in find(folder).values():
        with reading(path):
            found[path.name] = list(pictures.read_frames(path, 48))
    return found


def write_hdf5(folder: Path) -> None:
    for place in (folder, folder.parent / "elsewhere"):
        with h5py.File(place / "0.h5", "w") as file:
            file["0/features"] = np.full((36, 8), 3.5, np.float32)
    with h5py.File(folder / "link.h5", "w") as file:
        file["link/features"] = h5py.ExternalLink(f"{ELSEWHERE}/0.h5", "0/features")


def read_packed(folder: Path, out: Path) -> features.Features:
    found = features.Features(folder)
    found.stack(found.ids)
    return found


def write_npz(folder: Path) -> None:
    np.savez(folder / "v.npz", features=np.arange(40, dtype=np.float32).reshape(5, 8))


def convert(folder: Path, out: Path) -> features.Features:
    features.convert(folder, out, on_error="skip")
    return features.Features(out)


def tuned(folder: Path) -> runs.Run:
    """A run on tiny-bart, as train.py would make it."""
    lm = str(SHIPPED / "tiny-bart")
    config = resolve(Config(method="lora", lm=lm, out=str(folder), set="r=2", device="cpu"))
    model = peft.build(lm, [8], "lora", "r=2", TASKS)
    return runs.Run(config, model, None, {}, runs.identity(model.lm, config, model.method))


def write_run(run: runs.Run) -> dict[int, dict]:
    """Two steps, and all their files; returns step -> weights."""
    optimizer, saved = train.make_optimizer(run.model, run.config), {}
    log = resume.Log(run.folder / "log.jsonl")
    for step in (1, 2):
        loss = sum(p.square().sum() for p in run.model.parameters() if p.requires_grad)
        loss.backward()
        optimizer.step()
        log.add("vqa", loss)
        resume.save_last(run, optimizer, step, log)
        log.put({"step": step, "epoch": 0, "lr": 0.1, "grad_norm": 1.0, "loss": log.means()})
        log.put({"step": step, "epoch": 0, "validation": {"vqa": 50.0}, "mean": 50.0 + step})
        saved[step] = {name: t.detach().clone() for name, t in run.model.trained().items()}
    runs.save_json(run.folder / "config.json", asdict(run.config))
    runs.write(run, run.folder / "adapter.safetensors", run.model.trained())
    return saved


def read_run(good: runs.Run, folder: Path, out: Path) -> tuple:
    """What --resume and --test read of a run: step, weights there, weights of the end, scores."""
    run = replace(good, config=runs.read_config(str(folder)))
    log = resume.Log(Path(shutil.copy(folder / "log.jsonl", out)))
    step = resume.load_last(run, train.make_optimizer(run.model, run.config), 2, log)
    log.open(step)
    state = {name: tensor.detach().clone() for name, tensor in run.model.trained().items()}
    adapter = folder / "adapter.safetensors"
    runs.load_trained(run, runs.read(adapter), adapter, ("device",))
    return step, state, run.model.trained(), log.scores


def read_peft(folder: Path, out: Path) -> weights.Tensors:
    peft.from_peft(folder, str(SHIPPED / "tiny-bart"), out / "adapter.safetensors")
    return runs.read(out / "adapter.safetensors")


def write_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("2014/images/1.jpg", "2014/images/2.jpg", f"{ELSEWHERE}/images/3.jpg"):
            archive.writestr(name, name * 9)


def read_zip(folder: Path, out: Path) -> tuple[bytes, dict[str, bytes]]:
    content = (folder / "a.zip").read_bytes()
    fetch.unpack(folder / "a.zip", [out / "images"])
    return content, {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def sources(home: Path) -> dict[str, Kind]:
    """The table: of each kind a good folder, which files are damaged, who reads, who compares."""
    def make(name: str, write: Callable) -> Path:
        (home / name).mkdir()
        write(home / name)
        return home / name

    def of(folder: Path, pattern: str) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob(pattern) if p.is_file())

    def lm(folder: Path, model: torch.nn.Module) -> None:
        peers.model(folder, model, published_lm.table(model.config))

    torch.manual_seed(0)
    weights.write(home / "elsewhere" / weights.WHOLE, {"layer.0": torch.zeros(5, 4)})
    world = scenes.write(home / "world", pictures=100, items=100, progress=False)
    moving.write(world, clips=20, progress=False)
    seen, npz, hdf5 = make("seen", write_clips), make("npz", write_npz), make("hdf5", write_hdf5)
    bert, run = make("bert", write_bert), tuned(home / "run")
    features.convert(npz, home / "packed")
    saved = write_run(run)
    peft.export(run.model, home / "peft")
    model = ["config.json", weights.WHOLE]
    jsons = [name for name in of(world, "*.json*") if "/" in name and "stories" not in name]

    return {
        "annotations": Kind(world, jsons, read_examples, peers.annotations),
        "BART": Kind(SHIPPED / "tiny-bart", model, lambda f, _: published_lm.load_lm(f), lm),
        "T5": Kind(SHIPPED / "tiny-t5", model, lambda f, _: published_lm.load_lm(f), lm),
        "BERT": Kind(bert, [*model, "all_ans.json"], read_bert, lm),
        "CLIP": Kind(SHIPPED / "tiny-clip", model, lambda f, _: load_clip(f),
                     partial(peers.model, table=HUGGING_FACE)),
        "shards": Kind(make("shards", write_shards), [weights.INDEX, "0.safetensors"],
                       lambda f, _: dict(weights.read(f)), peers.shards),
        "BPE": Kind(SHIPPED / "tiny-bart", ["vocab.json", "merges.txt"],
                    lambda f, _: load_tokenizer(f), peers.tokens),
        "unigram": Kind(SHIPPED / "tiny-t5", ["tokenizer.json"],
                        lambda f, _: load_tokenizer(f), peers.tokens),
        "WordPiece": Kind(bert, ["vocab.txt"], lambda f, _: load_tokenizer(f), peers.tokens),
        "packed": Kind(home / "packed", [features.INDEX, features.ROWS], read_packed,
                       peers.packed),
        "HDF5": Kind(hdf5, ["0.h5"], convert, peers.published),
        "npz": Kind(npz, ["v.npz"], convert, peers.published),
        "pictures": Kind(seen / "2", of(seen / "2", "*"),
                         partial(read_frames, pictures.list_files), peers.pictures),
        "clips": Kind(seen, of(seen, "*"), partial(read_frames, pictures.list_clips),
                      peers.pictures),
        "run": Kind(home / "run", of(home / "run", "*.*"), partial(read_run, run),
                    partial(peers.run, saved=saved)),
        "PEFT": Kind(home / "peft", of(home / "peft", "*"), read_peft, peers.adapter),
        "zip": Kind(make("zip", write_zip), ["a.zip"], read_zip, peers.unpacked)}
