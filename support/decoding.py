"""How is a text found, token by token, when a model scores the next one?

Greedily, or by a beam search that keeps the K best beginnings. The rules are those of the
generation code that the papers used (transformers 4.2.1); they reproduce every sequence of the
golden files.

    python -m pytest tests/test_model.py tests/test_golden.py

Axes: B batch, K beams, t tokens so far, V vocabulary.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from t5 import Config


def ban_repeats(scores: Tensor, ids: Tensor, n: int) -> Tensor:
    """-inf for every token that would complete an n-gram which ids (rows, t) already hold."""
    t = ids.size(1)
    if n == 0 or t < n:
        return scores
    grams = ids.unfold(1, n, 1)                                             # rows, t - n + 1, n
    again = (grams[..., :-1] == ids[:, None, t - n + 1:]).all(-1)           # rows, t - n + 1
    row, place = again.nonzero(as_tuple=True)
    banned = grams[row, place, -1]
    return scores.index_put((row, banned), scores.new_tensor(float("-inf")))


def force(logp: Tensor, token: int) -> Tensor:
    """Leaves one token alone, with log p = 0; every other one gets -inf."""
    forced = torch.full_like(logp, float("-inf"))
    forced[:, token] = 0
    return forced


def greedy(step: Callable, ids: Tensor, c: Config, max_length: int) -> Tensor:
    """Arg-max decoding; after EOS comes padding. step(ids) -> scores (B, V)."""
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.size(1) < max_length and not done.all():
        scores = ban_repeats(step(ids), ids, c.no_repeat_ngram)             # B, V
        if ids.size(1) == 1 and c.forced_bos is not None:
            scores = force(scores, c.forced_bos)
        token = scores.argmax(-1)                                           # B
        token = token.masked_fill(done, c.pad)
        ids = torch.cat([ids, token[:, None]], 1)
        done |= token == c.eos
    return ids


class Hypotheses:
    """The K best finished texts of each of B items, kept on the device.

    A hypothesis holds no EOS and scores sum(log p) / length, where length counts the start token.
    """

    def __init__(self, B: int, K: int, max_length: int, pad: int, device: torch.device):
        self.pad = pad
        self.score = torch.full((B, K), float("-inf"), device=device)
        self.text = torch.full((B, K, max_length), pad, device=device)
        self.length = torch.zeros(B, K, dtype=torch.long, device=device)

    def add(self, items: Tensor, logp: Tensor, ids: Tensor, allowed: Tensor) -> None:
        """Candidates of b items: sum(log p) (b, K), tokens (b, K, t), which of them count (b, K).
        """
        t, (_, K, max_length) = ids.size(-1), self.text.shape
        score = torch.where(allowed, logp / t, float("-inf"))
        text = F.pad(ids, (0, max_length - t), value=self.pad)              # b, K, max_length
        length = torch.full_like(self.length[items], t)
        self.score[items], best = torch.cat([self.score[items], score], 1).topk(K)
        rows = best[..., None].expand(-1, -1, max_length)
        self.text[items] = torch.cat([self.text[items], text], 1).gather(1, rows)
        self.length[items] = torch.cat([self.length[items], length], 1).gather(1, best)


def beam_search(step: Callable, start: Tensor, c: Config, max_length: int,
                K: int) -> tuple[Tensor, Tensor]:
    """K beams, all on the device. step(ids, keep, items) -> scores (B * K, V) of the next token;
    keep: which rows of the step before live on, items: which items, if some have left.

    Returns token ids (B, K, max_length), best first, and their sum(log p) (B, K)."""
    device, keep, items = start.device, None, None
    ids = start.repeat_interleave(K, 0)                                     # B * K, t
    score = torch.full((len(start), K), -1e9, device=device)
    score[:, 0] = 0                            # all beams start alike: only the first one counts
    finished = Hypotheses(len(start), K, max_length, c.pad, device)
    active = torch.arange(len(start), device=device)     # the items that are still written

    while ids.size(1) < max_length and len(active):
        t, B = ids.size(1), len(active)
        first_row = torch.arange(B, device=device)[:, None] * K             # B, 1
        logp = ban_repeats(step(ids, keep, items).log_softmax(-1), ids, c.no_repeat_ngram)
        if c.forced_bos is not None and t == 1:
            logp = force(logp, c.forced_bos)                                # B * K, V
        if c.force_eos and t == max_length - 1:
            logp = force(logp, c.eos)
        V = logp.size(-1)
        total = (score.view(-1, 1) + logp).view(B, K * V)
        best, i = total.topk(2 * K)                                         # B, 2K, best first
        row, token = first_row + i // V, i % V
        ends = token == c.eos
        # An end among the first K candidates is a hypothesis, a later one is forgotten.
        finished.add(active, best[:, :K], ids[row[:, :K]], ends[:, :K])
        worst = finished.score[active].min(1).values     # -inf where there are fewer than K
        enough = worst.isfinite() & (c.early_stopping | (worst >= best[:, 0] / t))
        # The K best candidates that go on: a stable sort moves the ended ones to the end.
        live = ends.long().sort(dim=1, stable=True).indices[:, :K]          # B, K
        score, keep, token = best.gather(1, live), row.gather(1, live), token.gather(1, live)
        items = None
        if enough.any():                       # who is done leaves: fewer rows from now on
            items = (~enough).nonzero()[:, 0]
            active, score, keep, token = active[items], score[items], keep[items], token[items]
        keep = keep.flatten()
        ids = torch.cat([ids[keep], token.view(-1, 1)], 1)

    # Items that are not done add their live beams.
    every = torch.ones_like(score, dtype=torch.bool)
    finished.add(active, score, ids.view(*score.shape, ids.size(1)), every)
    # The end of a hypothesis goes back in where there is room.
    end = torch.arange(max_length, device=device) == finished.length[..., None]
    return finished.text.masked_fill(end, c.eos), finished.score * finished.length
