"""tools/peft.py against the PEFT library, on transformers' models; merged folders against both."""
import json
import warnings
from dataclasses import asdict

import peft
import pytest
import test_t5
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import methods
from adapters import Adapter
from config import Config
from model import VLModel
from support import runs, weights
from support.gate import BadInput
from support.published_lm import read_config
from tools import peft as tool


@pytest.fixture(scope="module", params=tiny.KINDS)
def published(request, tmp_path_factory):
    """A random model that transformers wrote, in bf16, and what stands for its tokeniser."""
    folder = tmp_path_factory.mktemp(request.param)
    test_t5.build(getattr(test_t5, f"{request.param}_config")(), folder, torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def is_t5(folder):
    return read_config(folder).is_t5


def theirs(folder):
    """transformers' model, in the precision that the folder's config says, then in fp32."""
    kind = transformers.BartForConditionalGeneration
    if is_t5(folder):
        kind = transformers.T5ForConditionalGeneration
    return kind.from_pretrained(folder).float().eval()


@torch.no_grad()
def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=generator) * 0.1
    return model


def ours(folder, method, changes="", seed=1):
    """Our model with the row; everything that it trains is random."""
    torch.manual_seed(seed)
    tasks = ("vqa", "caption")
    return randomize(tool.build(str(folder), [tiny.WIDTH], method, changes, tasks), seed)


@torch.no_grad()
def logits(model, task=""):
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(3, test_t5.VOCAB, (3, n), generator=generator) for n in (9, 6))
    if isinstance(model, VLModel):
        ctx = model.context((task,) * 3, ids.device)
        return model.lm(ids, labels, ctx=ctx)[..., :test_t5.VOCAB]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def begin_with(model, path):
    """What train.py --init does."""
    runs.begin_with(runs.Run(Config(init=str(path)), model, None, {}))


def config_of(folder):
    return json.loads((folder / tool.CONFIG).read_text())


# ----------------------------------------------------------------------------------- to PEFT

ROWS = [("lora", "r=8,alpha=12"),
        ("dora", "decoder.self_attn.k=dora,encoder.ffn.wi=dora,r=6,alpha=4"),
        ("lora", "encoder=none,decoder=none,decoder.ffn.wo=lora,r=8,dropout=0,open=none")]


@pytest.mark.parametrize("method, changes, task", [(*row, "") for row in ROWS]
                         + [("lora-multiple", "r=4", "caption")])
def test_peft_reads_ours(published, tmp_path, method, changes, task):
    model = ours(published, method, changes)
    tool.export(model, tmp_path, str(published), task)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing.*")         # PEFT only warns of such tensors
        other = peft.PeftModel.from_pretrained(theirs(published), tmp_path).eval()
    assert isinstance(other, peft.PeftModelForSeq2SeqLM)
    held = peft.get_peft_model_state_dict(other)
    held.pop("base_model.model.final_logits_bias", None)        # a frozen buffer
    held = {name: t for name, t in held.items() if "relative_attention_bias" not in name}
    assert tiny.same_state(load_file(tmp_path / tool.ADAPTER), held)
    close(logits(model, task), logits(other))
    different = logits(model, "vqa") if task else logits(theirs(published))
    assert (logits(other) - different).abs().max() > 0.005


def test_the_numbers_of_the_config(published, tmp_path):
    """alpha is what multiplies U D, times r, however the row says it."""
    rank, quarter = (150, 6) if is_t5(published) else (128, 8)
    for changes, r, alpha in [("", rank, 32), ("r=49,alpha=1,scale=3", 49, 3),
                              ("r=0,reduction=4,alpha=none,scale=0.5", quarter, quarter / 2)]:
        tool.export(ours(published, "lora", changes), tmp_path)
        said = config_of(tmp_path)
        assert (said["r"], said["lora_alpha"]) == (r, alpha)
    assert said["lora_dropout"] == 0.1 and said["base_model_name_or_path"] is None


@pytest.mark.parametrize("row", [
    "adapter", "ia3", "prompt", "frozen", "lora s=0.5", "lora matrix=kronecker", "lora per_task=up",
    "lora gate=middleY", "lora linear=no", "lora reads=h", "lora encoder.r=4", "lora open=norms",
    "lora decoder.dropout=0", "lora decoder=none,decoder.self_attn.q=dora",
    "lora encoder=none,decoder=none,decoder.ffn.hidden=lora"])
def test_what_peft_cannot_say(published, tmp_path, row):
    model, task = ours(published, *row.split()), "vqa" if "per_task" in row else ""
    with pytest.raises(BadInput, match="PEFT's format: it can say dense LoRA or DoRA of Linears"):
        tool.export(model, tmp_path / "new", task=task)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------- from PEFT

@pytest.mark.parametrize("method, changes", ROWS)
def test_round_trip(published, tmp_path, method, changes):
    """The same row, the same tensors; train.py --init takes them up."""
    model = ours(published, method, changes)
    tool.export(model, tmp_path)
    path, source = tmp_path / "adapter.safetensors", tmp_path / tool.ADAPTER
    # PEFT 0.19 saved BART's final_logits_bias beside, which it never trained.
    old = {} if is_t5(published) else {"base_model.model.final_logits_bias": torch.zeros(1, 9)}
    save_file(load_file(source) | old, source)
    method, changes = tool.from_peft(tmp_path, published, path)
    assert methods.row(method, is_t5(published), changes) == model.method
    assert tiny.same_state(load_file(path), model.trained())
    other = ours(published, method, changes, seed=2)
    begin_with(other, path)
    assert tiny.same_state(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ours_reads_peft(published, tmp_path, method):
    other = peft.get_peft_model(theirs(published), peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=9, use_dora=method == "dora",
        target_modules=["q", "v"] if is_t5(published) else ["q_proj", "v_proj"],
        bias="none" if is_t5(published) else "all", use_rslora=method == "lora"))
    randomize(other, 3).eval().save_pretrained(tmp_path)
    alpha = 18 if method == "lora" else 9
    path = tmp_path / "adapter.safetensors"
    assert tool.from_peft(tmp_path, published, path) == (method, f"r=4,alpha={alpha},dropout=0")
    model = ours(published, method, f"r=4,alpha={alpha},dropout=0")
    begin_with(model, path)
    close(logits(model), logits(other))
    assert (logits(other) - logits(theirs(published))).abs().max() > 0.005


def test_what_no_row_can_hold(published, tmp_path):
    folder, new = tmp_path / "peft", tmp_path / "new.safetensors"

    def refused(message):
        with pytest.raises((BadInput, FileNotFoundError), match=message):
            tool.from_peft(folder, published, new)
        assert not new.exists()

    refused("adapter_config.json")                              # nothing is there
    tool.export(ours(published, "lora", "r=4"), folder)
    right = config_of(folder)
    for changes, message in (
            ({"peft_type": "LOHA"}, "'peft_type'"), ({"bias": "lora_only"}, "'bias'"),
            ({"init_lora_weights": "pissa"}, "'init_lora_weights'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"lora_bias": True}, "lora_b"),
            ({"rank_pattern": {"q": 8}}, "rank_pattern"), ({"something_new": 1}, "something_new"),
            ({"r": "many"}, "'r' should be"), ({"lora_alpha": None}, "'lora_alpha'"),
            ({"r": 10 ** 7}, "has rank 4"), ({"use_dora": True}, "missing: .*magnitude")):
        (folder / tool.CONFIG).write_text(json.dumps(right | changes))
        refused(message)
    (folder / tool.CONFIG).write_text(json.dumps(right))
    path = folder / tool.ADAPTER
    held = load_file(path)
    A = next(name for name in held if "decoder" in name and name.endswith("lora_A.weight"))
    B, other = A.replace("lora_A", "lora_B"), A.replace(".0.", ".7.", 1)
    for change, message in (
            ({other: held[A]}, "unexpected"), ({"model.x": held[A]}, "unexpected"),
            ({f"base_model.model.x{tool.A}": held[A]}, "fits nothing in this language model"),
            ({f"base_model.model.lm_head{tool.A}": held[A]}, "shared"),
            ({B: None}, "missing"), ({B: held[B][1:]}, "not fitting"), ({A: None, B: None}, "miss"),
            ({A: held[A].repeat(2, 1)}, "has rank 8")):
        changed = {name: t for name, t in (held | change).items() if t is not None}
        save_file({name: t.clone() for name, t in changed.items()}, path)
        refused(message)
    save_file(held, path)
    visual = load_file(folder / tool.VISUAL)
    save_file(visual | {"visual.image.weight": torch.zeros(3, 32)}, folder / tool.VISUAL)
    refused("not fitting: visual")
    path.rename(folder / "adapter_model.bin")
    refused("a pickle can run code .* convert it")


# ------------------------------------------------------------------------------------ merging

MERGED = [("lora", ""), ("lora", "matrix=kronecker"), ("lora", "per_task=up"), ("lora", "reads=h"),
          ("lora", "gate=middleY,s=0.7"), ("lora", "encoder.ffn.wo=lora,open=norms"),
          ("lora-multiple", ""), ("dora", "matrix=kronecker"), ("dora", "per_task=all"),
          ("ia3", ""), ("ia3", "per_task=all,encoder.ffn.wo=lora"), ("norms", "")]
UNMERGED = [("hyperformer", "", "no Linear"), ("vlpet-large", "", "no Linear"),
            ("prompt", "", "no Linear"), ("vlpet-small", "encoder=none", "not linear"),
            ("lora", "linear=no", "not linear"), ("lora", "encoder.ffn.hidden=lora", "not linear"),
            ("full", "", "rows of added tokens")]


def merge(model, published, folder):
    task = "caption" if model.per_task else ""
    want = logits(model, task)
    tool.merge(model, str(published), folder, task)
    return want


@pytest.mark.parametrize("method, changes", MERGED)
def test_merged(published, tmp_path, method, changes):
    """transformers, our loader and the unmerged model: the same logits, also beside a picture."""
    model, batch = ours(published, method, changes), tiny.batch("bart", "caption")
    with torch.no_grad():
        shown = model(batch)
    want = merge(model, published, tmp_path)
    close(logits(theirs(tmp_path)), want)
    assert (want - logits(theirs(published))).abs().max() > 0.005
    other = ours(tmp_path, "frozen")
    begin_with(other, tmp_path / tool.VISUAL)
    close(logits(other), want)
    with torch.no_grad():
        close(other(batch), shown)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("method, changes, message", UNMERGED)
def test_what_cannot_be_merged(published, tmp_path, method, changes, message):
    model = ours(published, method, changes)
    with pytest.raises(BadInput, match=f"this row cannot be merged: .*{message}"):
        merge(model, published, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_wrong_merge_is_caught(published, tmp_path, monkeypatch):
    right, wrong = tool.probe, [lambda W, b: (0.999999 * W, b)]
    if not is_t5(published):                                    # T5 has no biases
        wrong.append(lambda W, b: (W, b + 1e-6))
    for spoil in wrong:
        monkeypatch.setattr(tool, "probe", lambda *args, spoil=spoil: spoil(*right(*args)))
        with pytest.raises(BadInput, match="its logits would differ"):
            merge(ours(published, "lora"), published, tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("more, merges", [
    (lambda h: 3 * h, tiny.KINDS), (lambda h: h + 0.1, "bart"), (lambda h: h + h.sin(), "")])
def test_what_nobody_told_merge_of(published, tmp_path, monkeypatch, more, merges):
    """A new field of Add, say: merged if it is linear, refused if not, never forgotten."""
    right = Adapter.forward
    monkeypatch.setattr(Adapter, "forward", lambda self, h, x, ctx: more(right(self, h, x, ctx)))
    model = ours(published, "lora")
    if ("t5" if is_t5(published) else "bart") in merges:
        want = merge(model, published, tmp_path)
        close(logits(theirs(tmp_path)), want)
    else:
        with pytest.raises(BadInput, match="not linear in x, adds a bias"):
            merge(model, published, tmp_path)


# ------------------------------------------------------------------------------- command line

def test_the_command_line(published, tmp_path, capsys):
    model, run = ours(published, "lora-multiple", "r=4"), tmp_path / "run"
    weights.write(run / "adapter.safetensors", model.trained())
    config = asdict(Config(method="lora-multiple", set="r=4", tasks="vqa,caption",
                           lm=str(published), device="cuda"))

    def call(*argv, **changes):
        (run / "config.json").write_text(json.dumps(config | changes))
        tool.main([str(arg) for arg in argv])

    folder, adapter, merged = tmp_path / "peft", tmp_path / "a.safetensors", tmp_path / "merged"
    call(run, folder, "--task", "vqa")
    assert config_of(folder)["base_model_name_or_path"] == str(published)
    call(folder, adapter, "--lm", published)
    assert f"--init {adapter} --method lora --set r=4,alpha=32" in capsys.readouterr().out
    call(run, "--merge", merged, "--task", "vqa")
    close(logits(ours(merged, "frozen")), logits(model, "vqa"))

    for argv, changes, message in [
            ((run, folder), {}, "it exists: name another"),
            ((run, tmp_path / "x"), {}, "--task: it should be one of 'vqa', 'caption'"),
            ((run, tmp_path / "x", "--task", "gqa"), {}, "one of 'vqa'"),
            ((run, tmp_path / "x"), {"pretrained": "out/full"}, "more than an adapter"),
            ((run, tmp_path / "x"), {"control": "random-lm"}, "more than an adapter"),
            ((run, tmp_path / "x"), {"method": "lora"}, "adapter.safetensors: it cannot be loaded"),
            ((tmp_path / "no", tmp_path / "x"), {}, "config.json")]:
        with pytest.raises(SystemExit, match=f"peft.py: .*{message}"):
            call(*argv, **changes)
    weights.write(run / "adapter.safetensors", ours(published, "lora", "r=4").trained())
    with pytest.raises(SystemExit, match="--task: it should be one of ''"):
        call(run, tmp_path / "x", "--task", "vqa", method="lora")
    assert not (tmp_path / "x").exists()
