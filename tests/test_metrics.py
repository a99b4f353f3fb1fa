"""Metrics against the official scripts' numbers: VQA's, coco-caption's, and Stanford's tokenizer.

python -m pytest tests/test_metrics.py
"""
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import metrics
from support.gate import BadInput

GOLDEN = Path(__file__).parent / "golden"


def read(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def example(references=None, targets=None, id=0):
    return SimpleNamespace(id=id, targets=targets or {}, references=references)


# ---------------------------------------------------------------------------------------- vqa

def test_vqa_tables_are_the_official_ones():
    tables = read("vqa_answers.json")
    real = {wrong: right for wrong, right in tables["contractions"].items() if wrong != right}
    assert metrics.CONTRACTIONS == real
    assert metrics.DIGITS == tables["numbers"]
    assert list(metrics.MARKS) == tables["punctuation"]
    assert metrics.ARTICLES == set(tables["articles"])


@pytest.mark.parametrize("text, normal", [
    ("The red one.", "red 1"), ("north\twest\n", "north west"), ("3.5 u.s.a.", "3.5 usa"),
    ("left/right", "left right"),  # a mark inside a word becomes a space
    ("left/ right", "left right"),  # one at a word's edge is deleted
    ("a/b 1,000", "ab 1000"),  # a comma between digits: every mark is deleted
    ("dont", "don't"), ("Im", "im"),  # the table's "Im" is never met: words are lower-cased first
    ("." * 33 + "x", ".x"),  # at most 32 periods
])
def test_normalize_answer(text, normal):
    assert metrics.normalize_answer(text) == normal
    assert metrics.strip_punctuation("a-;b") == "a  b"  # edges are looked up in the original


def test_vqa_worked_by_hand():
    # 3 of 10 said dog: they each see 2 others (2/3), the other 7 see all 3 (1).
    assert metrics.vqa_accuracy("Dog.", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)


def test_vqa_equals_the_official_scripts():
    """300 cases computed by the official script of 2016, 200 by it and by that of 2021."""
    first, both = read("vqa_accuracy.json"), read("vqa_rules.json")
    assert (len(first), len(both)) == (300, 200)
    for prediction, answers, accuracy in first:
        assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(accuracy, abs=1e-9)
    for case in both:
        scores = metrics.vqa([case["prediction"]], [example(case["answers"])])
        assert list(scores.values()) == pytest.approx([case["rule_2016"], case["rule_2021"]]), case


def test_vqa_falls_back_on_labels():
    scored = [example(["dog"] * 10), example(None, {"red": 0.3, "blue": 1.0}), example(None, {})]
    result = metrics.vqa(["dog", "red", "red"], scored)
    third = pytest.approx(100 * 1.3 / 3)
    assert result == {"accuracy": third, "accuracy_2021": third}


# --------------------------------------------------------------------------------- gqa and nlvr

def test_exact_match():
    examples = [example(targets={"dog": 1.0}), example(targets={"Dog": 1.0})]
    assert metrics.exact_match([" dog\n", "dog"], examples) == {"accuracy": 50.0}


def test_nlvr_consistency_groups_the_pairs_of_a_sentence():
    # The sentence is split, set and last field: here A on pairs 0 and 1, B on pair 0, C on set 8.
    ids = ["dev-7-0-0", "dev-7-1-0", "dev-7-0-1", "dev-8-0-0"]
    examples = [example(targets={"true": 1.0}, id=i) for i in ids]
    scores = metrics.nlvr(["true", "false", "true", "true"], examples)
    assert scores == {"accuracy": 75.0, "consistency": pytest.approx(200 / 3)}


# ------------------------------------------------------------------------------------- captions

def test_caption_tokens_are_the_java_tools():
    """ptb.json: 339 [caption, tokens], a third of them written by hand and the rest put together at
    random from nouns, possessives, contractions, numbers, abbreviations, quotes and dashes. The
    tokens are those of pycocoevalcap 1.2's tokenizer (Stanford CoreNLP 3.4.1, in Java) where the
    caption that follows in the file is "A man ." Left out, and known to differ: HTML ("&amp;",
    "<b>"), e-mail and web addresses with "://", smileys, "US$", "photo 12.jpg".
    """
    cases = read("ptb.json") + [[". , - !", ""]]
    wrong = [case for case in cases if metrics.tokenize_caption(case[0]) != case[1].split()]
    assert len(cases) == 340 and not wrong


def test_caption_tokens_live():
    """The frozen tokens are what the tool says, where it and Java are there."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="no pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("no Java")
    cases = read("ptb.json")
    lines = [{"caption": text} for caption, _ in cases for text in (caption, "A man .")]
    told = module.PTBTokenizer().tokenize({0: lines})[0][::2]
    assert [" ".join(tokens.split()) for tokens in told] == [tokens for _, tokens in cases]


def split(captions):
    return [caption.split() for caption in captions]


def test_captions_as_value_scores_them():
    """Every character beyond ASCII is a blank there; COCO's captions keep theirs."""
    case = read("captions_value.json")
    examples = [example(references) for references in case["references"].values()]
    predictions = [case["predictions"][name] for name in case["references"]]
    assert metrics.clip_caption(predictions, examples) == pytest.approx(case["value"])
    assert metrics.caption(predictions, examples) == pytest.approx(case["coco"])


def test_captions_equal_coco_caption():
    """cider.json and captions.json: random captions, 627 of them with 1 to 7 references, empty ones
    among them, scored by pycocoevalcap 1.2's Cider, Bleu(4) and Rouge."""
    for case in read("cider.json"):
        references = [split(captions) for captions in case["references"]]
        ours = metrics.cider(split(case["predictions"]), references)
        assert ours == pytest.approx(case["scores"], abs=1e-6)
    for case in read("captions.json"):
        words = split(case["predictions"])
        references = [split(captions) for captions in case["references"]]
        rouge = metrics.rouge_l(words, references)
        assert rouge == pytest.approx(case["rouge_l"], rel=1e-9, abs=0), case["name"]
        examples = [example(captions) for captions in case["references"]]
        scores = metrics.caption(case["predictions"], examples)
        assert list(scores) == ["cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"]
        expected = [case["cider"], *case["bleu"], sum(case["rouge_l"]) / len(rouge)]
        expected = [100 * score for score in expected]
        assert list(scores.values()) == pytest.approx(expected, rel=1e-9, abs=0), case["name"]


def test_captions_equal_coco_caption_live():
    """As above with new captions, where pycocoevalcap is there (these three need no Java)."""
    reason = "no pycocoevalcap"
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason=reason).Bleu(4)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=reason).Rouge()
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason).Cider()
    rng = random.Random(0)
    words = "a the man's dog t-shirt is n't red , on of 10:30 big blue street".split()
    for pictures in (1, 3, 500):
        references, predictions = [], []
        for _ in range(pictures):
            captions = [rng.choices(words, k=rng.randint(0, 12)) for _ in range(rng.randint(1, 7))]
            answer = [rng.choice([w, w, w, "cat"]) for w in rng.choice(captions)]
            predictions.append(answer[: rng.randint(0, 14)] + answer[:1] * rng.randint(0, 3))
            references.append(captions)
        theirs = {i: [" ".join(c) for c in captions] for i, captions in enumerate(references)}
        answers = {i: [" ".join(answer)] for i, answer in enumerate(predictions)}
        for ours, their in (
            (metrics.bleu, bleu.compute_score(theirs, answers, verbose=0)[0]),
            (metrics.rouge_l, rouge.compute_score(theirs, answers)[1]),
            (metrics.cider, cider.compute_score(theirs, answers)[1]),
        ):
            expected = [float(score) for score in their]
            assert ours(predictions, references) == pytest.approx(expected, rel=1e-9, abs=0)


def test_cider_worked_by_hand():
    # Two pictures, idf log 2 for every n-gram. The first prediction is its reference: 1 for each n,
    # so 10. The second shares 1 of 2 words with a 2-word reference: n = 1 gives 1/2, lengths equal.
    ours = metrics.cider(split(["a b c d", "e x"]), [split(["a b c d"]), split(["e f"])])
    # n = 1: vectors (e, x) and (e, f); x has never been seen, which counts as one picture.
    assert ours == pytest.approx([10.0, 10 * (1 / 2) / 4])
    # A word in every picture's references weighs nothing.
    assert metrics.cider(split(["a", "a"]), [split(["a"]), split(["a"])]) == [0.0, 0.0]


def test_bleu_worked_by_hand():
    # "the" counts twice, as often as the second reference has it: 4 of 5 words, and 1 of 4 pairs,
    # "the cat". The references, 4 and 6 long, are as close to 5: r is 4, so there is no penalty.
    references = split(["a cat lies down", "the cat is on the mat"])
    ours = metrics.bleu(split(["the the the cat on"]), [references])
    assert ours[:2] == pytest.approx([4 / 5, (4 / 5 * 1 / 4) ** 0.5])
    # 3 words against a closest reference of 4: every word and pair right, times exp(1 - 4 / 3).
    ours = metrics.bleu(split(["the cat is"]), [split(["the cat is out", "a b c d e f g"])])
    assert ours[:3] == pytest.approx([2.718281828459045 ** (-1 / 3)] * 3)


def test_rouge_worked_by_hand():
    # P = 3 / 4 from the first ("a red dog"), R = 2 / 2 from the second ("red dog").
    references = split(["a very red old dog", "red dog"])
    ours = metrics.rouge_l(split(["a red big dog"]), [references])
    assert ours == pytest.approx([2.44 * 0.75 * 1 / (1 + 1.44 * 0.75)])
    assert metrics.rouge_l(split(["a b"]), [split(["b a"])]) == pytest.approx([0.5])  # in order


def test_caption_edges():
    references = [["a red cat"], ["a blue dog", "the dog"]]
    examples = [example(r) for r in references]
    assert set(metrics.caption(["", "..."], examples).values()) == {0.0}
    assert metrics.caption(["a cat"], examples[:1])["cider"] == 0.0  # idf of one is 0
    upper = metrics.caption(["A RED CAT!", "The dog."], examples)
    assert upper == metrics.caption(["a red cat", "the dog"], examples)
    with pytest.raises(BadInput, match="'c7'"):
        metrics.caption(["a cat"], [example([], id="c7")])
