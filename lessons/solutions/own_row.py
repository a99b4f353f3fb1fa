"""Lesson 8, solved: a module of your own, and its row.

    python -m pytest tests/test_lessons.py
"""
import torch
from torch import Tensor, nn

from adapters import Adapter, Add, Context, Method, Site


class ChannelGated(Adapter):
    def __init__(self, add: Add, site: Site):
        super().__init__(add, site)
        self.a = nn.Parameter(torch.zeros(site.d_out))

    def forward(self, h: Tensor, x: Tensor, ctx: Context) -> Tensor:
        z = x if self.reads_x else h
        return h + self.a * self.net(z, ctx)               # B, S, D


def row() -> Method:
    behind = Add(r=4, module=ChannelGated)
    beside = Add(r=4, module=ChannelGated, reads="x")
    return Method({"encoder.ffn": behind, "decoder.cross_attn.v": beside}, ("encoder.norms",))


# Then: the gradient of each has the other as a factor, so both stay 0 for good.
