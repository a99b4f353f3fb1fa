"""How does a picture enter a language model, how is a method installed, how is an answer generated?

VL-BART and VL-T5 (Cho et al. 2021, arXiv 2102.02779) with CLIP features, as VL-Adapter and VL-PET
use them. The encoder reads [prompt | text | picture]; whatever is trained is installed by a row of
adapters.py's table.

    python model.py --lm bart-base --features 2048     # the table of what every row trains
    python -m pytest tests/test_model.py
"""
import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapters
import methods as rows
import t5
from support import weights
from adapters import Context, Method

# B batch, K beams, L text tokens, N visual tokens, S = L + N, T target tokens, D width,
# F feature width, V vocabulary.

STACKS, NORMS = ("encoder", "decoder"), (nn.LayerNorm, nn.RMSNorm)
TASKS = ("vqa", "gqa", "nlvr", "caption")            # of the papers' tables


class VisualEmbedding(nn.Module):
    """v = Norm_f(W_f f + b_f) + Norm_p(W_p [x1, x2, y1, y2, area] + b_p) + E_img + E_word[V-1-j]

    Trained in every method. E_word, the order table, is the language model's own (frozen) word
    embedding: token j of a picture is called <vis_extra_id_j>, which has id V - 1 - j. Features of
    other widths, as clips' are beside pictures', have a whole embedding of their own each: `more`.
    """

    def __init__(self, width: int, c: t5.Config, more: tuple[int, ...] = ()):
        super().__init__()
        self.more = nn.ModuleDict({str(other): VisualEmbedding(other, c) for other in more})
        std = None if c.is_t5 else 0.02
        self.feat, self.feat_norm = adapters.Dense(width, c.d, std), t5.make_norm(c)
        self.box, self.box_norm = adapters.Dense(5, c.d, std), t5.make_norm(c)
        self.image = nn.Embedding(2, c.d)
        nn.init.normal_(self.image.weight, std=1.0 if c.is_t5 else 0.02)

    def forward(self, feats: Tensor, boxes: Tensor, image_ids: Tensor, order_ids: Tensor,
                words: Tensor) -> Tensor:
        """feats (B, N, F), boxes (B, N, 4) as x1, x2, y1, y2 in 0..1, image_ids and order_ids
        (B, N), words (V, D) -> visual tokens (B, N, D)."""
        if (other := str(feats.size(-1))) in self.more:
            return self.more[other](feats, boxes, image_ids, order_ids, words)
        feats, boxes = feats.to(words.dtype), boxes.to(words.dtype)        # a bf16 model, too
        x1, x2, y1, y2 = boxes.unbind(-1)
        box = torch.cat([boxes, ((y2 - y1) * (x2 - x1))[..., None]], -1)
        return (self.feat_norm(self.feat(feats)) + self.box_norm(self.box(box))
                + self.image(image_ids) + F.embedding(len(words) - 1 - order_ids, words))


def norms(of: nn.Module) -> Iterator[nn.Parameter]:
    return (p for m in of.modules() if isinstance(m, NORMS) for p in m.parameters())


def biases(of: nn.Module) -> Iterator[nn.Parameter]:
    return (m.bias for m in of.modules() if isinstance(m, (nn.Linear, *NORMS))
            and getattr(m, "bias", None) is not None)


# What a row may open of the frozen networks: a name -> its parameters.
OPEN = {
    "all": lambda model: model.lm.parameters(),
    "norms": lambda model: norms(model.lm),
    "encoder.norms": lambda model: norms(model.lm.encoder),
    "biases": lambda model: biases(model.lm),
    "clip": lambda model: (p for name, p in model.clip.named_parameters()
                           if not name.startswith(model.clip.pooled_only)),
}


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Modules are named by their tasks: each once, and no name that a module has already."""
    if isinstance(tasks, str) or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks are {tasks!r}; they must be a tuple of different names")
    if odd := [t for t in tasks if not t.isidentifier() or hasattr(nn.ModuleDict, t)
               or hasattr(nn.ParameterDict, t) or t == "training"]:
        raise ValueError(f"a task cannot be called {odd[0]!r}: take another word")


def vocabulary(c: t5.Config) -> int:
    """Words with the 200 added ones, <extra_id_99..0> and <vis_extra_id_99..0>: 50265 -> 50465
    on BART. T5 has the first hundred already and published tables 28 spare rows: 32128 -> 32200."""
    return 32200 if c.is_t5 and c.vocab == 32128 else c.vocab + 200


def widths(held: weights.Tensors) -> list[int]:
    """The widths of features that an adapter-only file was trained on."""
    ours = [n for n in held if n.startswith("visual.") and n.endswith("feat.weight")]
    return [held.shape(name)[1] for name in sorted(ours)]


class VLModel(nn.Module):
    """A frozen language model that sees: `lm`, the `visual` embedding, and an installed method.

    lm: with its vocabulary resized to `vocabulary(lm.config)`. width: of the visual features; or
    several, where tasks differ in it. clip: the image tower, where batches hold pixels instead.
    """

    def __init__(self, lm: t5.EncoderDecoder, width: int | Iterable[int],
                 clip: nn.Module | None = None):
        super().__init__()
        self.lm, self.clip = lm, clip
        width, *more = dict.fromkeys([width] if isinstance(width, int) else width)
        self.visual = VisualEmbedding(width, lm.config, tuple(more)).to(lm.shared.weight.dtype)
        self.method, self.tasks, self.hyper, self.per_task = None, (), None, False
        self.installed, self.base = {}, {}
        self.merged, self.modules_out, self.merged_task = [], [], None
        self.requires_grad_(False)

    # ------------------------------------------------------------------------------- methods

    def sites(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """All places of a site, block by block: "encoder.ffn" names sub-layers, with ".q" (or any
        Linear of the sub-layer) behind it that Linear; "encoder.prompt" is before the text."""
        if name == "encoder.prompt":
            yield "lm.encoder", self.lm.encoder
            return
        stack, *path = name.split(".")
        path = path[:1] + [part for linear in path[1:] for part in ("f", linear)]
        for i, block in enumerate(getattr(self.lm, stack).blocks if stack in STACKS else [None]):
            place = block
            for part in path:
                place = getattr(place, part, None)
            if not hasattr(place, "tune"):
                raise ValueError(f"no site {name!r}; there are {', '.join(adapters.SUBLAYERS)}, "
                                 "behind an attention .q .k .v .o, behind a feed-forward .wi "
                                 ".wg .hidden .wo, and encoder.prompt")
            yield ".".join(["lm", stack, "blocks", str(i), *path]), place

    def install(self, method: Method,
                tasks: tuple[str, ...] = ()) -> list[tuple[str, int, int]]:
        """Puts a row's modules at their sites and opens what it opens; everything else is frozen.

        Trainable is decided by ownership: the visual embedding, the installed modules, and what
        `method.open` names (it keeps a copy of those, for remove). tasks: the names for which a
        row with modules for each task gets one. Returns `counts`.
        """
        if self.method is not None:
            raise ValueError("a method is installed already: call remove() first")
        check_tasks(tasks)
        if unknown := set(method.open) - OPEN.keys():
            raise ValueError(f"a row cannot open {', '.join(unknown)}; it can {', '.join(OPEN)}")
        if "clip" in method.open and self.clip is None:
            raise ValueError("a row that opens clip needs the image tower in the model, and "
                             "pictures instead of features")
        places = [(site, add, *found) for site, add in method.at.items()
                  for found in self.sites(site)]
        opened = {name: {id(p) for p in OPEN[name](self)} for name in method.open}
        if empty := [name for name, ids in opened.items() if not ids]:
            raise ValueError(f"there is nothing to open: this language model has no {empty[0]}")
        opened = set().union(*opened.values())
        c, device, dtype = self.lm.config, self.lm.shared.weight.device, self.lm.shared.weight.dtype
        made, hyper = {}, {}
        with device:
            for site, add, name, place in places:
                linear = place if isinstance(place, nn.Linear) else None
                d_in, d_out = (getattr(place, f"{end}_features", c.d) for end in ("in", "out"))
                made[name] = adapters.build(add, d_in, d_out, tasks, name, linear)
                if isinstance(net := getattr(made[name], "net", None), adapters.Generated):
                    stack, _, site = site.partition(".")
                    sites, law = hyper.setdefault(stack, (defaultdict(list), add))
                    sites[site.replace(".", "_")].append(net)
                    if (add.p, add.std, add.std_tokens) != (law.p, law.std, law.std_tokens):
                        raise ValueError(f"one hypernetwork writes for all of the {stack}: p, std "
                                         "and std_tokens must be the same at its sites")
            hyper = adapters.Hypernetwork(tasks, hyper).to(dtype) if hyper else None
        # Nothing has failed: only now is the model changed.
        self.method, self.tasks, self.hyper = method, tasks, hyper
        self.per_task = hyper is not None or any(
            isinstance(m, adapters.PerTask) for tune in made.values() for m in tune.modules())
        self.base = {n: p for n, p in self.named_parameters() if id(p) in opened}
        for _, _, name, place in places:
            place.tune, self.installed[name] = made[name].to(dtype).train(self.training), place
        self.requires_grad_(False)
        for p in (*self.visual.parameters(), *self.added(), *self.base.values()):
            p.requires_grad_(True)
        self.base = {n: (p, p.detach().clone()) for n, p in self.base.items()}
        return self.counts()

    def added(self) -> list[nn.Parameter]:
        """The parameters of the installed modules."""
        modules = [place.tune for place in self.installed.values()] + [self.hyper]
        return [p for m in modules if m is not None for p in m.parameters()]

    def remove(self) -> None:
        """Takes the method out: the language model is bit for bit what it was before install."""
        self.split()
        for place in self.installed.values():
            place.tune = None
        with torch.no_grad():
            for p, value in self.base.values():
                p.copy_(value)
        self.method, self.tasks, self.hyper, self.per_task = None, (), None, False
        self.installed, self.base = {}, {}
        self.requires_grad_(False)

    @torch.no_grad()
    def merge(self, task: str | None = None) -> None:
        """Writes LoRA, DoRA or (IA)3 into the frozen weights, so that they cost nothing; `split`
        takes them out. task: whose, where there is a module for each. ValueError if a module
        is not linear in its x (and then nothing is changed)."""
        if self.merged:
            raise ValueError("the method is merged already: call split() first")
        new = {}                                                   # Linear -> its W and b to be
        # What scales a Linear's x (at .hidden) comes behind the Linear's own module.
        for name, place in sorted(self.installed.items(), key=lambda item: ".hidden" in item[0]):
            tune, hidden = place.tune, name.endswith(".hidden")
            if isinstance(tune, adapters.PerTask):
                if task not in tune:
                    raise ValueError(f"merge(task) must name one of {', '.join(tune)}: this row "
                                     "has a module for each task")
                tune = tune[task]
            linear = self.get_submodule(f"{name.removesuffix('hidden')}wo") if hidden else place
            if not (isinstance(tune, adapters.Adapter) and isinstance(linear, nn.Linear)
                    and not (hidden and tune.net)):
                raise ValueError(f"what stands at {name} cannot be merged: its h is not what a "
                                 f"Linear gives ({type(tune).__name__} at a sub-layer, hidden or a "
                                 "prompt)")
            W, b = new.get(linear, (linear.weight, linear.bias))
            new[linear] = (tune.merged(W.T, None)[0].T, b) if hidden else tune.merged(W, b)
        for linear, (W, b) in new.items():
            self.merged.append((linear, linear.weight.clone(), b if b is None else
                                linear.bias.clone()))
            linear.weight.copy_(W)
            if b is not None:
                linear.bias.copy_(b)
        self.merged_task = task
        self.modules_out = [(place, place.tune) for place in self.installed.values()]
        for place in self.installed.values():
            place.tune = None

    @torch.no_grad()
    def split(self) -> None:
        """Undoes merge: weights and modules are bit for bit what they were."""
        for linear, W, b in self.merged:
            linear.weight.copy_(W)
            if b is not None:
                linear.bias.copy_(b)
        like = self.lm.shared.weight                        # the model may have moved since
        for place, tune in self.modules_out:
            place.tune = tune.to(like.device, like.dtype)
        self.merged, self.modules_out = [], []

    def check_split(self) -> None:
        if self.modules_out:
            raise ValueError("the method is merged, which is for answering alone: call split()")

    def counts(self) -> list[tuple[str, int, int]]:
        """(part, trainable, total parameters); tied tensors count once, buffers not at all."""
        self.check_split()
        added = {id(p) for p in self.added()}
        parts = {"language model": [p for p in self.lm.parameters() if id(p) not in added],
                 "visual embedding": list(self.visual.parameters()), "method": self.added()}
        if self.method and "clip" in self.method.open:       # the papers do not count a frozen one
            parts["CLIP"] = list(OPEN["clip"](self))
        parts["all"] = [p for ps in parts.values() for p in ps]
        return [(part, sum(p.numel() for p in ps if p.requires_grad), sum(p.numel() for p in ps))
                for part, ps in parts.items()]

    def trained(self) -> dict[str, Tensor]:
        """What an adapter-only file holds: every trainable tensor under its one name."""
        self.check_split()
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, path: str) -> None:
        """Fills what the installed method trains from an adapter-only file, strictly."""
        weights.load(self.trained(), weights.read(path), where=str(path))

    # ------------------------------------------------------------------------------- forward

    def context(self, tasks: tuple[str, ...], device: torch.device) -> Context:
        """Which examples belong to which task, and what the hypernetwork writes for these tasks."""
        if self.modules_out and self.per_task and set(tasks) != {self.merged_task}:
            raise ValueError(f"merged are the modules of {self.merged_task!r}; the batch has "
                             f"{', '.join(sorted(set(tasks)))}: call split()")
        if self.per_task and (odd := set(tasks) - set(self.tasks)):
            raise ValueError(f"the batch has examples of {', '.join(sorted(odd))}; the method was "
                             f"installed for {', '.join(self.tasks)}")
        rows = {task: [i for i, t in enumerate(tasks) if t == task] for task in set(tasks)}
        rows = {task: torch.tensor(rows[task], device=device) for task in sorted(rows)}
        return Context(rows=rows, generated=self.hyper(list(rows)) if self.hyper else {})

    def look(self, batch) -> Tensor:
        """The features (B, N, F) of a batch whose `feats` are its pictures' pixels (P, 3, H, W),
        example by example. CLIP is always in eval mode: a ResNet's batch statistics stay."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "clip" in self.method.open):
            tokens = self.clip.eval().encode(batch.feats)                   # P, 36, F
        if batch.seen is None:
            return tokens.reshape(*batch.order_ids.shape, -1)
        feats = tokens.new_zeros(*batch.order_ids.shape, tokens.size(-1))
        feats[batch.seen] = tokens.flatten(0, 1)
        return feats

    def encode(self, batch) -> tuple[Tensor, Tensor, list, Context]:
        """A batch of data.py -> encoder states (B, S, D), their mask (B, S), and what the decoder
        needs: a fresh cache and its context (without the encoder's mask: its tokens are others)."""
        feats = batch.feats if self.clip is None else self.look(batch)
        visual = self.visual(feats, batch.boxes, batch.image_ids, batch.order_ids,
                             self.lm.shared.weight)
        ctx = self.context(batch.tasks, visual.device)
        memory, mask = self.lm.encode(batch.input_ids, visual, batch.seen, ctx)
        return memory, mask, self.lm.start_cache(memory, replace(ctx, mask=mask)), ctx

    def forward(self, batch) -> Tensor:
        """Logits (B, T, V) of the batch's labels, teacher forced."""
        _, mask, cache, ctx = self.encode(batch)
        return self.lm.logits(self.lm.decode(self.lm.shift_right(batch.labels), mask, cache, ctx))

    def loss(self, batch) -> Tensor:
        """The training loss: the cross-entropy of every target token, times the example's weight
        (data.loss_weights)."""
        self.check_split()
        return (token_loss(self(batch), batch.labels) * batch.weights[:, None]).sum()

    # ------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, batch, beams: int = 1, max_length: int = 20,
                 no_repeat_ngram: int | None = None, early_stopping: bool | None = None) -> Tensor:
        """Token ids (B, <= max_length), the start token first, padding behind the end.

        beams 1 is greedy. The last two settings are the published model's unless given.
        """
        c = self.lm.config
        step, start = self.stepper(batch)
        n = c.no_repeat_ngram if no_repeat_ngram is None else no_repeat_ngram
        if beams == 1:
            return greedy(step, start, c, max_length, n)
        early = c.early_stopping if early_stopping is None else early_stopping
        text, _ = beam_search(step, start, c, max_length, n, beams, early)
        place = torch.arange(1, max_length + 1, device=text.device)
        return text[:, 0, :int((place * (text[:, 0] != c.pad)).max())]      # the best beam

    @torch.no_grad()
    def beams(self, batch, beams: int = 5, max_length: int = 20) -> tuple[Tensor, Tensor]:
        """The best answers of each example: token ids (B, K, max_length), padding behind the end,
        and log p of each whole answer (B, K), in the order of log p / length."""
        c = self.lm.config
        step, start = self.stepper(batch)
        return beam_search(step, start, c, max_length, c.no_repeat_ngram, beams, c.early_stopping)

    def stepper(self, batch):
        """What a search needs: a function that scores next tokens, and the first ones (B, 1)."""
        _, mask, cache, ctx = self.encode(batch)

        def step(ids: Tensor, keep: Tensor | None = None) -> Tensor:
            """Scores (rows, V) of the next token; `keep` names the rows that live on."""
            if keep is not None:
                for kv in cache:
                    kv[0] = tuple(t.index_select(0, keep) for t in kv[0])
            h = self.lm.decode(ids[:, -1:], mask, cache, ctx)
            return self.lm.logits(h[:, -1]).float()

        return step, torch.full((len(mask), 1), self.lm.config.start, device=mask.device)

    @torch.no_grad()
    def choose(self, batch, tokens: list[int]) -> Tensor:
        """Probabilities (B, n) among these n tokens at the first place of the answer: behind the
        start token, and on BART behind <s>, with which its targets begin."""
        c = self.lm.config
        _, mask, cache, ctx = self.encode(batch)
        ids = [c.start] if c.bos is None else [c.start, c.bos]
        h = self.lm.decode(torch.tensor(ids, device=mask.device).repeat(len(mask), 1),
                           mask, cache, ctx)
        return self.lm.logits(h[:, -1])[:, tokens].float().softmax(-1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each target token (B, T), 0 where the label is -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(),
                           reduction="none").view_as(labels)


# --------------------------------------------------------------------------------- decoding
# The rules of the generation code that the papers used (spec: backbone.md, "Decoding").

def ban_repeats(scores: Tensor, ids: Tensor, n: int) -> Tensor:
    """-inf for every token that would complete an n-gram which ids (rows, t) already hold."""
    t = ids.size(1)
    if n == 0 or t < n:
        return scores
    grams = ids.unfold(1, n, 1)                                             # rows, t - n + 1, n
    again = (grams[..., :-1] == ids[:, None, t - n + 1:]).all(-1)
    row, place = again.nonzero(as_tuple=True)
    return scores.index_put((row, grams[row, place, -1]), scores.new_tensor(float("-inf")))


def greedy(step, ids: Tensor, c: t5.Config, max_length: int, n: int) -> Tensor:
    """Arg-max decoding; behind EOS comes padding. step(ids) -> scores (B, V)."""
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.size(1) < max_length and not done.all():
        token = ban_repeats(step(ids), ids, n).argmax(-1).masked_fill(done, c.pad)
        ids = torch.cat([ids, token[:, None]], 1)
        done |= token == c.eos
    return ids


def beam_search(step, start: Tensor, c: t5.Config, max_length: int, n: int, K: int,
                early_stopping: bool) -> tuple[Tensor, Tensor]:
    """K beams, all on the device. A hypothesis holds no EOS and scores sum(log p) / length, where
    the length counts the start token. step(ids, keep) -> scores (B * K, V).

    Returns token ids (B, K, max_length), best first, and their sum(log p) (B, K)."""
    B, device, neg = len(start), start.device, float("-inf")
    first_row = torch.arange(B, device=device)[:, None] * K                # B, 1
    ids, keep = start.repeat_interleave(K, 0), None                        # B * K, t
    score = torch.full((B, K), -1e9, device=device)
    score[:, 0] = 0                            # all beams start alike: only the first one counts
    best = torch.full((B, K), neg, device=device)          # finished hypotheses, K best an item
    text = torch.full((B, K, max_length), c.pad, device=device)
    length = torch.zeros(B, K, dtype=torch.long, device=device)
    count = torch.zeros(B, dtype=torch.long, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)

    def add(new: Tensor, rows: Tensor, allowed: Tensor) -> None:
        """Finished candidates: their scores, rows of ids, and which of them count, each (B, K)."""
        nonlocal best, text, length, count
        t = ids.size(1)
        new = torch.where(allowed, new / t, neg)
        tokens = F.pad(ids[rows], (0, max_length - t), value=c.pad)        # B, K, max_length
        best, i = torch.cat([best, new], 1).topk(K)
        text = torch.cat([text, tokens], 1).gather(1, i[..., None].expand(-1, -1, max_length))
        length = torch.cat([length, torch.full_like(length, t)], 1).gather(1, i)
        count = (count + allowed.sum(1)).clamp(max=K)

    while ids.size(1) < max_length and not done.all():
        t = ids.size(1)
        logits = step(ids, keep)
        if c.force_eos and t == max_length - 1:
            only = torch.full_like(logits, neg)
            only[:, c.eos] = logits[:, c.eos]
            logits = only
        logp = ban_repeats(logits.log_softmax(-1), ids, n)
        V = logp.size(-1)
        top, i = (score.view(-1, 1) + logp).view(B, -1).topk(2 * K)        # B, 2K, best first
        row, token = first_row + i // V, i % V
        eos = token == c.eos
        add(top[:, :K], row[:, :K], eos[:, :K] & ~done[:, None])
        enough = (count == K) & (early_stopping | (best.min(1).values >= top[:, 0] / t))
        # The K best candidates that go on: a stable sort moves the ended ones behind.
        live = eos.long().sort(dim=1, stable=True).indices[:, :K]
        score, keep = top.gather(1, live), row.gather(1, live).flatten()
        ids = torch.cat([ids[keep], token.gather(1, live).view(-1, 1)], 1)
        done |= enough
    rows = first_row + torch.arange(K, device=device)
    add(score, rows, (~done)[:, None].expand(-1, K))
    logp = best * length
    # The end of a hypothesis goes back in where there is room.
    end = torch.arange(max_length, device=device) == length[..., None]
    return text.masked_fill(end, c.eos), logp


# --------------------------------------------------------------------------------- the table

def count_table(lm: str, width: int, table: dict[str, Method] | None = None,
                tasks: tuple[str, ...] = TASKS) -> list[tuple[str, int, int]]:
    """(method, trainable, total) of a table of rows (None: of all) on a weightless backbone of a
    published size. tasks: their names, which count for rows with a module for each."""
    if width < 1:
        raise ValueError(f"features are {width} wide; they must be at least 1")
    if lm not in t5.PRESETS:
        raise ValueError(f"there is no preset {lm!r}; there are {', '.join(t5.PRESETS)}")
    counts = []
    with torch.device("meta"):
        config = t5.PRESETS[lm]
        config = replace(config, vocab=vocabulary(config))
        model = VLModel(t5.EncoderDecoder(config), width)
        for name, method in (table or adapters.methods(config.is_t5)).items():
            counts.append((name, *model.install(method, tasks)[-1][1:]))
            model.remove()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of methods and what each one trains.")
    parser.add_argument("--lm", default="bart-base", help=f"one of {', '.join(t5.PRESETS)}")
    parser.add_argument("--features", type=int, default=2048, help="width of the visual features "
                        "(2048: RN101 pictures, 512: ViT-B/32 video)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma between them")
    parser.add_argument("--method", default="", help="this row alone")
    parser.add_argument("--set", default="", metavar="CHANGES", dest="changes",
                        help="changes of the row, as in train.py --help: r=48,decoder=none")
    args = parser.parse_args()
    try:
        is_t5 = args.lm in t5.PRESETS and t5.PRESETS[args.lm].is_t5
        if args.changes and not args.method:
            raise ValueError("--set changes a row: name it with --method")
        one = args.method and {args.method: rows.row(args.method, is_t5, args.changes)}
        counts = count_table(args.lm, args.features, one or None, tuple(args.tasks.split(",")))
    except ValueError as e:
        sys.exit(f"model.py: {e}")
    print(f"{args.lm}, features {args.features}, tasks {args.tasks}"
          + f", {args.changes}" * bool(args.changes))
    print(f"{'name':20} {'trainable':>12} {'total':>12} {'%':>8}")
    for name, trainable, total in counts:
        print(f"{name:20} {trainable:12,} {total:12,} {100 * trainable / total:8.4f}")


if __name__ == "__main__":
    main()
