"""How do a published T5's, BART's or BERT's config.json and tensor names become ours?

    model = load_lm("weights/tiny-bart")         # a folder as on the Hugging Face hub

Everything that changes a number is read or refused: sizes, dialect and decoding settings that
this code cannot reproduce exactly are named, never passed over.

    python -m pytest tests/test_published.py
"""
import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from answers import AnswerHead, transplant
from support import weights
from support.gate import Number, check, read_json, read_text, reading
from t5 import Config, EncoderDecoder, bart, bert, t5

# ---------------------------------------------------------------------------- what a config says

SIZE = Number(1, 2**24, whole=True)
LAYERS = Number(1, 200, whole=True)
COUNT = Number(0, 2**24, whole=True)                     # a token's id, the length of an n-gram
DROPOUT = Number(0, 0.999999)

# Field of config.json: (field of Config, what it may be). With "?" it may be missing: then it has
# the value that t5() and bart() give it, which is transformers' own.
FIELDS = {
    "vocab_size": ("vocab", SIZE), "d_model": ("d", SIZE),
    "pad_token_id?": ("pad", COUNT), "eos_token_id?": ("eos", COUNT),
    "decoder_start_token_id?": ("start", COUNT), "forced_bos_token_id?": ("forced_bos", COUNT),
    "no_repeat_ngram_size?": ("no_repeat_ngram", COUNT), "early_stopping?": ("early_stopping", bool)
}
T5_FIELDS = FIELDS | {
    "num_heads": ("heads", SIZE), "d_kv": ("d_kv", SIZE), "d_ff": ("ffn", SIZE),
    "relative_attention_num_buckets?": ("buckets", Number(4, 2**16, whole=True)),
    "relative_attention_max_distance?": ("max_distance", SIZE),
    "layer_norm_epsilon?": ("eps", Number(1e-30, 1)), "dropout_rate?": ("dropout", DROPOUT),
}
BART_FIELDS = FIELDS | {
    "encoder_attention_heads": ("heads", SIZE), "encoder_ffn_dim": ("ffn", SIZE),
    "activation_function?": ("activation", {"relu", "gelu"}),
    "dropout?": ("dropout", DROPOUT), "bos_token_id?": ("bos", COUNT),
}
BERT_FIELDS = {
    "vocab_size": ("vocab", SIZE), "hidden_size": ("d", SIZE),
    "num_hidden_layers": ("layers", LAYERS), "num_attention_heads": ("heads", SIZE),
    "intermediate_size": ("ffn", SIZE),
    "max_position_embeddings": ("positions", SIZE), "type_vocab_size?": ("segments", SIZE),
    "hidden_act?": ("activation", {"relu", "gelu"}), "layer_norm_eps?": ("eps", Number(1e-30, 1)),
    "hidden_dropout_prob?": ("dropout", DROPOUT), "pad_token_id?": ("pad", COUNT),
}
NEUTRAL = {                       # settings that are not followed: refused, unless they do nothing
    "do_sample": False, "repetition_penalty": 1, "encoder_repetition_penalty": 1,
    "length_penalty": 1, "diversity_penalty": 0, "num_beam_groups": 1, "min_length": 0,
    "min_new_tokens": 0, "encoder_no_repeat_ngram_size": 0, "suppress_tokens": [],
    "begin_suppress_tokens": [], "bad_words_ids": [], "force_words_ids": [], "sequence_bias": [],
    "forced_decoder_ids": [], "exponential_decay_length_penalty": [], "penalty_alpha": 0,
    "guidance_scale": 1, "renormalize_logits": False, "stop_strings": [], "dola_layers": [],
}


def read_fields(path: Path) -> dict:
    """The fields of one file; null says no more than a missing one, but for the forced end."""
    with reading(path):
        assert path.exists(), "it is not there: --lm is a folder, as tools.fetch leaves it"
        fields = {name: value for name, value in read_json(path).items()
                  if value is not None or name == "forced_eos_token_id"}
        for name, neutral in NEUTRAL.items():
            value = fields.get(name, neutral)
            assert value == neutral, (f"{name!r} is {value!r:.60}, which decoding here does not "
                                      "follow: take the field out to do without")
        ends = fields.get("eos_token_id")
        if isinstance(ends, list):
            assert len(ends) == 1, f"'eos_token_id' is {ends!r:.60}: an answer has one end here"
            fields["eos_token_id"] = ends[0]
    return fields


def read_config(folder: str | Path) -> Config:
    """Config of a published folder: config.json and, where there is one, generation_config.json."""
    path = Path(folder) / "config.json"
    fields = read_fields(path)
    generation = path.with_name("generation_config.json")
    if generation.exists():
        fields |= read_fields(generation)
    with reading(path):
        kind, = check(fields, {"model_type": set(DIALECTS)})
        config = DIALECTS[kind](fields)
        forced_eos, force_bos = check(fields, {
            "forced_eos_token_id?": {config.eos}, "force_bos_token_to_be_generated?": bool})
        if "forced_eos_token_id" in fields:              # without the field BART forces the end
            config = replace(config, force_eos=forced_eos is not None)
        if force_bos and config.forced_bos is None:      # how the first BARTs said it
            config = replace(config, forced_bos=config.bos)
        for name in ("pad", "bos", "eos", "start", "forced_bos"):
            token = getattr(config, name) or 0
            assert token < config.vocab, f"{name} token {token} is no row of {config.vocab} words"
    return config


def given(fields: dict, table: dict) -> dict:
    """The fields of Config for which a file has a value."""
    values = check(fields, {name: want for name, (_, want) in table.items()})
    found = zip(table.values(), values)
    return {ours: value for (ours, _), value in found if value is not None}


def t5_config(fields: dict) -> Config:
    fields = {"feed_forward_proj": "relu", "tie_word_embeddings": True} | fields
    feed_forward, tied, scaled, layers, decoder_layers = check(fields, {
        "feed_forward_proj": {"relu", "gelu", "gated-relu", "gated-gelu"},
        "tie_word_embeddings": bool, "scale_decoder_outputs?": bool,
        "num_layers": LAYERS, "num_decoder_layers?": LAYERS})
    gated, _, activation = feed_forward.rpartition("-")
    if gated and activation == "gelu":
        activation = "gelu_tanh"
    config = t5(layers=layers, **given(fields, T5_FIELDS))
    assert config.max_distance > config.buckets // 2, \
        f"{config.buckets} relative positions need a larger maximal distance"
    # transformers 5 calls every T5 tied, and says beside it whether h is scaled.
    scaled = tied if scaled is None else scaled
    return replace(
        config, layers=(layers, decoder_layers or layers), activation=activation,
        gated=gated != "", tied=tied, head_scale=config.d ** -0.5 if scaled else 1.0)


def bart_config(fields: dict) -> Config:
    sizes = {"no_repeat_ngram": 0, "early_stopping": False} | given(fields, BART_FIELDS)
    layers, decoder_layers, positions, *_ = check(fields, {
        "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": SIZE,
        # Here the two stacks are alike but for their depth.
        "decoder_attention_heads": {sizes["heads"]}, "decoder_ffn_dim": {sizes["ffn"]},
        # mBART, which has the same names, says otherwise.
        "scale_embedding?": {False}, "normalize_before?": {False}, "add_final_layer_norm?": {False},
        "normalize_embedding?": {True}})
    config = bart(layers=layers, positions=positions + 2, **sizes)
    return replace(config, layers=(layers, decoder_layers))


def bert_config(fields: dict) -> Config:
    check(fields, {"position_embedding_type?": {"absolute"}, "is_decoder?": {False}})
    return bert(**given(fields, BERT_FIELDS))


DIALECTS = {"t5": t5_config, "bart": bart_config, "bert": bert_config}


# ------------------------------------------------------------------------ what tensors are called

# (published, ours): a module, with all that lies below it. The first row that fits wins.
# {i}: a layer's number; {s}: encoder or decoder; {w}: q, k, v, and o, which BART calls out;
# {n}: which sub-layer of a T5 block is the feed-forward.
BART = [
    ("shared", "shared"),
    ("{s}.embed_positions", "{s}.positions"),
    ("{s}.layernorm_embedding", "{s}.embed_norm"),
    ("{s}.layers.{i}.self_attn.{w}_proj", "{s}.blocks.{i}.self_attn.f.{w}"),
    ("{s}.layers.{i}.self_attn_layer_norm", "{s}.blocks.{i}.self_attn.norm"),
    ("decoder.layers.{i}.encoder_attn.{w}_proj", "decoder.blocks.{i}.cross_attn.f.{w}"),
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
BERT = [
    ("embeddings.word_embeddings", "shared"),
    ("embeddings.position_embeddings", "encoder.positions"),
    ("embeddings.token_type_embeddings", "encoder.segments"),
    ("embeddings.position_ids", None),
    ("embeddings.LayerNorm", "encoder.embed_norm"),
    ("encoder.layer.{i}.attention.self.query", "encoder.blocks.{i}.self_attn.f.q"),
    ("encoder.layer.{i}.attention.self.key", "encoder.blocks.{i}.self_attn.f.k"),
    ("encoder.layer.{i}.attention.self.value", "encoder.blocks.{i}.self_attn.f.v"),
    ("encoder.layer.{i}.attention.output.dense", "encoder.blocks.{i}.self_attn.f.o"),
    ("encoder.layer.{i}.attention.output.LayerNorm", "encoder.blocks.{i}.self_attn.norm"),
    ("encoder.layer.{i}.intermediate.dense", "encoder.blocks.{i}.ffn.f.wi"),
    ("encoder.layer.{i}.output.dense", "encoder.blocks.{i}.ffn.f.wo"),
    ("encoder.layer.{i}.output.LayerNorm", "encoder.blocks.{i}.ffn.norm"),
    ("pooler.dense", "pooler"),
    # CLIP-ViL's own: X is for the row, whatever its name; the rest is read by others, or by nobody.
    ("encoder.visual_pos.x_position_embedding", "grid.rows"),
    ("encoder.visual_pos.y_position_embedding", "grid.columns"),
    ("encoder.visn_fc", None), ("encoder.visual_model", None),
]
BERT_HEADS = [("cls", None), ("answer_head", None), ("logit_fc", None),
              ("module.cls", None), ("module.answer_head", None), ("module.logit_fc", None)]


def table(config: Config, prefix: str = "") -> weights.Table:
    """The rename table of a model. prefix: what stands before a BART's or BERT's names."""
    if config.is_t5:
        rows = T5 + [("lm_head", "shared" if config.tied else "head")]
        if config.gated:
            rows = T5_GATED + rows
    elif config.segments:
        rows = [(prefix + published, ours) for published, ours in BERT] + BERT_HEADS
    else:
        rows = [(prefix + published, ours) for published, ours in BART] + BART_HEAD
    found = {}                           # a dictionary, since a row may come up more than once
    for published, ours in rows:
        for stack, ffn in (("encoder", "1"), ("decoder", "2")):
            for theirs, part in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                name = published.replace("{s}", stack).replace("{n}", ffn).replace("{w}", theirs)
                found[name] = ours and ours.replace("{s}", stack).replace("{w}", part)
    if not config.layers[1]:             # a model that chooses its answers has no decoder, no head
        for name, ours in found.items():
            if ours and ours.startswith(("decoder.", "head", "logits_bias")):
                found[name] = None
    return list(found.items())


def load_lm(folder: str | Path, dropout: float | None = None,
            writes: bool = True) -> EncoderDecoder:
    """The model of a published folder (config.json, model.safetensors), in eval mode and fp32.

    dropout: another one than the config's. writes: with its decoder; without, an answer can only be
    chosen. Raises BadInput or OSError, which name what is wrong.
    """
    config, source, prefix = read_config(folder), weights.read(folder), ""
    if dropout is not None:
        config = replace(config, dropout=dropout)
    if config.is_t5 and config.head_scale == 1 and "lm_head.weight" in source:
        config = replace(config, tied=False)             # T5 v1.1, whatever its config calls it
    if not writes:
        config = replace(config, layers=(config.layers[0], 0))
    if config.segments:
        config, prefix = read_bert(config, source)
    elif any(name.startswith("model.") for name in source):
        prefix = "model."
    rows = table(config, prefix)
    if config.layers[1] and not config.is_t5 and "final_logits_bias" not in source:
        # BART saved without its head.
        source = ChainMap({"final_logits_bias": torch.zeros(1, config.vocab)}, source)
    if any(name.endswith(".gamma") for name in source):  # how the first BERTs called a norm's two
        norms = [row for row in rows if row[0].endswith("LayerNorm")]
        rows = [(f"{name}.gamma", f"{ours}.weight") for name, ours in norms] + rows
        rows = [(f"{name}.beta", f"{ours}.bias") for name, ours in norms] + rows
    with reading(folder):                                # sizes that no memory holds
        with torch.device("meta"):                       # no random numbers that are overwritten
            model = EncoderDecoder(config)
        model.to_empty(device="cpu")
    weights.load(model, source, rows, where=str(folder))
    return model.eval()


def read_bert(config: Config, source: weights.Tensors) -> tuple[Config, str]:
    """What only the tensors tell: the prefix of a BERT's names, and what CLIP-ViL's holds."""
    words = "embeddings.word_embeddings.weight"
    prefix = next((name.removesuffix(words) for name in source if name.endswith(words)), "")
    config = replace(config, pooler=f"{prefix}pooler.dense.weight" in source)
    rows = f"{prefix}encoder.visual_pos.x_position_embedding.weight"
    if rows in source:
        config = replace(config, grid=source.shape(rows))
    return config, prefix


# --------------------------------------------------------- what a CLIP-ViL holds beside its BERT

VISUAL = [("fc", "feat"), ("layer_norm", "feat_norm")]


def begin_clip_vil(visual: nn.Module, heads: Mapping[str, AnswerHead], folder: str | Path) -> None:
    """Fills the visual embedding, and begins the answer heads as pre-training left its own, where
    the folder lists that one's answers. (Not of snli and nlvr: theirs are no words.)"""
    source, path = weights.read(folder), Path(folder) / "all_ans.json"
    weights.load(visual, behind(source, "encoder.visn_fc.visn_"), VISUAL, str(folder))
    old = behind(source, "answer_head.logit_fc.")
    for head in heads.values():
        if head.kind != "bce" or not old or not path.exists():
            continue
        with reading(path):                              # LXMERT's file: a list of {"ans": answer}
            found = [check(record, {"ans": str})[0] for record in json.loads(read_text(path))]
            known = transplant(head, old, found)
        print(f"answer head: {known} of {len(head.vocabulary)} answers are known from {path}")


def behind(source: Mapping, key: str) -> dict:
    """The tensors with `key` in their names, named by what stands behind it."""
    return {name.split(key)[1]: source[name] for name in source if key in name}
