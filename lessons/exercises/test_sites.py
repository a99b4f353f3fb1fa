"""Turns green when lessons/exercises/sites.py is solved.

    python -m pytest lessons/exercises/test_sites.py
"""
from dataclasses import replace

import torch
from sites import sublayer, widest

import t5
from adapters import Adapter, Add, Site

BART, T5 = t5.bart(8, 2, 16, 1), t5.t5(8, 2, 16, 1)


def block(config: t5.Config) -> t5.SubLayer:
    """A feed-forward with residual and norm, its weights drawn anew."""
    torch.manual_seed(0)
    layer = t5.SubLayer(config, t5.FeedForward(config)).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def test_like_the_model():
    """The same numbers as t5.SubLayer with the adapter installed, in both dialects."""
    for config in (BART, T5):
        for reads in ("h", "x"):
            layer = block(config)
            adapter = Adapter(Add(r=3, reads=reads, std=0.5), Site("here", 8, 8))
            x = torch.randn(2, 5, 8)
            mine = sublayer(x, layer.f, layer.norm, lambda h, x, f=adapter: f(h, x, None),
                            config.pre_norm)
            layer.tune = adapter
            assert torch.allclose(mine, layer(x)[0], atol=1e-5)


def test_nothing_added_changes_nothing():
    for config in (BART, replace(T5, gated=True)):
        layer, x = block(config), torch.randn(1, 3, 8)
        mine = sublayer(x, layer.f, layer.norm, lambda h, x: h, config.pre_norm)
        assert torch.allclose(mine, layer(x)[0], atol=1e-5)


def test_widest():
    """148,320 numbers buy r 96 at d 768; one number less does not."""
    assert widest(768, 148_320) == 96
    assert widest(768, 148_319) == 95
    for r in (1, 7, 16):
        d = 128
        layers = torch.nn.Sequential(torch.nn.Linear(d, r), torch.nn.Linear(r, d))
        numbers = sum(p.numel() for p in layers.parameters())
        assert (widest(d, numbers), widest(d, numbers - 1)) == (r, r - 1)
