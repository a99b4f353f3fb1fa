"""Metrics against the official scripts' numbers: VQA's, coco-caption's, and Stanford's tokenizer.

python -m pytest tests/test_metrics.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import metrics
import pytest

GOLDEN = Path(__file__).parent / "golden"


def example(references=None, targets=None, id=0):
    return SimpleNamespace(id=id, targets=targets or {}, references=references)


# ---------------------------------------------------------------------------------------- vqa


def test_vqa_accuracy_equals_the_official_script_on_300_cases():
    cases = json.loads((GOLDEN / "vqa_accuracy.json").read_text(encoding="utf-8"))
    assert len(cases) == 300
    wrong = [c for c in cases if abs(metrics.vqa_accuracy(c[0], c[1]) - c[2]) > 1e-9]
    assert not wrong


def test_vqa_tables_are_the_official_ones():
    tables = json.loads((GOLDEN / "vqa_answers.json").read_text(encoding="utf-8"))
    real = {wrong: right for wrong, right in tables["contractions"].items() if wrong != right}
    assert metrics.CONTRACTIONS == real
    assert metrics.DIGITS == tables["numbers"]
    assert list(metrics.MARKS) == tables["punctuation"]
    assert metrics.ARTICLES == set(tables["articles"])


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The red one.", "red 1"),
        ("left/right", "left right"),  # a mark inside a word becomes a space
        ("left/ right", "left right"),  # one at a word's edge is deleted
        ("a/b 1,000", "ab 1000"),  # a comma between digits: every mark is deleted
        ("north\twest\n", "north west"),
        ("dont", "don't"),
        ("Im", "im"),  # the table's "Im" is never met: words are lower-cased first
        ("3.5 u.s.a.", "3.5 usa"),
        ("." * 33 + "x", ".x"),  # at most 32 periods
    ],
)
def test_normalize_answer(text, normal):
    assert metrics.normalize_answer(text) == normal


def test_vqa_worked_by_hand():
    # 3 of 10 said dog: they each see 2 others (2/3), the other 7 see all 3 (1).
    assert metrics.vqa_accuracy("Dog.", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)
    # Where all agree, their answers are not processed, so a period is never matched.
    assert metrics.vqa_accuracy("yes.", ["yes."] * 10) == 0
    assert metrics.vqa_accuracy("yes", ["yes"] * 10) == 1


def test_vqa_falls_back_on_labels():
    scored = [example(["dog"] * 10), example(None, {"red": 0.3, "blue": 1.0}), example(None, {})]
    result = metrics.score("vqa", ["dog", "red", "red"], scored)
    assert result == {"accuracy": pytest.approx(100 * 1.3 / 3)}


# --------------------------------------------------------------------------------- gqa and nlvr


def test_gqa_is_exact_match():
    answers = [example(targets={"dog": 1.0}), example(targets={"Dog": 1.0})]
    assert metrics.score("gqa", ["dog", "dog"], answers) == {"accuracy": 50.0}


def test_nlvr_consistency_groups_the_pairs_of_a_sentence():
    # The sentence is split, set and last field: here A on pairs 0 and 1, B on pair 0, C on set 8.
    ids = ["dev-7-0-0", "dev-7-1-0", "dev-7-0-1", "dev-8-0-0"]
    examples = [example(targets={"true": 1.0}, id=i) for i in ids]
    scores = metrics.score("nlvr", ["true", "false", "true", "true"], examples)
    assert list(scores) == ["accuracy", "consistency"]
    assert scores["accuracy"] == 75.0
    assert scores["consistency"] == pytest.approx(200 / 3)


# ------------------------------------------------------------------------------------- captions

# What Stanford's PTBTokenizer (CoreNLP 3.4.1, -lowerCase) and coco-caption's punctuation list give.
TOKENS = {
    "A man's best friend doesn't bark.": "a man 's best friend does n't bark",
    "The dogs' bowls aren't full, are they?": "the dogs bowls are n't full are they",
    "I can't, won't, cannot, gonna": "i ca n't wo n't can not gon na",
    'A black-and-white t-shirt - on a -- "sofa".': "a black-and-white t-shirt on a sofa",
    "He said 'hello' to the cat (in a hat)": "he said hello to the cat -lrb- in a hat -rrb-",
    "and/or 50% off $5.50 & 1,000 at 10:30 a.m. in the U.S.": "and/or 50 % off $ 5.50 & 1,000 at "
    "10:30 a.m. in the u.s.",
    "Mr. Smith on 5th Ave. near 1/2 mile... and so on…": "mr. smith on 5th ave. near 1/2 mile and "
    "so on",
    "a wheel,a door.Another one;two:three": "a wheel a door.another one two three",
    "half–dash em—dash “quotes” ‘single’ it’s": "half dash em dash quotes single it 's",
    "A cat! The dog!!! what?! 6'2\" tall 1980's": "a cat the dog !!! what ?! 6 2 tall 1980 's",
    "o'clock 'twas b&w A&W no. 5 number no.": "o'clock 't was b & w a&w no. 5 number no",
    "couldn't've they've I'd we'll I'm y'all": "could n't 've they 've i 'd we 'll i 'm y' all",
    "  lots   of\tspace\n": "lots of space",
    ". , - !": "",
}


@pytest.mark.parametrize("text", TOKENS)
def test_caption_tokens(text):
    assert " ".join(metrics.tokenize_caption(text)) == TOKENS[text]


def split(captions):
    return [caption.split() for caption in captions]


def test_cider_equals_coco_caption():
    """cider.json: random captions, scored by pycocoevalcap 1.2's Cider().compute_score."""
    for case in json.loads((GOLDEN / "cider.json").read_text()):
        references, predictions = case["references"], case["predictions"]
        ours = metrics.cider(split(predictions), [split(captions) for captions in references])
        assert ours == pytest.approx(case["scores"], abs=1e-6)
        scores = metrics.score("caption", predictions, [example(r) for r in references])
        assert scores == {"cider": pytest.approx(100 * case["mean"], abs=1e-6)}


def test_cider_worked_by_hand():
    # Two pictures, idf log 2 for every n-gram. The first prediction is its reference: 1 for each n,
    # so 10. The second shares 1 of 2 words with a 2-word reference: n = 1 gives 1/2, lengths equal.
    ours = metrics.cider(split(["a b c d", "e x"]), [split(["a b c d"]), split(["e f"])])
    # n = 1: vectors (e, x) and (e, f); x has never been seen, which counts as one picture.
    assert ours == pytest.approx([10.0, 10 * (1 / 2) / 4])
    # A word in every picture's references weighs nothing.
    assert metrics.cider(split(["a", "a"]), [split(["a"]), split(["a"])]) == [0.0, 0.0]


def test_caption_edges():
    references = [["a red cat"], ["a blue dog", "the dog"]]
    examples = [example(r) for r in references]
    assert metrics.score("caption", ["", "..."], examples) == {"cider": 0.0}
    assert metrics.score("caption", ["a cat"], examples[:1]) == {"cider": 0.0}  # idf of one is 0
    upper = metrics.score("caption", ["A RED CAT!", "The dog."], examples)
    assert upper["cider"] == metrics.score("caption", ["a red cat", "the dog"], examples)["cider"]
    with pytest.raises(ValueError, match="'c7'"):
        metrics.score("caption", ["a cat"], [example([], id="c7")])


def test_score_explains_misuse():
    with pytest.raises(ValueError, match="tvqa"):
        metrics.score("tvqa", ["a"], [example()])
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        metrics.score("gqa", ["a"], [example(), example()])
    with pytest.raises(ValueError, match="at least one"):
        metrics.score("vqa", [], [])
