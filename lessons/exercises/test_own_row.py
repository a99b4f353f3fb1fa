"""Turns green when lessons/exercises/own_row.py is solved.

    python -m pytest lessons/exercises/test_own_row.py
"""
import torch
from own_row import row

import t5
from adapters import Context
from model import VLModel, vocabulary

D, LAYERS, FEATURES = 32, 2, 12
IDS, LABELS = torch.tensor([[0, 5, 6, 2]]), torch.tensor([[0, 7, 8, 2]])


def model(install: bool) -> VLModel:
    """A tiny BART with random weights; the row is installed or not."""
    torch.manual_seed(0)
    config = t5.bart(D, 4, 48, LAYERS, vocab=80, positions=66)
    lm = t5.EncoderDecoder(config).init_weights()
    made = VLModel(lm.resize(vocabulary(config)), FEATURES).eval()
    if install:
        made.install(row())
    return made


def test_it_begins_as_the_frozen_model():
    tuned, frozen = model(True), model(False)
    assert tuned.installed, "nothing is installed"
    assert torch.equal(tuned.lm(IDS, LABELS), frozen.lm(IDS, LABELS))


def test_what_is_trained():
    """A module: D and b_D 32 * 4 + 4, U and b_U 4 * 32 + 32, a 32: 324 numbers, at 2 + 2 sites.
    5 norms of the encoder: 64 each. The visual embedding is open in every row."""
    parts = {name: trained for name, trained, _ in model(True).counts()}
    assert parts["method"] == 4 * 324
    assert parts["language model"] == 5 * 64


def test_what_it_reads():
    """With an open gate: another x changes what the decoder's modules give, and no others."""
    h, x, other = torch.randn(3, 1, 5, D)
    for place, module in model(True).installed.items():
        with torch.no_grad():
            module.tune.a.fill_(1.0)
            same = torch.equal(module.tune(h, x, Context()), module.tune(h, other, Context()))
            assert not torch.equal(module.tune(h, x, Context()), h)
        assert same == place.startswith("lm.encoder"), place


def test_all_of_it_learns():
    """A step moves a from 0, and behind it every tensor of the modules has a gradient."""
    torch.manual_seed(1)
    tuned = model(True)
    before = tuned.lm(IDS, LABELS).detach()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        logits = tuned.lm(IDS, LABELS)
        torch.nn.functional.cross_entropy(logits[0], LABELS[0]).backward()
        optimizer.step()
    for place, module in tuned.installed.items():
        for name, p in module.tune.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, f"{place}: {name}"
    assert not torch.equal(tuned.lm(IDS, LABELS), before)
