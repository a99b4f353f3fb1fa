"""How do a published T5's or BART's config.json and tensor names become ours?

    model = load_lm("weights/tiny-bart")         # a folder as on the Hugging Face hub

Everything that changes a number is read or refused: sizes, dialect and decoding settings that
this code cannot reproduce exactly are named, never passed over.

    python -m pytest tests/test_published.py
"""
from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import torch

from support import weights
from support.gate import Number, check, read_json, reading
from t5 import Config, EncoderDecoder, bart, t5

# ---------------------------------------------------------------------------- what a config says

SIZE = Number(1, 2**24, whole=True)
LAYERS = Number(1, 999, whole=True)
COUNT = Number(0, 2**24, whole=True)                     # a token's id, the length of an n-gram
DROPOUT = Number(0, 0.999999)
EPS = Number(1e-30, 1)

# Fields of config.json; a missing one has the value that transformers gives it.
T5_FIELDS = {
    "vocab_size": SIZE, "d_model": SIZE, "num_heads": SIZE, "d_kv": SIZE, "d_ff": SIZE,
    "num_layers": LAYERS, "num_decoder_layers?": LAYERS,
    "relative_attention_num_buckets": Number(4, 2**16, whole=True),
    "relative_attention_max_distance": SIZE,
    "feed_forward_proj": {"relu", "gelu", "gated-relu", "gated-gelu"},
    "tie_word_embeddings": bool, "scale_decoder_outputs?": bool,
    "layer_norm_epsilon": EPS, "dropout_rate": DROPOUT,
}
T5_DEFAULTS = {
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}
BART_FIELDS = {
    "vocab_size": SIZE, "d_model": SIZE,
    "encoder_attention_heads": SIZE, "decoder_attention_heads": SIZE,
    "encoder_ffn_dim": SIZE, "decoder_ffn_dim": SIZE,
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": SIZE,
    "activation_function": {"relu", "gelu"}, "dropout": DROPOUT,
    # mBART, which has the same names, says otherwise
    "scale_embedding?": {False}, "normalize_before?": {False}, "add_final_layer_norm?": {False},
    "normalize_embedding?": {True},
}
BART_DEFAULTS = {
    "activation_function": "gelu", "dropout": 0.1, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}

# Decoding settings, in config.json or generation_config.json (which wins).
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
          "forced_bos_token_id", "forced_eos_token_id")
NEUTRAL = {                       # settings that are not followed: refused, unless they do nothing
    "do_sample": False, "repetition_penalty": 1, "encoder_repetition_penalty": 1,
    "length_penalty": 1, "diversity_penalty": 0, "num_beam_groups": 1, "min_length": 0,
    "min_new_tokens": 0, "encoder_no_repeat_ngram_size": 0, "suppress_tokens": [],
    "begin_suppress_tokens": [], "bad_words_ids": [], "force_words_ids": [], "sequence_bias": [],
    "forced_decoder_ids": [], "exponential_decay_length_penalty": [], "penalty_alpha": 0,
    "guidance_scale": 1,
}


def read_settings(path: Path) -> dict:
    """The fields of one file that are not null, its decoding settings checked."""
    with reading(path):
        fields = {name: value for name, value in read_json(path).items() if value is not None}
        if isinstance(fields.get("eos_token_id"), list):
            assert len(fields["eos_token_id"]) == 1, "an answer has one 'eos_token_id' here"
            fields["eos_token_id"] = fields["eos_token_id"][0]
        check(fields, {f"{name}?": COUNT for name in TOKENS})
        check(fields, {"no_repeat_ngram_size?": COUNT, "early_stopping?": bool})
        for name, neutral in NEUTRAL.items():
            value = fields.get(name, neutral)
            assert value == neutral, (f"{name!r} is {value!r:.60}, which decoding here does not "
                                      "follow: take the field out to do without")
    return fields


def read_config(folder: str | Path) -> Config:
    """Config of a published folder: config.json and, where there is one, generation_config.json."""
    path = Path(folder) / "config.json"
    fields = read_settings(path)
    generation = path.with_name("generation_config.json")
    if generation.exists():
        fields |= read_settings(generation)
    with reading(path):
        kind, = check(fields, {"model_type": {"t5", "bart"}})
        if kind == "t5":
            fields = T5_DEFAULTS | fields
            config = t5_config(fields)
        else:
            fields = BART_DEFAULTS | fields
            config = bart_config(fields)
        for name in TOKENS:
            assert fields.get(name, 0) < config.vocab, f"{name!r} is no row of the vocabulary"
        # BART learns to begin its answers with <s>: forcing <s> there changes nothing.
        forced = {"forced_bos_token_id": config.bos, "forced_eos_token_id": config.eos}
        for name, given in forced.items():
            assert fields.get(name, given) == given, f"{name!r} can only be {given} here"
    return replace(
        config, pad=fields["pad_token_id"], eos=fields["eos_token_id"],
        start=fields["decoder_start_token_id"],
        no_repeat_ngram=fields.get("no_repeat_ngram_size", 0),
        early_stopping=fields.get("early_stopping", False))


def t5_config(fields: dict) -> Config:
    check(fields, T5_FIELDS)
    buckets = fields["relative_attention_num_buckets"]
    distance = fields["relative_attention_max_distance"]
    assert distance > buckets // 2, f"{buckets} relative positions need a larger maximal distance"
    gated = fields["feed_forward_proj"].startswith("gated-")
    activation = fields["feed_forward_proj"].removeprefix("gated-")
    if gated and activation == "gelu":
        activation = "gelu_tanh"
    # transformers 5 calls every T5 tied, and says beside it whether h is scaled.
    tied = fields["tie_word_embeddings"]
    scaled = fields.get("scale_decoder_outputs", tied)
    layers = fields["num_layers"]
    config = t5(fields["d_model"], fields["num_heads"], fields["d_ff"], layers)
    return replace(
        config, vocab=fields["vocab_size"], d_kv=fields["d_kv"],
        layers=(layers, fields.get("num_decoder_layers", layers)), buckets=buckets,
        max_distance=distance, activation=activation, gated=gated, tied=tied,
        head_scale=config.d ** -0.5 if scaled else 1.0, eps=fields["layer_norm_epsilon"],
        dropout=fields["dropout_rate"])


def bart_config(fields: dict) -> Config:
    check(fields, BART_FIELDS)
    d, heads, ffn = fields["d_model"], fields["encoder_attention_heads"], fields["encoder_ffn_dim"]
    assert d % heads == 0, f"{heads} attention heads do not divide a d_model of {d}"
    for name in ("attention_heads", "ffn_dim"):
        same = fields[f"encoder_{name}"] == fields[f"decoder_{name}"]
        assert same, f"'encoder_{name}' and 'decoder_{name}' differ; here they are one"
    return replace(
        bart(d, heads, ffn, fields["encoder_layers"]), vocab=fields["vocab_size"],
        layers=(fields["encoder_layers"], fields["decoder_layers"]),
        positions=fields["max_position_embeddings"] + 2, activation=fields["activation_function"],
        dropout=fields["dropout"], bos=fields["bos_token_id"])


# ------------------------------------------------------------------------ what tensors are called

# (published, ours): a module, with all that lies below it. {i} is a layer's number, {s} encoder or
# decoder, {n} which sub-layer of a T5 block is the feed-forward. The first row that fits wins.
BART = [
    ("shared", "shared"),
    ("{s}.embed_positions", "{s}.positions"),
    ("{s}.layernorm_embedding", "{s}.embed_norm"),
    ("{s}.layers.{i}.self_attn.q_proj", "{s}.blocks.{i}.self_attn.f.q"),
    ("{s}.layers.{i}.self_attn.k_proj", "{s}.blocks.{i}.self_attn.f.k"),
    ("{s}.layers.{i}.self_attn.v_proj", "{s}.blocks.{i}.self_attn.f.v"),
    ("{s}.layers.{i}.self_attn.out_proj", "{s}.blocks.{i}.self_attn.f.o"),
    ("{s}.layers.{i}.self_attn_layer_norm", "{s}.blocks.{i}.self_attn.norm"),
    ("decoder.layers.{i}.encoder_attn.q_proj", "decoder.blocks.{i}.cross_attn.f.q"),
    ("decoder.layers.{i}.encoder_attn.k_proj", "decoder.blocks.{i}.cross_attn.f.k"),
    ("decoder.layers.{i}.encoder_attn.v_proj", "decoder.blocks.{i}.cross_attn.f.v"),
    ("decoder.layers.{i}.encoder_attn.out_proj", "decoder.blocks.{i}.cross_attn.f.o"),
    ("decoder.layers.{i}.encoder_attn_layer_norm", "decoder.blocks.{i}.cross_attn.norm"),
    ("{s}.layers.{i}.fc1", "{s}.blocks.{i}.ffn.f.wi"),
    ("{s}.layers.{i}.fc2", "{s}.blocks.{i}.ffn.f.wo"),
    ("{s}.layers.{i}.final_layer_norm", "{s}.blocks.{i}.ffn.norm"),
    ("{s}.embed_tokens", "shared"),                                              # tied copies
]
BART_HEAD = [("final_logits_bias", "logits_bias"), ("lm_head", "shared")]        # never prefixed
T5 = [
    ("shared", "shared"),
    ("{s}.block.0.layer.0.SelfAttention.relative_attention_bias", "{s}.relative"),
    ("{s}.block.{i}.layer.0.SelfAttention", "{s}.blocks.{i}.self_attn.f"),       # q, k, v, o
    ("{s}.block.{i}.layer.0.layer_norm", "{s}.blocks.{i}.self_attn.norm"),
    # Left over in Google's files; no model ever read it.
    ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias", None),
    ("decoder.block.{i}.layer.1.EncDecAttention", "decoder.blocks.{i}.cross_attn.f"),
    ("decoder.block.{i}.layer.1.layer_norm", "decoder.blocks.{i}.cross_attn.norm"),
    ("{s}.block.{i}.layer.{n}.DenseReluDense", "{s}.blocks.{i}.ffn.f"),          # wi, wo
    ("{s}.block.{i}.layer.{n}.layer_norm", "{s}.blocks.{i}.ffn.norm"),
    ("{s}.final_layer_norm", "{s}.norm"),
    ("{s}.embed_tokens", "shared"),                                              # tied copies
]
T5_GATED = [
    ("{s}.block.{i}.layer.{n}.DenseReluDense.wi_0", "{s}.blocks.{i}.ffn.f.wg"),
    ("{s}.block.{i}.layer.{n}.DenseReluDense.wi_1", "{s}.blocks.{i}.ffn.f.wi"),
]


def table(config: Config, prefix: str = "") -> weights.Table:
    """The rename table of a model; prefix: "model." where a BART file has it."""
    if config.is_t5:
        rows = [("lm_head", "shared" if config.tied else "head")]
        rows = T5[:1] + (T5_GATED if config.gated else []) + T5[1:] + rows
    else:
        rows = [(prefix + published, ours) for published, ours in BART] + BART_HEAD
    found = {}                                # a dictionary, since a row without {s} comes up twice
    for published, ours in rows:
        for stack, ffn in (("encoder", "1"), ("decoder", "2")):
            name = published.replace("{s}", stack).replace("{n}", ffn)
            found[name] = ours and ours.replace("{s}", stack)
    return list(found.items())


def load_lm(folder: str | Path, dropout: float | None = None) -> EncoderDecoder:
    """The model of a published folder (config.json, model.safetensors), in eval mode and fp32.

    dropout: another one than the config's. Raises BadInput or OSError, which name what is wrong.
    """
    config = read_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    source = weights.read(folder)
    if config.is_t5 and config.head_scale == 1 and "lm_head.weight" in source:
        config = replace(config, tied=False)             # T5 v1.1, whatever its config calls it
    prefix = "model." if any(name.startswith("model.") for name in source) else ""
    if not config.is_t5 and "final_logits_bias" not in source:       # BART saved without its head
        source = ChainMap({"final_logits_bias": torch.zeros(1, config.vocab)}, source)
    with reading(folder):                                # sizes that no memory holds
        with torch.device("meta"):                       # no random numbers that are overwritten
            model = EncoderDecoder(config)
        model.to_empty(device="cpu")
    weights.load(model, source, table(config, prefix), where=str(folder))
    return model.eval()
