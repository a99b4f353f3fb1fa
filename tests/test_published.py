"""support/published_lm.py and published_clip.py: files as others publish them, and damaged ones."""
import json
import os

import pytest
import test_t5
import torch
import transformers
from safetensors.torch import save_file
from test_clip import close, golden
from test_t5 import VOCAB, edit_config, edit_weights

import clip_encoder
from clip_encoder import ViT
from support import weights
from support.gate import BadInput
from support.published_clip import HUGGING_FACE, OPENAI_VIT, load_clip
from support.published_lm import load_lm, read_config

# -------------------------------------- language models (their numbers are compared in test_t5.py)

def test_config_is_read_in_full(tmp_path):
    test_t5.build(test_t5.bart_config(), tmp_path / "bart")
    config = read_config(tmp_path / "bart")
    assert (config.pad, config.bos, config.eos, config.start) == (1, 0, 2, 2)
    test_t5.own_head(tmp_path)
    edit_config(tmp_path, dropout_rate=0.3, layer_norm_epsilon=1e-3, early_stopping=None)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"no_repeat_ngram_size": 3, "eos_token_id": [1], "repetition_penalty": 1.0}))
    config = read_config(tmp_path)
    assert (config.dropout, config.eps, config.no_repeat_ngram) == (0.3, 1e-3, 3)
    assert (config.layers, config.d_kv, config.gated, config.tied) == ((2, 3), 6, True, False)
    assert (config.eos, config.early_stopping) == (1, False)
    assert load_lm(tmp_path, dropout=0.0).config.dropout == 0


SIZES = {"t5": dict(vocab_size=80, d_model=32, num_layers=2, num_heads=4, d_kv=6, d_ff=48),
         "bart": dict(vocab_size=80, d_model=32, encoder_layers=2, decoder_layers=3,
                      encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                      decoder_ffn_dim=48, max_position_embeddings=64)}


@pytest.mark.parametrize("kind", SIZES)
def test_a_missing_field_is_transformers_own(kind, tmp_path):
    """A config.json with sizes alone says the same as one with all that transformers adds."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind} | SIZES[kind]))
    short = read_config(tmp_path)
    whole = {"t5": transformers.T5Config, "bart": transformers.BartConfig}[kind](**SIZES[kind])
    path.write_text(json.dumps(whole.to_dict()))
    assert read_config(tmp_path) == short and len(whole.to_dict()) > 2 * len(SIZES[kind])


@pytest.mark.parametrize("kind, changes, want", [        # want: forced_bos, force_eos
    ("bart", {}, (None, True)), ("bart", {"forced_bos_token_id": 5}, (5, True)),
    ("bart", {"force_bos_token_to_be_generated": True}, (0, True)),
    ("bart", {"forced_eos_token_id": None}, (None, False)),
    ("t5", {"forced_eos_token_id": 1}, (None, True))])
def test_forced_tokens(kind, changes, want, tmp_path):
    test_t5.build(getattr(test_t5, f"{kind}_config")(), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(changes))
    config = read_config(tmp_path)
    assert (config.forced_bos, config.force_eos) == want


# kind, changes of config.json (...: the field is taken out), words of the message
BAD_CONFIGS = [
    ("t5", {"model_type": "gpt2"}, "config.json: 'model_type' should be one of 'bart', 'bert'"),
    ("t5", {"d_kv": ...}, "'d_kv' is missing"),
    # another model than ours, under the same names
    ("bart", {"scale_embedding": True}, "'scale_embedding'"),
    ("bart", {"decoder_ffn_dim": 40}, "'decoder_ffn_dim' should be one of 48, not 40"),
    ("t5", {"feed_forward_proj": "gated-silu"}, "'feed_forward_proj'"),
    # numbers that are none, or out of range
    ("t5", {"d_model": "32"}, "'d_model' should be a whole number from 1"),
    ("t5", {"dropout_rate": 1.0}, "'dropout_rate'"),
    ("t5", {"layer_norm_epsilon": 0}, "'layer_norm_epsilon'"),
    ("t5", {"relative_attention_max_distance": 2}, "need a larger maximal distance"),
    ("t5", {"d_ff": 2**24, "d_model": 2**24}, "lm: "),                  # no memory holds it
    ("bart", {"d_model": 33}, "not fitting: "),
    ("bart", {"vocab_size": 2}, "eos token 2 is no row of 2 words"),
    # decoding that would not be transformers'
    ("t5", {"repetition_penalty": 1.2}, "'repetition_penalty' is 1.2, which decoding here"),
    ("t5", {"early_stopping": "never"}, "'early_stopping' should be true or false"),
    ("t5", {"eos_token_id": [1, 2]}, r"'eos_token_id' is \[1, 2\]: an answer has one end"),
    ("bart", {"forced_bos_token_id": VOCAB}, "forced_bos token 80 is no row of 80 words"),
    ("t5", {"forced_eos_token_id": 5}, "'forced_eos_token_id' should be one of 1"),
    # of the right form, but not this file's: the tensors tell
    ("bart", {"encoder_layers": 3}, "missing: .*encoder.layers.2"),
    ("t5", {"num_layers": 1}, "unexpected: .*block.1"),
    ("t5", {"vocab_size": VOCAB + 1}, r"not fitting: .*shared.weight \(80, 32\) for \(81, 32\)"),
]


@pytest.mark.parametrize("kind, changes, words", BAD_CONFIGS)
def test_bad_config(tmp_path, kind, changes, words):
    folder = tmp_path / "lm"
    test_t5.build(getattr(test_t5, f"{kind}_config")(), folder)
    edit_config(folder, **changes)
    with pytest.raises(BadInput, match=words) as error:
        load_lm(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path):
    test_t5.build(test_t5.t5_config(), tmp_path)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": torch.ones(VOCAB, 32)}))
    with pytest.raises(BadInput, match="differs from its copy"):
        load_lm(tmp_path)
    edit_weights(tmp_path, lambda w: w.update({"extra": w.pop(name), "lm_head.weight":
                                               w["shared.weight"].clone()}))
    with pytest.raises(BadInput, match=f"missing: {name}; unexpected: extra"):
        load_lm(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="generation_config.json: "):
        load_lm(tmp_path)
    os.remove(tmp_path / "config.json")
    with pytest.raises(BadInput, match="config.json: it is not there: --lm is a folder"):
        load_lm(tmp_path)


# ------------------------------------------------------------------------------------------- CLIP

def write_clip(folder, tensors, config=None, name="open_clip_config.json"):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "clip.safetensors")
    if config is not None:
        (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / "clip.safetensors"


def open_clip_config(quick: bool = True, **vision) -> dict:
    return {"model_cfg": {"quick_gelu": quick, "vision_cfg": vision}}


@pytest.mark.parametrize("name", ["clip_vit", "clip_resnet"])
@pytest.mark.parametrize("how", ["visual.", "bare", "fp16"])
def test_openai_numbers(name, how, tmp_path):
    g, w = golden(name)
    if how == "visual.":   # a whole CLIP: the text tower beside it
        w |= {k: torch.zeros(2) for k in (
            "transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "ln_final.bias",
            "positional_embedding", "text_projection", "logit_scale", "vocab_size")}
    else:
        w = {k.removeprefix("visual."): v for k, v in w.items()}
    if how == "fp16":
        w = {k: v.half() if v.is_floating_point() else v for k, v in w.items()}
    clip = load_clip(write_clip(tmp_path, w, open_clip_config()))
    assert not clip.training and all(p.dtype == torch.float32 for p in clip.parameters())
    assert not any(p.requires_grad for p in clip.parameters())
    grid, pooled = clip.train()(g["in/pixels"])   # statistics stay put in train mode too
    within = 2e-2 if how == "fp16" else 2e-6
    assert close(grid, g["out/grid"], within) and close(pooled, g["out/pooled"], within)
    assert close(clip.encode(g["in/pixels"], pooled=True), pooled, 1e-6)


@pytest.mark.parametrize("activation, heads", [("quick_gelu", 2), ("gelu", 2), ("gelu", 4)])
def test_heads_and_activation_are_never_guessed(activation, heads, tmp_path, monkeypatch):
    vit = ViT(128, 2, heads, 8, 48, 32, activation=activation).eval()
    tensors = weights.published(vit, OPENAI_VIT)
    path = write_clip(tmp_path, tensors)
    with pytest.raises(BadInput, match="clip.safetensors.*heads and the activation.*config.json"):
        load_clip(path)
    # The sizes of OpenAI's own towers tell; here one is made up.
    own = dict(width=128, layers=2, heads=8, patch=8, size=48, out=32)
    monkeypatch.setitem(clip_encoder.PRESETS, "ViT-tiny", own)
    assert load_clip(path).config == ViT(**own).config
    # A file beside it knows better: open_clip has towers of OpenAI's sizes with another activation.
    config = open_clip_config(activation == "quick_gelu", head_width=128 // heads)
    found, x = load_clip(write_clip(tmp_path, tensors, config)), torch.randn(2, 3, 48, 48)
    assert found.config == vit.config and torch.equal(found.encode(x), vit.encode(x))
    os.remove(tmp_path / "open_clip_config.json")
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        load_clip(path.rename(tmp_path / "open_clip_model.safetensors"))


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("visual.proj"), "'visual.proj' is missing"),
    (lambda w: w.pop("visual.ln_pre.bias"), "missing: visual.ln_pre.bias"),
    (lambda w: w.update({"visual.extra": torch.zeros(1)}), "unexpected: visual.extra"),
    (lambda w: w.update({"visual.positional_embedding": torch.zeros(9, 64)}), "square"),
    (lambda w: w.clear(), "is missing")])
def test_wrong_clip_weights(change, words, tmp_path):
    tensors = golden("clip_vit")[1]
    change(tensors)
    with pytest.raises(BadInput, match=f"clip.safetensors.*{words}"):
        load_clip(write_clip(tmp_path, tensors, open_clip_config()))


@pytest.mark.parametrize("name, config, words", [
    ("config.json", "{", "config.json: "),
    ("config.json", {"num_hidden_layers": 4}, "'num_hidden_layers' should be one of 3, not 4"),
    ("config.json", {"num_attention_heads": 5, "num_hidden_layers": 3}, "5 heads do not divide"),
    ("config.json", {"vision_config": {"hidden_act": "relu6"}}, "'hidden_act'.*quick_gelu"),
    ("open_clip_config.json", {}, "'model_cfg' is missing"),
    ("open_clip_config.json", open_clip_config(head_width=65), "'head_width'"),
    ("open_clip_config.json", open_clip_config(pool_type="avg"), "'pool_type'"),
    ("open_clip_config.json", open_clip_config(norm_kwargs={"eps": 1e-3}), "'norm_kwargs'"),
    ("open_clip_config.json", open_clip_config() | {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}},
     "'mean' of the pictures")])
def test_wrong_clip_config(name, config, words, tmp_path):
    rows = HUGGING_FACE if name == "config.json" else OPENAI_VIT
    tensors = weights.published(ViT(32, 3, 4, 4, 24, 20), rows)
    with pytest.raises(BadInput, match=words):
        load_clip(write_clip(tmp_path, tensors, config, name))
