"""How does CLIP turn a picture into a grid of features?

CLIP (Radford et al. 2021, arXiv 2103.00020) has two kinds of image tower. The ViT cuts a picture
into patches, puts a class token in front and runs pre-norm Transformer blocks. The ResNet has a
stem of three convolutions with an average pool, strides made by average pools (anti-aliased), and
attention in place of the last global average pool. Both papers tune a language model on the
ResNet's last grid, pooled to 6 x 6 = 36 tokens.

Deliberate: the ViT's tokens for tuning come from the last block but one. CLIP's loss sees the last
block's class token only, so nothing ever taught that block's outputs at the patches to mean much.

    python -m tools.pack --clip weights/tiny-clip --images pictures/ --out packed/
    python -m pytest tests/test_clip.py

Axes: B batch, N cells of a grid (h x w, row by row), W width, H heads, F width of the features
that are tuned on, E width of CLIP's one vector.
"""
import struct

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)               # of red, green, blue in CLIP's pictures
STD = (0.26862954, 0.26130258, 0.27577711)
GRID = 6                                                 # tokens a side for tuning

# OpenAI's towers. size, patch: pixels a side; layers: blocks, or bottlenecks of each stage.
PRESETS = {
    "RN50": dict(width=64, layers=(3, 4, 6, 3), heads=32, size=224, out=1024),
    "RN50x4": dict(width=80, layers=(4, 6, 10, 6), heads=40, size=288, out=640),
    "RN101": dict(width=64, layers=(3, 4, 23, 3), heads=32, size=224, out=512),
    "ViT-B/32": dict(width=768, layers=12, heads=12, patch=32, size=224, out=512),
    "ViT-B/16": dict(width=768, layers=12, heads=12, patch=16, size=224, out=512),
    "ViT-L/14": dict(width=1024, layers=24, heads=16, patch=14, size=224, out=768),
}


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)                  # near GELU, and what OpenAI trained with


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


# ------------------------------------------------------------------------------------- both towers

class Attention(nn.Module):
    """softmax(q k^T / sqrt(W / H)) v in H heads; `out`: the output's width."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, out)

    def split(self, x: Tensor) -> Tensor:
        """The heads side by side (B, N, W) -> each for itself (B, H, N, W / H)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """Each query (B, Q, W) reads x (B, N, W) -> (B, Q, out)."""
        q, k, v = self.split(self.q(query)), self.split(self.k(x)), self.split(self.v(x))
        h = F.scaled_dot_product_attention(q, k, v)                         # B, H, Q, W / H
        return self.o(h.transpose(1, 2).flatten(2))                         # B, Q, out


def resize_positions(table: Tensor, h: int, w: int) -> Tensor:
    """Positions of a square grid, (1 + n * n, W) with the class token's first -> (1 + h * w, W)."""
    n = round((len(table) - 1) ** 0.5)
    if (h, w) == (n, n):
        return table
    grid = table[1:].T.unflatten(1, (n, n))[None]                           # 1, W, n, n
    grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)       # 1, W, h, w
    return torch.cat([table[:1], grid[0].flatten(1).T])                     # 1 + h * w, W


def pool(grid: Tensor) -> Tensor:
    """A feature map (B, F, h, w) -> 36 tokens (B, 36, F), each the maximum over its share.

    From 7 x 7 this equals a max-pool of 2 x 2 windows with stride 1; 6 x 6 stays as it is.
    """
    return F.adaptive_max_pool2d(grid, GRID).flatten(2).transpose(1, 2)


# --------------------------------------------------------------------------------------------- ViT

class Block(nn.Module):
    """x = x + attn(norm1(x));  x = x + down(act(up(norm2(x))))"""

    def __init__(self, width: int, heads: int, ffn: int, activation: str, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, width)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)                                                   # B, 1 + N, W
        x = x + self.attn(h, h)
        return x + self.down(self.act(self.up(self.norm2(x))))


class ViT(nn.Module):
    """CLIP's vision Transformer. out: E; ffn: 4 W if not given."""

    def __init__(self, width: int, layers: int, heads: int, patch: int, size: int, out: int,
                 ffn: int | None = None, activation: str = "quick_gelu", eps: float = 1e-5):
        super().__init__()
        assert size % patch == 0, f"size {size} is not a multiple of patch {patch}"
        ffn = ffn or 4 * width
        self.config = dict(width=width, layers=layers, heads=heads, patch=patch, size=size, out=out,
                           ffn=ffn, activation=activation, eps=eps)
        self.size, self.features = size, width                              # F = W
        # What only CLIP's vector passes through: a loss on the grid does not reach it.
        self.pooled_only = (f"blocks.{layers - 1}.", "norm_post.", "project.")
        self.patch = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1 + (size // patch) ** 2, width) * width ** -0.5)
        self.norm_pre, self.norm_post = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        blocks = [Block(width, heads, ffn, activation, eps) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.project = nn.Linear(width, out, bias=False)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pixels (B, 3, height, width) -> tokens (B, 1 + N, W), and the grid (h, w) of the N."""
        height, width = pixels.shape[2:]
        patch = self.config["patch"]
        # A convolution would pass over the pixels that are left at the edges, and say nothing.
        assert height % patch == width % patch == 0, f"{height} x {width} has no patches of {patch}"
        h, w = height // patch, width // patch
        x = self.patch(pixels).flatten(2).transpose(1, 2)                   # B, N, W
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)               # B, 1 + N, W
        return self.norm_pre(x + resize_positions(self.positions, h, w)), (h, w)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """-> the last block's output (B, 1 + N, W), class token first, and CLIP's vector (B, E)."""
        x, _ = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x, self.project(self.norm_post(x[:, 0]))                     # the class token's

    def encode(self, pixels: Tensor, pooled: bool = False) -> Tensor:
        """Tokens for the language model (B, 36, F); pooled: CLIP's one vector (B, E)."""
        if pooled:
            return self(pixels)[1]
        x, grid = self.embed(pixels)
        for block in self.blocks[:-1]:                   # the last but one: see above
            x = block(x)
        return pool(x[:, 1:].transpose(1, 2).unflatten(2, grid))            # B, 36, W


# ------------------------------------------------------------------------------------------ ResNet

class BatchNorm(nn.Module):
    """Batch normalisation by its stored statistics, in train mode too: the tower is frozen."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def conv(width: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; a stride is an average pool, so that no pixel is passed over."""

    def __init__(self, width: int, inner: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = conv(width, inner, 1), BatchNorm(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3), BatchNorm(inner)
        self.conv3, self.bn3 = conv(inner, 4 * inner, 1), BatchNorm(4 * inner)
        self.downsample = None
        if stride > 1 or width != 4 * inner:             # the residual takes the block's new shape
            self.downsample = nn.Sequential(conv(width, 4 * inner, 1), BatchNorm(4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))                                 # B, inner, h, w
        h = F.relu(self.bn2(self.conv2(h)))
        if self.stride > 1:
            h, x = F.avg_pool2d(h, self.stride), F.avg_pool2d(x, self.stride)     # h / 2, w / 2
        h = self.bn3(self.conv3(h))                                         # B, 4 * inner, h, w
        if self.downsample is not None:
            x = self.downsample(x)
        return F.relu(h + x)


class ResNet(nn.Module):
    """CLIP's ResNet. width: of the stem (64); layers: bottlenecks of each stage; F = 32 width."""

    def __init__(self, width: int, layers: tuple[int, ...], heads: int, size: int, out: int):
        super().__init__()
        self.config = dict(width=width, layers=layers, heads=heads, size=size, out=out)
        self.size, self.features = size, 32 * width
        self.pooled_only = ("positions", "attn.")        # as in the ViT
        self.conv1, self.bn1 = conv(3, width // 2, 3, stride=2), BatchNorm(width // 2)
        self.conv2, self.bn2 = conv(width // 2, width // 2, 3), BatchNorm(width // 2)
        self.conv3, self.bn3 = conv(width // 2, width, 3), BatchNorm(width)
        self.stages, before = nn.ModuleList(), width
        for stage, count in enumerate(layers):
            inner = width * 2 ** stage
            blocks = [Bottleneck(before, inner, stride=2 if stage else 1)]
            blocks += [Bottleneck(4 * inner, inner, stride=1) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            before = 4 * inner
        self.positions = nn.Parameter(torch.randn(1 + (size // 32) ** 2, before) * before ** -0.5)
        self.attn = Attention(before, heads, out)

    def grid(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, height, width) -> the last stage's map (B, F, height / 32, width / 32)."""
        x = F.relu(self.bn1(self.conv1(pixels)))         # every second pixel
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)                                              # B, width, h, w: / 4
        for stage in self.stages:
            x = stage(x)                                 # from the second on: / 2, twice the width
        return x

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """-> the last grid, row by row (B, N, F), and CLIP's vector (B, E)."""
        x = self.grid(pixels)                                               # B, F, h, w
        h, w = x.shape[2:]
        grid = x.flatten(2).transpose(1, 2)                                 # B, N, F
        # Attention pool: the mean asks, the mean and all cells answer.
        x = torch.cat([grid.mean(1, keepdim=True), grid], 1)                # B, 1 + N, F
        x = x + resize_positions(self.positions, h, w)
        return grid, self.attn(x[:, :1], x)[:, 0]

    def encode(self, pixels: Tensor, pooled: bool = False) -> Tensor:
        """Tokens for the language model (B, 36, F); pooled: CLIP's one vector (B, E)."""
        return self(pixels)[1] if pooled else pool(self.grid(pixels))


def randomized(clip: ViT | ResNet) -> ViT | ResNet:
    """The same tower with fresh random weights: the control that has never seen a picture."""
    return type(clip)(**clip.config).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ pixels

TURN = Image.Transpose
ORIENTATION = 0x0112                                     # the EXIF field: how the camera was held
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
# What Pillow raises at EXIF that it cannot parse; the picture beside it is as good as ever.
BAD_EXIF = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError,
            ValueError, struct.error)


def rgb(image: Image.Image) -> Image.Image:
    """Upright and in three colours: camera rotation applied, transparency laid on white."""
    image.load()                                         # broken pixels raise here, not in the try
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except BAD_EXIF:
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):                       # 16-bit grey: convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def padded(image: Image.Image) -> Image.Image:
    """CLIP-ViL's pictures keep their aspect: within 640 x 384 (upright ones and squares within
    384 x 640), as large as fits, in the middle of black."""
    short, long = min(image.size), max(image.size)
    size, sides = (384, 384 * long // short), (384, 640)
    if 384 * long > 640 * short:                         # a long one
        size = max(1, round(640 * short / long)), 640
    if image.width > image.height:
        size, sides = size[::-1], sides[::-1]
    canvas = Image.new("RGB", sides)
    left, top = ((side - length + 1) // 2 for side, length in zip(sides, size))
    canvas.paste(image.resize(size, Image.BILINEAR), (left, top))
    return canvas


def pixels(image: Image.Image, size: int, resize: str = "stretch") -> Tensor:
    """A picture -> (3, height, width), size x size but for pad; normalised as CLIP saw it.

    stretch: the whole picture, aspect not kept (the papers' features). crop: the short side to
    `size`, then the centre, rounded as by transformers. pad: CLIP-ViL's, `padded`, whatever `size`.
    """
    image = rgb(image)
    if resize == "pad":
        image = padded(image)
    elif resize == "crop":
        short = min(image.size)
        # Cut thin pictures first: 1 x 9,999 pixels would become 224 x 2,239,776 on the way. Whole
        # multiples of the short side are cut, so that the centre lies where it would have lain.
        x, y = (max(0, side // short - 9) // 2 * short for side in image.size)
        image = image.crop((x, y, image.width - x, image.height - y))
        image = image.resize([size * side // short for side in image.size], Image.BICUBIC)
        x, y = ((side - size) // 2 for side in image.size)
        image = image.crop((x, y, x + size, y + size))
    else:
        assert resize == "stretch", f"resize is 'stretch', 'crop' or 'pad', not {resize!r}"
        image = image.resize((size, size), Image.BICUBIC)
    x = np.asarray(image, np.float32) / 255                                 # height, width, 3
    x = (x - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(x).permute(2, 0, 1)                             # 3, height, width
