"""clip_encoder.py against OpenAI's numbers (golden), transformers, and pictures made by hand."""
import json
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import clip_encoder
from clip_encoder import PRESETS, ResNet, ViT, pixels
from support import weights
from support.published_clip import HUGGING_FACE, load_clip

GOLDEN = weights.Path(__file__).parent / "golden"
VISION = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
              patch_size=4, image_size=24)   # heads of 8, ffn 1.5 W, a grid of 6 x 6


def golden(name: str) -> tuple[dict, dict]:
    """All tensors of a golden file, and its weights alone under OpenAI's names."""
    g = load_file(GOLDEN / f"{name}.safetensors")
    return g, {k.removeprefix("w/"): v.clone() for k, v in g.items() if k.startswith("w/")}


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() < within


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hugging Face folder with both towers, random weights, and its transformers model."""
    torch.manual_seed(0)
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    model = CLIPModel(config).eval()
    with torch.no_grad():                                     # its own draw is too near to zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def vit(published):
    return load_clip(published[0])


# ------------------------------------------------------------------------------------------ towers

def test_resnet_tokens_are_the_pooled_grid():
    """Positions of other grids are resized bicubically: a constant table stays so."""
    clip = ResNet(width=4, layers=(1, 1, 1, 1), heads=2, size=224, out=8)
    x = torch.randn(2, 3, 224, 224)
    grid = clip(x)[0].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    want = F.max_pool2d(grid, 2, stride=1).flatten(2).transpose(1, 2)
    assert clip.features == 128 and torch.equal(clip.encode(x), want)
    table = clip.positions.data
    table[1:] = table[1]
    x = clip_encoder.resize_positions(table, 3, 5)
    assert x.shape == (16, 128) and close(x[1:], table[1:16]) and torch.equal(x[0], table[0])
    assert clip(torch.randn(1, 3, 96, 160))[1].shape == (1, 8)


def test_vit_equals_transformers(published, vit):
    """Grid, vector, tokens and every gradient."""
    folder, model = published
    x = torch.randn(3, 3, 24, 24)
    theirs = model.vision_model(x, output_hidden_states=True)
    grid, pooled = vit(x)
    assert vit.config == dict(width=32, layers=3, heads=4, patch=4, size=24, out=20, ffn=48,
                              activation="quick_gelu", eps=1e-5)
    assert close(grid, theirs.last_hidden_state)
    assert close(pooled, model.visual_projection(theirs.pooler_output))
    # tokens for tuning: the last block but one, without the class token; 6 x 6 passes unpooled
    assert close(vit.encode(x), theirs.hidden_states[-2][:, 1:])
    ours, direction = load_clip(folder).requires_grad_(True), torch.randn(3, 20)
    (model.visual_projection(theirs.pooler_output) * direction).sum().backward()
    (ours(x)[1] * direction).sum().backward()
    for name, p in ours.named_parameters():
        want = model.get_parameter(weights.to_published(name, HUGGING_FACE)[0]).grad
        assert close(p.grad, want, 1e-5 * max(1, want.abs().max().item())), name


def test_image_tower_alone_and_back(published, vit, tmp_path):
    """Saved under published names with a text-free config, transformers and we read the same."""
    weights.write(tmp_path / "model.safetensors", weights.published(vit, HUGGING_FACE))
    config = {"model_type": "clip_vision_model", "projection_dim": 20, **VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    x = torch.randn(2, 3, 24, 24)
    ours = load_clip(tmp_path)
    assert ours.config == vit.config and close(ours(x)[1], theirs.eval()(x).image_embeds)


def test_another_picture_size(published, vit):
    """Positions are resized bicubically, the class token's left alone."""
    x = torch.randn(2, 3, 32, 40)
    theirs = published[1].vision_model(x, interpolate_pos_encoding=True)
    assert close(vit(x)[0], theirs.last_hidden_state)
    assert vit.encode(x).shape == (2, 36, 32)
    with pytest.raises(AssertionError, match="patches of 4"):
        vit(torch.randn(1, 3, 25, 24))


@pytest.mark.parametrize("name, count, attention", [
    ("RN101", 56_259_936, 13_740_544), ("ViT-B/32", 87_849_216, None), ("RN50", 38_316_896, None),
    ("ViT-B/16", 86_192_640, None), ("ViT-L/14", 303_966_208, None)])
def test_preset_counts(name, count, attention):
    with torch.device("meta"):
        clip = ViT(**PRESETS[name]) if "patch" in PRESETS[name] else ResNet(**PRESETS[name])
    assert sum(p.numel() for p in clip.parameters()) == count
    if attention:
        assert clip.positions.numel() + sum(p.numel() for p in clip.attn.parameters()) == attention


def test_randomized(vit):
    other = clip_encoder.randomized(vit)
    assert other.config == vit.config and not torch.equal(other.cls, vit.cls)
    x = torch.randn(1, 3, 24, 24)
    assert not close(other.encode(x), vit.encode(x), 1e-2)


# ------------------------------------------------------------------------------------------ pixels

def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (24, 24), (10, 17), (97, 24), (333, 250)])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_pixels_equal_transformers(size, resize):
    how = dict(size={"shortest_edge": 24}) if resize == "crop" else dict(
        size={"height": 24, "width": 24}, do_center_crop=False)
    theirs = CLIPImageProcessorPil(crop_size={"height": 24, "width": 24}, **how)
    image = picture(*size)
    want = torch.as_tensor(np.asarray(theirs(image)["pixel_values"][0]))
    assert close(pixels(image, 24, resize), want)


def test_pixels_of_every_mode():
    grey = Image.fromarray(np.full((8, 8), 100, np.uint8))
    want = pixels(grey.convert("RGB"), 8)
    deep = Image.fromarray(np.full((8, 8), 100 * 256 + 7, np.uint16))          # 16-bit grey
    for image in (grey, grey.convert("P"), grey.convert("LA"), grey.convert("RGBA"), deep):
        assert close(pixels(image, 8), want), image.mode
    clear, index = Image.new("RGBA", (8, 8), (9, 9, 9, 0)), Image.new("P", (8, 8), 0)
    index.info["transparency"] = 0
    for image in (clear, index):
        assert close(pixels(image, 8), pixels(Image.new("RGB", (8, 8), "white"), 8))


@pytest.mark.parametrize("turn", range(10))
def test_pixels_follow_the_camera(turn, tmp_path):
    """Also where Pillow cannot write the other EXIF fields again, or cannot read any."""
    image = picture(8, 12)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    want = pixels(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")), 8)
    assert torch.equal(want, pixels(image, 8)) == (turn not in range(2, 9))
    fields = struct.pack("<HHIHH", 0x112, 3, 1, turn, 0) + struct.pack("<HHI4s", 0x11A, 2, 4, b"72")
    odd = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + fields + bytes(4)     # XResolution a text
    image.save(tmp_path / "b.png", exif=odd)
    for name in ("a.png", "b.png"):
        assert torch.equal(pixels(Image.open(tmp_path / name), 8), want)
    image.info["exif"] = odd[:2 * turn]                       # cut short: what it says is lost
    assert torch.equal(pixels(image, 8), pixels(picture(8, 12), 8))


def test_a_thin_picture_takes_no_memory(monkeypatch):
    """Cut before it is enlarged; what is left is the centre, as of a picture that needs no cut."""
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how:
                        seen.append(size) or resize(self, size, *how))
    long = picture(1001, 1)
    middle = long.crop((496, 0, 505, 1))
    assert torch.equal(pixels(long, 24, "crop"), pixels(middle, 24, "crop"))
    assert max(max(size) for size in seen) == 24 * 9
