"""Where does the tiny CLIP come from?

From pictures of the built-in world and captions for them, the way its big brother was made (CLIP,
arXiv 2103.00020): of B pictures and B captions, tell which belong together. With image vectors a_i
and text vectors b_j of length one and a learned scale s,

    loss = mean of cross-entropy(s a_i . b_j over j) and cross-entropy(s a_j . b_i over j)

Two things decide what such a tower learns, because it ignores whatever it can do without:
* Half of the captions in a batch are hard negatives: each scene has a twin that differs in one
  thing. Without them color and place identify a picture, and nothing asks for the kind.
* The captions of a batch leave fields out (a batch may say kinds only). So each field must be
  read on its own, which also carries it over to pairs of color and kind that no picture showed.

    python -m world.pretrain_clip           makes weights/tiny-clip
    python -m pytest tests/test_pretrain.py

Axes: B pictures, O objects a caption, D width of the text tower, E the shared width, N grid tokens,
F their width, C cells (3 x 3), each of which covers 2 x 2 tokens.
"""
import argparse
import json
import math
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

from clip_encoder import MEAN, STD, ViT
from support import weights
from support.gate import program
from support.published_clip import HUGGING_FACE
from world import moving
from world.shapes import (COLOR, FIELDS, HELD_OUT, KIND, PLACE, PLACES, SIZE, Scene, pick, put,
                          random_scene, render)

FOLDER = Path(__file__).parent.parent / "weights/tiny-clip"
LR = 1.5e-3
SHAPE = {"width": 128, "layers": 3, "heads": 4, "patch": 8, "size": 48, "out": 128}
WORDS = [dict(zip((None, *words), range(10))) for words in FIELDS]     # word -> id; 0: left out
# Which fields the captions of a batch name (kind, color, size, place): one row a batch, drawn
# evenly. Most leave the color out, the easy one: where it may help, the kind is learned late.
NAMED = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 0, 0, 1), (1, 0, 1, 1),
         (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1))


# ---- pictures and their captions -----------------------------------------------------------------
def resized(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((SHAPE["size"],) * 2, Image.Resampling.BICUBIC))


def draw_all(scenes: list[Scene], rng: Random) -> Tensor:
    """Scenes as the tower meets them later, compressed and resized: uint8 (B, 48, 48, 3)."""
    pictures = []
    for scene in scenes:
        file = BytesIO()
        render(scene, rng).save(file, "JPEG", quality=90)
        pictures.append(resized(Image.open(file)))
    return torch.from_numpy(np.stack(pictures))


def pixels(pictures: Tensor) -> Tensor:
    """uint8 (B, 48, 48, 3) -> normalised (B, 3, 48, 48)."""
    return ((pictures / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def twin(scene: Scene, rng: Random) -> Scene:
    """The scene with one thing changed: most often a kind, else a color, a size, a place, or two
    objects that exchange a field."""
    while True:
        i, j = int(rng.random() * len(scene)), int(rng.random() * len(scene))
        field = pick(rng, (KIND, KIND, KIND, COLOR, SIZE, PLACE))
        objects = list(scene)
        if i != j and field != PLACE and rng.random() < 0.4:
            objects[i] = put(scene[i], field, scene[j][field])
            objects[j] = put(scene[j], field, scene[i][field])
        else:
            taken = {obj[PLACE] for obj in scene} if field == PLACE else {scene[i][field]}
            free = [word for word in FIELDS[field] if word not in taken]
            objects[i] = put(scene[i], field, pick(rng, free))
        pairs = [(obj[COLOR], obj[KIND]) for obj in objects]
        if tuple(objects) != scene and HELD_OUT.isdisjoint(pairs):
            return tuple(objects)


def word_ids(obj: tuple) -> list[int]:
    return [WORDS[field][word] for field, word in enumerate(obj)]


def phrases(scenes: list[Scene], named=(1, 1, 1, 1)) -> Tensor:
    """The captions: word ids (B, O, 4), a row an object, sorted; fields not named and rows without
    an object are 0."""
    ids = torch.zeros(len(scenes), 5, 4, dtype=torch.long)
    for i, scene in enumerate(scenes):
        rows = torch.tensor([word_ids(obj) for obj in scene]) * torch.tensor(named)
        ids[i, :len(rows)] = torch.tensor(sorted(rows.tolist()))
    return ids


class Batches(IterableDataset):
    """Endless batches of fresh pictures (B, 48, 48, 3) and captions (B, O, 4): scenes, half of them
    of one or two objects, each followed by its twin. Never a held-out pair."""

    def __init__(self, pairs: int, seed: int):
        self.pairs, self.seed = pairs, seed

    def __iter__(self):
        rng = Random(self.seed)
        while True:
            scenes = []
            for _ in range(self.pairs):
                scene = random_scene(rng, False, pick(rng, (2, 5)))
                scenes += [scene, twin(scene, rng)]
            pictures = draw_all(scenes, rng)
            yield pictures, phrases(scenes, pick(rng, NAMED))


# ---- the model -----------------------------------------------------------------------------------
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
        words = sum(table(ids[..., field]) for field, table in enumerate(self.words))    # B, O, D
        there = ids.sum(-1, keepdim=True) > 0
        return self.caption((self.phrase(words) * there).sum(1))                         # B, E


def image_vectors(vit: ViT, pictures: Tensor) -> Tensor:
    """vit(pictures)[1], (B, E), without the last block's outputs at the patches: only its class
    token is read."""
    x, _ = vit.embed(pictures)                                                           # B, 1+N, F
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    h = last.norm1(x)
    x = x[:, :1] + last.attn(h[:, :1], h)                                                # B, 1, F
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


# ---- what has it learned? ------------------------------------------------------------------------
@torch.no_grad()
def retrieval(vit: ViT, text: TextTower, count: int = 512) -> float:
    """How often a picture's own caption is the nearest of `count`, held-out pairs included."""
    rng = Random("retrieval")
    scenes = [random_scene(rng, True) for _ in range(count)]
    a = F.normalize(vit(pixels(draw_all(scenes, rng)))[1], dim=-1)
    b = F.normalize(text(phrases(scenes)), dim=-1)
    return ((a @ b.T).argmax(1) == torch.arange(count)).float().mean().item()


@torch.no_grad()
def cells(vit: ViT, held_out: bool, count: int) -> tuple[Tensor, Tensor]:
    """Features of the grid's cells (count C, 4 F); their word ids (count C, 4), empty: 0."""
    rng = Random(f"probe {held_out}")
    scenes = [random_scene(rng, held_out) for _ in range(count)]
    parts = pixels(draw_all(scenes, rng)).split(250)
    grid = torch.cat([vit.encode(part) for part in parts])                               # B, N, F
    grid = grid.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5)      # B, 3, 3, 2, 2, F
    ids = torch.zeros(count, 9, 4, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for obj in scene:
            ids[i, PLACES.index(obj[PLACE])] = torch.tensor(word_ids(obj))
    return grid.flatten(3).flatten(0, 2), ids.flatten(0, 1)


def probe(vit: ViT, count: int = 1500) -> dict[str, float]:
    """Accuracy of a linear classifier (ridge) on a cell's four tokens, fitted without held-out
    pairs, tested on fresh scenes; "held": on the objects of held-out pairs alone."""
    (x, ids), (x_test, ids_test) = cells(vit, False, count), cells(vit, True, count // 2)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (F.pad((each - mean) / std, (0, 1), value=1.0) for each in (x, x_test))  # the bias
    pairs = [(WORDS[KIND][kind], WORDS[COLOR][color]) for color, kind in HELD_OUT]
    held = torch.tensor([tuple(pair) in pairs for pair in ids_test[:, :2].tolist()])
    found = {}
    for name, field in (("kind", KIND), ("color", COLOR), ("size", SIZE), ("empty", PLACE)):
        labels, wanted = ids[:, field], ids_test[:, field]
        fit, test = ids[:, PLACE] > 0, ids_test[:, PLACE] > 0         # the cells that hold objects
        if name == "empty":
            labels, wanted = (labels > 0).long(), (wanted > 0).long()
            fit, test = torch.ones_like(fit), torch.ones_like(test)     # every cell
        a = x[fit]
        # Ridge regression onto one-hot labels Y: W = (A^T A + 30 I)^-1 A^T Y.
        w = torch.linalg.solve(a.T @ a + 30 * torch.eye(a.shape[1]),
                               a.T @ F.one_hot(labels[fit]).float())
        right = ((x_test @ w).argmax(1) == wanted).float()
        found[name] = right[test].mean().item()
        if name in ("kind", "color"):
            found[f"{name}, held"] = right[held].mean().item()
    return {name: round(value, 3) for name, value in found.items()}


@torch.no_grad()
def center(vit: ViT, stories: int = 400) -> None:
    """Moves the mean of the vectors of clips' frames to zero, by the bias of the last norm.

    All of CLIP's vectors point much the same way (the cone of arXiv 2203.02053). Where one vector
    is all that a frame gives, a visual embedding that begins at random sees little but this common
    part, and some runs never find out that frames say anything.
    """
    rng, frames = Random("center"), []
    for _ in range(stories):
        frames += map(resized, moving.render(moving.random_story(rng, False), rng))
    parts = pixels(torch.from_numpy(np.stack(frames))).split(250)
    mean = torch.cat([vit(part)[1] for part in parts]).mean(0)                           # E
    vit.norm_post.bias -= torch.linalg.solve(vit.project.weight, mean)


# ---- training ------------------------------------------------------------------------------------
def save_clip(vit: ViT, folder: Path, card: dict) -> None:
    """A folder in the published layout (weights in fp16), and card.json with what was measured."""
    side = {"height": SHAPE["size"], "width": SHAPE["size"]}
    files = {"config": {"model_type": "clip_vision_model", "projection_dim": SHAPE["out"],
                        "architectures": ["CLIPVisionModelWithProjection"],
                        "hidden_size": SHAPE["width"], "intermediate_size": 4 * SHAPE["width"],
                        "num_hidden_layers": SHAPE["layers"],
                        "num_attention_heads": SHAPE["heads"], "patch_size": SHAPE["patch"],
                        "image_size": SHAPE["size"], "num_channels": 3,
                        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
             "preprocessor_config": {"do_resize": True, "size": side, "resample": 3,
                                     "do_center_crop": False, "do_rescale": True,
                                     "rescale_factor": 1 / 255, "do_normalize": True,
                                     "image_mean": MEAN, "image_std": STD},
             "card": card}
    tensors = weights.published(vit, HUGGING_FACE)
    weights.write(folder / "model.safetensors",
                  {name: tensor.half() for name, tensor in tensors.items()}, {"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m world.pretrain_clip", description="The tiny CLIP.")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--pairs", type=int, default=32, help="scenes a batch; each has a twin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                             # sums do not depend on the machine
    torch.manual_seed(args.seed)
    vit, text = ViT(**SHAPE), TextTower(128, SHAPE["out"])
    untrained = probe(vit)
    scale = nn.Parameter(torch.tensor(math.log(14.0)))
    params = [*vit.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    batches = DataLoader(Batches(args.pairs, args.seed), batch_size=None, num_workers=1,
                         prefetch_factor=8)
    bar = tqdm(zip(range(args.steps), batches), "tiny-clip", args.steps)
    mean_loss = None
    for step, (pictures, ids) in bar:
        # 200 steps of warm-up times half a cosine
        cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 200) * cosine
        loss = contrast(image_vectors(vit, pixels(pictures)), text(ids), ids,
                        scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.3f}")
        if (step + 1) % 500 == 0:
            bar.write(f"{step + 1} {mean_loss:.3f} retrieval {retrieval(vit, text):.3f} "
                      f"{probe(vit)}")
    card = {"made by": f"python -m world.pretrain_clip --steps {args.steps}", "steps": args.steps,
            "pictures seen": 2 * args.pairs * args.steps, "loss": round(mean_loss, 3),
            "retrieval of 512": round(retrieval(vit, text), 3), "linear probe": probe(vit),
            "linear probe, untrained": untrained,
            "parameters": sum(param.numel() for param in vit.parameters())}
    center(vit)
    save_clip(vit, args.out, card)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
