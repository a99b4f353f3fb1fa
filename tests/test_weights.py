"""weights.py against safetensors itself, hand-written tables, and every way a file can be wrong."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support import weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(4, 4) for n in "qkvo"})
                                    for _ in range(2))
        self.out = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(4)


TABLE = [
    ("layers.{i}.qkv", tuple(f"blocks.{{i}}.{n}" for n in "qkv")),
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
    w, out = net.state_dict(), {}
    for i in range(2):
        for kind in ("weight", "bias"):
            out[f"layers.{i}.qkv.{kind}"] = torch.cat([w[f"blocks.{i}.{n}.{kind}"] for n in "qkv"])
            out[f"layers.{i}.proj.{kind}"] = w[f"blocks.{i}.o.{kind}"]
    out |= {k: v for k, v in w.items() if k.startswith("norm.")}
    return out | {"head": w["out.weight"].T.contiguous()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fails(net: nn.Module, file: dict, *words: str, **kwargs) -> str:
    """Loading must fail, say these words, and leave the net as it was."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError) as error:
        weights.load(net, file, TABLE, **kwargs)
    assert same(before, net.state_dict())
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def test_load_fills_everything(net, file):
    other = Net()
    weights.load(other, file | {"other_tower.a.b": torch.zeros(3)}, TABLE)
    assert same(net.state_dict(), other.state_dict())


def test_published_is_the_inverse(net, file):
    assert same(weights.published(net, TABLE), file)


def test_published_needs_a_row(net):
    with pytest.raises(ValueError, match="norm.weight"):
        weights.published(net, [row for row in TABLE if row[0] != "norm"])


def test_without_a_table_names_are_ours(net):
    other = Net()
    weights.load(other, weights.published(net, None))
    assert same(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_to_the_modules_dtype(net, file, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in file.items()}
    weights.load(net, stored, TABLE)
    assert net.out.weight.dtype == torch.float32
    assert torch.equal(net.out.weight, stored["head"].T.float())


def test_some_tensors_of_a_module(net, file):
    """A target may be tensors by name: they are filled in place, the others stay."""
    other = Net()
    before = {n: t.clone() for n, t in other.state_dict().items() if n != "out.weight"}
    weights.load({"out.weight": other.out.weight}, {"head": file["head"]}, TABLE)
    assert torch.equal(other.out.weight, net.out.weight) and other.out.weight.requires_grad
    assert same(before, {n: t for n, t in other.state_dict().items() if n != "out.weight"})
    with pytest.raises(ValueError, match="missing: head"):
        weights.load({"out.weight": other.out.weight}, {}, TABLE)


def test_tied_copies_must_be_equal(net, file):
    weights.load(Net(), file | {"lm_head": file["head"].clone()}, TABLE)
    fails(net, file | {"lm_head": file["head"] + 1}, "lm_head", "copy", "head")
    half = file["head"].half()                   # the same numbers, but not the same bits
    fails(net, file | {"head": half.float(), "lm_head": half}, "lm_head", "copy")


def test_all_problems_at_once(net, file):
    file["blocks.0.q.weight"] = file["surprise"] = torch.zeros(1)
    file["layers.0.proj.weight"] = torch.zeros(4, 5)
    file["norm.num_batches_tracked"] = torch.tensor(1.5)
    del file["layers.1.qkv.bias"], file["norm.running_var"]
    text = fails(net, file, "missing: layers.1.qkv.bias, norm.running_var;",
                 "unexpected: blocks.0.q.weight, surprise;",
                 "layers.0.proj.weight (4, 5) for (4, 4)", "torch.float32 for torch.int64",
                 "there/model", "Net", where="there/model")
    assert "\n" not in text


@pytest.mark.parametrize("shape", [(16,), (2, 8), (4, 5), ()])
def test_shapes_must_be_equal(net, file, shape):
    fails(net, file | {"layers.1.proj.weight": torch.zeros(shape)}, f"weight {shape} for (4, 4)")


@pytest.mark.parametrize("shape", [(12,), (13, 4), (2, 4), (), (12, 5)])
def test_a_packed_tensor_that_cannot_be_cut(net, file, shape):
    fails(net, file | {"layers.0.qkv.weight": torch.zeros(shape)}, "layers.0.qkv.weight")


def test_long_lists_end_in_a_count(net, file):
    fails(net, file | {f"extra{i}": torch.zeros(1) for i in range(11)}, "extra7 and 3 more")


def test_a_row_matches_at_dots_only(net, file):
    fails(net, file | {"other_tower_2.a": torch.zeros(4)}, "unexpected: other_tower_2.a")
    fails(net, file | {"layers.x.proj.weight": torch.zeros(4)}, "unexpected: layers.x.proj.weight")


def test_write_and_read(net, file, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    weights.write(path, file, {"made": "by hand"})
    assert same(load_file(path), file)                              # safetensors' own reader
    assert [p.name for p in path.parent.iterdir()] == [path.name]   # nothing unfinished is left
    source = weights.read(path)
    assert source.metadata == {"made": "by hand"} and same(dict(source), file)
    assert source.shape("head") == (4, 6) and len(source) == len(file)


def test_write_separates_shared_memory(tmp_path):
    t = torch.arange(12.).view(3, 4)
    weights.write(tmp_path / "a.safetensors", {"a": t, "row": t[1], "t": t.T, "again": t})
    out = load_file(tmp_path / "a.safetensors")
    assert torch.equal(out["row"], t[1]) and torch.equal(out["t"], t.T)
    assert torch.equal(out["again"], out["a"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("no space left on device")

    weights.write(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    monkeypatch.setattr(weights.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        weights.write(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def shards(folder, file):
    names = sorted(file)
    home = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(home.values()):
        save_file({n: file[n] for n in names if home[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return home


def test_shards(net, file, tmp_path):
    home = shards(tmp_path, file)
    assert same(dict(weights.read(tmp_path)), file)
    (tmp_path / home["head"]).unlink()
    with pytest.raises(FileNotFoundError, match=home["head"]):
        weights.read(tmp_path)


def test_damaged_indices(file, tmp_path):
    home = shards(tmp_path, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": home | {"ghost": home["head"]}}))
    with pytest.raises(ValueError, match="ghost"):
        weights.read(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json"):
            weights.read(tmp_path)


def test_missing_files_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weights.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.saf"):
        weights.read(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_files_are_named(file, tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(file, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors.*download it again"):
        weights.read(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "RN101.pt", "a.pth", "b.ckpt"])
def test_pickles_are_refused_and_the_remedy_works(file, tmp_path, name):
    torch.save(file, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="pickle") as error:
            weights.read(path)
    code = str(error.value).split('python -c "')[1].rsplit('"', 1)[0]
    exec(code, {})                                                   # the advice, word for word
    assert same(dict(weights.read(tmp_path)), file)
