"""How fast is it, and how much memory does it take?

    python -m tools.bench                            # BART-base on one thread: every work
    python -m tools.bench --works step,beams --turns 9 --out out/bench      # .md and .json, too
    python -m tools.bench --device cuda --precision bf16 --batch 500
    python -m pytest tests/test_bench.py

Against what a user would pick instead, LoRA of transformers with the PEFT library (where they are
installed), and against the floor: the matrix products of a step alone. Contestants are processes,
so that none pays for another's imports and memory. They take turns, A B C A B C ...: what slows the
machine down for a while hits all. The first turn warms up; of the others the median is what one
sees, the minimum what the work takes, for noise only adds. With one CPU thread seconds are CPU
time, which a neighbour cannot take. Texts differ in length, so that both sides need their masks:
the peer drops a mask of ones. (0.2 s of its start-up are this file's imports.)

Axes: B batch, S = L + N text and visual tokens, T target tokens, F feature width, V vocabulary.
"""
import json
import random
import resource
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import config as configs
import data
import methods
import t5
import train
from model import VisualEmbedding, VLModel, vocabulary
from support import features, published_lm, weights
from support.gate import program, reading, replace_file
from tools.compare import machine
from world.pretrain_lm import save_lm

L, N, T, F = 20, 36, 6, 2048           # the longest text, visual tokens, the longest target, width
WORDS, PAD, EOS = 5, 1, 2              # BART's special tokens stand before its words
PROCESS = partial(ProcessPoolExecutor, 1, get_context("spawn"))
PEERS = [name for name in ("transformers", "peft") if find_spec(name)]

# Who is timed at a training step or at decoding with so many beams. natural: the lengths of texts
# and answers are as they come. fresh: each turn is a new process, timed from its start.
PAIR = "ours lora", "peer lora"        # ratios are to the first one
ALL = *PAIR, "ours adapter", "ours vlpet-large", "ours full", "floor", "features"
WORKS = {
    "step": (ALL, {}), "step-natural": (PAIR, {"natural": True}),
    "greedy": (PAIR, {"beams": 1}), "greedy-natural": (PAIR, {"beams": 1, "natural": True}),
    "beams": (PAIR, {"beams": 5}), "beams-natural": (PAIR, {"beams": 5, "natural": True}),
    "start-up": (PAIR, {"fresh": True})}
DEFAULTS = {"natural": False, "beams": 0, "fresh": False}
HEAD = """| work | contestant | median s | to ours | min s | to ours | peak MiB | to ours |
|---|---|---|---|---|---|---|---|"""


def make_batch(turn: int, B: int, natural: bool) -> data.Batch:
    """Random words and features. Texts have 8 to 20 tokens, mostly 11, as VQA's questions with task
    name, start and end. They meet as in training and are padded to the longest there, or to L."""
    generator, lengths = torch.Generator().manual_seed(turn), random.Random(0)
    asked = [data.Example("vqa", i, "x" * round(lengths.triangular(8, L, 11)), (), {})
             for i in range(128 * B)]
    _, chosen = list(data.batches({"vqa": asked}, B, epoch=0, seed=0))[turn]
    ids = torch.randint(WORDS, 600, (B, L), generator=generator)
    labels = torch.randint(WORDS, 600, (B, T), generator=generator)
    for row, i in enumerate(chosen):
        ids[row, len(asked[i].text):] = PAD
        labels[row, T - row % 4:] = -100                 # targets of 3 to 6 tokens
    if natural:
        ids = ids[:, (ids != PAD).any(0)]
    feats, place = torch.randn(B, N, F, generator=generator), torch.arange(N).expand(B, N)
    return data.Batch(
        ("vqa",) * B, ids, feats, data.grid_boxes(6, 6).expand(B, N, 4), torch.zeros_like(place),
        place, None, labels, data.loss_weights(["examples"] * B, torch.ones(B), labels))


def end(ids: Tensor, scores: Tensor, B: int, natural: bool) -> Tensor:
    """Scores (rows, V) with which answers have 20 tokens or, natural, 8 to 14: random weights end
    nowhere. An item's first word is its number, so that it is known wherever its rows go."""
    if ids.size(1) == 1:
        item = torch.arange(len(ids), device=ids.device) * B // len(ids)     # beams side by side
        return scores.scatter(1, WORDS + item[:, None], 100.0)
    last = 7 + (ids[:, 1] - WORDS) * 5 % 7 if natural else torch.full_like(ids[:, 1], L)
    scores[:, EOS] = torch.where(ids.size(1) >= last, 100.0, -1e4).to(scores.dtype)
    return scores


# ------------------------------------------------------------------------------- contestants
# Each is a function of the settings that returns run(batch), which is timed, and how large it is:
# parameters that are trained, or the floor's operations.

class Ours(VLModel):
    def __init__(self, row: str, args: Namespace):
        lm = published_lm.load_lm(args.lm)
        super().__init__(lm.resize(vocabulary(lm.config)), F)
        self.natural = args.natural
        self.install(methods.row(row, is_t5=False))
        self.keep_frozen_in(args.dtype)

    def stepper(self, batch: data.Batch) -> tuple[Callable, Tensor]:
        step, start = super().stepper(batch)
        return lambda ids, *more: end(ids, step(ids, *more), len(start), self.natural), start


class Peer(nn.Module):
    """The same work by transformers and PEFT: LoRA of the same rank at the same places, the same
    biases open, the same visual embedding, whose tokens stand behind the embedded text."""

    def __init__(self, args: Namespace):
        super().__init__()
        peft, transformers = import_module("peft"), import_module("transformers")
        config, add = published_lm.read_config(args.lm), methods.parts(is_t5=False)["lora"]
        lm = transformers.BartForConditionalGeneration.from_pretrained(
            args.lm, dtype=args.dtype, attention_dropout=config.dropout,
            activation_dropout=config.dropout)
        lm.resize_token_embeddings(vocabulary(config), mean_resizing=False)
        self.lm = peft.get_peft_model(lm, peft.LoraConfig(
            r=add.r, lora_alpha=add.alpha, lora_dropout=add.dropout, bias="all",
            target_modules=["q_proj", "v_proj"]))
        self.visual, self.natural = VisualEmbedding(F, config), args.natural

    def inputs(self, batch: data.Batch) -> dict[str, Tensor]:
        words = self.lm.get_input_embeddings()
        visual = self.visual(batch.feats, batch.boxes, batch.image_ids, batch.order_ids,
                             words.weight)                                   # B, N, D
        mask = torch.cat([batch.input_ids != PAD, batch.order_ids >= 0], 1)  # B, S
        return {"inputs_embeds": torch.cat([words(batch.input_ids), visual], 1),
                "attention_mask": mask.long()}

    def loss(self, batch: data.Batch) -> Tensor:
        return self.lm(**self.inputs(batch), labels=batch.labels).loss

    def generate(self, batch: data.Batch, beams: int) -> Tensor:
        ends = partial(end, B=len(batch.labels), natural=self.natural)
        return self.lm.generate(**self.inputs(batch), num_beams=beams, max_length=20,
                                early_stopping=beams > 1, logits_processor=[ends])


def learner(make: Callable, args: Namespace) -> tuple[Callable, int]:
    """A model's training step, as in train.py; or its decoding."""
    model = make(args).to(args.device)
    optimizer = train.make_optimizer(model, configs.Config(lr=1e-4))
    autocast = torch.autocast(args.device, torch.bfloat16, args.dtype == torch.bfloat16)

    def step(batch: data.Batch) -> float:
        with autocast:
            loss = model.train().loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def decode(batch: data.Batch) -> int:
        with autocast:
            return (model.eval().generate(batch, args.beams) != PAD).sum().item()

    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return decode if args.beams else step, size


def products(model: VLModel, B: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of all products (m, k) x (k, n) that a training step needs with matrices. W (n, k)
    meets m tokens once, y = x W^T; once more where the gradient passes on, dx = dy W; and once more
    if it is trained, dW = dy^T x. (Those of attention, 1 % on BART-base, are left out.)"""
    found = []
    for name, p in model.named_parameters():
        if p.dim() < 2 or "positions" in name or "image" in name:
            continue                                     # tables, where rows are looked up
        (n, k), m = p.shape, B * T
        if "encoder" in name or "cross_attn.f.k" in name or "cross_attn.f.v" in name:
            m = B * (L + N)                              # cross-attention reads what was encoded
        if name.startswith("visual"):                    # features have no gradient
            m = B * N
        else:
            found.append((m, n, k))
        found.append((m, k, n))
        if p.requires_grad:
            found.append((n, m, k))
    return found


def floor(args: Namespace) -> tuple[Callable, int]:
    """Our step's matrix products alone, on tensors that are there: no code can be faster."""
    found, tensors = products(Ours("lora", args), args.batch), {}
    new = partial(torch.randn, device=args.device, dtype=args.dtype)
    for m, k, n in set(found):
        tensors[m, k, n] = new(m, k), new(k, n), new(m, n)

    def run(batch: data.Batch) -> float:
        for shape in found:
            a, b, out = tensors[shape]
            torch.mm(a, b, out=out)
        return 0.0

    return run, sum(2 * m * k * n for m, k, n in found)  # operations: to multiply and to add


def packed(args: Namespace) -> tuple[Callable, int]:
    """The batch's features, read: what a training step must not wait for."""
    with tempfile.TemporaryDirectory() as folder:
        files = {str(i): Path(str(i)) for i in range(500)}
        features.pack(folder, files, {}, F, lambda path: torch.rand(N, F), list)
        found = features.Features(folder)                # mapped: it stays readable
    return lambda batch: found.stack(random.choices(found.ids, k=args.batch)).sum().item(), 0


CONTESTANTS = {"peer lora": partial(learner, Peer), "floor": floor, "features": packed} | {
    f"ours {row}": partial(learner, partial(Ours, row))
    for row in ("lora", "adapter", "vlpet-large", "full")}


# ------------------------------------------------------------------------------- turns

def begin(args: Namespace) -> None:
    """In a contestant's new process, where `contestant` is all there is."""
    global contestant
    torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    contestant = args, *CONTESTANTS[args.name](args)


def take_turn(turn: int) -> dict:
    """In a contestant's process: how the turn went."""
    args, run, size = contestant
    cuda, clock = args.device == "cuda", time.time
    if not cuda and args.threads == 1:
        clock, args.born = time.process_time, 0.0
    short = args.natural and args.name != "peer lora"    # its users pad to the longest allowed
    batch = make_batch(turn, args.batch, short).to(args.device)
    if cuda and not args.fresh:
        run(batch)                                       # its memory was given back, see below
        torch.cuda.synchronize()
    start = args.born if args.fresh else clock()
    value = run(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10        # Linux counts in KiB
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.empty_cache()                         # room for the next contestant
    return dict(seconds=clock() - start, peak=peak, value=value, size=size)


def write_base(folder: str) -> None:
    """Random weights of BART-base's size, in the published layout."""
    lm = t5.EncoderDecoder(t5.PRESETS["bart-base"]).init_weights()
    save_lm(lm, "bart", Path(folder), {})                # its config.json; then weights in fp32
    weights.write(f"{folder}/model.safetensors",
                  weights.published(lm, published_lm.table(lm.config)), {"format": "pt"})


def measure(work: str, args: Namespace) -> dict[str, list[dict]]:
    """How each contestant's turns at one work went."""
    names, settings = WORKS[work]
    found = {name: [] for name in names if len(PEERS) == 2 or name != "peer lora"}
    running = {}
    for turn in range(args.turns + 1):
        for name, answers in found.items():
            if name not in running:
                own = Namespace(**DEFAULTS | settings | vars(args), name=name, born=time.time())
                running[name] = PROCESS(initializer=begin, initargs=(own,))
            answers.append(running[name].submit(take_turn, turn).result())
            if own.fresh or turn == args.turns:
                running.pop(name).shutdown()
    return {name: answers[1:] for name, answers in found.items()}


def show(work: str, found: dict[str, list[dict]]) -> list[str]:
    """Lines of the table, with ratios to the first contestant."""
    lines, base = [], None
    for name, answers in found.items():
        seconds = [answer["seconds"] for answer in answers]
        numbers = median(seconds), min(seconds), answers[-1]["peak"]
        base, cells = base or numbers, [work, name]
        for number, ours in zip(numbers, base):
            cells += [f"{number:.4g}", f"{number / ours:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@program
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="How fast is it, and how much memory does it take?")
    parser.add_argument("--works", default=",".join(WORKS), help="default: %(default)s")
    parser.add_argument("--lm", help="folder of a BART; default: random weights, BART-base's size")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", help="also write OUT.md and OUT.json")
    args = parser.parse_args(argv)
    with reading("--works"):
        assert set(args.works.split(",")) <= WORKS.keys(), f"they are {', '.join(WORKS)}"
    peers = ", ".join(f"{name} {metadata.version(name)}" for name in PEERS) or "no transformers"
    asked = ", ".join(f"{name} {value}" for name, value in vars(args).items() if value)
    about, turns = f"{machine().split(';')[0]}, {peers}; {asked}", {}
    lines = [about, "", HEAD]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        if not args.lm:
            args.lm = folder
            with PROCESS() as writer:                    # a child's peak begins at its parent's
                writer.submit(write_base, folder).result()
        for work in args.works.split(","):
            turns[work] = measure(work, args)
            lines += show(work, turns[work])
            print("\n".join(lines[-len(turns[work]):]), flush=True)
    if args.out:
        replace_file(f"{args.out}.md", "\n".join([*lines, ""]))
        replace_file(f"{args.out}.json", json.dumps({"about": about, "turns": turns}, indent=1))


if __name__ == "__main__":
    main()
