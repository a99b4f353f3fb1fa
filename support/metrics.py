"""How good is an answer?

One table: METRICS maps a task to a function (predictions, examples) -> {name: score}. The first
score is the headline of the papers' tables, and every score is reported times 100.

* vqa      soft accuracy: how many of ten people gave this answer (VQA, arXiv 1505.00468)
* gqa      exact match (GQA, arXiv 1902.09506); tvqa and how2qa, whose answers are "a0" .. "a4", too
* nlvr     accuracy, and consistency over all picture pairs of a sentence (arXiv 1811.00491)
* caption  CIDEr-D (arXiv 1411.5726): tf-idf weighted n-grams shared with five people's captions;
           BLEU-1..4 (Papineni et al., ACL 2002); ROUGE-L (Lin, ACL 2004). tvc and yc2c too

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


# ---------------------------------------------------------------------------- exact match and nlvr


def exact_match(predictions: list[str], examples: list) -> dict[str, float]:
    """The share of predictions that are the answer, letter by letter."""
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
# First, what keeps its period: abbreviations, and places where they are capitalised ("on Wash.").
ABBREVIATIONS = r"""
jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri mrs? ms drs? profs? sens?
reps? atty lt col gen messrs govs? adm rev maj sgt cpl pvt capt pres lieut hon brig cmdr comdr pfc
spc supt det jr sr bros esq ph\.d ste? ave blvd rd sq ct mt ft rt bldg inc cos? corp ltd plc dept
assn assoc univ mfg intl natl ext tel vs etc al seq cf est adj adv msgr mme mlle ala ariz calif colo
conn fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo jos wm
"""
PLACES = "ark del ill la mass miss ore pa tex wash"
# One letter keeps its period too, but not before a word that begins a sentence ("plan b. The ...")
# nor at a caption's end: the tool reads on there, and the next caption begins "A man ...".
OPENERS = """
A An The One Some Many There This That These It He She They We You In At As But So If When While
After Here What Her Their Our Other Then Now However
"""
L, A, Q = r"[^\W\d_]", r"[^\W_]", "['’]"  # a letter, a letter or digit, an apostrophe
ABBREVIATION, PLACE, OPENER = ("|".join(s.split()) for s in (ABBREVIATIONS, PLACES, OPENERS))
TOKEN = re.compile(
    rf"""
      (?: can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | n['`]t\b | {L}+?(?=n['`]ts?\b)                                            # does n't
    | (?: ol | dunkin | somethin ){Q} | {Q}(?: em | till? | cause | [2-9]0s )\b | {Q}\d\d(?!\S)
    | (?: c'mon | s'mores | li'l | e'er | cap'n | nat'l | ev'ry | nor'easter )\b
    | {L}+[aeiouy]{Q}(?! (?:s|re|ve|ll|d|m)\b )(?-i:[aeiouA-Z]){L}*             # hawai'i
    | (?: [odln] | (?-i:[B-HJ-XZ]) )['’`]{L}{{2,}} | [yj]{Q}(?={L})             # o'clock y' all
    | '(?: s | re | ve | ll | d | m )\b | {Q}n{Q} | {Q}n(?!\w) | 't(?=is|was)
    | (?: {A}+- )? (?: {L}\. ){{2,}} (?: -{A}+ )* (?!\w)                        # u.s.-made
    | {L}\.(?! {L} | \s*$ | \s+(?-i:{OPENER})(?!\S) )                           # john f.
    | (?: {ABBREVIATION} | (?-i:(?=[A-Z])) (?:{PLACE}) )\. (?: -{A}+ )* (?!{L})
    | (?: nos? | figs? | pp | prop | art | ca )\.(?=\s?\d)                      # no. 5
    | \d+(?: ,\d+ )+(?: -{A}+ )+                                                # 1,000-year-old
    | [-+]?\.?\d+(?: [./]\d+ )*[,:]\d+(?: [,.:/]\d+ )*                          # 10:30 am
    | \d+(?: \.\d+ )+(?: -{A}+ )* | [-+]?\d*(?: \.\d+ )+                        # 7.5-foot 7.5 lb
    | {A}+(?: -{A}+ )*\.(?=[,;:])                                               # "on a bench.,"
    | [-+]?\d+(?: /\d+ )*(?! {A} | [-/]{A} )                                    # 1/2 -5
    | (?-i:[A-Z]+(?: &[A-Z]+ )+)                                                # M&M 's
    | {L}{A}*(?: \.{L}{A}*(?: -{A}+ )* )+                                       # a wall.The sky
    | {A}+(?: [-‐‑/_](?: o{Q} )?{A}+ )*                                         # t-shirt and/or
    | [\#@]{L}\w* | [!?]+ | \*+ | --+ | \.\.+ | __+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
CLITIC = re.compile(r"’(?=(?:s|t|re|ve|ll|d|m)\b)", re.IGNORECASE)  # it’s -> it's, but o’clock
SAME = str.maketrans(
    {"‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "‹": '"', "›": '"'}
    | {"–": "--", "—": "--", "‒": "--", "―": "--", "…": " ... ", "\u200b": " ", "\u00ad": ""}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
# Brackets leave tokens: coco-caption means to drop -LRB- but has lower-cased it by then.
RENAMED = dict(zip("()[]{}£€¢", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- # $ cents".split()))
DROPPED = set("'’\"`.,:;-!?")


def tokenize_caption(text: str) -> list[str]:
    """Lower-cased Penn Treebank words without punctuation, as coco-caption counts them."""
    text = CLITIC.sub("'", text.translate(SAME))
    words = [RENAMED.get(w, w.lower()) for w in TOKEN.findall(text)]
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


def bleu(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1..4 (0..1) of a whole split; words as in `cider`.

    With p_n the share of the predictions' n-grams that occur in a reference of their picture, each
    counted at most as often as the one reference that has it most; c the predictions' length; and
    r the summed length of the references closest in length, the shorter one of two as close,

        BLEU-n = min(1, exp(1 - r / c)) (p_1 p_2 ... p_n)^(1/n)
    """
    hits, total = [1e-15] * 4, [1e-9] * 4  # instead of 0, as in coco-caption: nothing divides by 0
    c, r = 1e-15, 1e-9
    for words, captions in zip(predictions, references):
        counts, most = ngrams(words), Counter()
        for ref in captions:
            most |= ngrams(ref)
        for gram, count in counts.items():
            hits[len(gram) - 1] += min(count, most[gram])
            total[len(gram) - 1] += count
        c += len(words)
        r += min((abs(len(ref) - len(words)), len(ref)) for ref in captions)[1]
    brevity = min(1.0, math.exp(1 - r / c))
    precisions = [hit / count for hit, count in zip(hits, total)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest sequence of words that a and b share in order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """ROUGE-L (0..1) of each picture; words as in `cider`.

    With lcs the longest common subsequence of a prediction p and a reference r, and beta = 1.2,

        P = max_ref lcs / |p|,  R = max_ref lcs / |r|,  ROUGE-L = (1 + beta^2) P R / (R + beta^2 P)

    where P and R may come from different references.
    """
    scores = []
    for words, captions in zip(predictions, references):
        # An empty caption is one empty word, as in coco-caption.
        p, refs = words or [""], [ref or [""] for ref in captions]
        shared = [common(p, ref) for ref in refs]
        precision = max(shared) / len(p)
        recall = max(n / len(ref) for n, ref in zip(shared, refs))
        weighted = recall + 1.2**2 * precision
        scores.append((1 + 1.2**2) * precision * recall / weighted if weighted else 0.0)
    return scores


def caption(predictions: list[str], examples: list) -> dict[str, float]:
    """CIDEr-D, BLEU-1..4 and ROUGE-L of a split; its own references are the idf corpus."""
    for ex in examples:
        if not ex.references:
            raise ValueError(f"caption {ex.id!r} has no reference captions to be scored against.")
    words = [tokenize_caption(p) for p in predictions]
    references = [[tokenize_caption(r) for r in ex.references] for ex in examples]
    scores = {"cider": mean(cider(words, references))}
    scores |= {f"bleu{n}": 100.0 * b for n, b in enumerate(bleu(words, references), 1)}
    return scores | {"rouge_l": mean(rouge_l(words, references))}


# --------------------------------------------------------------------------------------- the table

METRICS = {
    "vqa": vqa,
    "gqa": exact_match,
    "nlvr": nlvr,
    "caption": caption,
    "tvqa": exact_match,
    "how2qa": exact_match,
    "tvc": caption,
    "yc2c": caption,
}


def mean(scores: list[float]) -> float:
    """The mean, times 100, as scores are reported."""
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
