"""t5.py against transformers: files in its layout, the same numbers, the same tokens."""
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
import t5
from support import weights
from support.published_lm import load_lm, table
from world import pretrain_lm

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
VOCAB, LENGTH = 80, 50                                    # more tokens than T5's max_distance of 20


def t5_config(**other):
    return transformers.T5Config(**dict(
        vocab_size=VOCAB, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3,
        num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
        decoder_start_token_id=0) | other)


def bart_config(**other):
    return transformers.BartConfig(**dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
        decoder_attention_heads=4, max_position_embeddings=64) | other)


def build(config, folder, dtype=torch.float32, **save):
    kind = transformers.BartForConditionalGeneration
    if config.model_type == "t5":
        kind = transformers.T5ForConditionalGeneration
    theirs = tiny.randomize(kind(config)).to(dtype)
    with torch.no_grad():
        theirs.get_output_embeddings().weight[config.eos_token_id] *= 3        # some answers end
    theirs.save_pretrained(folder, **save)


def edit_config(folder, **changes):
    """A change of ... takes the field out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def own_head(folder, feed_forward="gated-gelu", resaved=False):
    """T5 v1.1 and Flan as Google published them; or resaved by transformers 5, which says of a
    model with its own head, too, that it is tied."""
    build(t5_config(feed_forward_proj=feed_forward, tie_word_embeddings=False), folder)
    head = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1)) * 0.2
    head[1] *= 3
    edit_weights(folder, lambda w: w.update({"lm_head.weight": head}))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    if not resaved:
        edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=...)


def left_over(folder):
    """Google's T5 v1.0 files: copies of tied tensors, and a table that no model reads."""
    build(t5_config(), folder)
    edit_weights(folder, lambda w: w.update({
        **{f"{s}.weight": w["shared.weight"].clone()
           for s in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")},
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 4)
    }))


def headless(folder):
    """BART as BartModel saves it: no prefix, no final_logits_bias."""
    tiny.randomize(transformers.BartModel(bart_config())).save_pretrained(folder)
    assert "shared.weight" in load_file(folder / "model.safetensors")


def copies(folder):
    build(bart_config(), folder)
    edit_weights(folder, lambda w: w.update({
        f"{name}.weight": w["model.shared.weight"].clone()
        for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens")}))


def shards(folder):
    build(t5_config(), folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def t5_form(**other):
    return lambda folder: build(t5_config(**other), folder)


def bart_form(dtype=torch.float32, **other):
    return lambda folder: build(bart_config(**other), folder, dtype)


# Heads of T5 are 4 x 6 or 4 x 10 wide, its width is 32; encoders have two layers, decoders three.
PUBLISHED = {
    "t5": t5_form(), "t5 with copies": left_over, "t5 in shards": shards,
    "t5 gelu": t5_form(feed_forward_proj="gelu"),
    "t5 gated relu": t5_form(feed_forward_proj="gated-relu", d_kv=10),
    "t5 own head": lambda folder: own_head(folder, "relu"),
    "t5 bf16": lambda folder: build(t5_config(), folder, torch.bfloat16),
    "flan": own_head, "flan by transformers 5": lambda folder: own_head(folder, resaved=True),
    "bart": bart_form(), "bart with copies": copies, "bart without head": headless,
    "bart relu": bart_form(activation_function="relu"), "bart fp16": bart_form(torch.float16),
}
FORMS = ["t5", "t5 gated relu", "t5 own head", "flan", "bart", "bart relu"]
every_form = pytest.mark.parametrize("name", FORMS)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> (folder, transformers' model, ours), each made once."""
    @cache
    def make(name):
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        PUBLISHED[name](folder)
        kind = ("T5" if "t5" in name or "flan" in name else "Bart") + "ForConditionalGeneration"
        theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
        return folder, theirs.eval(), load_lm(folder)
    return make


def texts(pad: int, size: int = 3, length: int = LENGTH, seed: int = 0):
    ids = torch.randint(3, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))
    for i in range(1, size):
        ids[i, max(2, length - 3 * i):] = pad
    return ids


def names(config):
    return table(config, "" if config.is_t5 else "model.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_numbers(published, name):
    _, theirs, ours = published(name)
    c = ours.config
    ids, labels = texts(c.pad), texts(-100, length=30, seed=1)
    out = theirs(input_ids=ids, attention_mask=ids != c.pad, output_hidden_states=True,
                 decoder_input_ids=ours.shift_right(labels))
    memory, mask = ours.encode(ids)
    hidden = ours.decode(ours.shift_right(labels), mask, ours.start_cache(memory))
    real = mask[..., None]
    for a, b in ((memory * real, out.encoder_last_hidden_state * real),
                 (hidden, out.decoder_hidden_states[-1]),
                 (ours(ids, labels), out.logits)):
        assert b.std() > 0.1
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy
    loss(out.logits.flatten(0, 1), labels.flatten()).backward()
    loss(ours(ids, labels).flatten(0, 1), labels.flatten()).backward()
    for name, parameter in ours.named_parameters():
        want = theirs.get_parameter(weights.to_published(name, names(c))[0]).grad
        scale = want.abs().max().clamp(min=1e-3)         # a key's bias has a true gradient of 0
        torch.testing.assert_close(parameter.grad / scale, want / scale, atol=3e-5, rtol=0)
    theirs.zero_grad()
    ours.zero_grad()


@every_form
def test_published_names_and_back(published, name):
    """What transformers wrote, bit for bit: it can read what is saved under these names."""
    folder, _, ours = published(name)
    found = weights.published(ours, names(ours.config))
    found.pop("final_logits_bias", None)                  # a buffer, which it leaves out today
    written = load_file(folder / "model.safetensors")
    written.pop("final_logits_bias", None)
    assert tiny.same_state(found, written)


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, h, x, ctx):
        return self.factor * h


@every_form
def test_sites_of_a_feed_forward(published, name):
    """wo(5 (act(2 wg x) * 3 wi x)); without a gate wo(5 act(3 wi x))."""
    f = load_lm(published(name)[0]).encoder.blocks[0].ffn.f
    x = torch.randn(3, 5, 32)
    h = f.act(3 * f.wi(x)) if f.wg is None else f.act(2 * f.wg(x)) * 3 * f.wi(x)
    want = f.wo(5 * h)
    for site, factor in ((f.wg, 2), (f.wi, 3), (f.hidden, 5)):
        if site is not None:
            site.tune = Times(factor)
    torch.testing.assert_close(f(x), want)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (16, 64)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_relative_bucket(both_ways, buckets, max_distance):
    distance = torch.arange(-700, 701)
    want = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        distance, both_ways, buckets, max_distance)
    assert t5.relative_bucket(distance, both_ways, buckets, max_distance).equal(want)


# ------------------------------------------------------------------------------------ decoding

def text_only(ids):
    """A batch whose pictures have no tokens."""
    empty = ids.new_zeros(len(ids), 0)
    return SimpleNamespace(tasks=("vqa",) * len(ids), input_ids=ids, image_ids=empty,
                           order_ids=empty, seen=None,
                           feats=torch.zeros(len(ids), 0, 4), boxes=torch.zeros(len(ids), 0, 4))


def answers(tokens, eos):
    """Rows without the start token, up to EOS (transformers' beams are padded with EOS on T5)."""
    rows = [row[1:] for row in tokens.tolist()]
    return [row[:row.index(eos) + 1] if eos in row else row for row in rows]


@pytest.mark.parametrize("beams, ngram, forced_bos", [(1, 0, None), (1, 2, 9), (4, 0, 9),
                                                      (4, 3, None)])
@every_form
def test_same_tokens(published, name, beams, ngram, forced_bos):
    """Beams where today's rules are the papers' (golden files hold the rest): with early_stopping
    and a forced EOS. Without, today's count a beam that did not end as one token shorter, and
    otherwise guess whether a longer answer could still win."""
    folder, theirs, _ = published(name)
    ours = load_lm(folder)
    c = ours.config = replace(ours.config, force_eos=True, forced_bos=forced_bos,
                              no_repeat_ngram=ngram, early_stopping=True)
    ids = texts(c.pad, 24, 9)
    # Its cache has as many layers as T5's encoder: too few for our decoders. Today's transformers
    # forces EOS at the last position in greedy decoding as well.
    want = answers(theirs.generate(
        ids, attention_mask=(ids != c.pad).long(), do_sample=False, max_length=14, use_cache=False,
        num_beams=beams, no_repeat_ngram_size=ngram, forced_bos_token_id=forced_bos,
        forced_eos_token_id=None if beams == 1 else c.eos, early_stopping=beams > 1), c.eos)
    assert len({tuple(row) for row in want}) > 6 and len({len(row) for row in want}) > 1
    got = model.VLModel(ours, 4).generate(text_only(ids), beams, 14)
    assert answers(got, c.eos) == want


@every_form
def test_step_by_step_is_the_full_forward(published, name):
    ours = published(name)[2]
    ids, target = texts(ours.config.pad), texts(0, length=24, seed=2)
    with torch.no_grad():
        memory, mask = ours.encode(ids)
        full = ours.decode(target, mask, ours.start_cache(memory))
        cache = ours.start_cache(memory)
        parts = [ours.decode(target[:, :3], mask, cache)]
        parts += [ours.decode(target[:, i:i + 1], mask, cache) for i in range(3, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="one token at a time"):
        ours.decode(target[:, :2], mask, cache)


# ------------------------------------------------------------------------------------ precision

@every_form
def test_half_precision(published, name):
    folder, _, ours = published(name)
    low = load_lm(folder).bfloat16()
    ids, labels = texts(low.config.pad), texts(-100, length=9)
    logits, exact = low(ids, labels), ours(ids, labels)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert (logits - exact).abs().mean() < 0.1 * exact.std()


def test_text_longer_than_the_positions(published):
    ours = published("bart")[2]
    assert ours.encode(texts(1, 1, 64))[0].isfinite().all()
    with pytest.raises(AssertionError, match="65 tokens, but this model has 64 positions"):
        ours.encode(texts(1, 1, 65))


# ------------------------------------------------------------------------------------ sizes

SIZES = {                                                # parameters, heads
    "bart-base": (139_420_416, 12), "bart-large": (406_291_456, 16),
    "t5-small": (60_506_624, 8), "t5-base": (222_903_552, 12), "t5-large": (737_668_096, 16),
    "t5-v1_1-small": (76_961_152, 6), "t5-v1_1-base": (247_577_856, 12),
    "t5-v1_1-large": (783_150_080, 16), "clip-vil": (109_610_240, 12)}


@pytest.mark.parametrize("name", t5.PRESETS)
def test_preset_size(name):
    with torch.device("meta"):
        model = t5.EncoderDecoder(t5.PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (count, model.config.heads) == SIZES[name.replace("flan-t5", "t5-v1_1")]


# ------------------------------------------------------------------------------------ new rows

@every_form
def test_resize(published, name):
    """Old tokens keep their rows and scores; the new rows are the same in every run."""
    folder = published(name)[0]
    torch.manual_seed(1)
    a = load_lm(folder).resize(100)
    torch.manual_seed(2)
    b = load_lm(folder).resize(100)
    assert tiny.same_state(a.state_dict(), b.state_dict())
    ids, labels = texts(a.config.pad), texts(-100, length=9)
    logits = a(ids, labels)
    assert logits.shape[-1] == a.config.vocab == 100
    torch.testing.assert_close(logits[..., :VOCAB], published(name)[2](ids, labels))
    std = a.shared.weight[VOCAB:].std().item()
    assert abs(std - (1.0 if a.config.is_t5 else 0.02)) < 0.1 * std
    if a.head is not None:                                # as transformers leaves them
        rows, bound = a.head.weight[VOCAB:], 32 ** -0.5
        assert bound * 0.95 < rows.abs().max() <= bound
        assert abs(rows.std() - bound / 3 ** 0.5) < 0.05 * bound


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-bart"])
def test_added_words_win_nothing(name):
    """The first loss of a trained model, on described scenes: that of the model without them."""
    folder = Path(t5.__file__).parent / "weights" / name
    ours = load_lm(folder)
    ids, bags, labels = pretrain_lm.Reader(folder).batch(Random(0), ("vqa", "list"), "bags", 32)

    def loss():
        logits = pretrain_lm.answer_logits(ours, ids, bags, labels)
        return model.token_loss(logits, labels).sum().item() / (labels >= 0).sum().item()

    with torch.no_grad():
        before = loss()
        ours.resize(model.vocabulary(ours.config))
        assert before <= loss() < before + 0.01              # nats a token


@pytest.mark.parametrize("config", [
    t5.bart(32, 4, 48, 2, vocab=VOCAB, positions=66), t5.t5(32, 4, 48, 2, vocab=VOCAB),
    t5.t5(32, 4, 48, 2, v11=True, vocab=VOCAB)])
def test_a_fresh_model_guesses(config):
    """Random weights, added words: a loss of about log V, with whatever head."""
    torch.manual_seed(0)
    fresh = t5.EncoderDecoder(config).init_weights().resize(VOCAB + 200).eval()
    labels = texts(-100, 8, 9)
    loss = model.token_loss(fresh(texts(config.pad, 8), labels), labels).sum() / (labels >= 0).sum()
    assert abs(loss.item() - math.log(VOCAB + 200)) < 1


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    """On the CPU: as many units as said, the others scaled up so that the sum is expected to stay;
    the gradient passes where the unit did. p is met to 1 / 65,536."""
    torch.manual_seed(0)
    x = torch.full((300, 333, 7), 2.0, requires_grad=True)
    y = t5.dropout(x, p, True)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - p)), rtol=1e-4, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)
    assert t5.dropout(x, p, False) is x and t5.dropout(x, 0.0, True) is x
    # The masks of four neighbours come from one random number: they are independent all the same.
    flat = kept.flatten()[:-4].float()
    for shift in (1, 2, 3, 4):
        other = kept.flatten()[shift:][:len(flat)].float()
        assert abs(((flat - 1 + p) * (other - 1 + p)).mean()) < 5 * p * (1 - p) / len(flat) ** 0.5
