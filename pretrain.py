"""Where do the tiny built-in weights come from?

From pictures and texts of the built-in world (world.py), the way their big brothers were made:

    python pretrain.py clip          weights/tiny-clip: pictures with captions, contrastive

CLIP (arXiv 2103.00020): of B pictures and B captions, tell which belong together. With image
vectors a_i and text vectors b_j of length one and a learned scale s,

    loss = mean of cross-entropy(s a_i . b_j over j) and cross-entropy(s a_j . b_i over j)

Two things decide what such a tower learns, because it ignores whatever it can do without:
* Half of the captions in a batch are hard negatives: each scene has a twin that differs in one
  thing. Without them color and place identify a picture, and nothing asks for the kind.
* The captions of a batch leave fields out (a batch may say kinds only). So each field must be
  read on its own, which also carries it over to pairs of color and kind that no picture showed.

Axes: B pictures, O objects a caption, D width of the text tower, E the shared width, N grid tokens,
F their width, C cells (3 x 3), each of which covers 2 x 2 tokens.
"""
import argparse
import json
import math
import time
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import weights
import world
from clip_encoder import HUGGING_FACE, MEAN, STD, ViT
from world import COLOR, FIELDS, HELD_OUT, KIND, PLACE, PLACES, SIZE

WEIGHTS = Path(__file__).parent / "weights"

# ---- CLIP: pictures and their captions -----------------------------------------------------------
SHAPE = {"width": 128, "layers": 3, "heads": 4, "patch": 8, "size": 48, "out": 128}
WORDS = [{word: i for i, word in enumerate((None, *field))} for field in FIELDS]     # 0: left out
# Which fields the captions of a batch name (kind, color, size, place): one row a batch, drawn
# evenly. Most leave the color out, the easy one: where it may help, the kind is learned late.
NAMED = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 0, 0, 1), (1, 0, 1, 1),
         (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1))


def picture(s: world.Scene, r: Random) -> np.ndarray:
    """A scene as the tower meets it later, compressed and resized: uint8 (48, 48, 3)."""
    file = BytesIO()
    world.render(s, r).save(file, "JPEG", quality=90)
    side = SHAPE["size"]
    return np.asarray(Image.open(file).resize((side, side), Image.Resampling.BICUBIC))


def pixels(pictures: Tensor) -> Tensor:
    """uint8 (B, 48, 48, 3) -> normalised (B, 3, 48, 48)."""
    return ((pictures / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def twin(s: world.Scene, r: Random) -> world.Scene:
    """The scene with one thing changed: most often a kind, else a color, a size, a place, or two
    objects that exchange a field."""
    while True:
        i, j = int(r.random() * len(s)), int(r.random() * len(s))
        field = world.pick(r, (KIND, KIND, KIND, COLOR, SIZE, PLACE))
        objects = list(s)
        if i != j and field != PLACE and r.random() < 0.4:
            words = s[j][field], s[i][field]
            objects[i], objects[j] = (world.put(s[k], field, w) for k, w in zip((i, j), words))
        else:
            taken = {o[PLACE] for o in s} if field == PLACE else {s[i][field]}
            free = [word for word in FIELDS[field] if word not in taken]
            objects[i] = world.put(s[i], field, world.pick(r, free))
        if tuple(objects) != s and not any((o[COLOR], o[KIND]) in HELD_OUT for o in objects):
            return tuple(objects)


def phrases(scenes: list[world.Scene], named=(1, 1, 1, 1)) -> Tensor:
    """The captions: word ids (B, O, 4), a row an object, sorted; fields not named and rows without
    an object are 0."""
    ids = torch.zeros(len(scenes), 5, 4, dtype=torch.long)
    for i, s in enumerate(scenes):
        rows = sorted([WORDS[f][o[f]] * named[f] for f in range(4)] for o in s)
        ids[i, :len(rows)] = torch.tensor(rows)
    return ids


class Batches(IterableDataset):
    """Endless batches of fresh pictures (B, 48, 48, 3) and captions (B, O, 4): scenes, half of them
    of one or two objects, each followed by its twin. Never a held-out pair."""

    def __init__(self, pairs: int, seed: int):
        self.pairs, self.seed = pairs, seed

    def __iter__(self):
        r = Random(self.seed)
        while True:
            scenes = []
            for _ in range(self.pairs):
                s = world.scene(r, False, world.pick(r, (2, 5)))
                scenes += [s, twin(s, r)]
            pictures = np.stack([picture(s, r) for s in scenes])
            yield torch.from_numpy(pictures), phrases(scenes, world.pick(r, NAMED))


class TextTower(nn.Module):
    """A throwaway reader: words to phrases, phrases to a bag, the bag to a vector (B, E)."""

    def __init__(self, d: int, out: int):
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(len(words), d) for words in WORDS)
        self.phrase = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, 2 * d),
                                    nn.GELU(), nn.Linear(2 * d, d))
        self.caption = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(),
                                     nn.Linear(2 * d, out))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.phrase(sum(words(ids[..., f]) for f, words in enumerate(self.words)))   # B, O, D
        return self.caption((x * (ids.sum(-1, keepdim=True) > 0)).sum(1))


def image_vectors(vit: ViT, x: Tensor) -> Tensor:
    """vit(x)[1], (B, E), without the last block's patch outputs: only its class token is read."""
    x, _ = vit.embed(x)
    for block in vit.blocks[:-1]:
        x = block(x)
    last, h = vit.blocks[-1], vit.blocks[-1].norm1(x)
    x = x[:, :1] + last.attn(h[:, :1], h)
    x = x + last.down(last.act(last.up(last.norm2(x))))
    return vit.project(vit.norm_post(x[:, 0]))


def contrast(a: Tensor, b: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss; where several captions of a batch are the same, all of them are right. The
    least possible value, the entropy of the targets, is subtracted."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T                   # B, B
    same = (ids.flatten(1)[:, None] == ids.flatten(1)).all(-1).float()
    same = same / same.sum(1, keepdim=True)
    least = -(same * same.clamp(min=1e-9).log()).sum(1).mean()
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2 - least


# ---- CLIP: what has it learned? ------------------------------------------------------------------
@torch.no_grad()
def retrieval(vit: ViT, text: TextTower, count: int = 512) -> float:
    """How often a picture's own caption is the nearest of `count`, held-out pairs included."""
    r = Random("retrieval")
    scenes = [world.scene(r, True) for _ in range(count)]
    x = pixels(torch.from_numpy(np.stack([picture(s, r) for s in scenes])))
    a, b = F.normalize(vit(x)[1], dim=-1), F.normalize(text(phrases(scenes)), dim=-1)
    return ((a @ b.T).argmax(1) == torch.arange(count)).float().mean().item()


@torch.no_grad()
def cells(vit: ViT, held_out: bool, count: int) -> tuple[Tensor, Tensor]:
    """Features of the grid's cells (count C, 4 F + 1); their word ids (count C, 4), empty: 0."""
    r = Random(f"probe {held_out}")
    scenes = [world.scene(r, held_out) for _ in range(count)]
    x = pixels(torch.from_numpy(np.stack([picture(s, r) for s in scenes])))
    grid = torch.cat([vit.encode(part) for part in x.split(250)])                         # B, N, F
    grid = grid.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2)
    ids = torch.zeros(count, 9, 4, dtype=torch.long)
    for i, s in enumerate(scenes):
        for o in s:
            ids[i, PLACES.index(o[PLACE])] = torch.tensor([WORDS[f][o[f]] for f in range(4)])
    return torch.cat([grid, torch.ones(len(grid), 1)], 1), ids.flatten(0, 1)


def probe(vit: ViT, count: int = 1500) -> dict[str, float]:
    """Accuracy of a linear classifier (ridge) on a cell's four tokens, fitted without held-out
    pairs, tested on fresh scenes; "held": on the objects of held-out pairs alone."""
    (x, y), (u, v) = cells(vit, False, count), cells(vit, True, count // 2)
    mean, std = x[:, :-1].mean(0), x[:, :-1].std(0) + 1e-6
    x[:, :-1], u[:, :-1] = (x[:, :-1] - mean) / std, (u[:, :-1] - mean) / std
    pairs = {(WORDS[COLOR][color], WORDS[KIND][kind]) for color, kind in HELD_OUT}
    held = torch.tensor([(color, kind) in pairs for kind, color in v[:, :2].tolist()])
    found = {}
    for name, field in (("kind", KIND), ("color", COLOR), ("size", SIZE), ("empty", PLACE)):
        fit, test = (ids[:, PLACE] > -(field == PLACE) for ids in (y, v))     # empty: every cell
        labels, wanted = y[fit, field], v[:, field]
        if name == "empty":
            labels, wanted = (labels > 0).long(), (wanted > 0).long()
        a = x[fit]
        w = torch.linalg.solve(a.T @ a + 30 * torch.eye(a.shape[1]),
                               a.T @ F.one_hot(labels).float())
        right = ((u @ w).argmax(1) == wanted).float()
        found[name] = right[test].mean().item()
        if name in ("kind", "color"):
            found[f"{name}, held"] = right[held].mean().item()
    return {name: round(value, 3) for name, value in found.items()}


# ---- CLIP: training ------------------------------------------------------------------------------
def save_clip(vit: ViT, folder: Path, card: dict) -> None:
    """A folder in the published layout (weights in fp16), and card.json with what was measured."""
    vision = {"model_type": "clip_vision_model", "hidden_size": SHAPE["width"],
              "intermediate_size": 4 * SHAPE["width"], "num_hidden_layers": SHAPE["layers"],
              "num_attention_heads": SHAPE["heads"], "patch_size": SHAPE["patch"],
              "image_size": SHAPE["size"], "projection_dim": SHAPE["out"], "num_channels": 3,
              "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    side = {"height": SHAPE["size"], "width": SHAPE["size"]}
    files = {"config": {"model_type": "clip_vision_model", "projection_dim": SHAPE["out"],
                        "architectures": ["CLIPVisionModelWithProjection"], **vision},
             "preprocessor_config": {"do_resize": True, "size": side, "resample": 3,
                                     "do_center_crop": False, "do_rescale": True,
                                     "rescale_factor": 1 / 255, "do_normalize": True,
                                     "image_mean": MEAN, "image_std": STD},
             "card": card}
    tensors = weights.published(vit, HUGGING_FACE)
    weights.write(folder / "model.safetensors", {k: t.half() for k, t in tensors.items()},
                  {"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def clip(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    vit, text = ViT(**SHAPE), TextTower(128, SHAPE["out"])
    untrained = probe(vit)
    scale = nn.Parameter(torch.tensor(math.log(14.0)))
    params = [*vit.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(total=round(60 * args.minutes), unit="s", desc="clip")
    start, step, mean_loss, shown = time.time(), 0, None, 0
    for pictures, ids in DataLoader(Batches(args.pairs, args.seed), batch_size=None, num_workers=1,
                                    prefetch_factor=8):
        done = (time.time() - start) / (60 * args.minutes)       # the schedule follows the clock
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * done)) / 2
        loss = contrast(image_vectors(vit, pixels(pictures)), text(ids), ids,
                        scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        bar.n = round(done * bar.total)
        bar.set_postfix(step=step, loss=f"{mean_loss:.3f}")
        if int(10 * done) > shown:
            shown, paused = int(10 * done), time.time()
            bar.write(f"{step} steps, loss {mean_loss:.3f}, retrieval {retrieval(vit, text):.3f}, "
                      f"probe {probe(vit)}")
            start += time.time() - paused
    bar.close()
    card = {"made by": f"python pretrain.py clip --minutes {args.minutes:g}", "steps": step,
            "pictures seen": 2 * args.pairs * step, "loss": round(mean_loss, 3),
            "retrieval of 512": round(retrieval(vit, text), 3), "linear probe": probe(vit),
            "linear probe, untrained": untrained,
            "parameters": sum(p.numel() for p in vit.parameters())}
    save_clip(vit, args.out or WEIGHTS / "tiny-clip", card)
    print(json.dumps(card, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny built-in weights.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("clip", help="the image tower, weights/tiny-clip")
    command.add_argument("--minutes", type=float, default=25, help="of training")
    command.add_argument("--pairs", type=int, default=32, help="scenes a batch; each has a twin")
    command.add_argument("--lr", type=float, default=1.5e-3)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, help="folder to write to")
    command.set_defaults(run=clip)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
