"""weights.py against safetensors itself, hand-written tables, and every way a file can be wrong.

python -m pytest tests/test_weights.py
"""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import same_state
from torch import nn

from support import weights
from support.gate import BadInput


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkvo"}))
        self.out = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.out(x)


TABLE = [
    ("layers.{i}.qkv", ("blocks.{i}.q", "blocks.{i}.k", "blocks.{i}.v")),
    ("layers.{i}.proj", "blocks.{i}.o"),
    ("head", "out.weight", "T"),
    ("lm_head", "out.weight", "T"),
    ("norm", "norm"),
    ("other_tower", None),
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def file(net):
    """The net's tensors as somebody else would have published them, built by hand."""
    state, out = net.state_dict(), {}
    for i in range(2):
        for kind in ("weight", "bias"):
            qkv = [state[f"blocks.{i}.{name}.{kind}"] for name in "qkv"]
            out[f"layers.{i}.qkv.{kind}"] = torch.cat(qkv)
            out[f"layers.{i}.proj.{kind}"] = state[f"blocks.{i}.o.{kind}"]
    out |= {name: tensor for name, tensor in state.items() if name.startswith("norm.")}
    return out | {"head": state["out.weight"].T.contiguous()}


def fails(net: nn.Module, file: dict, *words: str) -> None:
    """Loading must fail, say these words, and leave the net as it was."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(BadInput) as error:
        weights.load(net, file, TABLE, where="there/model")
    assert same_state(before, net.state_dict())
    for word in ("there/model: it cannot be loaded into this Net (", *words):
        assert word in str(error.value)


# ---------------------------------------------------------------------------------- names

def test_load_fills_everything_and_published_is_the_inverse(net, file):
    other = Net()
    weights.load(other, file | {"other_tower.a.b": torch.zeros(3)}, TABLE)
    assert same_state(net.state_dict(), other.state_dict())
    assert same_state(weights.published(net, TABLE), file)
    weights.load(Net(), weights.published(net, None))                # no table: names are ours
    for dtype in (torch.float16, torch.bfloat16, torch.float64):     # numbers are cast to ours
        file["head"] = file["head"].to(dtype)
        weights.load(net, file, TABLE)
        assert net.out.weight.dtype == torch.float32
        assert torch.equal(net.out.weight, file["head"].T.float())
    with pytest.raises(AssertionError, match="norm.weight"):
        weights.published(net, [row for row in TABLE if row[0] != "norm"])


def test_some_tensors_of_a_module(net, file):
    """A target may be tensors by name: they are filled in place, the others stay."""
    other = Net()
    target, kept = {"out.weight": other.out.weight}, other.norm.weight.clone()
    weights.load(target, {"head": file["head"]}, TABLE)
    assert torch.equal(other.out.weight, net.out.weight) and other.out.weight.requires_grad
    assert torch.equal(other.norm.weight, kept)
    for source, problem in (([], "missing: head"),
                            (["head", "norm.weight"], "unexpected: norm.weight")):
        with pytest.raises(BadInput, match=problem):
            weights.load(target, {name: file[name] for name in source}, TABLE)


def test_tied_copies_must_be_equal(net, file):
    weights.load(Net(), file | {"lm_head": file["head"].clone()}, TABLE)
    fails(net, file | {"lm_head": file["head"] + 1}, "lm_head differs from its copy")
    half = file["head"].half()                   # the same numbers, but not the same bits
    fails(net, file | {"head": half.float(), "lm_head": half}, "lm_head differs from its copy")


def test_all_problems_at_once(net, file):
    file["blocks.0.q.weight"] = file["surprise"] = torch.zeros(1)
    file["layers.0.proj.weight"] = torch.zeros(4, 5)
    file["norm.num_batches_tracked"] = torch.tensor(1.5)
    del file["layers.1.qkv.bias"], file["norm.running_var"]
    fails(net, file, "missing: layers.1.qkv.bias, norm.running_var;",
          "unexpected: blocks.0.q.weight, surprise;", "layers.0.proj.weight (4, 5) for (4, 4)",
          "torch.float32 for torch.int64")
    fails(net, file | {f"extra{i}": torch.zeros(1) for i in range(9)}, "extra5 and 3 more")


@pytest.mark.parametrize("name, shape", [
    *(("layers.1.proj.weight", shape) for shape in [(16,), (4, 5), ()]),
    *(("layers.0.qkv.weight", shape) for shape in [(12,), (13, 4), (2, 4), (), (12, 5)])])
def test_shapes_must_be_equal(net, file, name, shape):
    fails(net, file | {name: torch.zeros(shape)}, f"not fitting: {name} (")


def test_a_row_matches_at_dots_only(net, file):
    for name in ("other_tower_2.a", "layers.x.proj.weight", "norms.weight"):
        fails(net, file | {name: torch.zeros(4)}, f"unexpected: {name}")
    assert weights.to_published("norm.a", TABLE) == ("norm.a", 0, False)
    assert weights.to_published("norms.a", TABLE) is None


def test_fingerprint_sees_numbers_and_names(net):
    before = weights.fingerprint(net)
    assert len(before) == 16 and weights.fingerprint(net) == before
    net.blocks[0]["p"] = net.blocks[0].pop("q")
    renamed = weights.fingerprint(net)
    with torch.no_grad():
        net.out.weight[0, 0] += 1e-6
    changed = weights.fingerprint(net)
    assert len({before, renamed, changed, weights.fingerprint(net.bfloat16())}) == 4


# ---------------------------------------------------------------------------------- files

def test_write_and_read(file, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    file |= {"half": torch.ones(3).bfloat16(), "flag": torch.tensor([True]), "none": torch.ones(0)}
    file |= {"again": file["head"], "row": file["head"][1], "t": file["head"].T}   # one memory
    weights.write(path, file, {"made": "by hand é\n"})
    assert same_state(load_file(path), file)                              # safetensors' own reader
    assert [p.name for p in path.parent.iterdir()] == [path.name]   # nothing unfinished is left
    source = weights.read(path)
    assert source.metadata == {"made": "by hand é\n"} and same_state(dict(source), file)
    assert source.shape("head") == (4, 6) and len(source) == len(file)


def test_equal_tensors_give_equal_bytes(tmp_path):
    """In two processes: safetensors' own order of the metadata differs from one to the next."""
    code = ("import sys, torch; from support import weights; t = torch.arange(4.); "
            "weights.write(sys.argv[1], {'b': t, 'a': t.half()}, {c: c for c in 'zyxwabcd'})")
    for i in range(2):
        subprocess.run([sys.executable, "-c", code, tmp_path / str(i)], check=True,
                       env=os.environ | {"PYTHONHASHSEED": str(i), "PYTHONPATH": "."},
                       cwd=weights.Path(weights.__file__).parents[1])
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_shards(file, tmp_path):
    home = {name: f"model-{i % 2}" for i, name in enumerate(sorted(file))}
    for shard in set(home.values()):
        part = {name: file[name] for name in file if home[name] == shard}
        save_file(part, tmp_path / shard, {shard: "yes"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    source = weights.read(tmp_path)
    assert same_state(dict(source), file) and len(source.metadata) == 2

    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(BadInput, match="index.json: "):
            weights.read(tmp_path)
    index.write_text(json.dumps({"weight_map": {"head": "../elsewhere/" + home["head"]}}))
    assert weights.read(tmp_path)["head"].shape == (4, 6)   # an index never leads out of its folder
    (tmp_path / home["head"]).unlink()
    with pytest.raises(BadInput, match=f"{home['head']} is missing, cut short or"):
        weights.read(tmp_path)


def test_missing_and_damaged_files_are_named(file, tmp_path):
    with pytest.raises(BadInput, match="neither model.safetensors nor model.safetensors.index"):
        weights.read(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(file, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:60], whole[:-1], whole + b"x", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="model.safetensors is missing, cut short or"):
            weights.read(tmp_path)


def test_numbers_that_are_not_finite_are_refused():
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(BadInput, match="a holds NaN or inf"):
            weights.load({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, wrong])})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a b's.pth", "RN101.pt"])
def test_pickles_are_refused_and_the_remedy_works(net, file, tmp_path, name):
    """RN101.pt: OpenAI's CLIP files are programs with weights, torch.load does not open them."""
    if name == "RN101.pt":
        file = net.state_dict()
        torch.jit.trace(net, torch.ones(1, 4)).save(tmp_path / name)
    else:
        file |= {"tied": file["head"], "turned": file["head"].T}
        torch.save(file, tmp_path / name)
    with pytest.raises(BadInput, match="pickle") as error:
        weights.read(tmp_path)                                # the folder, or the file: the same
    # What is said must convert the file, word for word, when a shell runs it.
    command = str(error.value).split("convert it once: python")[1]
    subprocess.run(sys.executable + command, shell=True, check=True, capture_output=True)
    name = name.replace("pytorch_", "").rpartition(".")[0]
    assert same_state(dict(weights.read(tmp_path / f"{name}.safetensors")), file)
