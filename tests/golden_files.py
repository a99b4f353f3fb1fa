"""Reads tests/golden: the numbers of the papers' official code, its names translated into ours."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import safe_open

import adapters
import model
import t5

FOLDER = Path(__file__).parent / "golden"

# Official name -> ours, tried in this order on what is left of a weight's name.
RULES = [
    (r"^model\.", ""),
    (r"^(encoder|decoder)\.(embed_tokens)\.weight$", "lm.shared.weight"),
    (r"^shared\.", "lm.shared."), (r"^lm_head\.", "lm.shared."),
    (r"^final_logits_bias$", "lm.logits_bias"),
    (r"^encoder\.visual_embedding\.feat_embedding\.0", "visual.feat"),
    (r"^encoder\.visual_embedding\.feat_embedding\.1", "visual.feat_norm"),
    (r"^encoder\.visual_embedding\.absolute_vis_pos_embedding\.0", "visual.box"),
    (r"^encoder\.visual_embedding\.absolute_vis_pos_embedding\.1", "visual.box_norm"),
    (r"^encoder\.visual_embedding\.img_order_embedding", "visual.image"),
    (r"^(encoder|decoder)\.", r"lm.\1."),
    (r"\.(layers|block)\.(\d+)\.", r".blocks.\2."),
    # T5: layer.0 self-attention, (decoder) layer.1 cross-attention, the last the feed-forward
    (r"SelfAttention\.relative_attention_bias", "relative"),
    (r"lm\.(\w+)\.blocks\.0\.layer\.0\.relative", r"lm.\1.relative"),
    (r"\.layer\.0\.", ".self_attn."),
    (r"encoder\.(blocks\.\d+)\.layer\.1\.", r"encoder.\1.ffn."),
    (r"\.layer\.1\.", ".cross_attn."), (r"\.layer\.2\.", ".ffn."),
    (r"\.(SelfAttention|EncDecAttention|DenseReluDense)\.", ".f."), (r"\.layer_norm\.", ".norm."),
    # BART
    (r"embed_positions", "positions"), (r"layernorm_embedding", "embed_norm"),
    (r"\.self_attn_layer_norm\.", ".self_attn.norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn.norm."),
    (r"(blocks\.\d+)\.final_layer_norm\.", r"\1.ffn.norm."),
    (r"\.final_layer_norm\.", ".norm."),
    (r"\.fc1\.", ".ffn.f.wi."), (r"\.fc2\.", ".ffn.f.wo."),
    (r"\.self_attn\.(q|k|v|out)_proj\.", r".self_attn.f.\1."),
    (r"\.encoder_attn\.(q|k|v|out)_proj\.", r".cross_attn.f.\1."), (r"\.f\.out\.", ".f.o."),
    # what is added
    (r"\.(encoder_attn|cross_attn\.f)\.attn_value_parallel_adapter\.adapters\.vqa",
     ".cross_attn.f.v.tune.net"),
    (r"\.(self_attn\.)?encoder_attn_adapter_gating", ".self_attn.gate"),
    (r"\.(ffn\.)?encoder_ff_adapter_gating", ".ffn.gate"),
    (r"gate_large_x_(down|up)", r"tune.gate.net.\1"),
    (r"gate_(small_xy_cat|middle_xy_add)", "tune.gate.w"),
    (r"gate_middle\w*", "tune.gate.z"),
    (r"\.(self_attn\.)?(self_attn_adapter|attn_adapter)(\.adapters\.vqa|_multihead)",
     ".self_attn.tune.net"),
    (r"\.(cross_attn\.)?enc_attn_adapter\.adapters\.vqa", ".cross_attn.tune.net"),
    (r"\.(ffn\.)?ff_adapter(\.adapters\.vqa|_multihead)", ".ffn.tune.net"),
    (r"_sampler\.", "."), (r"\.net_(down|up)", r".net.\1"),
]


def ours(name: str) -> str:
    for pattern, to in RULES:
        name = re.sub(pattern, to, name)
    return name


def translate(tensors: dict) -> dict:
    """Official names -> ours; the heads of a multi-head down-projection become one Linear."""
    out, heads = {}, {}
    for name, t in tensors.items():
        name = ours(name)
        if m := re.match(r"(.*\.net\.down)\.(\d+)\.(weight|bias)$", name):
            heads.setdefault((m[1], m[3]), {})[int(m[2])] = t
        else:
            out[name] = t
    for (name, kind), parts in heads.items():
        out[f"{name}.{kind}"] = torch.cat([parts[i] for i in sorted(parts)])
    return out


def read(name: str) -> SimpleNamespace:
    """A golden file: w and grad under our names, inp, out, meta."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata() or {}
    part = {p: {k[len(p) + 1:]: t for k, t in tensors.items() if k.startswith(p + "/")}
            for p in ("w", "in", "out", "grad")}
    grad = {k.removeprefix("vqa/"): t for k, t in part["grad"].items()}
    return SimpleNamespace(w=translate(part["w"]), grad=translate(grad), inp=part["in"],
                           out=part["out"], meta=meta,
                           config=json.loads(meta["config"]) if "config" in meta else None)


def tiny_config(kind: str, vlpet: bool) -> t5.Config:
    """The sizes that the golden folder's README gives."""
    d, d_kv, vocab = (24, 6, 70) if vlpet else (32, 8, 290)
    if kind == "bart":
        return t5.bart(d, 4, 48, 2, vocab=vocab, positions=(64 if vlpet else 128) + 2)
    return t5.t5(d, 4, 48, 2, vocab=vocab, d_kv=d_kv, buckets=8)


def build(g: SimpleNamespace, kind: str, method: adapters.Method, vlpet: bool = False):
    """A model with the golden file's weights, eval mode; fails on any name that does not match."""
    width = g.w["visual.feat.weight"].shape[1]
    m = model.VLModel(t5.EncoderDecoder(tiny_config(kind, vlpet)), width)
    m.install(method)
    if vlpet and kind == "bart":                     # these files leave the buffer of zeros out
        g.w["lm.logits_bias"] = torch.zeros(1, m.lm.config.vocab)
    m.load_state_dict(g.w)
    return m.eval()


def pool(feats: torch.Tensor, to: int) -> torch.Tensor:
    """(B, n * n, F) -> (B, to * to, F) by adaptive max-pooling."""
    n = int(feats.size(1) ** 0.5)
    grid = feats.transpose(1, 2).unflatten(2, (n, n))
    return F.adaptive_max_pool2d(grid, to).flatten(2).transpose(1, 2)


def batch(g: SimpleNamespace, task: str = "vqa") -> SimpleNamespace:
    """The golden inputs as a batch of data.py."""
    i = g.inp
    if "feats" in i:                                           # vlpet: 3 x 3 -> 2 x 2
        feats, boxes = pool(i["feats"], 2), i["boxes"][:, :4]
    elif task == "nlvr":
        feats = torch.cat([pool(f, 6) for f in i["vis_feats2"].chunk(2, 1)], 1)
        boxes = torch.zeros(len(feats), 72, 4)
    else:
        feats = pool(i["vis_feats"], 6)
        boxes = torch.zeros(len(feats), 36, 4)
    n, pictures = feats.size(1), 2 if task == "nlvr" else 1
    order = torch.arange(n // pictures).repeat(pictures).expand(len(feats), n)
    image = torch.arange(pictures).repeat_interleave(n // pictures).expand(len(feats), n)
    return SimpleNamespace(task=task, input_ids=i["input_ids"], labels=i.get("labels"), feats=feats,
                           boxes=boxes, image_ids=image, order_ids=order,
                           scores=g.out.get(f"{task}/step_scores"),
                           loss="tokens" if task == "caption" else "examples")
