"""tools/bench.py: the table's form, the same work on both sides, the floor counted by hand.

    python -m pytest tests/test_bench.py
"""
import json
import math
from argparse import Namespace
from dataclasses import replace

import torch

import methods
import t5
from model import VLModel
from tools import bench


def test_two_works(tmp_path):
    """The table has a line for each contestant, and both sides do the same work."""
    bench.main(["--lm", "weights/tiny-bart", "--turns", "2", "--batch", "3", "--works",
                "step-natural,beams-natural", "--out", str(tmp_path / "table")])
    turns = json.loads((tmp_path / "table.json").read_text())["turns"]
    about, _, head, _, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert "transformers" in about and "lm weights/tiny-bart" in about
    assert {line.count("|") for line in [head, *lines]} == {9}
    for line in lines:
        _, work, name, *numbers, _ = map(str.strip, line.split("|"))
        assert [len(turns[work][name]), min(map(float, numbers)) > 0] == [2, True]
    ours, peer = (turns["step-natural"][name][-1] for name in bench.PAIR)
    assert ours["size"] == peer["size"] > 0              # parameters that are trained
    assert math.isfinite(ours["value"]) and math.isfinite(peer["value"])     # losses
    ours, peer = (turns["beams-natural"][name][-1] for name in bench.PAIR)
    assert ours["value"] == peer["value"] == 8 + 13 + 11     # tokens of the answers, see `end`


def test_the_floor_of_one_layer_by_hand():
    c = replace(t5.bart(8, 2, 16, 1), vocab=100)
    model = VLModel(t5.EncoderDecoder(c), bench.F)
    model.install(methods.row("lora", is_t5=False, changes="r=4"))
    encoder, decoder = 3 * (bench.L + bench.N), 3 * bench.T      # tokens of 3 examples
    frozen = encoder * (6 * 8 * 8 + 2 * 8 * 16)          # its q k v o, cross-attention's k v; ffn
    frozen += decoder * (6 * 8 * 8 + 2 * 8 * 16 + 8 * 100)       # the decoder's others, the head
    lora = 2 * (8 * 4) * (3 * encoder + 3 * decoder)     # A and B at q and v of three attentions
    visual = 3 * bench.N * (bench.F + 5) * 8
    want = 2 * frozen + 3 * lora + 2 * visual            # y, dx; y, dx, dW; y, dW
    assert sum(m * k * n for m, k, n in bench.products(model, 3)) == want


def test_the_other_contestants_run():
    args = Namespace(lm="weights/tiny-bart", batch=3, natural=False, device="cpu", beams=0,
                     dtype=torch.float32)
    for name in ("floor", "features", "ours adapter", "ours vlpet-large", "ours full"):
        run, size = bench.CONTESTANTS[name](args)
        value = run(bench.make_batch(0, 3, False))
        assert math.isfinite(value) and (size > 0) == (name != "features")
