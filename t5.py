"""How do T5 and BART turn tokens into tokens?

One encoder-decoder in three dialects: T5 (Raffel et al. 2020, arXiv 1910.10683), BART (Lewis et al.
2020, arXiv 1910.13461), and BERT (Devlin et al. 2019, arXiv 1810.04805), which is BART's encoder
alone. What differs between them, each a field of `Config`:

                      BART, BERT                        T5
    norm              LayerNorm, after the residual     RMSNorm, before a sub-layer, and at the end
    positions         learned, added to the words       relative, a bias on the attention scores
    embedding         LayerNorm over word + position    nothing
    attention scale   1 / sqrt(d_kv)                    1 (folded into the weights)
    biases            in every Linear                   nowhere
    feed-forward      GELU                              ReLU; v1.1 and Flan: gated GELU (tanh)
    head              tied, plus a bias buffer          tied, scaled by d^-0.5; v1.1 and Flan: own
    decoder starts    with </s>                         with <pad>

    BERT besides: a segment table, no dropout behind the activation, a Linear on the state of [CLS]
    (the pooler); in CLIP-ViL (arXiv 2107.06383) tables of a picture's rows and columns. Without a
    decoder an answer is chosen (answers.py), not written.

A *site* is a place where a tuning method may act: behind every sub-layer, behind every Linear of an
attention or a feed-forward, in front of the text. There stands `tune`, None in a published model,
until model.py installs a function (h, x, ctx) -> h'. The names of published weights are
translated in support/published_lm.py.

    python -m pytest tests/test_t5.py

Axes: B batch, L text tokens, N visual tokens, P prompt tokens, S = P + L + N encoder tokens,
T target tokens, D width, H heads, E = H * d_kv, V vocabulary.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


# ------------------------------------------------------------------------------------ the sizes

@dataclass(frozen=True)
class Config:
    """Size, dialect and decoding settings of an encoder-decoder."""
    # size
    vocab: int
    d: int                                   # width of the residual stream
    heads: int
    d_kv: int                                # width of a head; on T5, heads * d_kv may be another
    ffn: int                                 # width inside the feed-forward
    layers: tuple[int, int]                  # encoder, decoder; no decoder layers: no decoder

    # dialect
    pre_norm: bool                           # T5 normalises before the sub-layer, BART after it
    rms: bool                                # RMSNorm or LayerNorm
    eps: float                               # of the norms
    bias: bool                               # biases in the Linears
    scale: bool                              # attention scores / sqrt(d_kv)
    positions: int = 0                       # rows of learned positions; 0: relative
    unused: int = 0                          # of these, rows before the first token's
    segments: int = 0                        # rows of the segment table (BERT), the first is used
    buckets: int = 32                        # rows of the relative table (T5)
    max_distance: int = 128                  # farther keys share the last row
    activation: str = "relu"                 # a key of ACTIVATIONS
    gated: bool = False                      # two Linears into the feed-forward, one is the gate
    tied: bool = True                        # the head is the word embedding
    head_scale: float = 1.0                  # logits from h * head_scale
    dropout: float = 0.1
    inner_dropout: bool = True               # also behind the feed-forward's activation
    pooler: bool = False                     # a Linear on the first state, before an answer head
    grid: tuple[int, int] = (0, 0)           # tables of a picture's rows and columns: rows, width

    # special tokens and decoding, as the published model has them
    pad: int = 0
    bos: int | None = None
    eos: int = 1
    start: int = 0                           # first decoder token
    no_repeat_ngram: int = 0                 # no n-gram of this length twice; 0: any
    early_stopping: bool = False             # stop at K finished beams
    forced_bos: int | None = None            # every answer begins with this token
    force_eos: bool = False                  # beams must end at the last position

    @property
    def is_t5(self) -> bool:
        return not self.positions


def bart(d: int, heads: int, ffn: int, layers: int, **other) -> Config:
    """BART of any size; `other` fields of Config as given."""
    fields = dict(
        vocab=50265, d=d, heads=heads, d_kv=d // heads, ffn=ffn, layers=(layers, layers),
        pre_norm=False, rms=False, eps=1e-5, bias=True, scale=True, positions=1026, unused=2,
        activation="gelu", pad=1, bos=0, eos=2, start=2,
        no_repeat_ngram=3, early_stopping=True, force_eos=True)
    return Config(**fields | other)


def t5(d: int, heads: int, ffn: int, layers: int, v11: bool = False, **other) -> Config:
    """T5 v1.0 of any size, or v1.1 (and Flan-T5); `other` fields of Config as given."""
    head = dict(head_scale=d ** -0.5)
    if v11:
        head = dict(tied=False, gated=True, activation="gelu_tanh")
    fields = dict(
        vocab=32128, d=d, heads=heads, d_kv=64, ffn=ffn, layers=(layers, layers),
        pre_norm=True, rms=True, eps=1e-6, bias=False, scale=False)
    return Config(**fields | head | other)


def bert(d: int, heads: int, ffn: int, layers: int, **other) -> Config:
    """BERT of any size; `other` fields of Config as given."""
    fields = dict(
        vocab=30522, d=d, heads=heads, d_kv=d // heads, ffn=ffn, layers=(layers, 0),
        pre_norm=False, rms=False, eps=1e-12, bias=True, scale=True, positions=512, segments=2,
        activation="gelu", inner_dropout=False, pooler=True)
    return Config(**fields | other)


# Published sizes: such a model can be built without its weights (also on the meta device).
PRESETS = {
    #                     d   heads  ffn  layers
    "bart-base":     bart(768, 12, 3072, 6),
    "bart-large":    bart(1024, 16, 4096, 12),
    "t5-small":      t5(512, 8, 2048, 6),
    "t5-base":       t5(768, 12, 3072, 12),
    "t5-large":      t5(1024, 16, 4096, 24),
    "t5-v1_1-small": t5(512, 6, 1024, 8, v11=True),
    "t5-v1_1-base":  t5(768, 12, 2048, 12, v11=True),
    "t5-v1_1-large": t5(1024, 16, 2816, 24, v11=True),
    "clip-vil":      bert(768, 12, 3072, 12, grid=(25, 2560)),
}
for size in ("small", "base", "large"):
    PRESETS[f"flan-t5-{size}"] = PRESETS[f"t5-v1_1-{size}"]


# -------------------------------------------------------------------------------- the sub-layers

class Linear(nn.Linear):
    """A Linear with a site behind it: h = W x + b; h' = tune(h, x, ctx)."""

    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias)
        self.register_module("tune", None)               # the site, empty: a module may come here

    def forward(self, x: Tensor, ctx=None) -> Tensor:
        h = super().forward(x)
        return h if self.tune is None else self.tune(h, x, ctx)


class Attention(nn.Module):
    """softmax(q k^T * scale + mask) v in H heads, then o."""

    def __init__(self, config: Config):
        super().__init__()
        inner = config.heads * config.d_kv                                  # E
        self.q, self.k, self.v = (Linear(config.d, inner, config.bias) for _ in range(3))
        self.o = Linear(inner, config.d, config.bias)
        self.d_kv, self.dropout = config.d_kv, config.dropout
        # T5 was trained without 1 / sqrt(d_kv): its initial q is smaller by that factor instead.
        self.scale = config.d_kv ** -0.5 if config.scale else 1.0

    def split(self, x: Tensor) -> Tensor:
        """The heads side by side (B, S, E) -> each for itself (B, H, S, d_kv)."""
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)

    def keys_values(self, x: Tensor, ctx=None) -> tuple[Tensor, Tensor]:
        return self.split(self.k(x, ctx)), self.split(self.v(x, ctx))       # B, H, S, d_kv

    def forward(self, x: Tensor, ctx=None, mask: Tensor | None = None, causal: bool = False,
                past: tuple[Tensor, Tensor] | None = None,
                cross: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, D) -> the output (B, T, D), and the keys and values that were read.

        x attends to itself, after the keys and values `past`, if there are any; with `cross` to
        `past` alone. mask: broadcasts to (B, H, T, S), True = visible, or a float bias.
        """
        q = self.q(x, ctx)                                                  # B, T, E
        if cross:
            k, v = past                                                     # of the encoder
            # Beams are queries of one item: (B * beams, 1) tokens read (B, S) keys as (B, beams),
            # so that the keys and values of the encoder are never repeated for each beam.
            q = q.view(k.size(0), -1, q.size(-1))                           # B, beams * T, E
        else:
            k, v = self.keys_values(x, ctx)
            if past is not None:
                k = torch.cat([past[0], k], 2)                              # B, H, past + T, d_kv
                v = torch.cat([past[1], v], 2)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)                      # autocast makes q bf16, the bias is fp32
        dropout = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(self.split(q), k, v, mask, dropout, causal,
                                           scale=self.scale)                # B, H, beams * T, d_kv
        h = h.transpose(1, 2).reshape(x.size(0), x.size(1), -1)             # B, T, E
        return self.o(h, ctx), (k, v)


class Hidden(nn.Module):
    """The site between a feed-forward's activation and its second Linear; without `tune`, h."""

    def __init__(self, config: Config):
        super().__init__()
        self.in_features, self.out_features = config.d, config.ffn          # of what is installed
        self.register_module("tune", None)

    def forward(self, h: Tensor, x: Tensor, ctx=None) -> Tensor:
        return h if self.tune is None else self.tune(h, x, ctx)


class FeedForward(nn.Module):
    """wo(act(wi x)); gated: wo(act(wg x) * wi x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        self.wi = Linear(config.d, config.ffn, config.bias)
        self.wg = Linear(config.d, config.ffn, config.bias) if config.gated else None
        self.hidden = Hidden(config)
        self.wo = Linear(config.ffn, config.d, config.bias)
        self.act = ACTIVATIONS[config.activation]
        self.dropout = config.dropout if config.inner_dropout else 0.0

    def forward(self, x: Tensor, ctx=None) -> Tensor:
        h = self.wi(x, ctx)                                                 # B, S, ffn
        h = self.act(h) if self.wg is None else self.act(self.wg(x, ctx)) * h
        h = self.hidden(h, x, ctx)
        h = dropout(h, self.dropout, self.training)
        return self.wo(h, ctx)                                              # B, S, D


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout. On the CPU that takes a seventh of BART-base's training step: it draws a float64
    for each unit and keeps a mask of floats. Here 16 random bits and a mask of bytes do the same.
    """
    if not training or p == 0 or x.is_cuda or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64, device=x.device)
    bits = bits.random_(-2**63, None)
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)                 # -32768 .. 32767
    dropped = min(round(p * 2**16), 2**16 - 1)           # of 65,536 equally likely values
    return torch.where(bits >= dropped - 2**15, x * (2**16 / (2**16 - dropped)), 0.0)


class Embedding(nn.Embedding):
    """nn.Embedding, but nothing is drawn on the meta device: that would import a compiler, 1 s."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def make_norm(config: Config) -> nn.Module:
    if config.rms:
        return nn.RMSNorm(config.d, config.eps)          # x / rms(x) * weight: no mean, no bias
    return nn.LayerNorm(config.d, config.eps)


class SubLayer(nn.Module):
    """Where residual, norm, dropout and tuning meet.

        h = f(norm(x))              T5;  BART: f(x)
        h = tune(h, x, ctx)         x is the residual stream, on T5 un-normalised
        x = x + dropout(h)          BART: then norm
    """

    def __init__(self, config: Config, f: nn.Module):
        super().__init__()
        self.f, self.norm = f, make_norm(config)
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.register_module("tune", None)

    def forward(self, x: Tensor, ctx=None, **attention) -> tuple[Tensor, tuple | None]:
        """x (B, S, D) -> the same shape, and an attention's keys and values."""
        h = self.f(self.norm(x) if self.pre_norm else x, ctx, **attention)
        keys_values = None
        if isinstance(h, tuple):                         # an attention's, for the decoder's cache
            h, keys_values = h
        if self.tune is not None:
            h = self.tune(h, x, ctx)
        x = x + dropout(h, self.dropout, self.training)
        if not self.pre_norm:
            x = self.norm(x)
        return x, keys_values


# ----------------------------------------------------------------------------------- the stacks

class Block(nn.Module):
    """The sub-layers of one layer; `encode` and `decode` below run them in this order."""

    def __init__(self, config: Config, decoder: bool):
        super().__init__()
        self.self_attn = SubLayer(config, Attention(config))
        self.cross_attn = SubLayer(config, Attention(config)) if decoder else None
        self.ffn = SubLayer(config, FeedForward(config))


class Stack(nn.Module):
    """Encoder or decoder: its blocks, and what surrounds them (positions, norms)."""

    def __init__(self, config: Config, decoder: bool):
        super().__init__()
        self.config, self.decoder = config, decoder
        learned = config.positions > 0
        self.positions = Embedding(config.positions, config.d) if learned else None
        self.segments = Embedding(config.segments, config.d) if config.segments else None
        self.embed_norm = make_norm(config) if learned else None
        # One table for all blocks: the published name puts it into the first one.
        self.relative = None if learned else Embedding(config.buckets, config.heads)
        depth = config.layers[1 if decoder else 0]
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(depth))
        self.norm = make_norm(config) if config.pre_norm else None
        self.register_module("tune", None)          # the encoder's: writes a prompt before the text

    def embed(self, words: Tensor, offset: int = 0, prompt: Tensor | None = None,
              visual: Tensor | None = None) -> Tensor:
        """words (B, L, D), the first one at `offset` -> [prompt | words | visual] (B, S, D)."""
        x = words
        if self.positions is not None:
            end, rows = offset + words.size(1), self.config.positions - self.config.unused
            assert end <= rows, f"{end} tokens, but this model has {rows} positions"
            # BART counts from its padding id + 1: its first two rows are never read.
            place = self.config.unused + offset + torch.arange(words.size(1), device=words.device)
            x = x + self.positions(place)                # prompt and visual tokens have none
        if self.segments is not None:
            x = x + self.segments.weight[0]              # the only text is the first segment
        if prompt is not None:
            x = torch.cat([prompt, x], 1)                                   # B, P + L, D
        if self.embed_norm is not None:
            x = self.embed_norm(x)                       # not over visual tokens: they have a norm
        if visual is not None:
            x = torch.cat([x, visual], 1)                                   # B, S, D
        return dropout(x, self.config.dropout, self.training)

    def finish(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        # A pre-norm stream was never normalised itself: T5 does so once, after the last block.
        return dropout(self.norm(x), self.config.dropout, self.training)

    def bias(self, queries: int, keys: int) -> Tensor:
        """T5's relative position bias (1, H, queries, keys) of the last `queries` positions."""
        place = torch.arange(keys, device=self.relative.weight.device)
        distance = place - place[keys - queries:, None]                     # queries, keys
        rows = relative_bucket(distance, not self.decoder, self.config.buckets,
                               self.config.max_distance)
        return self.relative(rows).permute(2, 0, 1)[None]                   # 1, H, queries, keys


def relative_bucket(distance: Tensor, both_ways: bool, buckets: int, max_distance: int) -> Tensor:
    """distance = key - query -> row of the relative table (T5, section 2.1), the same shape.

    The decoder looks back only. Of the encoder's rows the second half is for keys to the right.
    """
    row = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        row = row + (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    # The first half: a row for each distance 0, 1, ..., near - 1. The second half: rows that widen,
    #   near + log(distance / near) / log(max_distance / near) * (buckets - near), rounded down.
    near = buckets // 2
    # In fp32 and in this order: another rounding moves the borders from where T5 learnt them.
    widest = torch.log(torch.tensor(max_distance / near)).item()
    far = torch.log(distance.clamp(min=1).float() / near) / widest * (buckets - near)
    far = (near + far.long()).clamp(max=buckets - 1)     # max_distance and beyond: the last row
    return row + torch.where(distance < near, distance, far)


# ------------------------------------------------------------------------------------ the model

class Grid(nn.Module):
    """CLIP-ViL's positions of a picture's cells, added to CLIP's features: X[row] + Y[column]."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.rows, self.columns = Embedding(rows, width), Embedding(rows, width)

    def forward(self, boxes: Tensor) -> Tensor:
        """Boxes (B, N, 4) of the cells, x1, x2, y1, y2 in 0..1, row by row -> (B, N, F)."""
        x1, x2, y1, y2 = boxes.unbind(-1)                                   # B, N each
        row, column = y1 / (y2 - y1), x1 / (x2 - x1)     # cells are of one width and height
        row, column = row.nan_to_num(), column.nan_to_num()         # padding has no box: 0 / 0
        return self.rows(row.round().long()) + self.columns(column.round().long())


class EncoderDecoder(nn.Module):
    """BART, T5 or BERT with sites. Parameters are named by place: `decoder.blocks.0.ffn.f.wi`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab, config.d)      # of encoder, decoder and tied head
        self.encoder, writes = Stack(config, False), config.layers[1] > 0
        self.decoder = Stack(config, True) if writes else None
        own_head = writes and not config.tied
        self.head = nn.Linear(config.d, config.vocab, bias=False) if own_head else None
        # BART was published with a bias on its logits, all zeros and never trained.
        bias = torch.zeros(1, config.vocab) if writes and config.positions else None
        self.register_buffer("logits_bias", bias)
        self.pooler = nn.Linear(config.d, config.d) if config.pooler else None
        self.grid = Grid(*config.grid) if config.grid[0] else None
        self.checkpoint = False                          # keep no activations of encoder blocks

    def encode(self, ids: Tensor, visual: Tensor | None = None, seen: Tensor | None = None,
               ctx=None) -> tuple[Tensor, Tensor]:
        """Text and visual tokens -> states (B, S, D) of [prompt | text | visual], mask (B, S).

        ids (B, L), visual (B, N, D), seen (B, N): False on padding among the visual tokens.
        """
        encoder, words = self.encoder, self.shared(ids)                     # B, L, D
        # mask: True where a token is seen, the prompt, text and visual tokens but padding.
        prompt, parts = None, [ids != self.config.pad]                      # B, L
        if encoder.tune is not None:
            prompt = encoder.tune(words, words, ctx)                        # B, P, D
            parts.insert(0, ids.new_ones(prompt.shape[:2], dtype=torch.bool))
        if visual is not None:
            all_seen = ids.new_ones(visual.shape[:2], dtype=torch.bool)
            parts.append(all_seen if seen is None else seen)
        mask = torch.cat(parts, 1)                                          # B, S
        if ctx is not None:
            ctx = replace(ctx, mask=mask)                # some tuning methods average over tokens
        x = encoder.embed(words, 0, prompt, visual)                         # B, S, D
        attend = mask[:, None, None, :]                                     # B, 1, 1, S
        if encoder.relative is not None:
            # Prompt and text have relative positions; a pair with a visual token has bias 0.
            N = 0 if visual is None else visual.size(1)
            text = x.size(1) - N                                            # P + L
            bias = F.pad(encoder.bias(text, text), (0, N, 0, N))            # 1, H, S, S
            attend = bias.masked_fill(~attend, float("-inf"))               # B, H, S, S

        def run(x: Tensor, block: Block) -> Tensor:
            x, _ = block.self_attn(x, ctx, mask=attend)
            return block.ffn(x, ctx)[0]
        for block in encoder.blocks:
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(run, x, block, use_reentrant=False)
            else:
                x = run(x, block)
        return encoder.finish(x), mask

    def pooled(self, memory: Tensor, first: int) -> Tensor:
        """States (B, S, D) -> of the text's first token, on which an answer is chosen, (B, D)."""
        state = memory[:, first]
        # BERT's pooler has a tanh here; CLIP-ViL was trained without it.
        return state if self.pooler is None else self.pooler(state)

    def start_cache(self, memory: Tensor, ctx=None) -> list[list]:
        """Of each decoder block [self-attention's past (k, v) or None, cross-attention's (k, v)].

        The first grows with every token, the second is made once, with whatever is tuned there.
        """
        blocks = self.decoder.blocks
        return [[None, block.cross_attn.f.keys_values(memory, ctx)] for block in blocks]

    def decode(self, ids: Tensor, mask: Tensor, cache: list[list], ctx=None) -> Tensor:
        """Decoder ids (B, T), the encoder's mask (B, S), a cache -> hidden states (B, T, D).

        A fresh cache: all tokens at once (training). A filled one: ids (B, 1), or (B * K, 1) of K
        beams, are the next token. The cache is brought up to date in place.
        """
        decoder, T = self.decoder, ids.size(1)
        past = cache[0][0]
        offset = 0 if past is None else past[0].size(2)  # tokens that were decoded before
        assert not offset or T == 1, f"a filled cache takes one token at a time, not {T}"
        x = decoder.embed(self.shared(ids), offset)                         # B, T, D
        # No token sees a later one. The next token, after a past, sees all of it.
        attend, causal = None, past is None
        if decoder.relative is not None:
            attend, causal = decoder.bias(T, offset + T), False             # 1, H, T, offset + T
            if past is None:
                future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
                attend = attend.masked_fill(future, float("-inf"))
        visible = mask[:, None, None, :]                                    # B, 1, 1, S
        for block, layer in zip(decoder.blocks, cache):
            x, layer[0] = block.self_attn(x, ctx, mask=attend, causal=causal, past=layer[0])
            x, _ = block.cross_attn(x, ctx, mask=visible, past=layer[1], cross=True)
            x, _ = block.ffn(x, ctx)
        return decoder.finish(x)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., D) -> scores of the next token (..., V)."""
        if self.config.head_scale != 1:
            h = h * self.config.head_scale               # T5 v1.0: its embedding has variance 1
        scores = F.linear(h, self.shared.weight if self.head is None else self.head.weight)
        return scores if self.logits_bias is None else scores + self.logits_bias

    def shift_right(self, labels: Tensor) -> Tensor:
        """Labels -> decoder input [start, labels[:-1]] (B, T); -100 (no target) becomes padding."""
        start = labels.new_full((labels.size(0), 1), self.config.start)
        ids = torch.cat([start, labels[:, :-1]], 1)
        return ids.masked_fill(ids == -100, self.config.pad)

    def forward(self, ids: Tensor, labels: Tensor, visual=None, ctx=None) -> Tensor:
        """Teacher forcing: text ids (B, L) and labels (B, T) -> logits (B, T, V)."""
        memory, mask = self.encode(ids, visual, None, ctx)
        cache = self.start_cache(memory, ctx)
        return self.logits(self.decode(self.shift_right(labels), mask, cache, ctx))

    @torch.no_grad()
    def resize(self, vocab: int) -> "EncoderDecoder":
        """Appends rows for added tokens, up to `vocab`."""
        new, d = vocab - self.config.vocab, self.config.d
        # A seed of their own: these rows are frozen and in no adapter file; all runs draw the same.
        generator = torch.Generator().manual_seed(0)
        std = 1.0 if self.config.is_t5 else 0.02
        words = torch.empty(new, d).normal_(std=std, generator=generator)
        grown = [(self.shared, words)]                   # and a tied head with the words
        if self.head is not None:
            # Trap: rows of N(0, 1) would win every softmax of an own head, whose scores are not
            # scaled down. These are a fresh Linear's, U(-1 / sqrt(d), 1 / sqrt(d)).
            rows = torch.empty(new, d).uniform_(-d ** -0.5, d ** -0.5, generator=generator)
            grown.append((self.head, rows))
        for owner, rows in grown:
            owner.weight = nn.Parameter(torch.cat([owner.weight, rows.to(owner.weight)]))
        if self.logits_bias is not None:
            self.logits_bias = F.pad(self.logits_bias, (0, new))
        self.config = replace(self.config, vocab=vocab)
        return self

    @torch.no_grad()
    def init_weights(self) -> "EncoderDecoder":
        """Random weights, drawn as each dialect's were before its training."""
        config = self.config
        # BART: N(0, 0.02), meant for a width of 768. A narrower model gets the same variance of
        # sums, 0.02 sqrt(768 / d). T5: variance 1 / fan-in; q makes up for the missing scale.
        bart_std = 0.02 * max(1.0, 768 / config.d) ** 0.5
        fan_in = {"shared": 1, "q": config.d * config.d_kv, "o": config.heads * config.d_kv,
                  "wo": config.ffn}
        for name, parameter in self.named_parameters():
            module, kind = name.rsplit(".", 2)[-2:]      # "q", "weight"
            if "norm" in module or kind == "bias":
                nn.init.constant_(parameter, float(kind == "weight"))
            elif config.is_t5:
                nn.init.normal_(parameter, std=fan_in.get(module, config.d) ** -0.5)
            else:
                nn.init.normal_(parameter, std=bart_std)
        return self
