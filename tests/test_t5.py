"""t5.py against transformers: files in its layout, the same numbers, the same tokens."""
import json
import os
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
import t5
from support import weights
from support.published_lm import load_lm, read_config, table

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
VOCAB, LENGTH = 80, 50                                    # more tokens than T5's max_distance of 20


def t5_config(**other):
    return transformers.T5Config(**dict(
        vocab_size=VOCAB, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3,
        num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
        decoder_start_token_id=0) | other)


def bart_config(**other):
    sizes = {f"{s}_{k}": v for s in ("encoder", "decoder")
             for k, v in (("ffn_dim", 48), ("attention_heads", 4))}
    return transformers.BartConfig(**dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, **sizes,
        max_position_embeddings=64, attention_dropout=0.1, activation_dropout=0.1) | other)


def build(config, folder, dtype=torch.float32, **save):
    name = "T5" if config.model_type == "t5" else "Bart"
    m = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    m = tiny.randomize(m).to(dtype)
    with torch.no_grad():
        m.get_output_embeddings().weight[config.eos_token_id] *= 3             # some answers end
    m.save_pretrained(folder, **save)
    return m


def edit_config(folder, **changes):
    """A change of ... takes the field out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    w = load_file(path)
    change(w)
    save_file(w, path, {"format": "pt"})


def own_head(folder):
    """As Google's T5 v1.1 and Flan are published: a head of its own, a left-over table."""
    law = torch.Generator().manual_seed(1)
    head = torch.randn(VOCAB, 32, generator=law) * 0.2
    head[1] *= 3
    edit_weights(folder, lambda w: w.update({"lm_head.weight": head}))


def flan(folder):
    build(t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False), folder)
    own_head(folder)
    edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=...)


def flan_resaved(folder):
    """transformers 5 writes tie_word_embeddings true for it."""
    build(t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False), folder)
    own_head(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


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


PUBLISHED = {
    "t5": lambda f: build(t5_config(), f), "t5 with copies": left_over, "t5 in shards": shards,
    "t5 gelu": lambda f: build(t5_config(feed_forward_proj="gelu"), f),
    "t5 bf16": lambda f: build(t5_config(), f, torch.bfloat16),
    "flan": flan, "flan by transformers 5": flan_resaved,
    "bart": lambda f: build(bart_config(), f), "bart with copies": copies,
    "bart without head": headless,
    "bart fp16": lambda f: build(bart_config(), f, torch.float16),
}


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


# gradients to compare: theirs, ours
GRADIENTS = {
    "t5": [("shared.weight", "shared.weight"),
           ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.relative.weight"),
           ("decoder.block.1.layer.1.EncDecAttention.v.weight",
            "decoder.blocks.1.cross_attn.f.v.weight")],
    "bart": [("model.shared.weight", "shared.weight"),
             ("model.encoder.embed_positions.weight", "encoder.positions.weight"),
             ("model.decoder.layers.1.encoder_attn.v_proj.weight",
              "decoder.blocks.1.cross_attn.f.v.weight")],
}


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
    for a, b in GRADIENTS["t5" if c.rms else "bart"]:
        want, got = theirs.get_parameter(a).grad, ours.get_parameter(b).grad
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(),
                                   atol=1e-5, rtol=0)
    theirs.zero_grad()
    ours.zero_grad()


def test_config_is_read_in_full(published, tmp_path):
    config = published("bart")[2].config
    assert (config.pad, config.bos, config.eos, config.start) == (1, 0, 2, 2)
    flan(tmp_path)
    edit_config(tmp_path, dropout_rate=0.3, layer_norm_epsilon=1e-3, early_stopping=None)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"no_repeat_ngram_size": 3, "eos_token_id": None}))
    c = read_config(tmp_path)
    assert (c.dropout, c.eps, c.no_repeat_ngram, c.early_stopping) == (0.3, 1e-3, 3, False)
    assert (c.layers, c.d_kv, c.gated, c.tied, c.eos) == ((2, 3), 6, True, False, 1)
    assert load_lm(tmp_path, dropout=0.0).config.dropout == 0


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


def they_generate(theirs, ids, **settings):
    """Its cache has as many layers as T5's encoder: too few for our decoders."""
    mask = (ids != theirs.config.pad_token_id).long()
    tokens = theirs.generate(ids, attention_mask=mask, do_sample=False, max_length=14,
                             use_cache=False, **settings)
    found = answers(tokens, theirs.config.eos_token_id)
    assert len({tuple(row) for row in found}) > 8 and len({len(row) for row in found}) > 1
    return found


@pytest.mark.parametrize("ngram", [0, 2])
@pytest.mark.parametrize("name", ["t5", "flan", "bart"])
def test_greedy_tokens(published, name, ngram):
    _, theirs, ours = published(name)
    c = ours.config
    ids = texts(c.pad, 24, 9)
    # Today's transformers forces EOS at the last position in greedy decoding as well.
    want = they_generate(theirs, ids, num_beams=1, no_repeat_ngram_size=ngram,
                         forced_eos_token_id=None)
    got = model.VLModel(ours, 4).generate(text_only(ids), max_length=14, no_repeat_ngram=ngram)
    assert answers(got, c.eos) == want


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize("name", ["t5", "flan", "bart"])
def test_beam_tokens(published, name, ngram):
    """Where today's rules are the papers' (golden files hold the rest): with early_stopping and a
    forced EOS. Without, today's count a beam that did not end as one token shorter, and otherwise
    guess whether a longer answer could still win."""
    folder, theirs, _ = published(name)
    ours = load_lm(folder)
    c = ours.config = replace(ours.config, force_eos=True)
    ids = texts(c.pad, 24, 9)
    want = they_generate(theirs, ids, num_beams=4, no_repeat_ngram_size=ngram,
                         forced_eos_token_id=c.eos, early_stopping=True)
    got = model.VLModel(ours, 4).generate(text_only(ids), 4, 14, ngram, early_stopping=True)
    assert answers(got, c.eos) == want


@pytest.mark.parametrize("name", ["t5", "flan", "bart"])
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
    with pytest.raises(ValueError, match="one token at a time"):
        ours.decode(target[:, :2], mask, cache)


# ------------------------------------------------------------------------------------ precision

def test_half_precision(published):
    folder, _, _ = published("t5")
    for name in ("t5", "flan", "bart"):
        folder, theirs, ours = published(name)
        low = load_lm(folder).bfloat16()
        ids, labels = texts(low.config.pad), texts(-100, length=9)
        logits, exact = low(ids, labels), ours(ids, labels)
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert (logits - exact).abs().mean() < 0.1 * exact.std()


# ------------------------------------------------------------------------------------ bad files

BAD_CONFIGS = {
    r"config.json: model_type is 'gpt2'; known are 't5', 'bart'": ("t5", {"model_type": "gpt2"}),
    r"config.json: model_type is 'mbart'": ("bart", {"model_type": "mbart"}),
    r"config.json: model_type is None": ("t5", {"model_type": ...}),
    r"config.json has no field 'd_kv'": ("t5", {"d_kv": ...}),
    r"config.json has no field 'encoder_ffn_dim'": ("bart", {"encoder_ffn_dim": ...}),
    r"config.json: scale_embedding is True": ("bart", {"scale_embedding": True}),
    r"config.json: normalize_before is True": ("bart", {"normalize_before": True}),
    r"config.json: activation_function is 'swish'": ("bart", {"activation_function": "swish"}),
    r"config.json: feed_forward_proj is 'gated-silu'": ("t5", {"feed_forward_proj": "gated-silu"}),
    r"config.json: encoder_ffn_dim and decoder_ffn_dim differ": ("bart", {"decoder_ffn_dim": 40}),
    # of the right form, but not this file's: the tensors tell
    r"missing: .*encoder.layers.2": ("bart", {"encoder_layers": 3}),
    r"unexpected: .*block.1": ("t5", {"num_layers": 1}),
    r"not fitting: .*shared.weight \(80, 32\) for \(81, 32\)": ("t5", {"vocab_size": 81}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_config(published, tmp_path, message):
    name, changes = BAD_CONFIGS[message]
    copy_folder(published(name)[0], tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_lm(tmp_path)


def copy_folder(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def mangle(name, content):
    return lambda folder: (folder / name).write_bytes(content)


NAME = "encoder.block.1.layer.0.SelfAttention.q.weight"
BAD_FILES = {
    r"config.json is missing": lambda f: os.remove(f / "config.json"),
    r"config.json is not valid JSON": mangle("config.json", b'{"model_type": "t5",'),
    r"config.json holds no JSON object": mangle("config.json", b"[]"),
    r"generation_config.json is not valid JSON": mangle("generation_config.json", b"\xff"),
    r"holds neither model.safetensors nor": lambda f: os.remove(f / "model.safetensors"),
    r"model.safetensors is truncated": lambda f: os.truncate(f / "model.safetensors", 5000),
    rf"missing: {NAME}": lambda f: edit_weights(f, lambda w: w.pop(NAME)),
    rf"not fitting: {NAME} \(24, 30\) for \(24, 32\)":
        lambda f: edit_weights(f, lambda w: w.update({NAME: torch.zeros(24, 30)})),
    r"unexpected: encoder.extra": lambda f: edit_weights(
        f, lambda w: w.update({"encoder.extra": torch.zeros(1)})),
    r"lm_head.weight differs from its copy|differs from its copy lm_head.weight":
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(VOCAB, 32)})),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_file(published, tmp_path, message):
    copy_folder(published("t5")[0], tmp_path)
    BAD_FILES[message](tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_lm(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_text_longer_than_the_positions(published):
    ours = published("bart")[2]
    assert ours.encode(texts(1, 1, 64))[0].isfinite().all()
    with pytest.raises(ValueError, match="65 tokens, but this model has 64 positions"):
        ours.encode(texts(1, 1, 65))


# ------------------------------------------------------------------------------------ sizes

SIZES = {"t5-small": (512, 8, 2048, 6), "t5-base": (768, 12, 3072, 12),
         "t5-large": (1024, 16, 4096, 24), "t5-v1_1-small": (512, 6, 1024, 8),
         "t5-v1_1-base": (768, 12, 2048, 12), "t5-v1_1-large": (1024, 16, 2816, 24),
         "bart-base": (768, 12, 3072, 6), "bart-large": (1024, 16, 4096, 12)}


@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name):
    d, heads, ffn, layers = SIZES[name]
    gated = {}
    if "v1_1" in name:
        gated = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.device("meta"):
        if name.startswith("bart"):
            theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(
                d_model=d, encoder_layers=layers, decoder_layers=layers, **{
                    f"{s}_{k}": v for s in ("encoder", "decoder")
                    for k, v in (("ffn_dim", ffn), ("attention_heads", heads))}))
        else:
            theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
                d_model=d, num_heads=heads, d_ff=ffn, num_layers=layers, **gated))
        ours = t5.EncoderDecoder(t5.PRESETS[name])
    # transformers 5 builds every T5 tied, and unties v1.1's head when a file brings one.
    count = theirs.num_parameters() + bool(gated) * theirs.lm_head.weight.numel()
    assert sum(p.numel() for p in ours.parameters()) == count
    assert name != "bart-base" or count == 139_420_416
    if gated:
        assert t5.PRESETS[name.replace("t5-v1_1", "flan-t5")] == t5.PRESETS[name]


# ------------------------------------------------------------------------------------ new rows

@pytest.mark.parametrize("name", ["t5", "flan", "bart"])
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
    assert abs(std - (1.0 if a.config.rms else 0.02)) < 0.1 * std


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_published_names_round_trip(kind, tmp_path):
    """Saved under published names by weights.py, transformers reads every tensor."""
    c = tiny.config(kind)
    ours = tiny.randomize(t5.EncoderDecoder(c)).eval()
    rows = table(c, "model." if kind == "bart" else "")
    weights.write(tmp_path / "model.safetensors", weights.published(ours, rows),
                  {"format": "pt"})
    config = (bart_config if kind == "bart" else t5_config)(**{
        "decoder_layers" if kind == "bart" else "num_decoder_layers": 2})
    config.save_pretrained(tmp_path)
    name = "Bart" if kind == "bart" else "T5"
    theirs, info = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids, labels = texts(c.pad), texts(-100, length=9)
    out = theirs.eval()(input_ids=ids, attention_mask=ids != c.pad,
                        decoder_input_ids=ours.shift_right(labels))
    torch.testing.assert_close(ours(ids, labels), out.logits, atol=1e-5, rtol=1e-5)
