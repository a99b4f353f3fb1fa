"""How good is an answer?

Four tasks, one table: METRICS maps a task to a function (predictions, examples) -> {name: score}.
The first score is the headline of the papers' tables, and every score is reported times 100.

* vqa      soft accuracy: how many of ten people gave this answer (VQA, arXiv 1505.00468)
* gqa      exact match (GQA, arXiv 1902.09506)
* nlvr     accuracy, and consistency over all picture pairs of a sentence (arXiv 1811.00491)
* caption  CIDEr-D (arXiv 1411.5726): tf-idf weighted n-grams shared with five people's captions

An example is anything with `.id`, `.targets` {answer: soft score} and `.references` (raw answers or
captions, or None), which is what data.py makes.

    python -m pytest tests/test_metrics.py
"""

import math
import re
from collections import Counter, defaultdict

# ------------------------------------------------------------------------------------- vqa answers

# Answers are free text, so the official script folds spellings together before comparing. In this
# table "don^t" says: read "dont" as "don't"; ^ marks an apostrophe that people leave out.
APOSTROPHES = """
ain^t aren^t can^t could^ve couldn^t couldn't^ve couldn^t've didn^t doesn^t don^t hadn^t hadn^t've
hadn't^ve hasn^t haven^t he^d he^d've he'd^ve he^s how^d how^ll how^s I^d've I'd^ve I^m I^ve isn^t
it^d it^d've it'd^ve it^ll ma^am mightn^t mightn^t've mightn't^ve might^ve mustn^t must^ve needn^t
not^ve o^clock oughtn^t ^ow's'at 'ow^s'at 'ow's^at shan^t she^d've she'd^ve should^ve shouldn^t
shouldn^t've shouldn't^ve somebody^d've somebody'd^ve somebody^ll somebody^s someone^d someone^d've
someone'd^ve someone^ll someone^s something^d something^d've something'd^ve something^ll that^s
there^d there^d've there'd^ve there^re there^s they^d they^d've they'd^ve they^ll they^re they^ve
^twas wasn^t we^d've we'd^ve we^ve weren^t what^ll what^re what^s what^ve when^s where^d where^s
where^ve who^d who^d've who'd^ve who^ll who^s who^ve why^ll why^re why^s won^t would^ve wouldn^t
wouldn^t've wouldn't^ve y^all y^all'll y'all^ll y^all'd've y'all^d've y'all'd^ve you^d you^d've
you'd^ve you^ll you^re you^ve
"""
CONTRACTIONS = {w.replace("^", ""): w.replace("^", "'") for w in APOSTROPHES.split()}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table's one slip; scores depend on it
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")


def strip_punctuation(text: str) -> str:
    """The official punctuation rule: a mark at the edge of a word goes, one inside becomes a space.

    Traps kept because scores depend on them: the edge test looks at the original text, not at what
    earlier marks left, and one comma between digits anywhere makes every mark go without a space.
    """
    numeral = DIGIT_COMMA.search(text) is not None
    out = text
    for mark in MARKS:
        if mark in text:
            edge = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if edge or numeral else " ")
    # 32: the official script passes a regular expression flag where the count belongs.
    return PERIOD.sub("", out, count=32)


def normalize_answer(text: str) -> str:
    """A predicted answer as the VQA metric compares it: "The red one." -> "red 1"."""
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Soft accuracy in 0..1 of one prediction against the raw answers of (ten) annotators.

    Each annotator in turn is left out, and the prediction earns min(1, matches among the rest / 3);
    the result is the mean. Annotators' answers get the punctuation rule only, and only where they
    disagree: an answer all ten wrote as "Yes." is never matched, as in the official script.
    """
    prediction = normalize_answer(prediction)
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    matches = sum(answer == prediction for answer in answers)
    left_out = [matches - (answer == prediction) for answer in answers]
    return sum(min(1.0, rest / 3) for rest in left_out) / len(answers)


def vqa(predictions: list[str], examples: list) -> dict[str, float]:
    """Soft accuracy from the raw answers; from the labels' soft scores where there are none."""
    scores = [
        vqa_accuracy(p, ex.references) if ex.references else ex.targets.get(p.strip(), 0.0)
        for p, ex in zip(predictions, examples)
    ]
    return {"accuracy": mean(scores)}


# ------------------------------------------------------------------------------------ gqa and nlvr


def gqa(predictions: list[str], examples: list) -> dict[str, float]:
    """Exact match with the answer."""
    return {"accuracy": mean([p.strip() in ex.targets for p, ex in zip(predictions, examples)])}


def nlvr(predictions: list[str], examples: list) -> dict[str, float]:
    """Accuracy of "true" / "false", and the share of sentences right on all of their pictures.

    An identifier is split-set-pair-sentence ("dev-850-0-1"): blanking the pair, its third field,
    leaves what the examples of one sentence share.
    """
    right = [p.strip() in ex.targets for p, ex in zip(predictions, examples)]
    sentences = defaultdict(list)
    for ok, ex in zip(right, examples):
        fields = str(ex.id).split("-")
        sentences["-".join(fields[:2] + [""] + fields[3:])].append(ok)
    return {"accuracy": mean(right), "consistency": mean([all(s) for s in sentences.values()])}


# ---------------------------------------------------------------------------------------- captions

# The Penn Treebank way to cut English, as coco-caption uses it (its tool is Stanford's, in Java):
# "don't" -> do n't, "man's" -> man 's, "cannot" -> can not; "t-shirt", "10:30", "u.s." stay whole.
ABBREVIATIONS = r"mrs?|ms|drs?|profs?|st|ave|blvd|rd|mt|ft|sq|jr|sr|vs|etc|inc|co|corp|ltd|ph\.d"
TOKEN = re.compile(
    rf"""
      (?: can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | n't\b | [^\W\d_]+?(?=n't\b)                       # does n't
    | '(?: s | re | ve | ll | d | m | em | \d0s )\b | 'n' | 'n(?!\w) | 't(?=is\b|was\b)
    | (?: [odl] | ma )'[^\W\d_]{{2,}} | y'(?=all\b)      # o'clock
    | (?: [^\W\d_]\. )+(?!\w) | (?: {ABBREVIATIONS} )\. | no\.(?=\s?\d)
    | [-+]?\.?\d+(?: [,.:/]\d+ )*(?![^\W_]|[-./&][^\W_])       # 1,000 10:30 1/2 -5
    | [^\W_]+(?: (?: [-./_] | (?-i:(?<=[A-Z])&(?=[A-Z])) ) [^\W_]+ )*
    | [\#@][^\W\d_]\w* | [!?]+ | --+ | \.\.+ | __+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
SAME = str.maketrans({"’": "'", "‘": "`", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
# Brackets leave tokens: coco-caption means to drop -LRB- but has lower-cased it by then.
RENAMED = dict(zip("()[]{}£€", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- # $".split()))
DROPPED = set("'\"`.,:;-!?")


def tokenize_caption(text: str) -> list[str]:
    """Lower-cased Penn Treebank words without punctuation, as CIDEr counts them."""
    words = [RENAMED.get(w, w.lower()) for w in TOKEN.findall(text.translate(SAME))]
    return [w for w in words if w not in DROPPED and w[:2] not in ("--", "..")]


def ngrams(words: list[str]) -> Counter:
    """How often each 1- to 4-gram occurs: {("a", "red"): 1, ...}."""
    counts = range(1, 5)
    return Counter(tuple(words[i : i + n]) for n in counts for i in range(len(words) - n + 1))


def cider(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each picture (x10, as published; a mean of 1.2 is printed as 120).

    predictions: a picture's words; references: a picture's captions, each its words.
    With g_n a caption's n-gram counts times idf, idf = log(pictures / pictures whose references
    hold the n-gram), and l a caption's length in words,

        CIDEr-D = 10 * mean_ref mean_n  exp(-(l_p - l_r)^2 / 2 sigma^2)  min(p_n, r_n) . r_n
                                                                        -----------------
                                                                          |p_n| |r_n|
    with sigma = 6. The min keeps a caption from scoring by repeating a good word.
    """
    ref_counts = [[ngrams(words) for words in captions] for captions in references]
    pictures = Counter(gram for counts in ref_counts for gram in set().union(*counts))
    log_total = math.log(max(1, len(references)))

    def vector(counts: Counter):
        weights: list[dict] = [{}, {}, {}, {}]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (log_total - math.log(max(1, pictures[gram])))
        norms = [math.sqrt(sum(w * w for w in ws.values())) for ws in weights]
        length = sum(count for gram, count in counts.items() if len(gram) == 1)
        return weights, norms, length

    scores = []
    for words, counts in zip(predictions, ref_counts):
        p, p_norms, p_length = vector(ngrams(words))
        total = 0.0
        for r, r_norms, r_length in map(vector, counts):
            penalty = math.exp(-((p_length - r_length) ** 2) / (2 * 6.0**2))
            for n in range(4):
                dot = sum(min(w, r[n][g]) * r[n][g] for g, w in p[n].items() if g in r[n])
                norm = p_norms[n] * r_norms[n]
                total += penalty * dot / norm / 4 if norm else 0.0
        scores.append(10 * total / len(counts))
    return scores


def caption(predictions: list[str], examples: list) -> dict[str, float]:
    """CIDEr-D over a split; the references of the split's own pictures are the idf corpus."""
    for ex in examples:
        if not ex.references:
            raise ValueError(f"caption {ex.id!r} has no reference captions to be scored against.")
    words = [tokenize_caption(p) for p in predictions]
    references = [[tokenize_caption(r) for r in ex.references] for ex in examples]
    return {"cider": mean(cider(words, references))}


# --------------------------------------------------------------------------------------- the table

METRICS = {"vqa": vqa, "gqa": gqa, "nlvr": nlvr, "caption": caption}


def mean(scores: list[float]) -> float:
    """The mean, times 100: the one place where scores get their scale."""
    return 100.0 * sum(scores) / len(scores)


def score(task: str, predictions: list[str], examples: list) -> dict[str, float]:
    """Named scores (x100) of one task's predictions, the headline first.

    Raises ValueError for an unknown task, no examples, or not one prediction an example.
    """
    if task not in METRICS:
        raise ValueError(f"no metric for task {task!r}; there are metrics for {list(METRICS)}.")
    if not examples or len(predictions) != len(examples):
        raise ValueError(
            f"{task}: {len(predictions)} predictions for {len(examples)} examples; "
            "scoring needs one prediction for each example, and at least one."
        )
    return METRICS[task](predictions, examples)
