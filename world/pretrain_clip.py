"""Where does the tiny CLIP come from?

From pictures of the built-in world and captions for them (CLIP, arXiv 2103.00020): of B pictures
and B captions, tell which belong together. With vectors a_i and b_j of length one and a scale s,

    loss = mean of cross-entropy(s a_i . b_j over j) and cross-entropy(s a_j . b_i over j)

Such a tower ignores whatever it can do without. So each scene has a twin that differs in one thing
(else color and place identify a picture, and nothing asks for the kind), and captions leave fields
out (so each is read on its own, in pairs of color and kind that no picture showed, too).

    python -m world.pretrain_clip           makes weights/tiny-clip
    python -m pytest tests/test_pretrain.py

Axes: B pictures, O objects a caption, D width of the text tower, E the shared width, N grid tokens,
F their width.
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from io import BytesIO
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from clip_encoder import MEAN, STD, ViT
from support import weights
from support.gate import program
from support.published_clip import HUGGING_FACE
from world import moving
from world.shapes import (COLOR, FIELDS, HELD_OUT, KIND, PLACE, PLACES, SIZE, Scene, pick, put,
                          random_scene, render)

FOLDER = Path(__file__).parent.parent / "weights/tiny-clip"
SHAPE = {"width": 128, "layers": 3, "heads": 4, "patch": 8, "size": 48, "out": 128}
PAIRS = 32                                              # scenes a batch; each has a twin
WORDS = [dict(zip((None, *words), range(10))) for words in FIELDS]     # word -> id; 0: left out
# Which fields the captions of a batch name (kind, color, size, place): one row a batch, drawn
# evenly. Most leave the color out, the easy one: where it may help, the kind is learned late.
NAMED = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 0, 0, 1), (1, 0, 1, 1),
         (0, 1, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1))
SIDE = {"height": SHAPE["size"], "width": SHAPE["size"]}
CONFIG = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"],
          "projection_dim": SHAPE["out"], "hidden_size": SHAPE["width"],
          "intermediate_size": 4 * SHAPE["width"], "num_hidden_layers": SHAPE["layers"],
          "num_attention_heads": SHAPE["heads"], "patch_size": SHAPE["patch"],
          "image_size": SHAPE["size"], "num_channels": 3, "hidden_act": "quick_gelu",
          "layer_norm_eps": 1e-5}
PREPROCESSOR = {"do_resize": True, "size": SIDE, "resample": 3, "do_center_crop": False,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                "image_mean": MEAN, "image_std": STD}


# ---- pictures and their captions -----------------------------------------------------------------
def pixels(pictures: list[Image.Image]) -> Tensor:
    """Resized and normalised, (B, 3, 48, 48)."""
    side = (SHAPE["size"], SHAPE["size"])
    resized = np.stack([picture.resize(side, Image.Resampling.BICUBIC) for picture in pictures])
    x = (torch.from_numpy(resized) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.permute(0, 3, 1, 2)


def draw_all(scenes: list[Scene], rng: Random) -> Tensor:
    """Scenes as the tower meets them later, compressed and resized: (B, 3, 48, 48)."""
    pictures = []
    for scene in scenes:
        file = BytesIO()
        render(scene, rng).save(file, "JPEG", quality=90)
        pictures.append(Image.open(file))
    return pixels(pictures)


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


def phrases(scenes: list[Scene], named: tuple[int, ...]) -> Tensor:
    """The captions: word ids (B, O, 4), a row an object, sorted; fields not named and rows without
    an object are 0."""
    ids = torch.zeros(len(scenes), 5, 4, dtype=torch.long)
    for i, scene in enumerate(scenes):
        rows = torch.tensor([word_ids(obj) for obj in scene]) * torch.tensor(named)
        ids[i, :len(rows)] = torch.tensor(sorted(rows.tolist()))
    return ids


def draw_batch(rng: Random) -> tuple[Tensor, Tensor]:
    """Fresh pictures (B, 3, 48, 48) and captions (B, O, 4): scenes, half of them of one or two
    objects, each followed by its twin. Never a held-out pair."""
    scenes = []
    for _ in range(PAIRS):
        scene = random_scene(rng, False, pick(rng, (2, 5)))
        scenes += [scene, twin(scene, rng)]
    return draw_all(scenes, rng), phrases(scenes, pick(rng, NAMED))


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


def contrast(a: Tensor, b: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss; where several captions of a batch are the same, all of them are right. The
    least possible value, the entropy of the targets, is subtracted."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T                   # B, B
    same = (ids.flatten(1)[:, None] == ids.flatten(1)).all(-1).float()
    same = same / same.sum(1, keepdim=True)
    least = -(same * same.clamp(min=1e-9).log()).sum(1).mean()
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2 - least


@torch.no_grad()
def center(vit: ViT) -> None:
    """Moves the mean of the vectors of clips' frames to zero, by the bias of the last norm.

    All of CLIP's vectors point much the same way (the cone of arXiv 2203.02053). Where one vector
    is all that a frame gives, a visual embedding that begins at random sees little but this common
    part, and some runs never find out that frames say anything.
    """
    rng, frames = Random("center"), []
    for _ in range(400):
        frames += moving.render(moving.random_story(rng, False), rng)
    vectors = [vit(part)[1] for part in pixels(frames).split(250)]
    vit.norm_post.bias -= torch.linalg.solve(vit.project.weight, torch.cat(vectors).mean(0))


# ---- what has it learned? ------------------------------------------------------------------------
@torch.no_grad()
def objects_seen(vit: ViT, held_out: bool, count: int) -> tuple[Tensor, Tensor]:
    """Of every object in `count` scenes the four tokens of its cell (objects, 4 F), and its word
    ids (objects, 4)."""
    rng = Random(f"probe {held_out}")
    scenes = [random_scene(rng, held_out) for _ in range(count)]
    grid = torch.cat([vit.encode(part) for part in draw_all(scenes, rng).split(250)])    # B, N, F
    cells = grid.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5)     # B, 3, 3, 2, 2, F
    cells = cells.flatten(3).flatten(1, 2)                                # B, 9, 4 F
    x, ids = [], []
    for scene, features in zip(scenes, cells):
        x += [features[PLACES.index(obj[PLACE])] for obj in scene]
        ids += map(word_ids, scene)
    return torch.stack(x), torch.tensor(ids)


def probe(vit: ViT, count: int = 1500) -> dict[str, float]:
    """Accuracy of a linear classifier (ridge) on the tokens of an object's cell, fitted without
    held-out pairs, tested on fresh scenes; "held": on the objects of held-out pairs alone."""
    (x, ids), (x_test, ids_test) = objects_seen(vit, False, count), objects_seen(vit, True, count)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (F.pad((each - mean) / std, (0, 1), value=1.0) for each in (x, x_test))  # the bias
    # Ridge regression onto one-hot labels Y: W = (X^T X + 30 I)^-1 X^T Y.
    gram = x.T @ x + 30 * torch.eye(x.shape[1])
    pairs = [[WORDS[KIND][kind], WORDS[COLOR][color]] for color, kind in HELD_OUT]
    held = torch.tensor([pair in pairs for pair in ids_test[:, :2].tolist()])
    found = {}
    for name, field in (("kind", KIND), ("color", COLOR), ("size", SIZE)):
        w = torch.linalg.solve(gram, x.T @ F.one_hot(ids[:, field]).float())
        right = ((x_test @ w).argmax(1) == ids_test[:, field]).float()
        found |= {name: right.mean().item(), f"{name}, held": right[held].mean().item()}
    return {name: round(value, 3) for name, value in found.items()}


# ---- training ------------------------------------------------------------------------------------
def fit(name: str, optimizer: torch.optim.Optimizer, steps: int,
        schedule: Callable[[int], float], loss_of: Callable[[int], Tensor]) -> None:
    """Trains. schedule: step -> factor of the learning rates; loss_of: step -> loss of a batch."""
    scheduler, bar = LambdaLR(optimizer, schedule), tqdm(range(steps), name)
    parameters = [*chain(*(group["params"] for group in optimizer.param_groups))]
    for step in bar:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def save(model: nn.Module, table: weights.Table, folder: Path, **files: dict) -> None:
    """A folder in the published layout, weights in fp16. files: name -> content, of .json files."""
    tensors = {name: tensor.half() for name, tensor in weights.published(model, table).items()}
    weights.write(folder / weights.WHOLE, tensors, {"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def save_clip(vit: ViT, folder: Path, card: dict) -> None:
    save(vit, HUGGING_FACE, folder, config=CONFIG, preprocessor_config=PREPROCESSOR, card=card)


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m world.pretrain_clip", description="The tiny CLIP.")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                             # sums do not depend on the machine
    torch.manual_seed(0)
    rng, vit, text = Random(0), ViT(**SHAPE), TextTower(128, SHAPE["out"])
    untrained = probe(vit)
    scale = nn.Parameter(torch.tensor(math.log(14.0)))
    optimizer = torch.optim.AdamW([*vit.parameters(), *text.parameters(), scale], lr=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.05)

    def schedule(step: int) -> float:                    # 200 steps of warm-up times half a cosine
        return min(1, (step + 1) / 200) * (1 + math.cos(math.pi * step / args.steps)) / 2

    def loss_of(step: int) -> Tensor:
        pictures, ids = draw_batch(rng)
        return contrast(vit(pictures)[1], text(ids), ids, scale.exp().clamp(max=100))
    fit("tiny-clip", optimizer, args.steps, schedule, loss_of)
    card = {"made by": f"python -m world.pretrain_clip --steps {args.steps}",
            "pictures seen": 2 * PAIRS * args.steps, "linear probe": probe(vit),
            "linear probe, untrained": untrained,
            "parameters": sum(parameter.numel() for parameter in vit.parameters()),
            "cpu seconds": round(time.process_time())}
    center(vit)
    save_clip(vit, args.out, card)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
