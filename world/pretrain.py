"""Where do the tiny built-in weights come from?

From pictures and texts of the built-in world (world.py), the way their big brothers were made:

    python -m world.pretrain clip   weights/tiny-clip: pictures with captions, contrastive
    python -m world.pretrain bart   weights/tiny-bart: text alone, questions on described scenes
    python -m world.pretrain t5   weights/tiny-t5: the same
    python -m world.pretrain video   weights/tiny-bart-video: tiny-bart goes on with described clips

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
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import data
from world import moving
import t5
from support import tokenizer
from support import weights
from support.published_clip import HUGGING_FACE
from support.published_lm import load_lm, table
from world import scenes as world
from clip_encoder import MEAN, STD, ViT
from model import token_loss
from world.scenes import COLOR, FIELDS, HELD_OUT, KIND, PLACE, PLACES, SIZE

WEIGHTS = Path(__file__).parent.parent / "weights"

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


@torch.no_grad()
def center(vit: ViT, stories: int = 400) -> None:
    """Moves the mean of the vectors of clips' frames to zero, by the bias of the last norm.

    All of CLIP's vectors point much the same way (the cone of arXiv 2203.02053). Where one vector
    is all that a frame gives, a visual embedding that begins at random sees little but this common
    part, and some runs never find out that frames say anything.
    """
    r, side = Random("center"), SHAPE["size"]
    frames = [frame for _ in range(stories) for frame in moving.render(moving.story(r, False), r)]
    x = pixels(torch.from_numpy(np.stack([np.asarray(frame.resize((side, side),
               Image.Resampling.BICUBIC)) for frame in frames])))
    mean = torch.cat([vit(part)[1] for part in x.split(250)]).mean(0)
    vit.norm_post.bias -= torch.linalg.solve(vit.project.weight, mean)


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
    mean_loss = None
    batches = DataLoader(Batches(args.pairs, args.seed), batch_size=None, num_workers=1,
                         prefetch_factor=8)
    bar = tqdm(zip(range(args.steps), batches), "tiny-clip", args.steps)
    for step, (pictures, ids) in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (
                1 + math.cos(math.pi * step / args.steps)) / 2
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
    card = {"made by": f"python -m world.pretrain clip --steps {args.steps}", "steps": args.steps,
            "pictures seen": 2 * args.pairs * args.steps, "loss": round(mean_loss, 3),
            "retrieval of 512": round(retrieval(vit, text), 3), "linear probe": probe(vit),
            "linear probe, untrained": untrained,
            "parameters": sum(p.numel() for p in vit.parameters())}
    center(vit)
    save_clip(vit, args.out or WEIGHTS / "tiny-clip", card)
    print(json.dumps(card, indent=1))


# ---- the tokenisers ------------------------------------------------------------------------------

WORD = re.compile(r" ?[a-z<>_]+| ?[0-9]+| ?[^a-z0-9\s]+")   # GPT-2's split rule on the world's text
MARKS = ("first", "second")                                 # nlvr: which of the two pictures


def word_counts(r: Random, items: int = 4000, more: Iterable[str] = ()) -> Counter:
    """Every word that the world (and `more`) can say, with and without a space before it, and how
    often."""
    counts = Counter(word for text in more for word in WORD.findall(text))
    for task in world.TASKS:
        for _ in range(items):
            item = world.example(task, r, True)
            texts = [data.TASKS[task].prefix + item.text, item.answer]
            for s in item.scenes:
                texts += [*world.captions(s, r), ", ".join(world.describe(s))]
            for text in texts:
                counts.update(WORD.findall(text))
    said = [word for answer, near in world.NEAR.items() for a in (answer, *near)
            for word in a.split()]
    counts.update(said + [*MARKS, "list", "scene", "true", "false", *world.NUMBERS, *"0123456789"])
    for word in list(counts):
        counts.update((word.strip(), " " + word.strip()))
    return counts


def write_bpe(folder: Path, counts: Counter) -> None:
    """vocab.json and merges.txt (Sennrich et al. 2016): the most frequent pair is merged until
    every word is one token. Other text falls apart into bytes; nothing is unknown."""
    letters = tokenizer.byte_chars()
    words = {word: [letters[b] for b in word.encode()] for word in counts}
    merges = []
    while any(len(pieces) > 1 for pieces in words.values()):
        pairs = Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in words.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i:i + 2] = ["".join(best)]
                i += 1
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *map("".join, merges)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def write_unigram(folder: Path, counts: Counter) -> None:
    """tokenizer.json with a unigram model (Kudo 2018): a piece a word, its log-frequency; single
    letters far below, so that a word of the world is never cut."""
    pieces = Counter()
    for word, n in counts.items():
        bare = word.strip()
        pieces["\u2581" + bare if bare.isalnum() else bare] += n
    total = sum(counts.values())
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -12.0],
             *([piece, math.log(n / total)] for piece, n in pieces.most_common())]
    vocab += [[c, -14.0] for c in map(chr, range(33, 127)) if c not in pieces]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
             "split": True}
    ends = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **special} for i in range(3)],
        "pre_tokenizer": space, "decoder": space,
        "post_processor": {
            "type": "TemplateProcessing", "single": ends,
            "pair": ends + [{"Sequence": {"id": "B", "type_id": 0}}, ends[1]],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}},
        ensure_ascii=False))


# ---- the language model --------------------------------------------------------------------------
# It reads text only: questions about scenes that are described. Half-way to seeing are *bags*: an
# object's phrase as one encoder vector, the scaled sum of its words' embeddings, unordered and
# without a position, put where a picture's tokens will stand. Still nothing but words, but what a
# method must learn later is only to turn a patch of a picture into such a vector.

SHORT = ("vqa",) * 6 + ("gqa",) * 7 + ("nlvr",) * 5          # answers of a word or two
LONG = ("caption", "list")                                   # "list": name all that is there
PLAIN_SHARE, DENSE_SHARE, LONG_SHARE = 0.15, 0.15, 0.2
CLIP_SHARE, CLIP_TASKS = 0.7, ("tvqa",) * 3 + ("how2qa",) * 2 + ("tvc", "yc2c")
EASY, CHOICE_SHARE = (0.8, 0.2), (0.3, 0.15)                 # in the first third of steps, later
SHORT_TEXT, LONG_TEXT = 130, 602                             # positions, two more than tokens
MOMENTS = ("begins", "goes on", "ends")                      # of a clip's shot, frame by frame
SIZE_WORDS = {moving.NEAR: "large", moving.HALFWAY: "", moving.FAR: "small"}


class Clips:
    """Examples of the video tasks about clips that nobody drew."""

    def __init__(self, count: int, seed: int):
        with TemporaryDirectory() as folder:
            moving.build(Path(folder) / "video", count, seed + 1, draw=False)    # 0: the built-in
            self.shots = json.loads((Path(folder) / "video" / "stories.json").read_text())
            self.examples = {split: {task: data.load(task, split, folder) for task in moving.TASKS}
                             for split in ("train", "val")}

    def texts(self) -> list[str]:
        """All that its tasks say."""
        some = [ex for found in self.examples["train"].values() for ex in found[:4000]]
        said = [f"{ex.context} {ex.text} {data.TASKS[ex.task].prefix}" for ex in some]
        return said + [answer for ex in some for answer in ex.targets] + [" ".join(MOMENTS)] * 1000


def offered(text: str, choice: str) -> str:
    """What a question says behind the name of a choice."""
    return re.search(f"{choice}: (.*?) \\.", text)[1]


class Reader:
    """World items as ids."""

    def __init__(self, folder: Path, clips: Clips | None = None):
        self.tok, self.clips, self.easy = tokenizer.load_tokenizer(folder), clips, 0.0
        self.mask = self.tok.ids.get("<mask>", self.tok.unk_id)

    @lru_cache(maxsize=1 << 16)                              # noqa: B019 (one reader a run)
    def ids(self, text: str) -> list[int]:
        return self.tok.encode(text)

    @lru_cache(maxsize=1 << 12)                              # noqa: B019
    def phrase(self, text: str) -> list[int]:
        """Ids of words as they stand in the middle of a text, without special tokens."""
        return [i for i in self.ids(" " + text) if i not in (self.tok.bos_id, self.tok.eos_id)]

    def bags(self, scenes, r: Random, dense: bool) -> list[list[int]]:
        """Bags of word ids: one to three an object, and some for empty places, which know only
        where they are; dense: four for every place, like the tokens of a picture."""
        out = []
        for n, s in enumerate(scenes):
            mark = self.phrase(MARKS[n]) if len(scenes) > 1 else []
            for phrase in world.describe(s):
                copies = 4 if dense else 1 + int(r.random() * 2.5)
                out += [self.phrase(phrase) + mark] * copies
            taken = {o[world.PLACE] for o in s}
            free = [p for p in world.PLACES if p not in taken]
            places = free * 4 if dense else r.sample(free, int(r.random() * 4))
            out += [self.phrase(p) + mark for p in places]
        r.shuffle(out)
        return out

    def clip(self, r: Random, task: str, split: str) -> tuple[list, list, list]:
        """(encoder ids, a bag a frame, target ids): a frame knows its moment and what it shows. In
        easy training examples the right answer is all that there is to see."""
        ex = world.pick(r, self.clips.examples[split][task])
        answer, shots = world.pick(r, tuple(ex.targets)), self.clips.shots[ex.images[0]]
        easy = answer in ("a0", "a1", "a2", "a3", "a4") and split == "train" and \
            r.random() < self.easy
        right = offered(ex.text, answer) if easy else None
        bags = [self.phrase(f"{order} {moment} {size} {color} {kind}")
                for order, (kind, color, motion) in zip(moving.ORDER, shots)
                if right in (None, kind, color, motion)
                for moment, size in zip(MOMENTS, map(SIZE_WORDS.get, moving.MOTIONS[motion]))]
        return data.text_ids(ex, self.tok), bags, self.ids(answer)

    def choice(self, r: Random) -> tuple[list, None, list]:
        """Which of the choices is it? Text alone: "star a0: cross . a1: star . tvqa:"."""
        task = world.pick(r, ("tvqa", "how2qa"))
        ex = world.pick(r, self.clips.examples["train"][task])
        answer, = ex.targets
        text = f"{offered(ex.text, answer)} {ex.text[ex.text.index('a0:'):]} {task}:"
        return self.ids(text), None, self.ids(answer)

    def item(self, r: Random, task: str, how: str, most: int) -> tuple[list, list | None, list]:
        """(encoder ids, bags or None, target ids); how: "plain", "bags", "dense", or a split of
        the clips."""
        if task in moving.TASKS:
            return self.clip(r, task, how)
        if task == "choice":
            return self.choice(r)
        if task == "list":
            scenes = world.example("caption", r, True, most).scenes
            text, answer = "list: ", ", ".join(world.describe(scenes[0]))
        else:
            scenes, text, answer, _ = world.example(task, r, True, most)
            text = data.TASKS[task].prefix + text
        if how != "plain":
            return self.ids(text), self.bags(scenes, r, how == "dense"), self.ids(answer)
        text += " scene:"
        for n, s in enumerate(scenes):
            phrases = world.describe(s)
            if task == "list" or r.random() < 0.5:
                r.shuffle(phrases)
            text += f" {MARKS[n]}:" * (len(scenes) > 1) + "".join(f" {p}," for p in phrases)
        ids = self.tok.encode(text.removesuffix(","))
        if task == "list":                                   # BART's and T5's own task: denoising
            ids = [self.mask if 4 < i < len(ids) - 1 and r.random() < 0.1 else t
                   for i, t in enumerate(ids)]
        return ids, None, self.ids(answer)

    def batch(self, r: Random, tasks, how: str, most, size: int):
        """ids (B, L), bags (B, M, words) padded with -1 or None, labels (B, T)."""
        items = [self.item(r, world.pick(r, tasks), how, most()) for _ in range(size)]
        bags = None
        if how != "plain":
            flat = data.pad([bag for _, bags, _ in items for bag in bags], -1)
            counts = [len(bags) for _, bags, _ in items]
            bags = torch.nn.utils.rnn.pad_sequence(flat.split(counts), True, -1)
        return (data.pad([a for a, _, _ in items], self.tok.pad_id), bags,
                data.pad([c for _, _, c in items], -100))


def see(model, bags: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Bags (B, M, words) -> visual tokens (B, M, D) and their mask. The scale and the noise vary,
    as nobody knows how a method will write."""
    v = (model.shared(bags.clamp(min=0)) * (bags >= 0)[..., None]).sum(2)
    v = F.layer_norm(v, v.shape[-1:])
    if model.training:
        v = v * (0.6 + torch.rand(len(v), 1, 1))
        v = v + noise * torch.rand(len(v), 1, 1) * torch.randn_like(v)
    return v, (bags >= 0).any(-1)


def answer_logits(model, ids, bags, labels, noise: float = 0.0) -> Tensor:
    visual, seen = (None, None) if bags is None else see(model, bags, noise)
    memory, mask = model.encode(ids, visual, seen)
    return model.logits(model.decode(model.shift_right(labels), mask, model.start_cache(memory)))


@torch.no_grad()
def read_well(model, reader: Reader, count: int) -> dict[str, float]:
    """Percent of described scenes and clips answered right ("list", captions: of tokens), on
    held-out pairs too."""
    model.eval()
    r, found = Random(123456), {}
    asked = [(how, task) for how in ("plain", "bags", "dense")
             for task in ("vqa", "gqa", "nlvr", "list")]
    asked += [("plain", "choice"), *(("val", task) for task in moving.TASKS)] * bool(reader.clips)
    for how, task in asked:
        ids, bags, labels = reader.batch(r, (task,), how, lambda: 5, count)
        right = answer_logits(model, ids, bags, labels).argmax(-1) == labels
        real = labels != -100
        right = right[real] if task in ("list", "tvc", "yc2c") else (right | ~real).all(1)
        found[f"{how}/{task}".replace("val/", "")] = round(100 * right.float().mean().item(), 1)
    model.train()
    return found


def lm_config(kind: str, vocab: int, positions: int = SHORT_TEXT) -> t5.Config:
    """Small, and without BART's ban on repeated 3-grams: captions here repeat "at the top"."""
    size = {"vocab": vocab, "layers": (3, 2), "d_kv": 32, "dropout": 0.0, "no_repeat_ngram": 0}
    return replace(t5.bart(128, 4, 512, 3), **size, positions=positions) if kind == "bart" else \
        replace(t5.t5(128, 4, 256, 3, v11=True), **size)


@torch.no_grad()
def go_on(model, tok, folder: Path) -> None:
    """Begins with an older model, which knows some of the words and of the positions."""
    before, known = dict(load_lm(folder).named_parameters()), tokenizer.load_tokenizer(folder).ids
    rows = [(i, known[token]) for token, i in tok.ids.items() if token in known]
    new, old = map(torch.tensor, zip(*rows))
    for name, p in model.named_parameters():
        if p.shape == before[name].shape:
            p.copy_(before[name])
        elif name == "shared.weight":
            p[new] = before[name][old]
        else:                                                    # the tables of positions
            p[:len(before[name])] = before[name]


def language_model(args) -> None:
    """Trains weights/tiny-bart, tiny-t5 or tiny-bart-video, which begins as tiny-bart."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    kind, folder, r = args.kind, args.out or WEIGHTS / args.name, Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    clips = Clips(args.clips, args.seed) if args.begin else None
    counts = word_counts(Random(0), more=clips.texts() if clips else ())
    (write_bpe if kind == "bart" else write_unigram)(folder, counts)
    reader = Reader(folder, clips)
    c = lm_config(kind, len(reader.tok), LONG_TEXT if clips else SHORT_TEXT)
    model = t5.EncoderDecoder(c).init_weights()
    if args.begin:
        go_on(model, reader.tok, args.begin)
    if kind == "t5":
        with torch.no_grad():       # of std 1, embeddings learn slowly; the head, though untied,
            model.head.weight.copy_(model.shared.weight * c.d ** -0.5)      # starts as their copy
            model.shared.weight.mul_(0.3)
    noise = 0.3 if kind == "bart" else 0.5     # T5's order embedding is noise of its own
    # T5 folds the attention's scale into q: a step of Adam moves its scores sqrt(d_kv) times as far
    # as BART's, and they never learn what to look for. So q's learning rate is folded, too.
    slow = [p for n, p in model.named_parameters() if c.is_t5 and n.endswith(".q.weight")]
    rest = [p for p in model.parameters() if not any(p is q for q in slow)]
    groups = [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01, "share": 1.0},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "share": 1.0},
              {"params": slow, "weight_decay": 0.01, "share": c.d_kv ** -0.5}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    bar = tqdm(range(args.steps), args.name)
    for step in bar:
        warm = min(1000, 1 + args.steps // 10)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["share"] * min(
                (step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))
        cap = min(5, 2 + int(4 * step / (0.3 * args.steps)))   # first scenes of one or two objects
        how = ("plain" if r.random() < PLAIN_SHARE else
               "dense" if r.random() < DENSE_SHARE else "bags")
        tasks = LONG if r.random() < LONG_SHARE else SHORT
        if reader.clips and r.random() < CLIP_SHARE:
            tasks, how = CLIP_TASKS, "train"
            late = step > args.steps / 3
            reader.easy = EASY[late]
            if r.random() < CHOICE_SHARE[late]:
                tasks, how = ("choice",), "plain"
        ids, bags, labels = reader.batch(
            r, tasks, how, lambda cap=cap: 1 + int(r.random() * cap) if r.random() < 0.5 else cap,
            args.batch // 2 if how == "dense" else args.batch)
        loss = token_loss(answer_logits(model, ids, bags, labels, noise), labels)
        loss = (loss.sum(1) / (labels != -100).sum(1) ** 0.7).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            tqdm.write(f"{step + 1} {loss.item():.3f} {read_well(model, reader, 128)}")
    save_lm(model, kind, folder, {
        "made by": f"python -m world.pretrain {args.command} --steps {args.steps}",
        "examples seen": f"{args.steps} batches of {args.batch} (dense ones half)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "described scenes, % right": read_well(model, reader, 2000)})


def save_lm(model, kind: str, folder: Path, card: dict) -> None:
    """The published layout: config.json, model.safetensors in fp16, the tokenizer's files."""
    c = model.config
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bart", "d_model": c.d, "vocab_size": c.vocab, "dropout": c.dropout,
        "encoder_layers": c.layers[0], "decoder_layers": c.layers[1],
        "encoder_attention_heads": c.heads, "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.ffn, "decoder_ffn_dim": c.ffn, "activation_function": c.activation,
        "max_position_embeddings": c.positions - 2, "pad_token_id": c.pad, "bos_token_id": c.bos,
        "eos_token_id": c.eos, "decoder_start_token_id": c.start, "is_encoder_decoder": True,
        "no_repeat_ngram_size": c.no_repeat_ngram, "early_stopping": c.early_stopping,
    } if kind == "bart" else {
        "model_type": "t5", "d_model": c.d, "vocab_size": c.vocab, "dropout_rate": c.dropout,
        "num_layers": c.layers[0], "num_decoder_layers": c.layers[1], "num_heads": c.heads,
        "d_kv": c.d_kv, "d_ff": c.ffn, "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance, "layer_norm_epsilon": c.eps,
        "tie_word_embeddings": False, "pad_token_id": c.pad, "eos_token_id": c.eos,
        "decoder_start_token_id": c.start, "is_encoder_decoder": True}, indent=1))
    tensors = weights.published(model, table(c))
    weights.write(folder / "model.safetensors", {n: t.half() for n, t in tensors.items()})
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny built-in weights.")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("clip", help="the image tower, weights/tiny-clip")
    command.add_argument("--steps", type=int, default=6500)
    command.add_argument("--pairs", type=int, default=32, help="scenes a batch; each has a twin")
    command.add_argument("--lr", type=float, default=1.5e-3)
    command.set_defaults(run=clip)
    for name, kind, begin, steps, lr in (
            ("bart", "bart", None, 12000, 1.5e-3), ("t5", "t5", None, 6000, 1.5e-3),
            ("video", "bart", WEIGHTS / "tiny-bart", 9500, 1e-3)):
        made = "tiny-bart-video" if begin else f"tiny-{kind}"
        command = commands.add_parser(name, help=f"a language model, weights/{made}")
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--batch", type=int, default=64)
        command.add_argument("--lr", type=float, default=lr)
        if begin:
            command.add_argument("--clips", type=int, default=12000, help="clips to read about")
        command.set_defaults(run=language_model, kind=kind, begin=begin, name=made)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", type=Path, help="folder to write to")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; it must be at least 1")
    args.run(args)


if __name__ == "__main__":
    main()
