"""interchange.py against the PEFT library on transformers' models: the same numbers, both ways."""
import json
import sys
import warnings

import pytest
import test_t5
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from tools import peft as interchange
import model
import methods as rows
import train
from support import weights
from support.published_lm import load_lm, read_config

try:
    import peft
except ImportError:
    peft = None

needs_peft = pytest.mark.skipif(peft is None, reason="the PEFT library is not installed: "
                                "pip install -r requirements-dev.txt")
KINDS = ("bart", "t5")
TARGETS = {"bart": ["q_proj", "v_proj"], "t5": ["q", "v"]}
TASKS = ("vqa", "caption")


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    """A random model that transformers wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    test_t5.build(getattr(test_t5, f"{request.param}_config")(), folder)
    return folder


def kind_of(folder):
    return "t5" if read_config(folder).is_t5 else "bart"


def theirs(folder):
    name = "T5" if kind_of(folder) == "t5" else "Bart"
    m = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder)
    return m.eval()


def ours(folder, method, changes="", seed=1, tasks=()):
    """Our model with the row; everything that it trains is random."""
    m = model.VLModel(load_lm(folder), tiny.WIDTH)
    m.install(rows.row(method, kind_of(folder) == "t5", changes), tasks)
    return randomize(m, seed).eval()


@torch.no_grad()
def randomize(m, seed):
    law = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=law) * 0.2
    return m


@torch.no_grad()
def logits(m, ctx=None):
    law = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(3, test_t5.VOCAB, (3, n), generator=law) for n in (9, 6))
    if isinstance(m, model.VLModel):
        return m.lm(ids, labels, ctx=m.context((ctx,) * 3, ids.device) if ctx else None)
    mask = torch.ones_like(ids)
    return m(input_ids=ids, attention_mask=mask, labels=labels).logits


def state(m):
    return {n: t.clone() for n, t in m.state_dict().items()}


def edit(folder, **changes):
    path = folder / interchange.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ROWS = {"lora": "r=8,alpha=12", "dora": "decoder.self_attn.k=dora,encoder.ffn.wi=dora,r=6,alpha=4",
        "lora of the ffn": "encoder=none,decoder.ffn.wo=lora,r=8,open=none"}


@needs_peft
@pytest.mark.parametrize("name", ROWS)
def test_peft_reads_ours(published, tmp_path, name):
    m = ours(published, name.split()[0], ROWS[name])
    interchange.export(m, tmp_path, str(published))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing.*")         # PEFT only warns of such tensors
        p = peft.PeftModel.from_pretrained(theirs(published), tmp_path).eval()
    assert isinstance(p, peft.PeftModelForSeq2SeqLM)
    held = load_file(tmp_path / interchange.ADAPTER)
    said = peft.get_peft_model_state_dict(p)
    said.pop("base_model.model.final_logits_bias", None)        # a frozen buffer
    said = {k: t for k, t in said.items() if "relative_attention_bias" not in k}
    assert tiny.same_state(held, said)
    want = logits(p)
    torch.testing.assert_close(logits(m), want, atol=1e-5, rtol=1e-5)
    assert (want - logits(theirs(published))).abs().max() > 0.05


@needs_peft
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ours_reads_peft(published, tmp_path, method):
    kind, bart = kind_of(published), kind_of(published) == "bart"
    p = peft.get_peft_model(theirs(published), peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=9, target_modules=TARGETS[kind],
        bias="all" if bart else "none", use_dora=method == "dora", use_rslora=method == "lora"))
    randomize(p, 3).eval().save_pretrained(tmp_path)
    m = ours(published, method, "r=4,alpha=" + ("18" if method == "lora" else "9"))
    assert interchange.load(m, tmp_path) is False               # no visual embedding
    want = logits(p)
    torch.testing.assert_close(logits(m), want, atol=1e-5, rtol=1e-5)
    assert (want - logits(theirs(published))).abs().max() > 0.05


@pytest.mark.parametrize("name", ROWS)
def test_round_trip(published, tmp_path, name):
    m = ours(published, name.split()[0], ROWS[name])
    interchange.export(m, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        (interchange.CONFIG, interchange.ADAPTER, interchange.VISUAL))
    other = ours(published, name.split()[0], ROWS[name], seed=2)
    assert interchange.load(other, tmp_path) is True
    assert tiny.same_state(other.state_dict(), m.state_dict())


def test_the_published_sizes_have_whole_alphas(published, tmp_path):
    """alpha / r * r is alpha again, whatever r: 150 on T5, 128 on BART."""
    interchange.export(ours(published, "lora"), tmp_path)
    c = json.loads((tmp_path / interchange.CONFIG).read_text())
    assert repr(c["lora_alpha"]) == "32" and c["r"] == (150 if kind_of(published) == "t5" else 128)
    assert c["lora_dropout"] == 0.1 and c["base_model_name_or_path"] is None
    interchange.export(ours(published, "lora", "r=49,alpha=1"), tmp_path)
    assert 1 / 49 * 49 != 1 == json.loads((tmp_path / interchange.CONFIG).read_text())["lora_alpha"]


@needs_peft
def test_one_task_of_many(published, tmp_path):
    m = ours(published, "lora-multiple", "r=4", tasks=TASKS)
    interchange.export(m, tmp_path, task="caption")
    p = peft.PeftModel.from_pretrained(theirs(published), tmp_path).eval()
    torch.testing.assert_close(logits(m, "caption"), logits(p), atol=1e-5, rtol=1e-5)
    assert (logits(m, "vqa") - logits(p)).abs().max() > 0.05
    other = ours(published, "lora-multiple", "r=4", seed=2, tasks=TASKS)
    before = state(other)
    interchange.load(other, tmp_path, task="caption")
    assert torch.equal(logits(other, "caption"), logits(m, "caption"))
    filled = {n for n, t in other.state_dict().items() if not torch.equal(t, before[n])}
    assert filled == {n for n in m.trained() if ".vqa." not in n}


# --------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("method, changes, task, message", [
    ("adapter", "", "", "cannot say what is installed at lm.encoder.blocks.0.self_attn"),
    ("vlpet-large", "", "", "cannot say"), ("ia3", "", "", "cannot say"),
    ("frozen", "", "", "installed are none"),
    ("lora", "s=0.5", "", "cannot say"), ("lora", "matrix=kronecker", "", "cannot say"),
    ("lora", "per_task=up", "", "cannot say"), ("lora", "gate=middleY", "", "cannot say"),
    ("lora", "encoder.r=4", "", r"one r, alpha, .*\(4, 32, 'LoRA', 0.1\)"),
    ("lora", "decoder.dropout=0", "", "and dropout"),
    ("lora", "decoder=none,decoder.self_attn.q=dora", "", "'DoRA'.*'LoRA'"),
    ("lora", "open=norms", "", "opens norms"), ("lora", "open=encoder.norms", "", "opens enc"),
    ("lora", "", "vqa", "task 'vqa' has no module of its own"),
    ("lora-multiple", "", "", "name the task"),
    ("lora-multiple", "", "gqa", "task 'gqa' has no module of its own")])
def test_what_peft_cannot_say(published, tmp_path, method, changes, task, message):
    m = ours(published, method, changes, tasks=TASKS)
    with pytest.raises(ValueError, match=message):
        interchange.export(m, tmp_path / "new", task=task)
    assert not (tmp_path / "new").exists()


def test_merged(published, tmp_path):
    m = ours(published, "lora", "r=4")
    m.merge()
    with pytest.raises(ValueError, match="not merged"):
        interchange.export(m, tmp_path)


def refused(m, folder, message, error=ValueError, task=""):
    """load says so, and writes nothing."""
    before = state(m)
    with pytest.raises(error, match=message) as found:
        interchange.load(m, folder, task)
    assert "\n" not in str(found.value) and str(folder) in str(found.value)
    assert tiny.same_state(m.state_dict(), before)
    return str(found.value)


LORA = "lora r=4,alpha=3"
DORA = "dora encoder.ffn.wo=dora,decoder.self_attn=none,r=5,alpha=0.7"


@pytest.mark.parametrize("right, wrong, task", [
    (LORA, "lora r=4,alpha=6", ""), (LORA, "lora r=8,alpha=3", ""), (LORA, "adapter ", ""),
    (LORA, "lora decoder.self_attn.k=lora,r=4,alpha=3", ""), (LORA, "frozen ", ""),
    (LORA, "lora r=4,alpha=3,open=norms", ""), (LORA, "lora-multiple r=4,alpha=3", ""),
    (LORA, "lora-multiple r=4,alpha=6", "vqa"), (LORA, DORA, ""), (DORA, LORA, "")])
def test_the_refusal_says_what_fits(published, tmp_path, right, wrong, task):
    m = ours(published, *right.split())
    interchange.export(m, tmp_path)
    method, changes = wrong.split(" ")
    text = refused(ours(published, method, changes, tasks=TASKS), tmp_path, "--method .* --set ",
                   task=task)
    method, changes = text.split("--method ")[1].split(", but ")[0].split(" --set ")
    other = ours(published, method, changes, seed=2, tasks=TASKS)
    interchange.load(other, tmp_path, task)
    assert torch.equal(logits(other, task), logits(m))


def test_biases_that_one_side_has(tmp_path):
    test_t5.build(test_t5.bart_config(), tmp_path / "lm")
    m, other = (ours(tmp_path / "lm", "lora", f"r=4,{c}") for c in ("open=none", "open=biases"))
    interchange.export(m, tmp_path / "none")
    interchange.export(other, tmp_path / "all")
    assert refused(other, tmp_path / "none", "open=none")
    assert "open" not in refused(m, tmp_path / "all", "--method lora --set r=4,alpha=32, but")


def test_what_no_row_can_hold(published, tmp_path):
    m = ours(published, "lora", "r=4")
    interchange.export(m, tmp_path)
    for changes, message in (
            ({"peft_type": "LOHA"}, "peft_type 'LOHA'"), ({"bias": "lora_only"}, "bias 'lora_only"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"lora_bias": True}, "lora_b"),
            ({"rank_pattern": {"q": 8}}, "rank_pattern"), ({"something_new": 1}, "something_new"),
            ({"r": "many"}, "r is 'many'"), ({"lora_alpha": None}, "alpha None, which"),
            ({"r": 8}, "--set r=8")):
        old = (tmp_path / interchange.CONFIG).read_text()
        edit(tmp_path, **changes)
        refused(m, tmp_path, message)
        (tmp_path / interchange.CONFIG).write_text(old)
    path = tmp_path / interchange.ADAPTER
    held = load_file(path)
    A = next(k for k in held if "decoder" in k and k.endswith("lora_A.weight"))
    B, other = A.replace("lora_A", "lora_B"), A.replace(".0.", ".7.", 1)
    for change, message in (
            ({other: held[A]}, "no Linear of this"), ({"model.x": held[A]}, "unexpected"),
            ({B: None}, "missing"), ({B: held[B][1:]}, "not fitting"),
            ({A: None, B: None}, "some layers of a stack and others not"),
            ({A: held[A].repeat(2, 1)}, "not fitting")):
        save_file({k: t.clone() for k, t in (held | change).items() if t is not None}, path)
        refused(m, tmp_path, message)
    save_file(held, path)
    visual = load_file(tmp_path / interchange.VISUAL)
    save_file({k: t[:1] for k, t in visual.items()}, tmp_path / interchange.VISUAL)
    refused(m, tmp_path, "not fitting: visual")


def test_what_old_files_hold_beside(published, tmp_path):
    """PEFT 0.19 saved with bias "all" what has bias in its name: BART's final_logits_bias, which it
    never trained, and T5's table of relative positions, which it did."""
    m = ours(published, "lora", "r=4")
    interchange.export(m, tmp_path)
    edit(tmp_path, bias="all")
    other = ours(published, "lora", "r=4", seed=2)
    name = ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            if kind_of(published) == "t5" else "final_logits_bias")
    path = tmp_path / interchange.ADAPTER
    save_file(load_file(path) | {f"base_model.model.{name}": torch.zeros(8, 4)}, path)
    if kind_of(published) == "t5":
        refused(other, tmp_path, "unexpected: .*relative_attention_bias")
    else:
        interchange.load(other, tmp_path)
        assert tiny.same_state(other.state_dict(), m.state_dict())


def test_files_that_are_not_there(published, tmp_path):
    m = ours(published, "lora", "r=4")
    refused(m, tmp_path, "adapter_config.json is missing", FileNotFoundError)
    (tmp_path / interchange.CONFIG).write_text("{}")
    refused(m, tmp_path, "adapter_model.safetensors does not exist", FileNotFoundError)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    refused(m, tmp_path, "is a pickle, .* convert it")


# ----------------------------------------------------------------------------- command line

def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["interchange.py", *map(str, argv)])
    interchange.main()


@needs_peft
def test_a_run_is_exported(published, tmp_path, monkeypatch):
    config = train.Config(method="lora", set="r=4,alpha=6", tasks="vqa,gqa", lm=str(published))
    lm = load_lm(published)
    m = model.VLModel(lm.resize(model.vocabulary(lm.config)), 7)
    m.install(rows.row("lora", lm.config.is_t5, config.set), ("vqa", "gqa"))
    m.eval()
    path = tmp_path / "run" / "adapter.safetensors"
    weights.write(path, randomize(m, 1).trained(), {"config": json.dumps(vars(config))})
    run(monkeypatch, tmp_path / "run", tmp_path / "peft")
    p = peft.PeftModel.from_pretrained(theirs(published), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(m)[..., :test_t5.VOCAB], logits(p), atol=1e-5, rtol=1e-5)
    held = load_file(tmp_path / "peft" / interchange.VISUAL)
    assert tiny.same_state(held, {f"visual.{n}": t for n, t in m.visual.state_dict().items()})
    said = json.loads((tmp_path / "peft" / interchange.CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(published)
    for argv, message in (
            ((tmp_path / "no", tmp_path / "x"), "interchange.py: .*adapter.safetensors does not"),
            ((tmp_path / "run", tmp_path / "x", "--task", "vqa"), "interchange.py: task 'vqa'")):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *argv)
    for metadata in (None, {"config": json.dumps(vars(config) | {"control": "random-lm"})}):
        weights.write(path, m.trained(), metadata)
        with pytest.raises(SystemExit, match="adapts no published model, or"):
            run(monkeypatch, tmp_path / "run", tmp_path / "x")
    assert not (tmp_path / "x").exists()
