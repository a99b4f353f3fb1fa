"""How do the names and sizes of a published CLIP become ours?

    tower = load_clip("weights/tiny-clip")       # a folder as on the Hugging Face hub, or a file

A file in OpenAI's names may hold the image tower alone, or as "visual." beside the text tower.

    python -m pytest tests/test_published.py
"""
import json
from pathlib import Path

import torch

from clip_encoder import ACTIVATIONS, ResNet, ViT
from support import weights

HUGGING_FACE: weights.Table = [
    ("vision_model.embeddings.class_embedding", "cls"),
    ("vision_model.embeddings.position_embedding.weight", "positions"),
    ("vision_model.embeddings.position_ids", None),
    ("vision_model.embeddings.patch_embedding", "patch"),
    ("vision_model.pre_layrnorm", "norm_pre"),                         # spelt so in every file
    *((f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj", f"blocks.{{i}}.attn.{part[0]}")
      for part in ("q", "k", "v", "out")),
    ("vision_model.encoder.layers.{i}.layer_norm{j}", "blocks.{i}.norm{j}"),
    ("vision_model.encoder.layers.{i}.mlp.fc1", "blocks.{i}.up"),
    ("vision_model.encoder.layers.{i}.mlp.fc2", "blocks.{i}.down"),
    ("vision_model.post_layernorm", "norm_post"),
    ("visual_projection", "project"),
    *((name, None) for name in ("text_model", "text_projection", "logit_scale")),
]
OPENAI_VIT: weights.Table = [
    ("class_embedding", "cls"),
    ("positional_embedding", "positions"),
    ("conv1", "patch"),
    ("ln_pre", "norm_pre"),
    *((f"transformer.resblocks.{{i}}.attn.in_proj_{kind}",
       tuple(f"blocks.{{i}}.attn.{part}.{kind}" for part in "qkv")) for kind in ("weight", "bias")),
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
    *((f"layer{n + 1}.{{i}}", f"stages.{n}.{{i}}") for n in range(4)),
    ("attnpool.positional_embedding", "positions"),
    ("attnpool.c_proj", "attn.o"),
    *((f"attnpool.{part}_proj", f"attn.{part}") for part in "qkv"),
]
OPENAI_TEXT: weights.Table = [(name, None) for name in (
    "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
    "logit_scale", "input_resolution", "context_length", "vocab_size")]


class Shapes(dict):
    """Our name -> shape, and a clear complaint where a file lacks what gives the tower's size."""

    def __init__(self, source: weights.Tensors, table: weights.Table, path: Path):
        self.path, self.table = path, table
        for name in source:
            names, transposed = weights.to_ours(name, table) or ((), False)
            if names:
                self[names[0]] = source.shape(name)[::-1 if transposed else 1]

    def __missing__(self, name: str):
        raise ValueError(f"{self.path} lacks {weights.to_published(name, self.table)[0]}: give the "
                         "complete weights of a CLIP image tower.")

    def count(self, name: str) -> int:
        """How many of a numbered list there are: count("blocks.{}.up.bias")"""
        return next(n for n in range(len(self) + 1) if name.format(n) not in self)

    def side(self) -> int:
        """Cells a side of the square grid that the positions were made for."""
        cells = self["positions"][0] - 1
        if round(cells ** 0.5) ** 2 != cells:
            raise ValueError(f"{self.path}: {cells} positions of a grid, but that is no square.")
        return round(cells ** 0.5)


def load_clip(path: str | Path) -> ViT | ResNet:
    """A published tower, frozen, in eval mode and fp32; its sizes are read off the tensors' shapes.

    path: a Hugging Face folder (config.json, model.safetensors; ViTs only), or a .safetensors file
    under OpenAI's names, alone or as "visual." beside the text tower. Raises FileNotFoundError or
    ValueError with the names of what is missing, unexpected or misshapen.
    """
    path = Path(path)
    source, known = weights.read(path), {}
    if any(name.startswith("vision_model.") for name in source):
        table, build = HUGGING_FACE, vit_of
        known = read_config((path if path.is_dir() else path.parent) / "config.json")
    else:
        prefix = "visual." if any(name.startswith("visual.") for name in source) else ""
        rows, build = ((OPENAI_VIT, vit_of) if f"{prefix}class_embedding" in source else
                       (OPENAI_RESNET, resnet_of))
        table = [(prefix + row[0], *row[1:]) for row in rows] + (OPENAI_TEXT if prefix else [])
    with torch.device("meta"):
        clip = build(Shapes(source, table, path), **known)
    clip.to_empty(device="cpu")
    weights.load(clip, source, table, where=str(path))
    return clip.eval().requires_grad_(False)


def vit_of(shapes: Shapes, heads: int = 0, layers: int = 0, **known) -> ViT:
    width, _, patch, _ = shapes["patch.weight"]
    heads = heads or width // 64                     # every published tower has heads of 64
    if heads < 1 or width % heads:
        raise ValueError(f"{shapes.path}: {heads} heads do not divide a width of {width}; give the "
                         "right num_attention_heads in config.json.")
    return ViT(width, layers or shapes.count("blocks.{}.up.bias"), heads, patch,
               shapes.side() * patch, shapes["project.weight"][0], shapes["blocks.0.up.bias"][0],
               **known)


def resnet_of(shapes: Shapes) -> ResNet:
    width = shapes["stages.0.0.conv1.weight"][0]
    layers = tuple(shapes.count(f"stages.{stage}.{{}}.conv1.weight") for stage in range(4))
    return ResNet(width, layers, max(1, width // 2), shapes.side() * 32, shapes["attn.o.bias"][0])


def read_config(path: Path) -> dict:
    """What shapes do not tell, as far as a Hugging Face config.json names it."""
    theirs = {"heads": "num_attention_heads", "layers": "num_hidden_layers",
              "activation": "hidden_act", "eps": "layer_norm_eps"}
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from None
    config = config.get("vision_config", config) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("num_attention_heads", 1), int):
        raise ValueError(f"{path} is no CLIP config (an object, with an integer for "
                         "num_attention_heads): download it again.")
    known = {ours: config[name] for ours, name in theirs.items() if name in config}
    if known.get("activation", "gelu") not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act {known['activation']!r} is not supported; supported: "
                         f"{', '.join(ACTIVATIONS)}.")
    return known
