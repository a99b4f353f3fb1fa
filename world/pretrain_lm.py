"""Where do the tiny language models come from?

From texts of the built-in world. They never see a picture; what they are asked about is described.
Half-way to seeing are *bags*: an object's phrase as one encoder vector, the scaled sum of its
words' embeddings, where a picture's tokens will stand. Still nothing but words, but all that a
method must learn later is to turn a patch of a picture into such a vector.

    python -m world.pretrain_lm bart        weights/tiny-bart: questions on described scenes
    python -m world.pretrain_lm t5          weights/tiny-t5: the same
    python -m world.pretrain_lm video       weights/tiny-bart-video: tiny-bart goes on with clips
    python -m pytest tests/test_pretrain.py
"""
import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import t5
from model import token_loss
from support.gate import program
from support.published_lm import BART_FIELDS, T5_FIELDS, load_lm, table
from support.tokenizer import byte_chars, load_tokenizer
from world import moving, scenes
from world.pretrain_clip import fit, save
from world.shapes import NEAR, NUMBERS, PLACE, PLACES, Scene, captions, describe, pick

WEIGHTS = Path(__file__).parent.parent / "weights"
RECIPES = {        # folder, dialect, steps, learning rate, positions, noise, pairs, clips to read
    "bart": ("tiny-bart", "bart", 12000, 1.5e-3, 130, 0.3, 0.0, 0),
    # T5's order embedding is noise, too. And it learns what two pictures have in common late, once
    # it can read one: pairs, a share of the second half, are about nothing else.
    "t5": ("tiny-t5", "t5", 12000, 1.5e-3, 130, 0.5, 0.5, 0),
    "video": ("tiny-bart-video", "bart", 9500, 1e-3, 602, 0.3, 0.0, 12000)}
BATCH = 64
WORD = re.compile(r" ?[a-z<>_]+| ?[0-9]+| ?[^a-z0-9\s]+")   # GPT-2's split rule on the world's text
MARKS = ("first", "second")                                 # nlvr: which of the two pictures
SHORT = ("vqa",) * 6 + ("gqa",) * 7 + ("nlvr",) * 5         # answers of a word or two
LONG = ("caption", "list")                                  # "list": name all that is there
CLIP_TASKS = ("tvqa",) * 3 + ("how2qa",) * 2 + ("tvc", "yc2c")
# To point at a choice is learnt in steps: at one that the text names, at one that a bag names, at
# the only one to be seen (an easy clip), at the right one.
STAGES = (        # until this share of the steps: share of "choice", what names it, share of easy
    (1 / 4, 0.8, "plain", 0.8), (1 / 2, 0.4, "bags", 0.8), (1, 0.1, "bags", 0.2))
MOMENTS = ("begins", "goes on", "ends")                     # of a clip's shot, frame by frame
SIZE_WORDS = {moving.NEAR: "large", moving.HALFWAY: "", moving.FAR: "small"}


# ---- the tokenisers ------------------------------------------------------------------------------
def word_counts(rng: Random, items: int = 4000, more: Iterable[str] = ()) -> Counter:
    """Every word that the world (and `more`) can say, with and without a space before it, and how
    often."""
    texts = [*more]
    for task in scenes.TASKS:
        for _ in range(items):
            item = scenes.example(task, rng, True)
            texts += [data.TASKS[task].prefix + item.text, item.answer]
            for scene in item.scenes:
                texts += [*captions(scene, rng), ", ".join(describe(scene))]
    counts = Counter(chain(*map(WORD.findall, texts)))
    for answer, near in NEAR.items():
        counts.update(" ".join((answer, *near)).split())
    counts.update([*MARKS, "list", "scene", "true", "false", *NUMBERS, *"0123456789"])
    for word in list(counts):
        counts.update((word.strip(), " " + word.strip()))
    return counts


def write_bpe(folder: Path, counts: Counter) -> None:
    """vocab.json and merges.txt (Sennrich et al. 2016): the most frequent pair is merged until
    every word is one token. Other text falls apart into bytes; nothing is unknown."""
    letters, words, merges = byte_chars(), {}, []
    for word in counts:                                     # every piece has its own two spaces
        words[word] = "".join(f" {letters[byte]} " for byte in word.encode())
    while any("  " in spelt for spelt in words.values()):
        pairs = Counter()
        for word, spelt in words.items():
            for pair in zip(spelt.split(), spelt.split()[1:]):
                pairs[pair] += counts[word]
        first, second = best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, spelt in words.items():
            words[word] = spelt.replace(f" {first}  {second} ", f" {first}{second} ")
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *map("".join, merges)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def write_unigram(folder: Path, counts: Counter) -> None:
    """tokenizer.json with a unigram model (Kudo 2018): a piece a word, its log-frequency; single
    letters far below, so that a word of the world is never cut."""
    pieces = Counter()
    for word, count in counts.items():
        bare = word.strip()
        pieces["\u2581" + bare if bare.isalnum() else bare] += count
    total = sum(counts.values())
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581", -12.0]]
    vocab += [[piece, math.log(count / total)] for piece, count in pieces.most_common()]
    vocab += [[char, -14.0] for char in map(chr, range(33, 127)) if char not in pieces]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
             "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **special} for i in range(3)],
        "pre_tokenizer": space, "decoder": space,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}},
        ensure_ascii=False))


# ---- what is read --------------------------------------------------------------------------------
class Clips:
    """Examples of the video tasks about clips that nobody drew."""

    def __init__(self, count: int, seed: int):
        with TemporaryDirectory() as folder:
            moving.build(Path(folder) / "video", count, seed, drawn=False)
            self.shots = json.loads((Path(folder) / "video/stories.json").read_text())
            # As training on the built-in clips shows them (config.py, subtitles).
            self.examples = {(task, split): data.load_examples(task, split, folder, "span")
                             for task, split in product(moving.TASKS, ("train", "val"))}

    def texts(self) -> list[str]:
        """All that its tasks say."""
        texts = [" ".join(MOMENTS)] * 1000
        for task in moving.TASKS:
            for ex in self.examples[task, "train"][:4000]:
                texts += [f"{ex.context} {ex.text} {data.TASKS[task].prefix}", *ex.targets]
        return texts


def offered(text: str, choice: str) -> str:
    """What a question says behind the name of a choice."""
    return re.search(f"{choice}: (.*?)\\.", text)[1]


class Reader:
    """Items of the world as ids. An item: (encoder ids, bags of word ids or None, target ids)."""

    def __init__(self, folder: Path, clips: Clips | None = None):
        self.tokenizer, self.clips = load_tokenizer(folder), clips
        self.easy = 0.0                                     # share of easy examples of clips
        # What a text was cut into is remembered: do not change the lists.
        self.ids = partial(data.token_ids, self.tokenizer, max_length=None)

    def phrase(self, text: str) -> list[int]:
        """Ids of words as they stand in the middle of a text, without special tokens."""
        frame = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return [i for i in self.ids(" " + text) if i not in frame]

    def bags(self, shown: tuple[Scene, ...], rng: Random, dense: bool) -> list[list[int]]:
        """One to three bags an object, and some for empty places, which know only where they are;
        dense: four for every place, like the tokens of a picture."""
        bags = []
        for number, scene in enumerate(shown):
            mark = self.phrase(MARKS[number]) if len(shown) > 1 else []
            for phrase in describe(scene):
                copies = 4 if dense else 1 + int(rng.random() * 2.5)
                bags += [self.phrase(phrase) + mark] * copies
            taken = {obj[PLACE] for obj in scene}
            free = [place for place in PLACES if place not in taken]
            places = free * 4 if dense else rng.sample(free, int(rng.random() * 4))
            bags += [self.phrase(place) + mark for place in places]
        rng.shuffle(bags)
        return bags

    def described(self, rng: Random, task: str, shown: tuple[Scene, ...], text: str) -> list[int]:
        """A question with its scenes in words: "vqa: is there a star? scene: left red star"."""
        text += " scene:"
        for number, scene in enumerate(shown):
            phrases = describe(scene)
            if task == "list" or rng.random() < 0.5:
                rng.shuffle(phrases)
            if len(shown) > 1:
                text += f" {MARKS[number]}:"
            text += "".join(f" {phrase}," for phrase in phrases)
        ids = self.tokenizer.encode(text.removesuffix(","))
        if task == "list":                                  # BART's and T5's own task: denoising
            for i in range(5, len(ids) - 1):
                if rng.random() < 0.1:
                    ids[i] = self.tokenizer.ids.get("<mask>", self.tokenizer.unk_id)
        return ids

    def clip(self, rng: Random, task: str, split: str) -> tuple[list, list, list]:
        """A bag a frame, which knows its moment and what it shows. In easy training examples the
        right answer is all that there is to see."""
        ex = pick(rng, self.clips.examples[task, split])
        answer, right = pick(rng, tuple(ex.targets)), None
        if f"{answer}: " in ex.text and split == "train" and rng.random() < self.easy:
            right = offered(ex.text, answer)
        bags = []
        for order, (kind, color, motion) in zip(moving.ORDER, self.clips.shots[ex.images[0]]):
            if right in (None, kind, color, motion):
                for moment, radius in zip(MOMENTS, moving.MOTIONS[motion]):
                    size = SIZE_WORDS[radius]
                    bags.append(self.phrase(f"{order} {moment} {size} {color} {kind}"))
        return data.text_ids(ex, self.tokenizer), bags, self.ids(answer)

    def choice(self, rng: Random, task: str, how: str) -> tuple[list, list | None, list]:
        """Points at the choice that a bag or the text names: "tom star a0: cross. a1: star. tvqa:".
        (Some words before it: were it always the first, its place would be all that is learnt.)"""
        ex = pick(rng, self.clips.examples[task, "train"])
        (answer,) = ex.targets
        named, words = offered(ex.text, answer), ex.context.split()
        if how == "bags":
            return data.text_ids(ex, self.tokenizer), [self.phrase(named)], self.ids(answer)
        before = " ".join(words[:int(rng.random() * (len(words) + 1))])
        text = f"{before} {named} {ex.text[ex.text.index('a0:'):]} {task}:"
        return self.ids(text), None, self.ids(answer)

    def item(self, rng: Random, task: str, how: str, most: int) -> tuple[list, list | None, list]:
        """how: "plain" (all is text), "bags", "dense", or a split of the clips; most: objects."""
        if task in moving.TASKS:
            return self.clip(rng, task, how)
        if task == "choice":
            return self.choice(rng, pick(rng, ("tvqa", "how2qa")), how)
        if task == "list":
            shown = scenes.example("caption", rng, True, most).scenes
            text, answer = "list: ", ", ".join(describe(shown[0]))
        else:
            shown, text, answer, _ = scenes.example(task, rng, True, most)
            text = data.TASKS[task].prefix + text
        if how == "plain":
            return self.described(rng, task, shown, text), None, self.ids(answer)
        return self.ids(text), self.bags(shown, rng, how == "dense"), self.ids(answer)

    def batch(self, rng: Random, tasks: tuple[str, ...], how: str, size: int,
              most: int | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids (B, L), bags (B, M, words) padded with -1 or None, labels (B, T). most: objects of a
        scene, or for half of the scenes fewer."""
        items = []
        for _ in range(size):
            task, objects = pick(rng, tasks), most or 5
            if most and rng.random() < 0.5:
                objects = 1 + int(rng.random() * most)
            items.append(self.item(rng, task, how, objects))
        texts, bags, answers = zip(*items)
        padded = None
        if how != "plain":
            flat = data.pad([*chain(*bags)], -1)
            padded = pad_sequence(flat.split([len(each) for each in bags]), True, -1)
        return data.pad(texts, self.tokenizer.pad_id), padded, data.pad(answers, -100)


# ---- the model -----------------------------------------------------------------------------------
def answer_logits(model: t5.EncoderDecoder, ids: Tensor, bags: Tensor | None, labels: Tensor,
                  noise: float = 0.0) -> Tensor:
    """Bags (B, M, words) become visual tokens (B, M, D)."""
    visual = seen = None
    if bags is not None:
        words = model.shared(bags.clamp(min=0)) * (bags >= 0)[..., None]     # B, M, words, D
        visual, seen = words.sum(2), (bags >= 0).any(-1)                     # B, M, D and B, M
        visual = F.layer_norm(visual, visual.shape[-1:])
    if visual is not None and model.training:      # nobody knows how loud a method will write
        visual = visual * (0.6 + torch.rand(len(visual), 1, 1))
        visual = visual + noise * torch.rand(len(visual), 1, 1) * torch.randn_like(visual)
    memory, mask = model.encode(ids, visual, seen)
    return model.logits(model.decode(model.shift_right(labels), mask, model.start_cache(memory)))


@torch.no_grad()
def read_well(model: t5.EncoderDecoder, reader: Reader, count: int) -> dict[str, float]:
    """Percent of described scenes and clips answered right ("list", captions: of tokens), on
    held-out pairs too."""
    model.eval()
    rng, found = Random(123456), {}
    asked = [*product(("plain", "bags", "dense"), ("vqa", "gqa", "nlvr", "list"))]
    if reader.clips:
        asked += [("bags", "choice"), *product(("val",), moving.TASKS)]
    for how, task in asked:
        ids, bags, labels = reader.batch(rng, (task,), how, count)
        right = answer_logits(model, ids, bags, labels).argmax(-1) == labels
        real = labels != -100
        right = right[real] if task in ("list", "tvc", "yc2c") else (right | ~real).all(1)
        found[f"{how}/{task}".replace("val/", "")] = round(100 * right.float().mean().item(), 1)
    model.train()
    return found


def lm_config(kind: str, vocab: int, positions: int = 130) -> t5.Config:
    """Small, and without BART's ban on repeated 3-grams: captions here repeat "at the top"."""
    size = {"vocab": vocab, "layers": (3, 2), "d_kv": 32, "dropout": 0.0, "no_repeat_ngram": 0}
    if kind == "bart":
        return replace(t5.bart(128, 4, 512, 3), positions=positions, **size)
    return replace(t5.t5(128, 4, 512, 3), **size)


def go_on(model: t5.EncoderDecoder, tokenizer, folder: Path) -> None:
    """Begins with an older model, which knows some of the words and of the positions."""
    before, known = dict(load_lm(folder).named_parameters()), load_tokenizer(folder).ids
    for name, parameter in model.named_parameters():
        if name == "shared.weight":
            for token in tokenizer.ids.keys() & known.keys():
                parameter[tokenizer.ids[token]] = before[name][known[token]]
        else:                                               # the tables of positions are longer
            parameter[:len(before[name])] = before[name]


# ---- training ------------------------------------------------------------------------------------
def make_optimizer(model: t5.EncoderDecoder, lr: float) -> torch.optim.AdamW:
    """T5 folds the attention's scale into q: a step of Adam moves its scores sqrt(d_kv) times as
    far as BART's, and they never learn what to look for. So q's learning rate is folded, too."""
    groups = []
    for name, parameter in model.named_parameters():
        folded = model.config.is_t5 and name.endswith(".q.weight")
        groups.append({"params": [parameter], "weight_decay": 0.01 if parameter.dim() > 1 else 0.0,
                       "lr": lr * model.config.d_kv ** -0.5 if folded else lr})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def draw_batch(reader: Reader, rng: Random, done: float, pairs: float):
    """A batch for training; done: the share of the steps that are done."""
    most = min(5, 2 + int(4 * done / 0.3))                  # first scenes of one or two objects
    how = "bags"
    if rng.random() < 0.3:
        how = "plain"
    elif rng.random() < 0.15:
        how = "dense"
    tasks = LONG if rng.random() < 0.2 else SHORT
    if pairs and done > 1 / 2 and rng.random() < pairs:
        tasks, how = ("nlvr",), "bags"
    if reader.clips and rng.random() < 0.7:
        tasks, how = CLIP_TASKS, "train"
        _, choices, named, reader.easy = next(stage for stage in STAGES if done < stage[0])
        if rng.random() < choices:
            tasks, how = ("choice",), named
    return reader.batch(rng, tasks, how, BATCH // 2 if how == "dense" else BATCH, most)


def save_lm(model: t5.EncoderDecoder, kind: str, folder: Path, card: dict) -> None:
    c, fields = model.config, {"model_type": kind, "is_encoder_decoder": True}
    for theirs, (ours, _) in (BART_FIELDS if kind == "bart" else T5_FIELDS).items():
        fields[theirs.removesuffix("?")] = getattr(c, ours)
    if kind == "bart":
        fields |= {"encoder_layers": c.layers[0], "decoder_layers": c.layers[1],
                   "decoder_attention_heads": c.heads, "decoder_ffn_dim": c.ffn,
                   "max_position_embeddings": c.positions - 2}
    else:
        fields |= {"num_layers": c.layers[0], "num_decoder_layers": c.layers[1],
                   "feed_forward_proj": "relu", "tie_word_embeddings": True}
    save(model, table(c), folder, config=fields, card=card)


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m world.pretrain_lm", description="Tiny BART and T5.")
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="folder to write to")
    args = parser.parse_args(argv)
    name, kind, steps, lr, positions, noise, pairs, clips = RECIPES[args.model]
    steps, folder = args.steps or steps, args.out or WEIGHTS / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)                                # sums do not depend on the machine
    torch.manual_seed(0)
    rng = Random(0)
    clips = Clips(clips, seed=1) if clips else None         # seed 0 is the built-in data set's
    write_tokenizer = {"bart": write_bpe, "t5": write_unigram}[kind]
    write_tokenizer(folder, word_counts(Random(0), more=clips.texts() if clips else ()))
    reader = Reader(folder, clips)
    config = lm_config(kind, len(reader.tokenizer), positions)
    model = t5.EncoderDecoder(config).init_weights()
    if clips:
        with torch.no_grad():
            go_on(model, reader.tokenizer, WEIGHTS / "tiny-bart")
    warm = min(1000, 1 + steps // 10)

    def schedule(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    def loss_of(step: int) -> Tensor:
        ids, bags, labels = draw_batch(reader, rng, step / steps, pairs)
        loss = token_loss(answer_logits(model, ids, bags, labels, noise), labels)          # B, T
        return (loss.sum(1) / (labels != -100).sum(1) ** 0.7).mean()
    fit(name, make_optimizer(model, lr), steps, schedule, loss_of)
    save_lm(model, kind, folder, {
        "made by": f"python -m world.pretrain_lm {args.model} --steps {steps}",
        "examples seen": f"{steps} batches of {BATCH} (dense ones half)",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu seconds": round(time.process_time()),
        "described scenes, % right": read_well(model, reader, 2000)})


if __name__ == "__main__":
    main()
