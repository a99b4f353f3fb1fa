"""How do T5 and BART turn tokens into tokens?

One encoder-decoder in two dialects (T5: Raffel et al. 2020, arXiv 1910.10683; BART: Lewis et al.
2020, arXiv 1910.13461). This is the whole lesson, what differs between them:

                      BART                              T5
    norm              LayerNorm, after the residual     RMSNorm, before the sub-layer, 1 at the end
    positions         learned, added to the words       relative, a bias on the attention scores
    embedding         LayerNorm over word + position    nothing
    attention scale   1 / sqrt(d_kv)                    1 (folded into the weights)
    biases            in every Linear                   nowhere
    feed-forward      GELU                              ReLU; v1.1 and Flan: gated GELU (tanh)
    head              tied, plus a bias buffer          tied, scaled by d^-0.5; v1.1 and Flan: own
    decoder starts    with </s>                         with <pad>

A *site* is where a tuning method may act: behind every sub-layer and behind every Linear of an
attention or a feed-forward stands `tune`, None until model.py installs a function (h, x) -> h'.

    python -m pytest tests/test_t5.py
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S encoder tokens (prompt P, text L, visual N), T target tokens, D width, H heads,
# E = H * d_kv, V vocabulary.


@dataclass(frozen=True)
class Config:
    """Size and dialect of an encoder-decoder. The first block is size, the second dialect."""
    vocab: int
    d: int
    heads: int
    d_kv: int
    ffn: int
    layers: tuple[int, int]                  # encoder, decoder

    pre_norm: bool                           # T5 normalises before the sub-layer, BART after it
    rms: bool                                # RMSNorm or LayerNorm
    eps: float
    bias: bool                               # biases in the Linears
    scale: bool                              # attention scores / sqrt(d_kv)
    positions: int = 0                       # rows of learned positions (BART); 0: relative
    buckets: int = 32                        # rows of the relative table (T5)
    max_distance: int = 128
    activation: str = "relu"                 # a key of ACTIVATIONS
    gated: bool = False
    tied: bool = True                        # the head is the word embedding
    head_scale: float = 1.0                  # logits from h * head_scale
    dropout: float = 0.1
    pad: int = 0
    bos: int | None = None
    eos: int = 1
    start: int = 0                           # first decoder token
    no_repeat_ngram: int = 0                 # decoding settings that a published model carries
    early_stopping: bool = False
    force_eos: bool = False                  # beams must end at the last position

    @property
    def is_t5(self) -> bool:
        return not self.positions


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def bart(d: int, heads: int, ffn: int, layers: int, **other) -> Config:
    return Config(**dict(
        vocab=50265, d=d, heads=heads, d_kv=d // heads, ffn=ffn, layers=(layers, layers),
        pre_norm=False, rms=False, eps=1e-5, bias=True, scale=True, positions=1026,
        activation="gelu", pad=1, bos=0, eos=2, start=2,
        no_repeat_ngram=3, early_stopping=True, force_eos=True) | other)


def t5(d: int, heads: int, ffn: int, layers: int, v11: bool = False, **other) -> Config:
    head = (dict(tied=False, gated=True, activation="gelu_tanh") if v11 else
            dict(head_scale=d ** -0.5))
    return Config(**dict(
        vocab=32128, d=d, heads=heads, d_kv=64, ffn=ffn, layers=(layers, layers),
        pre_norm=True, rms=True, eps=1e-6, bias=False, scale=False) | head | other)


# A model of a published size can be built without its weights (also on the meta device).
PRESETS = {
    "bart-base": bart(768, 12, 3072, 6), "bart-large": bart(1024, 16, 4096, 12),
    "t5-small": t5(512, 8, 2048, 6), "t5-base": t5(768, 12, 3072, 12),
    "t5-large": t5(1024, 16, 4096, 24),
    "t5-v1_1-small": t5(512, 6, 1024, 8, v11=True), "t5-v1_1-base": t5(768, 12, 2048, 12, v11=True),
    "t5-v1_1-large": t5(1024, 16, 2816, 24, v11=True),
}
PRESETS |= {f"flan-t5-{s}": PRESETS[f"t5-v1_1-{s}"] for s in ("small", "base", "large")}


# ---------------------------------------------------------------------------------- the machine

class Linear(nn.Linear):
    """A Linear with a site behind it: h = W x + b; h' = tune(h, x, ctx)."""

    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias)
        self.register_module("tune", None)

    def forward(self, x: Tensor, ctx=None) -> Tensor:
        h = super().forward(x)
        return h if self.tune is None else self.tune(h, x, ctx)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        inner = c.heads * c.d_kv
        self.q, self.k, self.v = (Linear(c.d, inner, c.bias) for _ in range(3))
        self.o = Linear(inner, c.d, c.bias)
        self.d_kv, self.dropout = c.d_kv, c.dropout
        self.scale = c.d_kv ** -0.5 if c.scale else 1.0

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_kv)).transpose(1, 2)             # B, H, S, d_kv

    def keys_values(self, x: Tensor, ctx=None) -> tuple[Tensor, Tensor]:
        return self.split(self.k(x, ctx)), self.split(self.v(x, ctx))

    def forward(self, x: Tensor, ctx=None, mask: Tensor | None = None, causal: bool = False,
                past: tuple[Tensor, Tensor] | None = None,
                cross: bool = False) -> tuple[Tensor, tuple]:
        """x (B, T, D) attends to itself (behind `past` keys and values, if any) or, with `cross`,
        to `past` alone. mask: True = visible, or a float bias. Returns the output and (k, v)."""
        q = self.q(x, ctx)
        if cross:
            k, v = past
            # Beams are queries of one item: (B * beams, 1) tokens read (B, S) keys as (B, beams),
            # so that the keys and values of the encoder are never repeated for each beam.
            q = q.view(k.size(0), -1, q.size(-1))
        else:
            k, v = self.keys_values(x, ctx)
            if past is not None:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(self.split(q), k, v, mask, dropout, causal,
                                           scale=self.scale)
        h = h.transpose(1, 2).reshape(x.size(0), x.size(1), -1)             # B, T, E
        return self.o(h, ctx), (k, v)


class Hidden(nn.Module):
    """The site between a feed-forward's activation and its second Linear."""

    def __init__(self, c: Config):
        super().__init__()
        self.in_features, self.out_features = c.d, c.ffn
        self.register_module("tune", None)

    def forward(self, h: Tensor, x: Tensor, ctx=None) -> Tensor:
        return h if self.tune is None else self.tune(h, x, ctx)


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.wi = Linear(c.d, c.ffn, c.bias)
        self.wg = Linear(c.d, c.ffn, c.bias) if c.gated else None
        self.hidden = Hidden(c)
        self.wo = Linear(c.ffn, c.d, c.bias)
        self.act, self.dropout = ACTIVATIONS[c.activation], c.dropout

    def forward(self, x: Tensor, ctx=None) -> Tensor:
        h = self.wi(x, ctx)
        h = self.act(h) if self.wg is None else self.act(self.wg(x, ctx)) * h
        h = self.hidden(h, x, ctx)
        return self.wo(F.dropout(h, self.dropout, self.training), ctx)


def make_norm(c: Config) -> nn.Module:
    return nn.RMSNorm(c.d, c.eps) if c.rms else nn.LayerNorm(c.d, c.eps)


class SubLayer(nn.Module):
    """Where residual, norm, dropout and tuning meet.

        h = f(norm(x))              T5;  BART: f(x)
        h = tune(h, x, ctx)         x is the residual stream, on T5 un-normalised
        x = x + dropout(h)          BART: then norm
    """

    def __init__(self, c: Config, f: nn.Module):
        super().__init__()
        self.f, self.norm = f, make_norm(c)
        self.pre_norm, self.dropout = c.pre_norm, c.dropout
        self.register_module("tune", None)

    def forward(self, x: Tensor, ctx=None, **attention) -> tuple[Tensor, tuple | None]:
        h = self.f(self.norm(x) if self.pre_norm else x, ctx, **attention)
        h, kv = h if isinstance(h, tuple) else (h, None)
        if self.tune is not None:
            h = self.tune(h, x, ctx)
        x = x + F.dropout(h, self.dropout, self.training)
        return x if self.pre_norm else self.norm(x), kv


class Block(nn.Module):
    def __init__(self, c: Config, decoder: bool):
        super().__init__()
        self.self_attn = SubLayer(c, Attention(c))
        self.cross_attn = SubLayer(c, Attention(c)) if decoder else None
        self.ffn = SubLayer(c, FeedForward(c))


class Stack(nn.Module):
    """Encoder or decoder: what surrounds the blocks (positions, norms, masks)."""

    def __init__(self, c: Config, decoder: bool):
        super().__init__()
        self.config, self.decoder = c, decoder
        self.positions = nn.Embedding(c.positions, c.d) if c.positions else None
        self.embed_norm = make_norm(c) if c.positions else None
        self.relative = None if c.positions else nn.Embedding(c.buckets, c.heads)
        self.blocks = nn.ModuleList(Block(c, decoder) for _ in range(c.layers[decoder]))
        self.norm = make_norm(c) if c.pre_norm else None
        self.register_module("tune", None)          # the encoder's: writes a prompt before the text

    def embed(self, words: Tensor, offset: int = 0, prompt: Tensor | None = None,
              visual: Tensor | None = None) -> Tensor:
        """[prompt | words | visual]: only words have positions; BART's norm leaves visual alone."""
        x = words
        if self.positions is not None:
            t = offset + torch.arange(words.size(1), device=words.device)
            if offset + words.size(1) > self.positions.num_embeddings - 2:
                raise ValueError(f"{offset + words.size(1)} tokens, but this model has "
                                 f"{self.positions.num_embeddings - 2} positions: shorten the text")
            x = x + self.positions(t + 2)                   # BART's first two rows are never used
        if prompt is not None:
            x = torch.cat([prompt, x], 1)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if visual is not None:
            x = torch.cat([x, visual], 1)                                   # B, P + L + N, D
        return F.dropout(x, self.config.dropout, self.training)

    def finish(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        return F.dropout(self.norm(x), self.config.dropout, self.training)

    def bias(self, queries: int, keys: int) -> Tensor:
        """T5's relative position bias (1, H, queries, keys) of the last `queries` positions."""
        place = torch.arange(keys, device=self.relative.weight.device)
        distance = place - place[keys - queries:, None]
        rows = relative_bucket(distance, not self.decoder, self.config.buckets,
                               self.config.max_distance)
        return self.relative(rows).permute(2, 0, 1)[None]


def relative_bucket(distance: Tensor, both_ways: bool, buckets: int, max_distance: int) -> Tensor:
    """distance = key - query -> row of the relative table (T5, section 2.1).

    Near distances have a row each, far ones share rows that widen logarithmically up to
    max_distance; the encoder spends half its rows on keys to the right of the query.
    """
    row = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        row, distance = row + (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    near = buckets // 2
    # The logarithm is taken in fp32 and in this order, so that borders fall where T5 learnt them.
    far = near + (torch.log(distance.clamp(min=1).float() / near)
                  / torch.log(torch.tensor(max_distance / near)).item() * (buckets - near)).long()
    return row + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


class EncoderDecoder(nn.Module):
    """BART or T5 with sites. Parameters are named by place: `decoder.blocks.0.cross_attn.f.v`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab, config.d)
        self.encoder, self.decoder = Stack(config, False), Stack(config, True)
        self.head = None if config.tied else nn.Linear(config.d, config.vocab, bias=False)
        bias = torch.zeros(1, config.vocab) if config.positions else None
        self.register_buffer("logits_bias", bias)

    def encode(self, ids: Tensor, visual: Tensor | None = None, seen: Tensor | None = None,
               ctx=None) -> tuple[Tensor, Tensor]:
        """ids (B, L), visual (B, N, D), seen (B, N) False on padding among the visual tokens ->
        states (B, S, D) of [prompt | text | visual] and their mask (B, S)."""
        enc, words = self.encoder, self.shared(ids)
        prompt = None if enc.tune is None else enc.tune(words, words, ctx)
        mask = self.encoder_mask(ids, prompt, visual, seen)
        ctx = None if ctx is None else replace(ctx, mask=mask)
        x = enc.embed(words, 0, prompt, visual)
        attend = mask[:, None, None, :]                                     # B, 1, 1, S
        if enc.relative is not None:
            text = x.size(1) - (0 if visual is None else visual.size(1))
            n = x.size(1) - text                            # a pair with a visual token has bias 0
            attend = F.pad(enc.bias(text, text), (0, n, 0, n)).masked_fill(~attend, float("-inf"))
        for block in enc.blocks:
            x, _ = block.self_attn(x, ctx, mask=attend)
            x, _ = block.ffn(x, ctx)
        return enc.finish(x), mask

    def encoder_mask(self, ids: Tensor, prompt: Tensor | None, visual: Tensor | None,
                     seen: Tensor | None) -> Tensor:
        """True (B, S) where a token is seen: the prompt, text and visual tokens but padding."""
        parts = [ids != self.config.pad]
        if prompt is not None:
            parts.insert(0, ids.new_ones(prompt.shape[:2], dtype=torch.bool))
        if visual is not None:
            parts.append(ids.new_ones(visual.shape[:2], dtype=torch.bool) if seen is None else seen)
        return torch.cat(parts, 1)

    def start_cache(self, memory: Tensor, ctx=None) -> list[list]:
        """One [past self-attention (k, v) or None, cross-attention (k, v)] a decoder block: the
        keys and values of the encoder's output, with whatever is tuned there, computed once."""
        return [[None, b.cross_attn.f.keys_values(memory, ctx)] for b in self.decoder.blocks]

    def decode(self, ids: Tensor, mask: Tensor, cache: list[list], ctx=None) -> Tensor:
        """Decoder ids (B, T), the encoder's mask (B, S), a cache -> hidden states (B, T, D).

        With a filled cache, ids are the next tokens only; the cache is brought up to date in place.
        """
        dec, T = self.decoder, ids.size(1)
        offset = 0 if cache[0][0] is None else cache[0][0][0].size(2)
        if offset and T > 1:
            raise ValueError(f"a filled cache takes one token at a time, not {T}")
        x = dec.embed(self.shared(ids), offset)
        seen, causal = None, T > 1
        if dec.relative is not None:
            seen, causal = dec.bias(T, offset + T), False
            if T > 1:
                future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
                seen = seen.masked_fill(future, float("-inf"))
        for block, kv in zip(dec.blocks, cache):
            x, kv[0] = block.self_attn(x, ctx, mask=seen, causal=causal, past=kv[0])
            x, _ = block.cross_attn(x, ctx, mask=mask[:, None, None, :], past=kv[1], cross=True)
            x, _ = block.ffn(x, ctx)
        return dec.finish(x)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states (..., D) -> scores of the next token (..., V)."""
        h = h * self.config.head_scale if self.config.head_scale != 1 else h
        y = F.linear(h, self.shared.weight if self.head is None else self.head.weight)
        return y if self.logits_bias is None else y + self.logits_bias

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder input [start, labels[:-1]]; -100 (no target) becomes padding. (B, T)"""
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
        """More rows for added tokens: N(0, 0.02) on BART, N(0, 1) on T5. They have a seed of their
        own: they stay frozen and are in no adapter file, so every run must draw the same."""
        new, law = vocab - self.config.vocab, torch.Generator().manual_seed(0)
        for owner in (self.shared, self.head):
            if owner is not None:
                w = owner.weight
                rows = torch.empty(new, w.size(1)).normal_(std=1.0 if self.config.is_t5 else 0.02,
                                                           generator=law)
                owner.weight = nn.Parameter(torch.cat([w, rows.to(w)]))
        if self.logits_bias is not None:
            self.logits_bias = F.pad(self.logits_bias, (0, new))
        self.config = replace(self.config, vocab=vocab)
        return self

    @torch.no_grad()
    def init_weights(self) -> "EncoderDecoder":
        """Random weights by the law each dialect was trained from. BART's N(0, 0.02) is meant for
        a width of 768: a smaller model gets the same variance of sums, 0.02 sqrt(768 / d)."""
        c = self.config
        for name, p in self.named_parameters():
            last, kind = name.rsplit(".", 2)[-2:]
            if "norm" in last or kind == "bias":
                nn.init.constant_(p, float(kind == "weight"))
            elif not c.is_t5:
                nn.init.normal_(p, std=0.02 * max(1.0, 768 / c.d) ** 0.5)
            else:                                   # T5: variance 1 / fan-in, q also / d_kv
                fan = {"shared": 1, "q": c.d * c.d_kv, "o": c.heads * c.d_kv, "wo": c.ffn}
                fan = fan.get(last, c.d)
                nn.init.normal_(p, std=fan ** -0.5)
        return self
