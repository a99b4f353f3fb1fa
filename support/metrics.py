"""How good is an answer?

A metric is a function (predictions, examples) -> {name: score}: every score times 100, the headline
of the papers' tables first. data.py's TASKS says which task is scored by which.

* vqa          soft accuracy: how many of ten people gave this answer (VQA, arXiv 1505.00468)
* exact_match  the share of right answers (GQA, arXiv 1902.09506; TVQA and How2QA, "a0" .. "a4")
* nlvr         accuracy, and consistency over all picture pairs of a sentence (arXiv 1811.00491)
* caption      CIDEr-D (arXiv 1411.5726): n-grams shared with five people's captions, rare ones
               weigh more; BLEU-1..4 (Papineni et al., ACL 2002); ROUGE-L (Lin, ACL 2004)

An example is anything with `.id`, `.targets` {answer: soft score} and `.references` (raw answers or
captions, or None), which is what data.py makes. There is one prediction for each, and at least one.

    python -m pytest tests/test_metrics.py
"""
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from support.gate import BadInput


def mean(scores: list[float]) -> float:
    """The mean, times 100, as scores are reported."""
    return 100.0 * sum(scores) / len(scores)


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
CONTRACTIONS = {}
for word in APOSTROPHES.split():
    CONTRACTIONS[word.replace("^", "")] = word.replace("^", "'")
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table's one slip; scores depend on it
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'


def strip_punctuation(text: str) -> str:
    """The official punctuation rule: a mark beside a space goes, any other becomes a space.

    Traps kept because scores depend on them: it looks at the original text, not at what earlier
    marks left; one comma between digits makes all go; "yes!" is "yes ", by 2016's rule never right.
    """
    numeral, out = re.search(r"\d,\d", text), text
    for mark in MARKS:
        if mark in text:
            # One occurrence at the edge of a word decides for all of them.
            edge = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if edge or numeral else " ")
    # 32: the official script passes a regular expression flag where the count belongs.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """A predicted answer as the VQA metric compares it: "The red one." -> "red 1"."""
    words = []
    for word in strip_punctuation(one_line(text)).lower().split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


# How a prediction and the annotators' answers are folded before they are compared, where the ten
# agree and where they do not. Papers report by the official script's rule of 2016: an answer that
# all ten wrote as "Yes." is never matched. The script has had the second rule since 2021-03-11.
FOLDS = {
    (2016, True): (normalize_answer, str), (2016, False): (normalize_answer, strip_punctuation),
    (2021, True): (one_line, one_line), (2021, False): (normalize_answer, normalize_answer),
}


def vqa_accuracy(prediction: str, answers: list[str], rule: int = 2016) -> float:
    """Soft accuracy (0..1) of a prediction against the raw answers of (ten) annotators."""
    fold, fold_answer = FOLDS[rule, len(set(answers)) == 1]
    prediction = fold(prediction)
    agrees = [fold_answer(answer) == prediction for answer in answers]
    # Each annotator in turn is left out; the prediction earns min(1, matches among the rest / 3).
    rests = [sum(agrees) - agree for agree in agrees]
    return sum(min(1.0, rest / 3) for rest in rests) / len(answers)


def vqa(predictions: list[str], examples: list) -> dict[str, float]:
    """Soft accuracy by the papers' rule and by today's; from the soft scores of `targets`, where
    there are no raw answers."""
    scores: dict[int, list[float]] = {2016: [], 2021: []}
    for prediction, example in zip(predictions, examples):
        for rule, found in scores.items():
            if example.references:
                found.append(vqa_accuracy(prediction, example.references, rule))
            else:
                found.append(example.targets.get(prediction.strip(), 0.0))
    return {"accuracy": mean(scores[2016]), "accuracy_2021": mean(scores[2021])}


# ---------------------------------------------------------------------------- exact match and nlvr

def right(predictions: list[str], examples: list) -> list[bool]:
    """Which predictions are the answer, letter by letter."""
    pairs = zip(predictions, examples)
    return [prediction.strip() in example.targets for prediction, example in pairs]


def exact_match(predictions: list[str], examples: list) -> dict[str, float]:
    return {"accuracy": mean(right(predictions, examples))}


def nlvr(predictions: list[str], examples: list) -> dict[str, float]:
    """Accuracy of "true" / "false", and the share of sentences right on all of their pictures.

    An identifier is split-set-pair-sentence ("dev-850-0-1"): blanking the pair, its third field,
    leaves what the examples of one sentence share.
    """
    sentences, hits = defaultdict(list), right(predictions, examples)
    for hit, example in zip(hits, examples):
        fields = str(example.id).split("-")
        fields[2:3] = [""]
        sentences["-".join(fields)].append(hit)
    return {"accuracy": mean(hits), "consistency": mean([all(hit) for hit in sentences.values()])}


# ---------------------------------------------------------------------------------------- captions

# The Penn Treebank way to cut English, as coco-caption uses it (its tool is Stanford's, in Java):
# "don't" -> do n't, "man's" -> man 's, "cannot" -> can not; "t-shirt", "10:30", "u.s." stay whole.
# First, what keeps its period: abbreviations, and places where they are capitalised ("on Wash.").
ABBREVIATION = "|".join(r"""
jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri mrs? ms drs? profs? sens?
reps? atty lt col gen messrs govs? adm rev maj sgt cpl pvt capt pres lieut hon brig cmdr comdr pfc
spc supt det jr sr bros esq ph\.d ste? ave blvd rd sq ct mt ft rt bldg inc cos? corp ltd plc dept
assn assoc univ mfg intl natl ext tel vs etc al seq cf est adj adv msgr mme mlle ala ariz calif colo
conn fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo jos wm
""".split())
PLACE = "ark|del|ill|la|mass|miss|ore|pa|tex|wash"
# One letter keeps its period too, but not before a word that begins a sentence ("plan b. The ...")
# nor at a caption's end: the tool reads on there, and the next caption begins "A man ...".
OPENER = "|".join("""
A An The One Some Many There This That These It He She They We You In At As But So If When While
After Here What Her Their Our Other Then Now However
""".split())
L, A, Q = r"[^\W\d_]", r"[^\W_]", "['’]"  # a letter, a letter or digit, an apostrophe
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
SIGMA = 6.0                          # of CIDEr-D's penalty on a length that differs, in words
BETA = 1.2                           # of ROUGE-L: how much more recall counts than precision
DROPPED = set("'’\"`.,:;-!?")


def tokenize_caption(text: str) -> list[str]:
    """Lower-cased Penn Treebank words without punctuation, as coco-caption counts them."""
    text = CLITIC.sub("'", text.translate(SAME))            # typographic signs -> typewriter's
    words = []
    for token in TOKEN.findall(text):
        word = RENAMED.get(token, token.lower())
        if word not in DROPPED and word[:2] not in ("--", ".."):
            words.append(word)
    return words


def ngrams(words: list[str]) -> Counter:
    """How often each 1- to 4-gram occurs: {("a", "red"): 1, ...}."""
    counts: Counter = Counter()
    for n in range(1, 5):                                   # a window of n words slides along
        counts.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return counts


def norm(vector: dict) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))


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
    # The references are the corpus. How many pictures have a caption that holds an n-gram?
    pictures = Counter()
    for captions in references:
        pictures.update(set().union(*map(ngrams, captions)))
    log_total = math.log(max(1, len(references)))

    def tf_idf(words: list[str]) -> list[dict]:
        """A caption as g_1 .. g_4: n-gram -> count * idf."""
        vectors: list[dict] = [{}, {}, {}, {}]
        for gram, count in ngrams(words).items():           # in no reference: as if in one
            vectors[len(gram) - 1][gram] = count * (log_total - math.log(max(1, pictures[gram])))
        return vectors

    scores = []
    for words, captions in zip(predictions, references):
        p = tf_idf(words)                                   # p[n - 1] is the formula's p_n
        total = 0.0                                         # over references and n
        for caption in captions:
            r = tf_idf(caption)
            # A Gaussian of the difference in length: saying more does not pay.
            penalty = math.exp(-((len(words) - len(caption)) ** 2) / (2 * SIGMA**2))
            for n in range(4):
                # p . r, but a word counts at most as often as the reference says it.
                shared = [gram for gram in p[n] if gram in r[n]]
                dot = sum(min(p[n][gram], r[n][gram]) * r[n][gram] for gram in shared)
                norms = norm(p[n]) * norm(r[n])
                if norms:                                   # else nothing is shared that counts
                    total += penalty * dot / norms / 4
        scores.append(10 * total / len(captions))
    return scores


def bleu(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1..4 (0..1) of a whole split; words as in `cider`.

    With p_n the share of the predictions' n-grams that occur in a reference of their picture, each
    counted at most as often as the one reference that has it most; c the predictions' length; and
    r the summed length of the references closest in length, the shorter one of two as close,

        BLEU-n = min(1, exp(1 - r / c)) (p_1 p_2 ... p_n)^(1/n)
    """
    # p_n = hits / total. Tiny numbers instead of 0, as in coco-caption: nothing divides by 0.
    hits, total = [1e-15] * 4, [1e-9] * 4
    c, r = 1e-15, 1e-9
    for words, captions in zip(predictions, references):
        most = Counter()                                    # n-gram -> its most in one reference
        for ref in captions:
            most |= ngrams(ref)
        for gram, count in ngrams(words).items():
            hits[len(gram) - 1] += min(count, most[gram])
            total[len(gram) - 1] += count
        c += len(words)
        # The closest length; of two as close, the shorter one.
        r += min((abs(len(ref) - len(words)), len(ref)) for ref in captions)[1]
    brevity = min(1.0, math.exp(1 - r / c))                 # saying little is no way to be right
    precisions = [hit / count for hit, count in zip(hits, total)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest sequence of words that a and b share in order, gaps allowed."""
    row = [0] * (len(b) + 1)                                # of a so far and the first j words of b
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            if word == other:
                row.append(above[j] + 1)                    # both end in this word
            else:
                row.append(max(above[j + 1], row[j]))       # one of them without its last word
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
        p = words or [""]
        refs = [ref or [""] for ref in captions]
        lcs = [common(p, ref) for ref in refs]
        # The best reference for each, which may be two different ones.
        precision = max(lcs) / len(p)
        recall = max(shared / len(ref) for shared, ref in zip(lcs, refs))
        weighted = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / weighted if weighted else 0.0)
    return scores


def caption(predictions: list[str], examples: list,
            tokenize: Callable[[str], list[str]] = tokenize_caption) -> dict[str, float]:
    """CIDEr-D, BLEU-1..4 and ROUGE-L of a split; its own references are the idf corpus."""
    words, references = [tokenize(prediction) for prediction in predictions], []
    for example in examples:
        if not example.references:
            raise BadInput(f"caption {example.id!r} has no reference captions to be scored against")
        references.append([tokenize(reference) for reference in example.references])
    scores = {"cider": mean(cider(words, references))}
    for n, score in enumerate(bleu(words, references), 1):
        scores[f"bleu{n}"] = 100.0 * score
    scores["rouge_l"] = mean(rouge_l(words, references))
    return scores


def clip_caption(predictions: list[str], examples: list) -> dict[str, float]:
    """The same as VALUE scores tvc and yc2c: every character beyond ASCII is a blank."""
    return caption(predictions, examples,
                   lambda text: tokenize_caption(re.sub(r"[^\x00-\x7f]", " ", text)))
