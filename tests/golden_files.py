"""Reads tests/golden: the numbers of the papers' official code, its names translated into ours."""
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import safe_open

import adapters
import data
import model
import methods
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
    # what is added: modules at sites
    (r"\.(encoder_attn|cross_attn\.f)\.attn_value_parallel_adapter\.", ".cross_attn.f.v.tune."),
    (r"\.(self_attn\.)?encoder_attn_adapter_gating_", ".self_attn.tune.gate."),
    (r"\.(ffn\.)?encoder_ff_adapter_gating_", ".ffn.tune.gate."),
    (r"gate\.large_x_(down|up)", r"gate.net.\1"), (r"gate\.(small_xy_cat|middle_xy_add)", "gate.w"),
    (r"gate\.middle\w*", "gate.z"),
    (r"\.(self_attn\.)?(self_attn_adapter|attn_adapter)(_multihead_|\.)", ".self_attn.tune."),
    (r"\.(cross_attn\.)?enc_attn_adapter\.", ".cross_attn.tune."),
    (r"\.(ffn\.)?ff_adapter(_multihead_|\.)", ".ffn.tune."),
    (r"\.adapters\.(\w+)\.", r".\1."),
    (r"_sampler\.", "."), (r"\.net_(down|up)", r".\1"),
    (r"\.tune\.(\w+\.)?(down|up)\.", r".tune.\1net.\2."),
    (r"^phm_rule$", "shared_R"), (r"\.W_left$", ".L"), (r"\.W_right$", ".U"),
    (r"\.phm_rule$", ".R"), (r"\.(down|up)\.b$", r".\1.bias"),
    (r"\.([qkvo])\.lora_As\.(\w+)$", r".\1.tune.\2.net.down.weight"),
    (r"\.([qkvo])\.lora_Bs\.(\w+)$", r".\1.tune.\2.net.up.weight"),
    # the prompt, the hypernetwork
    (r"prompt_modules\.prompts\.(\w+)\.prefix_embedding\.", r"tune.\1."),
    (r"(lm\.encoder\.tune\.\w+)\.0\.weight$", r"\1.E"),
    (r"(lm\.encoder\.tune\.\w+)\.1\.", r"\1.W1."), (r"(lm\.encoder\.tune\.\w+)\.3\.", r"\1.W2."),
    (r"^shared_task_embed\.task_to_embeddings\.", "hyper.tasks."),
    (r"^lm\.(\w+)\.adapter_layers_hyper_net\.", r"hyper.stacks.\1."),
    (r"\.layer_id_embeddings\.weight$", ".layers"), (r"\.LayerNorm\.", ".norm."),
    (r"\.task_hypernet\.task_embeding_generator\.0\.", ".W1."),
    (r"\.task_hypernet\.task_embeding_generator\.2\.", ".W2."),
    (r"\.feed_forward_(down|up)_sampler_hyper_net\.", r".make.ffn.\1."),
    (r"\.self_attention_(down|up)_sampler_hyper_net\.", r".make.self_attn.\1."),
    (r"\.cross_attention_(down|up)_sampler_hyper_net\.", r".make.cross_attn.\1."),
    (r"\.down\.weight_generator\.0\.", ".0."), (r"\.down\.bias_generator\.0\.", ".1."),
    (r"\.up\.weight_generator\.0\.", ".2."), (r"\.up\.bias_generator\.0\.", ".3."),
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


def placed(tensors: dict, names: set[str]) -> dict:
    """The official files call what all tasks share by its first task, tune.vqa.net.down: here it
    may be shared (tune.net.down), or half-shared (tune.net.down.vqa). The model's names decide."""
    def place(name: str) -> str:
        m = re.match(r"(.*\.tune)\.(vqa|gqa|nlvr|caption)\.(.*)", name)
        if name in names or not m:
            return name
        half = re.sub(r"net\.(down|up)", rf"net.\1.{m[2]}", m[3])
        return next((n for n in (f"{m[1]}.{half}", f"{m[1]}.{m[3]}") if n in names), name)
    return {place(name): t for name, t in tensors.items()}


def read(name: str) -> SimpleNamespace:
    """A golden file: w and grad under our names, inp, out, meta, and its flags as words."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata() or {}
    part = {p: {k[len(p) + 1:]: t for k, t in tensors.items() if k.startswith(p + "/")}
            for p in ("w", "in", "out", "grad")}
    grad = {k.removeprefix("vqa/"): t for k, t in part["grad"].items()}
    words = f"{meta.get('flags', '')} ".split("--")[1:]
    flags = {w[0]: w[1] if w[1:] else "True" for w in map(str.split, words)}
    return SimpleNamespace(name=name, w=translate(part["w"]), grad=translate(grad), inp=part["in"],
                           out=part["out"], meta=meta, flags=flags)


GATING = {"large_x_lowrank": "large", "middle_xy_add": "middleX", "small_xy_cat": "small"}


def describe(g: SimpleNamespace) -> tuple[bool, adapters.Method]:
    """Dialect (is it T5?) and row of a golden file, from the official flags that made it."""
    flags, is_t5 = g.flags, "t5" in g.flags["backbone"]
    kind = next((k for k in ("adapter", "compacter", "hyperformer", "lora") if f"use_{k}" in flags),
                "prompt" if "encoder_prompt_len" in flags else "frozen")
    single = any(f.startswith("use_single") for f in flags) or kind in ("hyperformer", "frozen")
    row, changes = kind if single else f"{kind}-multiple", []
    for flag, other in (("unfreeze_layer_norms", "norms"), ("unfreeze_bias", "bitfit"),
                        ("unfreeze_language_model", "full")):
        # On T5 the official code finds no norms and no biases to open, but the whole model.
        if kind == "frozen" and flag in flags and (other == "full" or not is_t5):
            row = other
    if "shared_R" in g.w:                                  # which no flag says
        row = "compacter-original"
    if {"share_up_sampler", "share_down_sampler"} & flags.keys():
        row = "adapter-half-shared"
        if "share_down_sampler" in flags:
            changes.append("per_task=up")
    if gate := [f for f in flags if f.startswith("use_encoder_adapter_gating_")]:
        gate = gate[0].removeprefix("use_encoder_adapter_gating_")
        row = f"{kind}+{GATING.get(gate, 'middleY')}"
        scale = flags.get("encoder_gating_scaling_factor", 1.0)
        changes += [f"encoder.s={scale}"] + ["mean=all"] * row.endswith("small")
    if kind in ("adapter", "compacter", "hyperformer"):
        changes += [f"reduction={flags.get('reduction_factor', 4)}"]
    for flag, field in (("adapter_down_dim", "r"), ("adapter_gating_down_dim", "g"),
                        ("decoder_enc_attn_value_parallel_adapter_down_dim", "decoder.r"),
                        ("hypercomplex_division", "n"), ("projected_task_embedding_dim", "p"),
                        ("lora_dim", "r"), ("encoder_prompt_len", "length"), ("mid_dim", "mid")):
        if flag in flags:
            changes.append(f"{field}={flags[flag]}")
    return is_t5, methods.row(row, is_t5, ",".join(changes))


def build(g: SimpleNamespace) -> model.VLModel:
    """A model with the golden file's weights, eval mode; fails on any name that does not match."""
    is_t5, method = describe(g)
    vocab, d = g.w["lm.shared.weight"].shape               # the rest: the folder's README
    if is_t5:
        config = t5.t5(d, 4, 48, 2, vocab=vocab, d_kv=d // 4, buckets=8)
    else:
        positions = len(g.w["lm.encoder.positions.weight"])
        config = t5.bart(d, 4, 48, 2, vocab=vocab, positions=positions)
    m = model.VLModel(t5.EncoderDecoder(config), g.w["visual.feat.weight"].shape[1])
    m.install(method, tuple(g.flags["tasks"].split(",")))
    if not is_t5 and "lm.logits_bias" not in g.w:          # some leave the buffer of zeros out
        g.w["lm.logits_bias"] = torch.zeros(1, vocab)
    names = set(m.state_dict())
    g.w, g.grad = placed(g.w, names), placed(g.grad, names)
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
    scores, weights = g.out.get(f"{task}/step_scores"), None
    if "labels" in i:                       # the files' losses: vqa's is scored where scores are
        loss = data.TASKS[task].loss if scores is not None or task != "vqa" else "examples"
        weights = data.loss_weights([loss] * len(feats), scores if scores is not None else
                                    torch.ones(len(feats)), i["labels"])
    return SimpleNamespace(tasks=(task,) * len(feats), input_ids=i["input_ids"], feats=feats,
                           boxes=boxes, image_ids=image, order_ids=order, seen=None,
                           labels=i.get("labels"), weights=weights)
