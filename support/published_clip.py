"""How do a published CLIP's sizes and tensor names become ours?

    tower = load_clip("weights/tiny-clip")       # a folder as on the Hugging Face hub, or a file

Two spellings are read: Hugging Face's (ViTs only) and OpenAI's, which open_clip uses too. Shapes
tell all sizes, but not the number of heads and the activation: these stand in a config file, or
the tower has one of OpenAI's own sizes. Nothing is guessed.

    python -m pytest tests/test_published.py
"""
from pathlib import Path

import torch

from clip_encoder import ACTIVATIONS, MEAN, PRESETS, STD, ResNet, ViT
from support import weights
from support.gate import Number, check, read_json, reading

# ------------------------------------------------------------------------ what tensors are called

# (published, ours): a tensor, or a module with all that lies below it. {i}, {j} are numbers.
HUGGING_FACE: weights.Table = [
    ("vision_model.embeddings.class_embedding", "cls"),
    ("vision_model.embeddings.position_embedding.weight", "positions"),
    ("vision_model.embeddings.position_ids", None),
    ("vision_model.embeddings.patch_embedding", "patch"),
    ("vision_model.pre_layrnorm", "norm_pre"),                           # spelt so in every file
    *((f"vision_model.encoder.layers.{{i}}.self_attn.{theirs}", f"blocks.{{i}}.attn.{ours}")
      for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))),
    ("vision_model.encoder.layers.{i}.layer_norm{j}", "blocks.{i}.norm{j}"),
    ("vision_model.encoder.layers.{i}.mlp.fc1", "blocks.{i}.up"),
    ("vision_model.encoder.layers.{i}.mlp.fc2", "blocks.{i}.down"),
    ("vision_model.post_layernorm", "norm_post"),
    ("visual_projection", "project"),
    ("text_model", None),
    ("text_projection", None),
    ("logit_scale", None),
]
OPENAI_VIT: weights.Table = [
    ("class_embedding", "cls"),
    ("positional_embedding", "positions"),
    ("conv1", "patch"),
    ("ln_pre", "norm_pre"),
    ("transformer.resblocks.{i}.attn.in_proj_weight",                    # q, k, v in one
     ("blocks.{i}.attn.q.weight", "blocks.{i}.attn.k.weight", "blocks.{i}.attn.v.weight")),
    ("transformer.resblocks.{i}.attn.in_proj_bias",
     ("blocks.{i}.attn.q.bias", "blocks.{i}.attn.k.bias", "blocks.{i}.attn.v.bias")),
    ("transformer.resblocks.{i}.attn.out_proj", "blocks.{i}.attn.o"),
    ("transformer.resblocks.{i}.ln_{j}", "blocks.{i}.norm{j}"),
    ("transformer.resblocks.{i}.mlp.c_fc", "blocks.{i}.up"),
    ("transformer.resblocks.{i}.mlp.c_proj", "blocks.{i}.down"),
    ("ln_post", "norm_post"),
    ("proj", "project.weight", "T"),
]
OPENAI_RESNET: weights.Table = [
    ("bn{i}.num_batches_tracked", None),
    ("layer{i}.{j}.bn{k}.num_batches_tracked", None),
    ("layer{i}.{j}.downsample.1.num_batches_tracked", None),
    ("conv{i}", "conv{i}"),
    ("bn{i}", "bn{i}"),
    *((f"layer{stage + 1}.{{i}}", f"stages.{stage}.{{i}}") for stage in range(4)),
    ("attnpool.positional_embedding", "positions"),
    ("attnpool.c_proj", "attn.o"),
    *((f"attnpool.{part}_proj", f"attn.{part}") for part in "qkv"),
]


def load_clip(path: str | Path) -> ViT | ResNet:
    """A published tower, frozen, in eval mode and fp32.

    path: a Hugging Face folder (config.json, model.safetensors), or a .safetensors file in OpenAI's
    names, the image tower alone or as "visual." beside the text tower, or within a CLIP-ViL.
    """
    path, source, prefix = Path(path), weights.read(path), ""
    tower = {name: file for name, file in source.files.items() if "visual." in name}
    if tower:                                            # what lies beside it is the text tower
        source = weights.Tensors(tower, source.metadata)
        prefix = next(iter(tower)).split("visual.")[0] + "visual."
    kind, rows, config_name, settings = ViT, OPENAI_VIT, "open_clip_config.json", open_clip
    if any(name.startswith("vision_model.") for name in source):
        rows, config_name, settings = HUGGING_FACE, "config.json", hugging_face
    elif f"{prefix}layer1.0.conv1.weight" in source:
        kind, rows = ResNet, OPENAI_RESNET
    table = [(prefix + row[0], *row[1:]) for row in rows]
    config_path = (path if path.is_dir() else path.parent) / config_name
    with reading(path):
        sizes = read_sizes(kind, source, table)
        if config_path.exists() or path.name.startswith("open_clip"):      # there is always one
            with reading(config_path):
                sizes |= settings(read_json(config_path), sizes)
        else:
            sizes["heads"] = known_heads(sizes)
        with torch.device("meta"):                       # no random numbers that are overwritten
            clip = kind(**sizes)
    clip.to_empty(device="cpu")
    weights.load(clip, source, table, where=str(path))
    return clip.eval().requires_grad_(False)


def read_sizes(kind: type, source: weights.Tensors, table: weights.Table) -> dict:
    """What the shapes of a file's tensors tell: all but heads and activation."""
    def shape(ours: str) -> tuple[int, ...]:
        name, _, transposed = weights.to_published(ours, table)
        return source.shape(name)[::-1] if transposed else source.shape(name)

    def count(ours: str) -> int:
        """How many of a numbered list there are: count("blocks.{}.up.bias")"""
        return sum(weights.to_published(ours.format(i), table)[0] in source
                   for i in range(len(source)))

    cells = shape("positions")[0] - 1                    # without the class token's
    grid = round(cells ** 0.5)
    assert grid * grid == cells, f"{cells} positions of a grid, but that is no square"
    if kind is ResNet:
        return dict(width=shape("stages.0.0.conv1.weight")[0], size=32 * grid,
                    layers=tuple(count(f"stages.{n}.{{}}.conv1.weight") for n in range(4)),
                    out=shape("attn.o.bias")[0])
    width, _, patch, _ = shape("patch.weight")
    return dict(width=width, layers=count("blocks.{}.up.bias"), patch=patch, size=patch * grid,
                out=shape("project.weight")[0], ffn=shape("blocks.0.up.bias")[0])


# ------------------------------------------------------------------------- heads and activation

def hugging_face(config: dict, sizes: dict) -> dict:
    """What config.json says of the image tower; a missing field has transformers' own value."""
    heads, activation, eps, _ = check(config.get("vision_config", config), {
        "num_attention_heads?": Number(1, sizes["width"], whole=True),
        "hidden_act?": set(ACTIVATIONS), "layer_norm_eps?": Number(1e-30, 1),
        "num_hidden_layers?": {sizes["layers"]}})
    return dict(heads=heads or 12, activation=activation or "quick_gelu", eps=eps or 1e-5)


def open_clip(config: dict, sizes: dict) -> dict:
    """What open_clip_config.json says of the image tower."""
    model, = check(config, {"model_cfg": dict})
    quick, tower = check(model, {"quick_gelu?": bool, "vision_cfg": dict})
    # Other values of these change the numbers and no tensor's name; None: they must be absent.
    head_width, *_ = check(tower, {
        "head_width?": Number(1, sizes["width"], whole=True), "pool_type?": {"tok"},
        "norm_kwargs?": {None}, "act_kwargs?": {None}})
    colours = {"mean": [*MEAN], "std": [*STD]}
    for name, theirs in config.get("preprocess_cfg", {}).items():
        assert colours.get(name, theirs) == theirs, f"{name!r} of the pictures is not CLIP's"
    if "patch" not in sizes:                             # a ResNet has no activation but ReLU
        return dict(heads=32 * sizes["width"] // (head_width or 64))
    return dict(heads=sizes["width"] // (head_width or 64),
                activation="quick_gelu" if quick else "gelu")


def known_heads(sizes: dict) -> int:
    """Of a tower with one of OpenAI's own sizes, whose activation is the default, quick_gelu."""
    for own in PRESETS.values():
        if sizes.items() <= (own | {"ffn": 4 * own["width"]}).items():
            return own["heads"]
    raise ValueError("shapes do not tell the number of heads and the activation: put the model's "
                     "config.json (Hugging Face) or open_clip_config.json beside it")
