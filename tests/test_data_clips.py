"""Clips as examples: how their text is put together and cut (against `tokenizers`), and batched."""
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch

import data
import methods
from data import Example
from support import metrics
from support.tokenizer import load_tokenizer
from test_data import Words

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


# ------------------------------------------------------------------------------------ encoder text

ASKED = "Is the red star left? (2.5, 5.2) a0: no . a1: red star . a2: two . a3: blue . a4: yes ."
FULL = Example("tvqa", 7, ASKED, ("v",), {"a4": 1.0}, None, "a large red star. it's black")


@pytest.fixture(scope="module", params=["tiny-bart", "tiny-t5"])
def toks(request):
    """Our tokenizer and the library's, of the same files."""
    folder = WEIGHTS / request.param
    if request.param == "tiny-t5":
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab, merges))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.post_processor = tokenizers.processors.BertProcessing(
            *((special, theirs.token_to_id(special)) for special in ("</s>", "<s>")))
    return load_tokenizer(folder), theirs


def test_the_parts_are_one_text_where_they_fit(toks):
    ours, theirs = toks
    for context, text, named in [
        (FULL.context, FULL.text, True), (FULL.context, FULL.text, False), ("", FULL.text, True),
        (FULL.context, "", True), ("", "", True), (FULL.context, "", False), ("", "", False),
    ]:
        ex = replace(FULL, context=context, text=text)
        joint = " ".join(filter(None, (context, text, "tvqa:" if named else "")))
        assert data.text_ids(ex, ours, named) == theirs.encode(joint).ids, joint


def test_a_long_subtitle_never_hides_the_question(toks):
    ours, theirs = toks
    words = [f"{word} {i}" for i, word in enumerate(["red", "it's", "small", "black", "a"] * 500)]
    ex = replace(FULL, context=" ".join(words))
    special = [] if ours.bos_id is None else [ours.bos_id]
    tail = theirs.encode(f" {ex.text} tvqa:").ids[len(special):]
    room = 600 - len(tail)                       # as much of what is said as fits
    ids = data.collate([ex, FULL], ours, Clips()).input_ids[0].tolist()
    assert ids == theirs.encode(ex.context).ids[:room] + tail and len(ids) == 600
    assert ids.count(ours.eos_id) == 1 and all(ids.count(i) == 1 for i in special)


def test_a_question_that_does_not_fit_is_named():
    ex = replace(FULL, text="what " * 700)
    with pytest.raises(AssertionError, match="its question and choices take 703 tokens"):
        data.text_ids(ex, Words())


# ------------------------------------------------------------------------------------------ batches


class Clips:
    """Clip "v" has 3 real frames of 64, "w" 64."""

    real, tokens = {"v": 3, "w": 64}, 64

    def stack(self, ids):
        numbers = torch.arange(1.0, len(ids) + 1).view(-1, 1, 1).expand(-1, 64, 5)
        return numbers * torch.arange(64)[:, None]

    def grids(self, ids):
        return [(1, 64)] * len(ids)

    def frames(self, ids):
        return [self.real[i] for i in ids]


def test_a_clip_is_64_frames_of_a_film():
    examples = [FULL, replace(FULL, images=("w",))]
    batch = data.collate(examples, Words(), Clips())
    assert batch.feats.shape == (2, 64, 5) and batch.feats[1, 3].tolist() == [6.0] * 5
    assert batch.boxes.tolist() == [[[j / 64, (j + 1) / 64, 0, 1] for j in range(64)]] * 2
    assert batch.image_ids.tolist() == [[0] * 64] * 2
    assert batch.order_ids.tolist() == [list(range(64))] * 2
    assert batch.seen.tolist() == [[True] * 3 + [False] * 61, [True] * 64]
    assert batch.weights.tolist() == pytest.approx([1 / 3 / 2] * 2)
    papers = data.collate(examples, Words(), Clips(), boxes="zero", frames="all")
    assert papers.seen is None and papers.boxes.abs().sum() == 0
    assert torch.equal(papers.feats, batch.feats)


class Noisy(Clips):
    """Clips of 2, 9 and 5 real frames of 64, with noise behind them that nobody may see."""

    real = {"a": 2, "b": 9, "c": 5, "none": 0}

    def stack(self, ids):
        return torch.randn(len(ids), 64, tiny.WIDTH, generator=torch.Generator().manual_seed(0))


def short(names):
    texts = ("what is red ?", "who ?", "is it left of the red star ?")
    return [replace(FULL, images=(v,), text=t, id=i) for i, (v, t) in enumerate(zip(names, texts))]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_batch_is_as_long_as_its_longest_clip(kind):
    """Without the 55 places that no clip fills, the model says the same."""
    m = tiny.randomize(tiny.model(kind, methods.row("vlpet-small", kind == "t5"), tasks=("tvqa",)))
    tok = Words()
    tok.pad_id = tiny.config(kind).pad
    batch = data.collate(short("abc"), tok, Noisy())
    whole = data.collate(short("abc"), tok, Noisy(), frames="all")
    assert whole.seen is None and whole.feats.shape == (3, 64, tiny.WIDTH)
    whole = replace(whole, seen=torch.arange(64) < torch.tensor([[2], [9], [5]]))
    for name in ("feats", "boxes", "image_ids", "order_ids", "seen"):
        cut = getattr(batch, name)
        assert cut.shape[:2] == (3, 9) and torch.equal(cut, getattr(whole, name)[:, :9]), name
    with torch.no_grad():
        ours, theirs = m(batch), m(whole)
        blind = m(replace(batch, seen=torch.ones_like(batch.seen)))
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, blind, atol=1e-3)


def test_of_clips_without_frames_one_place_is_left():
    batch = data.collate(short(["none"]), Words(), Noisy())
    assert batch.feats.shape == (1, 1, tiny.WIDTH) and batch.seen.tolist() == [[False]]


def subtitled(n, seed=0):
    """Texts of lengths 1..n in random order, in context, text or both."""
    law = random.Random(seed)
    lengths = law.sample(range(1, n + 1), n)
    parts = [(m, law.randint(0, m)) for m in lengths]
    return [replace(FULL, id=m, context="c" * k, text="t" * (m - k)) for m, k in parts]


def test_clips_of_similar_length_share_a_batch():
    """129 batches of 10: four slices of 32 and the rest. In a sorted slice of 320 out of lengths
    1..1287 neighbours differ by about 4; drawn at random, a batch of 10 would span about 1050."""
    examples = subtitled(1287)
    plan = [chosen for _, chosen in data.batches({"tvqa": examples}, 10, 0, 42)]
    assert sorted(i for part in plan for i in part) == list(range(1287))
    assert sorted(map(len, plan)) == [7] + [10] * 128
    assert len(plan) == data.steps_per_epoch({"tvqa": examples}, 10) == 129
    full, (rest,) = ([p for p in plan if len(p) == n] for n in (10, 7))
    for part in full:
        lengths = [examples[i].id for i in part]
        assert lengths == sorted(lengths) and lengths[-1] - lengths[0] <= 100
    firsts = [examples[p[0]].id for p in full]
    assert firsts != sorted(firsts)  # the batches themselves are shuffled
    assert examples[rest[-1]].id - examples[rest[0]].id > 200  # slices are cut from the shuffle


def test_few_clips_meet_others_every_epoch():
    """In a data set of 30 batches, too: its slices are smaller."""
    examples = subtitled(1500)
    plans = [{tuple(sorted(p)) for _, p in data.batches({"tvqa": examples}, 50, epoch, 42)}
             for epoch in range(3)]
    assert not plans[0] & plans[1] and not plans[1] & plans[2]


def test_who_shares_a_batch_depends_on_seed_and_epoch():
    """An epoch's slices are others, so the same clips do not meet again."""
    both = {"tvqa": subtitled(2000), "tvc": subtitled(100, 1)}
    plan, again, *others = (list(data.batches(both, 5, epoch, seed))
                            for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2)))
    assert plan == again and {task for task, _ in plan} == {"tvqa", "tvc"}
    for other in others:
        same = {tuple(p) for t, p in plan if t == "tvqa"} & {tuple(p) for _, p in other}
        assert len(same) < 10


def test_equal_lengths_stay_shuffled():
    examples = [FULL] * 50
    plan = [chosen for _, chosen in data.batches({"tvc": examples}, 50, 0, 42)]
    order = list(range(50))
    random.Random("42 0 tvc").shuffle(order)
    assert plan == [order]


def test_pictures_are_no_clips():
    class Pictures(Clips):
        def frames(self, ids):
            return None

    with pytest.raises(AssertionError, match="'v' are of pictures, not of a clip"):
        data.collate([FULL], Words(), Pictures())
    with pytest.raises(AssertionError, match="pictures or clips, not both"):
        data.collate([FULL, replace(FULL, task="vqa")], Words(), Clips())


def test_the_table():
    for task in ("tvqa", "how2qa", "tvc", "yc2c"):
        row = data.TASKS[task]
        assert data.batch_size(task, 50) == 50
        assert row.metric in (metrics.exact_match, metrics.clip_caption)
        assert (row.text_tokens, row.target_tokens) == (600, 20)
        assert (row.loss, row.decode) == ("examples", "beam")
    long = replace(FULL, task="tvc", targets={"x " * 40: 1.0})
    assert data.collate([long], Words(), Clips()).labels.shape == (1, 20)


def test_values_own_file_names(tmp_path):
    """TVQA's own test questions are among VALUE's: where both lie there, VALUE's alone are read."""
    def put(name, **record):
        path = tmp_path / "video" / "ann" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"vid_name": "v"} | record) + "\n")

    choices = {f"a{k}": "yes" for k in range(5)} | {"q": "what?", "ts": "NaN-NaN"}
    for split in ("train", "val"):
        put(f"tvqa/tvqa_{split}.jsonl", qid=split, answer_idx=1, **choices)
    put("tv_subtitles.jsonl", sub=[])
    put("yc2_subtitles.jsonl", sub=[])
    put("tvqa/tvqa_test_public.jsonl", qid="own", **choices)
    put("tvc/tvc_test_release.jsonl", clip_id=5, ts=[0, 2.2])
    put("yc2c/yc2c_test_release.jsonl", clip_id=7)

    def ids(task, split):
        return [ex.id for ex in data.load_examples(task, split, tmp_path)]

    assert ids("tvqa", "train") == ["train"] and ids("tvqa", "submit") == ["own"]
    put("tvqa/tvqa_test_release.jsonl", qid="value's", **choices)
    assert ids("tvqa", "submit") == ["value's"]
    assert ids("tvc", "submit") == [5] and ids("yc2c", "submit") == [7]
    with pytest.raises(data.Unanswered):
        ids("tvqa", "test")
