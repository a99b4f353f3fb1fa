"""How does a picture enter a language model, how does a method stand in it, how is an answer made?

VL-BART and VL-T5 (Cho et al. 2021, arXiv 2102.02779) with CLIP features, as VL-Adapter and VL-PET
use them. The encoder reads [prompt | text | picture]; whatever is trained is installed by a row of
methods.py. This is the only file that knows both backbones and adapters.

    model = VLModel(lm.resize(vocabulary(lm.config)), width=2048)
    model.install(methods.row("vlpet-large", is_t5=False))
    loss, answers = model.loss(batch), model.generate(batch, beams=5)

    python -m tools.count --lm bart-base --features 2048     # the table of what every row trains
    python -m pytest tests/test_model.py

Axes: B batch, K beams, L text tokens, N visual tokens, S = L + N (plus a prompt's), T target
tokens, D width, F feature width, V vocabulary.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapters
import t5
from adapters import Context, Method, Site
from answers import AnswerHead
from support.decoding import beam_search, greedy

TASKS = ("vqa", "gqa", "nlvr", "caption")            # of the papers' tables
NORMS = (nn.LayerNorm, nn.RMSNorm)
LOGITS = 2**26                                       # at once in the training loss: 256 MB


# --------------------------------------------------------------------------------- the picture

def vocabulary(c: t5.Config) -> int:
    """Words with the 200 added ones, <extra_id_99..0> and <vis_extra_id_99..0>: 50265 -> 50465
    on BART. T5 has the first hundred already and published tables 28 spare rows: 32128 -> 32200.
    CLIP-ViL (c.grid) adds nothing: its cells have position tables instead of names."""
    if c.grid[0]:
        return c.vocab
    return 32200 if c.is_t5 and c.vocab == 32128 else c.vocab + 200


class VisualEmbedding(nn.Module):
    """v = Norm_f(W_f f + b_f) + Norm_p(W_p [x1, x2, y1, y2, area] + b_p) + E_img + E_word[V-1-j]

    Of CLIP-ViL, which has tables of the grid's rows and columns: v = Norm_f(W_f (f + X + Y) + b_f).

    Trained in every method. E_word, the order table, is the language model's own (frozen) word
    embedding: token j of a picture is called <vis_extra_id_j>, which has id V - 1 - j. Features of
    other widths, as clips' are beside pictures', have a whole embedding of their own each: `more`.
    """

    def __init__(self, width: int, c: t5.Config, more: tuple[int, ...] = ()):
        super().__init__()
        self.more = nn.ModuleDict({str(other): VisualEmbedding(other, c) for other in more})
        std = None if c.is_t5 else 0.02              # of a new Linear; None: PyTorch's default
        self.feat, self.feat_norm = adapters.Dense(width, c.d, std), t5.make_norm(c)
        self.box = None
        if c.grid[0]:
            return
        self.box, self.box_norm = adapters.Dense(5, c.d, std), t5.make_norm(c)
        self.image = nn.Embedding(2, c.d)            # E_img: the first or the second picture
        nn.init.normal_(self.image.weight, std=1.0 if c.is_t5 else 0.02)

    def forward(self, feats: Tensor, boxes: Tensor, image_ids: Tensor, order_ids: Tensor,
                words: Tensor) -> Tensor:
        """feats (B, N, F), boxes (B, N, 4) as x1, x2, y1, y2 in 0..1, image_ids and order_ids
        (B, N), words (V, D) -> visual tokens (B, N, D)."""
        width = str(feats.size(-1))
        if width in self.more:
            return self.more[width](feats, boxes, image_ids, order_ids, words)
        feats, boxes = feats.to(words.dtype), boxes.to(words.dtype)        # a bf16 model, too
        if self.box is None:
            return self.feat_norm(self.feat(feats))
        x1, x2, y1, y2 = boxes.unbind(-1)                                  # B, N each
        area = (y2 - y1) * (x2 - x1)
        box = torch.cat([boxes, area[..., None]], -1)                      # B, N, 5
        order = F.embedding(len(words) - 1 - order_ids, words)             # B, N, D
        return (self.feat_norm(self.feat(feats)) + self.box_norm(self.box(box))
                + self.image(image_ids) + order)


# ------------------------------------------------------------------------ what a row may open

def norms(of: nn.Module) -> list[nn.Parameter]:
    modules = [module for module in of.modules() if isinstance(module, NORMS)]
    return list(nn.ModuleList(modules).parameters())


def biases(of: nn.Module) -> list[nn.Parameter]:
    modules = [module for module in of.modules() if isinstance(module, (nn.Linear, *NORMS))]
    found = [getattr(module, "bias", None) for module in modules]          # an RMSNorm has none
    return [bias for bias in found if bias is not None]


def clip_grid(model: "VLModel") -> list[nn.Parameter]:
    """CLIP's parameters that the grid depends on, without those of its pooled vector alone."""
    only = model.clip.pooled_only
    return [p for name, p in model.clip.named_parameters() if not name.startswith(only)]


OPEN: dict[str, Callable[["VLModel"], Iterable[nn.Parameter]]] = {
    "all": lambda model: model.lm.parameters(),
    "norms": lambda model: norms(model.lm),
    "encoder.norms": lambda model: norms(model.lm.encoder),
    "biases": lambda model: biases(model.lm),
    "clip": clip_grid,
}


# ------------------------------------------------------------------------------------ the model

class VLModel(nn.Module):
    """A frozen language model that sees: `lm`, the `visual` embedding, and an installed method.

    lm: with its vocabulary resized to `vocabulary(lm.config)`. width: of the visual features; or
    several, where tasks differ in it. clip: the image tower, where batches hold pixels instead.
    answers: task -> AnswerHead, where answers are chosen.
    """

    def __init__(self, lm: t5.EncoderDecoder, width: int | Iterable[int],
                 clip: nn.Module | None = None, answers: dict[str, AnswerHead] | None = None):
        super().__init__()
        assert all(getattr(module, "tune", None) is None for module in lm.modules()), \
            "the language model holds a method: call remove() of its VLModel, or load it anew"
        self.lm, self.clip = lm, clip
        widths = [width] if isinstance(width, int) else width
        first, *more = dict.fromkeys(widths)                               # each once, in order
        self.visual = VisualEmbedding(first, lm.config, tuple(more)).to(lm.shared.weight.dtype)
        self.answers = nn.ModuleDict(answers or {}).to(lm.shared.weight.dtype)
        self.forget()

    def forget(self) -> None:
        """The state without a method: everything frozen, nothing installed."""
        self.method, self.tasks, self.hyper, self.per_task = None, (), None, False
        self.shared_R = None                                        # of the original Compacter
        self.installed: dict[str, nn.Module] = {}                   # place -> what stands there
        self.opened: dict[str, Tensor] = {}                         # name -> its frozen value
        self.requires_grad_(False)

    # ------------------------------------------------------------------------------- methods

    def sites(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """All places of a site, block by block: "encoder.ffn" names sub-layers, with ".q" (or any
        Linear of the sub-layer) behind it that Linear; "encoder.prompt" is before the text."""
        if name == "encoder.prompt":
            yield "lm.encoder", self.lm.encoder
            return
        stack, *path = name.split(".")
        if stack == "decoder" and self.lm.decoder is None:
            return                                   # answers are chosen: a row's encoder half
        if len(path) > 1:
            path.insert(1, "f")                      # a Linear lies in the sub-layer's function f
        blocks = [None]                              # a wrong stack: the assert below names it
        if stack in ("encoder", "decoder"):
            blocks = self.lm.get_submodule(stack).blocks
        for i, block in enumerate(blocks):
            module = block
            for part in path:
                module = getattr(module, part, None)
            assert hasattr(module, "tune"), (
                f"no site {name!r}; there are encoder.self_attn, encoder.ffn, decoder.self_attn, "
                "decoder.cross_attn, decoder.ffn, behind an attention .q .k .v .o, behind a "
                "feed-forward .wi .wg .hidden .wo, and encoder.prompt")
            yield ".".join(["lm", stack, "blocks", str(i), *path]), module

    def install(self, method: Method, tasks: tuple[str, ...] = ()) -> list[tuple[str, int, int]]:
        """Puts a row's modules at their sites and opens what it opens; everything else is frozen.

        Trainable is decided by ownership: the visual embedding, answer heads, the installed
        modules, and what `method.open` names (it keeps a copy of those, for remove). tasks: the
        names for which a row with modules for each task gets one. Returns `counts`.
        """
        assert self.method is None, "a method is installed already: call remove() first"
        opened = self.to_open(method)
        d, words = self.lm.config.d, self.lm.shared.weight
        places, stacks = {}, {}                      # place -> (module of the site, what is added)
        with words.device:
            shared_R = method.new_R(words.dtype)
            for site, add in method.at.items():
                for place, module in self.sites(site):
                    linear = module if isinstance(module, nn.Linear) else None
                    d_in = getattr(module, "in_features", d)
                    d_out = getattr(module, "out_features", d)
                    tune = adapters.build(add, Site(place, d_in, d_out, linear, tasks))
                    places[place] = module, tune.to(words.dtype).train(self.training)
                    if isinstance(getattr(tune, "net", None), adapters.Generated):
                        collect_generated(stacks, site, add, tune.net)
            hyper = adapters.Hypernetwork(tasks, stacks).to(words.dtype) if stacks else None
        assert places or not method.at, "all its sites are in the decoder, and there is none"
        # Nothing has failed: only now is the model changed.
        self.method, self.tasks, self.hyper, self.shared_R = method, tasks, hyper, shared_R
        for place, (module, tune) in places.items():
            module.tune, self.installed[place] = tune, module
        self.per_task = hyper is not None or any(
            isinstance(module, adapters.PerTask) for module in self.modules())
        self.requires_grad_(False)
        for p in (*self.visual.parameters(), *self.answers.parameters(), *self.added()):
            p.requires_grad_(True)
        for name, p in self.named_parameters():
            if id(p) in opened:
                p.requires_grad_(True)
                self.opened[name] = p.detach().clone()
        return self.counts()

    def to_open(self, method: Method) -> set[int]:
        """The parameters (their id()) that a row opens."""
        opened = set()
        for name in method.open:
            assert name in OPEN, f"a row cannot open {name}; it can {', '.join(OPEN)}"
            assert name != "clip" or self.clip is not None, \
                "a row that opens clip needs the image tower in the model, and pictures as pixels"
            found = {id(p) for p in OPEN[name](self)}
            assert found, f"there is nothing to open: this language model has no {name}"
            opened |= found
        return opened

    def keep_frozen_in(self, dtype: torch.dtype) -> None:
        """Casts frozen matrices for good. Autocast would do so in every step, and keep both."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(dtype)

    def remove(self) -> None:
        """Takes the method out: the language model is bit for bit what it was before install."""
        for module in self.installed.values():
            module.tune = None
        with torch.no_grad():
            # By name: load_state_dict(assign=True) puts other parameters in their places.
            for name, frozen in self.opened.items():
                self.get_parameter(name).copy_(frozen)
        self.forget()

    def added(self) -> list[nn.Parameter]:
        """The parameters of the installed modules."""
        modules = [module.tune for module in self.installed.values()]
        if self.hyper is not None:
            modules.append(self.hyper)
        shared = [] if self.shared_R is None else [self.shared_R]
        return [*shared, *nn.ModuleList(modules).parameters()]

    def counts(self) -> list[tuple[str, int, int]]:
        """(part, trainable, total parameters); tied tensors count once, buffers not at all."""
        added = {id(p) for p in self.added()}
        parts = {"language model": [p for p in self.lm.parameters() if id(p) not in added],
                 "visual embedding": list(self.visual.parameters()), "method": self.added()}
        if self.answers:
            parts["answer heads"] = list(self.answers.parameters())
        if self.method and "clip" in self.method.open:       # the papers do not count a frozen one
            parts["CLIP"] = clip_grid(self)
        parts["all"] = sum(parts.values(), [])
        lines = []
        for part, parameters in parts.items():
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            lines.append((part, trainable, sum(p.numel() for p in parameters)))
        return lines

    def trained(self) -> dict[str, Tensor]:
        """What an adapter-only file holds: every trainable tensor under its one name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------- forward

    def context(self, tasks: tuple[str, ...], device: torch.device) -> Context:
        """Which examples belong to which task, and what the hypernetwork writes for these tasks."""
        unknown = sorted(set(tasks) - set(self.tasks))
        assert not (self.per_task and unknown), (
            f"the batch has examples of {', '.join(unknown)}; the method was installed for "
            f"{', '.join(self.tasks)}")
        rows = {}
        for task in sorted(set(tasks)):
            rows[task] = torch.tensor([i for i, other in enumerate(tasks) if other == task],
                                      device=device)
        generated = {} if self.hyper is None else self.hyper(list(rows))
        return Context(rows=rows, generated=generated, shared_R=self.shared_R)

    def look(self, batch) -> Tensor:
        """Features (B, N, F) of a batch whose `feats` are pixels (pictures, 3, height, width)."""
        trains = torch.is_grad_enabled() and self.method is not None and "clip" in self.method.open
        with torch.set_grad_enabled(trains):
            tokens = self.clip.encode(batch.feats)                          # pictures, 36, F
        if batch.seen is None:
            return tokens.reshape(*batch.order_ids.shape, -1)               # B, N, F
        feats = tokens.new_zeros(*batch.order_ids.shape, tokens.size(-1))   # B, N, F
        feats[batch.seen] = tokens.flatten(0, 1)
        return feats

    def encode(self, batch) -> tuple[Tensor, Tensor, list | None, Context]:
        """A batch of data.py -> encoder states (B, S, D), their mask (B, S), and what a decoder
        needs: a fresh cache and its context (without the encoder's mask: its tokens are others)."""
        feats = batch.feats if self.clip is None else self.look(batch)      # B, N, F
        if self.lm.grid is not None:
            feats = feats + self.lm.grid(batch.boxes)
        visual = self.visual(feats, batch.boxes, batch.image_ids, batch.order_ids,
                             self.lm.shared.weight)                         # B, N, D
        ctx = self.context(batch.tasks, visual.device)
        memory, mask = self.lm.encode(batch.input_ids, visual, batch.seen, ctx)
        cache = None
        if self.lm.decoder is not None:
            cache = self.lm.start_cache(memory, replace(ctx, mask=mask))
        return memory, mask, cache, ctx

    def head(self, batch) -> AnswerHead:
        """The answer head of a batch, which belongs to one task."""
        (task,) = set(batch.tasks)
        return self.answers[task]

    def states(self, batch) -> Tensor:
        """The decoder's states (B, T, D) at the batch's labels, teacher forced."""
        _, mask, cache, ctx = self.encode(batch)
        return self.lm.decode(self.lm.shift_right(batch.labels), mask, cache, ctx)

    def forward(self, batch) -> Tensor:
        """Logits (B, T, V) of the batch's labels, teacher forced; of answer heads, (B, A)."""
        if not self.answers:
            return self.lm.logits(self.states(batch))
        memory, _, _, ctx = self.encode(batch)
        prompt = memory.size(1) - batch.input_ids.size(1) - batch.order_ids.size(1)
        state = self.lm.pooled(memory, prompt)           # of the text's first token: B, D
        return ctx.by_task(lambda task, own, _: self.answers[task](own), state)

    def loss(self, batch) -> Tensor:
        """The training loss: the cross-entropy of every target token, times the example's weight
        (data.loss_weights); or the answer head's, from the soft scores of its answers."""
        if not self.answers:
            loss = self.token_losses(self.states(batch), batch.labels)      # B, T
            return (loss * batch.weights[:, None]).sum()
        scores, loss = self(batch), 0.0
        for task, rows in self.context(batch.tasks, scores.device).rows.items():
            own = self.answers[task].loss(scores[rows], batch.answers[rows])
            loss = loss + (own * batch.weights[rows]).sum()
        return loss

    def token_losses(self, h: Tensor, labels: Tensor) -> Tensor:
        """Decoder states (B, T, D) -> the cross-entropy of each target token (B, T). 500 captions
        have 2 GB of logits: so large a table is made in parts, each again in the backward pass."""
        def losses(h: Tensor, labels: Tensor) -> Tensor:
            return token_loss(self.lm.logits(h), labels)
        rows = max(1, LOGITS // (labels.size(1) * self.lm.config.vocab))
        if rows >= len(h):
            return losses(h, labels)
        parts = zip(h.split(rows), labels.split(rows))
        return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])

    # ------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, batch, beams: int = 1, max_length: int = 20) -> Tensor:
        """Token ids (B, <= max_length), the start token first, padding after the end. beams 1 is
        greedy; what else decides are the published model's settings (t5.Config)."""
        if beams == 1:
            return greedy(*self.stepper(batch), self.lm.config, max_length)
        best = self.beams(batch, beams, max_length)[0][:, 0]                # B, max_length
        used = (best != self.lm.config.pad).any(0)                          # max_length
        used[0] = True                               # T5's start token is padding: keep it
        return best[:, :int(used.nonzero().max()) + 1]

    @torch.no_grad()
    def beams(self, batch, beams: int = 5, max_length: int = 20) -> tuple[Tensor, Tensor]:
        """The best answers of each example: token ids (B, K, max_length), padding after the end,
        and log p of each whole answer (B, K), in the order of log p / length."""
        return beam_search(*self.stepper(batch), self.lm.config, max_length, beams)

    def stepper(self, batch) -> tuple[Callable, Tensor]:
        """What a search needs: a function that scores next tokens, and the first ones (B, 1)."""
        _, mask, cache, ctx = self.encode(batch)
        tasks = list(batch.tasks)

        def step(ids: Tensor, keep: Tensor | None = None, items: Tensor | None = None) -> Tensor:
            """Scores (rows, V) of the next token; `keep` names the rows that live on, `items` the
            items, if some have left."""
            nonlocal mask, ctx, tasks
            for layer in cache:
                if keep is not None:
                    layer[0] = tuple(t.index_select(0, keep) for t in layer[0])
                if items is not None:
                    layer[1] = tuple(t.index_select(0, items) for t in layer[1])
            if items is not None:
                mask, tasks = mask[items], [tasks[i] for i in items.tolist()]
                ctx = self.context(tuple(tasks), mask.device)
            h = self.lm.decode(ids[:, -1:], mask, cache, ctx)               # rows, 1, D
            return self.lm.logits(h[:, -1]).float()

        return step, torch.full((len(mask), 1), self.lm.config.start, device=mask.device)

    @torch.no_grad()
    def choose(self, batch, tokens: list[int]) -> Tensor:
        """Probabilities (B, n) among these n tokens at the first place of the answer: after the
        start token, and on BART after <s>, with which its targets begin."""
        c = self.lm.config
        _, mask, cache, ctx = self.encode(batch)
        start = [c.start] if c.bos is None else [c.start, c.bos]
        ids = torch.tensor(start, device=mask.device).repeat(len(mask), 1)
        h = self.lm.decode(ids, mask, cache, ctx)                           # B, 1 or 2, D
        return self.lm.logits(h[:, -1])[:, tokens].float().softmax(-1)


def collect_generated(stacks: dict, site: str, add: adapters.Add, net: adapters.Generated) -> None:
    """Adds a module to those that the hypernetwork of its stack writes: all of one description."""
    stack, _, kind = site.partition(".")
    sites, first = stacks.setdefault(stack, ({}, add))
    assert (add.p, add.std, add.std_tokens) == (first.p, first.std, first.std_tokens), (
        f"one hypernetwork writes for all of the {stack}: p, std and std_tokens must be the same "
        "at its sites")
    sites.setdefault(kind.replace(".", "_"), []).append(net)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each target token (B, T), 0 where the label is -100."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return loss.view_as(labels)
