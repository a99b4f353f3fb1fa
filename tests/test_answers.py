"""Answers that are chosen: the head, BERT, CLIP-ViL against the official code's numbers."""
import json
from types import SimpleNamespace

import pytest
import torch
from golden_files import FOLDER
from PIL import Image
from safetensors.torch import load_file, save_file

import answers
import clip_encoder
import data
import methods
import t5
import tiny
import train
from answers import AnswerHead, spell
from clip_encoder import ResNet, padded
from model import VLModel
from support import published_lm
from support.gate import BadInput
from support.published_clip import OPENAI_RESNET

FILES = sorted(path.stem for path in FOLDER.glob("clipvil_*.safetensors"))
WHOLE = [name for name in FILES if "pretrained" not in name]


def meta(name):
    from safetensors import safe_open
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if key != "name"}


def part(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def folder_of(tmp_path, config, tensors):
    """A folder as somebody has it who converted a checkpoint of CLIP-ViL."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    return tmp_path


def ours(name):
    """A weight's official name -> its name in VLModel."""
    name = name.removeprefix("lxrt_encoder.model.bert.")
    if "adapter" in name:
        place, _, kind = name.partition(".adapter.adapters.vqa.")
        layer = place.split(".")[2]
        site = "self_attn" if "attention" in place else "ffn"
        return f"lm.encoder.blocks.{layer}.{site}.tune.net." + kind.replace("_sampler", "")
    if name.startswith("logit_fc."):
        return name.replace("logit_fc", "answers.vqa")
    if "visn_fc.visn_" in name:
        return name.replace("encoder.visn_fc.visn_fc", "visual.feat").replace(
            "encoder.visn_fc.visn_layer_norm", "visual.feat_norm")
    config = t5.bert(32, 4, 48, 3)
    row = published_lm.weights.to_ours(name, published_lm.table(config))
    return f"lm.{row[0][0]}" if row and row[0] else None


def build(name, tmp_path):
    tensors, about = load_file(FOLDER / f"{name}.safetensors"), meta(name)
    config, flags, w = about["config"], about["flags"], part(tensors, "w/")
    adapters = {k: t for k, t in w.items() if ".adapter." in k}
    lm = published_lm.load_lm(folder_of(tmp_path, config, {k: t for k, t in w.items()
                                                           if k not in adapters}))
    head = AnswerHead(lm.config.d, lm.config.eps, list(map(str, range(config["num_answers"]))),
                      flags["loss"])
    model = VLModel(lm, config["visual_feat_dim"], answers={"vqa": head})
    published_lm.begin_clip_vil(model.visual, model.answers, tmp_path)
    row = methods.row("full", False, "")
    if flags["use_adapter"]:
        row = methods.row("adapter", False, f"reduction={flags['reduction_factor']}")
    model.install(row)
    held = {ours(k): t for k, t in w.items() if ".adapter." in k or k.startswith("logit_fc.")}
    published_lm.weights.load({k: model.state_dict()[k] for k in held}, held)
    return tensors, about, model.eval()


def batch(tensors, kind, grid):
    B, L = tensors["in/input_ids"].shape
    rows, columns = grid.shape[2:]
    target = tensors["in/target"]
    if kind == "ce":
        target = torch.nn.functional.one_hot(target, 3).float()
    N = rows * columns
    assert torch.equal(tensors["in/input_mask"] > 0, tensors["in/input_ids"] != 0)
    return SimpleNamespace(
        tasks=("vqa",) * B, input_ids=tensors["in/input_ids"], feats=grid.flatten(2).mT,
        boxes=grid_boxes(rows, columns).expand(B, N, 4), image_ids=torch.zeros(B, N).long(),
        order_ids=torch.arange(N).expand(B, N), seen=None, answers=target,
        weights=torch.full((B,), 1 / B))


def grid_boxes(rows, columns):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = x / columns, (x + 1) / columns, y / rows, (y + 1) / rows
    return torch.stack(corners, -1).view(-1, 4)


def close(a, b, atol=5e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=2e-6)


def tower(w, about):
    """The tiny CLIP ResNet of a golden file: its tower stands below a BERT's names."""
    sizes = about["flags"]["clip"]
    clip = ResNet(sizes["width"], tuple(sizes["layers"]), sizes["width"] // 2, sizes["res"],
                  sizes["embed"])
    published_lm.weights.load(clip, published_lm.behind(w, "visual_model.visual."), OPENAI_RESNET)
    return clip.eval()


@pytest.mark.parametrize("name", WHOLE)
def test_clip_vil(name, tmp_path):
    tensors, about, model = build(name, tmp_path)
    if "in/images" in tensors:
        grid = tower(part(tensors, "w/"), about).grid(tensors["in/images"])
        close(grid, tensors["out/grid"])
    else:
        grid = tensors["in/grid"]
    asked = batch(tensors, about["flags"]["loss"], grid)
    seen = {}
    for i, block in enumerate(model.lm.encoder.blocks):
        for site, what in (("self_attn", "attention"), ("ffn", "ffn")):
            getattr(block, site).register_forward_hook(
                lambda _, __, out, key=f"out/layer{i}/{what}": seen.__setitem__(key, out[0]))
    cells = asked.feats + model.lm.grid(asked.boxes)
    close(cells, tensors["out/cells"])
    close(model.visual(cells, asked.boxes, None, None, model.lm.shared.weight),
          tensors["out/visual"])
    logits = model(asked)
    for key, states in seen.items():
        close(states, tensors[key])
    memory = model.encode(asked)[0]
    close(model.lm.pooled(memory, 0), tensors["out/pooled"])
    close(logits, tensors["out/logits"])
    assert torch.equal(logits.argmax(-1), tensors["out/answer"])
    loss = model.loss(asked)
    close(loss, tensors["out/loss"])
    loss.backward()
    unused = sum(tensors[f"w/{k}"].numel() for k in about["trainable_without_gradient"])
    assert model.counts()[-1][1] == about["n_trainable"] - unused
    grads = {ours(k): g for k, g in part(tensors, "grad/").items()}
    held = dict(model.named_parameters())
    assert grads.keys() == {k for k, p in held.items() if p.requires_grad}
    for key, grad in grads.items():
        rows = slice(1 if key.endswith(("shared.weight", "positions.weight", "segments.weight"))
                     else 0, None)           # the official tables never train their row 0
        scale = grad.abs().max().clamp(min=1e-3)
        if key.endswith(".k.bias"):          # its true gradient is 0
            scale = torch.tensor(1.0)
        close(held[key].grad[rows] / scale, grad[rows] / scale, 1e-4)


def test_pretrained_checkpoint(tmp_path):
    """A checkpoint in the published layout: BERT, visual projection, CLIP, and its answer head."""
    tensors, about = load_file(FOLDER / "clipvil_pretrained.safetensors"), meta(
        "clipvil_pretrained")
    w, config = part(tensors, "w/"), about["config"]
    lm = published_lm.load_lm(folder_of(tmp_path, config, w))
    (tmp_path / "all_ans.json").write_text(
        json.dumps([{"ans": answer, "dsets": ["vqa"]} for answer in about["all_ans"]]))
    head = AnswerHead(lm.config.d, lm.config.eps, about["label2ans"], "bce")
    model = VLModel(lm, config["visual_feat_dim"], answers={"vqa": head})
    published_lm.begin_clip_vil(model.visual, model.answers, tmp_path)
    close(head[3].weight, tensors["out/logit_fc.3.weight"])
    close(head[3].bias, tensors["out/logit_fc.3.bias"])
    for answer, spelt in about["convert_ans"]:
        assert spell(answer) == spelt
    model.install(methods.row("adapter", False, f"reduction={about['flags']['reduction_factor']}"))
    held = {ours(k): t for k, t in part(tensors, "adapters/").items()}
    published_lm.weights.load({k: model.state_dict()[k] for k in held}, held)
    grid = tower(w, about).grid(tensors["in/images"])
    close(grid, tensors["out/grid"])
    asked = batch(tensors | {"in/target": torch.zeros(3, 10)}, "bce", grid)
    close(model.eval()(asked), tensors["out/logits"])


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_bert_as_transformers(kind, tmp_path):
    """A published BERT's folder; with its first names of a norm's parameters, too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20)
    bert = getattr(transformers, kind)(config).eval()
    bert.save_pretrained(tmp_path)
    ids = torch.randint(1, 64, (3, 9))
    ids[0, 5:] = 0
    with torch.no_grad():
        want = getattr(bert, "bert", bert)(ids, attention_mask=ids != 0).last_hidden_state
    for old in (False, True):
        if old:
            path = tmp_path / "model.safetensors"
            held = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"): t for name, t in load_file(path).items()}
            save_file(held, path)
        lm = published_lm.load_lm(tmp_path)
        states, _ = lm.encode(ids)
        torch.testing.assert_close(states[ids != 0], want[ids != 0], atol=1e-5, rtol=0)
        assert (lm.pooler is None) == (kind == "BertForMaskedLM")
        assert lm.decoder is None and lm.grid is None


def test_counts():
    """The paper's 6.19, 5.43 and 4.31 % count CLIP and what is never used, too."""
    for count, trainable, total, percent in (
            (3129, 15_101_241, 124_673_081, 6.1944), (1842, 13_123_122, 122_694_962, 5.4274),
            (3, 10_296_579, 119_868_419, 4.3093)):
        with torch.device("meta"):
            c = t5.PRESETS["clip-vil"]
            head = AnswerHead(c.d, c.eps, list(map(str, range(count))), "bce")
            model = VLModel(t5.EncoderDecoder(c), 2560, answers={"vqa": head})
            counts = model.install(methods.row("adapter", False, "reduction=4"))
        assert counts[-1][1:] == (trainable, total)
        clip, text, box, last_norm = 87_137_080, 32_081_281, 5_376, 1_280
        share = 100 * (trainable + box + last_norm) / (total + clip + text + box)
        assert round(share, 4) == percent


def test_head_by_hand():
    """Two answers, one example: BCE is the sum over answers, CE one of them."""
    head = AnswerHead(2, 1e-5, ["no", "yes"], "bce")
    assert torch.equal(head.targets([{"yes": 0.3, "maybe": 1.0}]), torch.tensor([[0.0, 0.3]]))
    z, t = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.3]])
    p = z.sigmoid()
    want = -torch.log(1 - p[0, 0]) - 0.3 * torch.log(p[0, 1]) - 0.7 * torch.log(1 - p[0, 1])
    torch.testing.assert_close(head.loss(z, t), want[None])
    head.kind = "ce"
    torch.testing.assert_close(head.loss(z, torch.tensor([[0.0, 1.0]])),
                               -torch.log(z.softmax(-1)[:, 1]))
    torch.testing.assert_close(head.probabilities(z).sum(), torch.tensor(1.0))


def test_a_prompt_stands_before_the_state():
    """The head reads the text's first state, whatever stands before it."""
    torch.manual_seed(0)
    lm = tiny.lm("bart")
    head = AnswerHead(32, 1e-5, ["a", "b", "c"], "ce")
    model = VLModel(lm, tiny.WIDTH, answers={"vqa": head}).eval()
    model.install(methods.row("prompt", False, "length=5"))
    asked = tiny.batch("bart")
    memory = model.encode(asked)[0]
    first = memory.size(1) - asked.input_ids.size(1) - asked.feats.size(1)
    assert first == 5
    torch.testing.assert_close(model(asked), head(memory[:, 5]))


def test_padding_has_no_cell():
    """A mixed batch fills the place of a second picture with boxes of nothing."""
    grid = t5.Grid(2, 4)
    boxes = torch.cat([data.grid_boxes(2, 2)[-1:], torch.zeros(1, 4)])[None]
    last, padding = grid(boxes)[0]
    torch.testing.assert_close(last, grid.rows.weight[1] + grid.columns.weight[1])
    assert padding.isfinite().all()


def test_padded_pictures():
    """Size, place and grid of CLIP-ViL's pictures: white where the picture is, black around."""
    cases = json.loads((FOLDER / "clipvil_sizes.json").read_text())["cases"]
    for case in cases:
        picture = padded(Image.new("RGB", (case["width"], case["height"]), "white"))
        left, top, right, bottom = case["pad_left_top_right_bottom"]
        assert picture.size == tuple(case["padded"])
        assert picture.getbbox() == (left, top, picture.width - right, picture.height - bottom)
        assert [side // 32 for side in picture.size[::-1]] == case["grid_rows_columns"]


def test_a_run_of_clip_vil(tmp_path, monkeypatch):
    """From a checkpoint's folder to scores: its own tower, its grid, WordPiece, its answer head."""
    tensors, about = load_file(FOLDER / "clipvil_pretrained.safetensors"), meta(
        "clipvil_pretrained")
    w, sizes = part(tensors, "w/"), about["flags"]["clip"]
    for axis in "xy":                                # the golden tables are for smaller pictures
        w[f"module.bert.encoder.visual_pos.{axis}_position_embedding.weight"] = torch.rand(25, 128)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] ? is there a red star what color the".split()
    (tmp_path / "lm").mkdir()
    lm = folder_of(tmp_path / "lm", about["config"], w)
    (lm / "vocab.txt").write_text("\n".join(words + [f"word{i}" for i in range(64 - len(words))]))
    (lm / "all_ans.json").write_text(json.dumps([{"ans": str(i)} for i in range(7)]))
    monkeypatch.setitem(clip_encoder.PRESETS, "tiny", dict(
        width=sizes["width"], layers=tuple(sizes["layers"]), heads=2, size=sizes["res"],
        out=sizes["embed"]))
    world = tmp_path / "world"
    (world / "images").mkdir(parents=True)
    (world / "vqa").mkdir()
    for name, size in (("wide", (90, 40)), ("square", (50, 50))):
        Image.effect_noise(size, 50).convert("RGB").save(world / f"images/{name}.jpg")
    questions = [{"question_id": i, "img_id": ("wide", "square")[i % 2],
                  "sent": "is there a red star?", "label": {("yes", "no")[i % 2]: 1.0}}
                 for i in range(10)]
    for split in ("train", "nominival", "minival"):  # LXMERT's names
        (world / f"vqa/{split}.json").write_text(json.dumps(questions))
    train.main(["--data", str(world), "--lm", str(lm), "--clip", str(lm),
                "--features", "none", "--answers", "yes", "--tasks", "vqa", "--method", "adapter",
                "--set", "reduction=4", "--steps", "2", "--batch", "4", "--device", "cpu",
                "--out", str(tmp_path / "run")])
    held = published_lm.weights.read(tmp_path / "run/adapter.safetensors")
    assert json.loads(held.metadata["answers"])["vqa"] == ["no", "yes"]
    assert not {name for name in held if name.startswith(("clip.", "lm.grid", "lm.pooler"))}


def test_snli(tmp_path):
    """SNLI-VE's own lines; hypotheses in lower case, three answers in the official order."""
    (tmp_path / "snli").mkdir()
    lines = [{"pairID": f"1.jpg#{i}", "Flickr30K_ID": "1", "sentence2": "A Dog runs.",
              "gold_label": label} for i, label in enumerate(("neutral", "entailment",
                                                              "contradiction"))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "snli/snli_ve_train.jsonl").write_text(text)
    examples = data.load_examples("snli", "train", tmp_path)
    assert [(ex.id, ex.text, ex.images) for ex in examples[:1]] == [
        ("1.jpg#0", "a dog runs.", ("1",))]
    assert answers.vocabulary(examples) == ["contradiction", "entailment", "neutral"]
    (tmp_path / "snli/snli_ve_train.jsonl").write_text(text.replace("neutral", "-"))
    with pytest.raises(BadInput, match="snli_ve_train.jsonl, record 0: 'gold_label' should be one"):
        data.load_examples("snli", "train", tmp_path)
