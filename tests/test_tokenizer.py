"""The tokenisers against the `tokenizers` library, on vocabularies that it trains here.

python -m pytest tests/test_tokenizer.py
"""
import base64
import copy
import json
import random
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from support import tokenizer
from support.gate import WRONG, BadInput
from support.normalize import Charsmap
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent
SPECIAL = {"bart": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "t5": ["<pad>", "</s>", "<unk>"],
           "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]}
WORDS = """what color is the cat on left don't we'll IT'S it's I'm you've they're he'd isn't 'S 're
café cafe\u0301 naïve Ångström A\u030angstro\u0308m ﬁne ﬁ\u0301 ª\u0301 №\u0308 ½ x² ㎏ ™ ™\ufe0f ℹ️
ｆｕｌｌ ｶﾞ 東京タワー 한국어 \u1112\u1161\u11ab हिन्दी क्षि العربية עברית ไทยน้ำ 123 4,567.89 's's
１２３ ١٢٣ ४५६ Ⅷ 〇 ① 😀 👨\u200d👩\u200d👧 👍🏽 🇫🇷🇩🇪 ©\u200d® snake_case _ __init__ e-mail@x.org
... ?! “quoted” ‘ ’ -- \u00ad \u200b \ufeff \u2028 \x00 \x01\u0301 \x1c \x1f \x7f \x85 ▁ ▁▁a a▁b
<extra_id_0> <extra_id_12> <mask> <s> </s> <pad> <unk> <mask <extra_id_0 ＜extra_id_0＞ ＜ｐａｄ＞
ſt ǆ ß İ Σς ΑΣ Q\u0301 ﷺ ﷽ 𝒳𝔘 𐍈 𠮷""".replace("\n", " ").split(" ")
SPACES = [" "] * 8 + ["  ", "   ", "\u00a0", "\u3000", "\t", "\n", "\r\n", "\r", "\u2003",
                      "\u202f", "\u1680", "\x85", "\u200b", "\u200d", "", " ▁"]
RANGES = [(0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x800), (0x900, 0xE00),
          (0xE00, 0x1200), (0x1AB0, 0x1ABF), (0x1E00, 0x2200), (0x2460, 0x2500), (0x3000, 0x3200),
          (0x4E00, 0x4E80), (0xAC00, 0xAC40), (0xFB00, 0xFC00), (0xFE00, 0x10000),
          (0x1D400, 0x1D500), (0x1F1E6, 0x1F200), (0x1F3E0, 0x1F650), (0xE0020, 0xE0080)]


def assigned(start, stop):
    """Characters that this Python and the library know: tables of Unicode grow."""
    return [c for c in map(chr, range(start, stop)) if unicodedata.category(c) not in "Cn Co Cs"]


def make_texts(count=2500, seed=0):
    rnd = random.Random(seed)
    pools = [assigned(*r) for r in RANGES]
    texts = ["", " ", "   ", "\n", "\t \u3000", "\r\n", "▁", " ▁", "'", "'s", " 's", "a" * 300]
    while len(texts) < count:
        parts = [rnd.choice(WORDS) + rnd.choice(SPACES) for _ in range(rnd.randint(1, 9))]
        if rnd.random() < 0.3:
            parts = [rnd.choice(rnd.choice(pools)) for _ in range(rnd.randint(1, 12))]
        texts.append("".join(parts))
    return texts


TEXTS = make_texts()
CORPUS = [" ".join(random.Random(i).choices(WORDS[:40] + ["the", "cat", "left", "what"] * 5, k=8))
          for i in range(400)]


# ---------------------------------------------------------------------- vocabularies to test with

def charsmap(rule):
    """SentencePiece's own table, in base64: nmt_nfkc is T5's, nmt_nfkc_cf folds the case too."""
    proto = sentencepiece.SentencePieceNormalizer(rule_name=rule).serialized_model_proto()
    # The table stands behind its name (tag 2, bytes): its length, 7 bits a byte, then it.
    at = proto.index(rule.encode() + b"\x12") + len(rule) + 1
    size = proto[at] & 127 | (proto[at + 1] & 127) << 7 | proto[at + 2] << 14
    assert size > 200_000
    return base64.b64encode(proto[at + 3:at + 3 + size]).decode()


def added(i, content, **other):
    return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False,
                normalized=False, special=True) | other


def precompiled(blob):
    return dict(normalizer=dict(type="Precompiled", precompiled_charsmap=blob))


METASPACE = dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True)


@pytest.fixture(scope="session")
def t5_json():
    """A tokenizer.json as T5's: charsmap, unigram model, a hundred <extra_id_n> at the end."""
    lib = tokenizers.Tokenizer(models.Unigram())
    lib.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    lib.decoder = decoders.Metaspace()
    lib.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    lib.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL["t5"], unk_token="<unk>", show_progress=False))
    spec = json.loads(lib.to_str())
    vocab = spec["model"]["vocab"]
    vocab += [[f"<extra_id_{i}>", 0.0] for i in range(99, -1, -1)]
    spec["added_tokens"] += [added(i, text) for i, (text, _) in enumerate(vocab)
                             if text.startswith("<extra_id_")]
    return spec | precompiled(charsmap("nmt_nfkc"))


@pytest.fixture(scope="session")
def bart_json():
    """A tokenizer.json as BART's: <mask> swallows the spaces in front of it."""
    lib = tokenizers.Tokenizer(models.BPE())
    lib.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = decoders.ByteLevel()
    lib.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    lib.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL["bart"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    spec = json.loads(lib.to_str())
    spec["added_tokens"][4]["lstrip"] = True
    return spec


VARIANTS = {
    "t5": {},
    "t5 metaspace only": dict(pre_tokenizer=METASPACE),
    "t5 unsplit": dict(pre_tokenizer=METASPACE | dict(split=False)),
    "t5 plain": dict(normalizer=None),
    "t5 folded": precompiled(charsmap("nmt_nfkc_cf")),
    "t5 steps": dict(normalizer=dict(type="Sequence", normalizers=[
        dict(type="Strip", strip_left=False, strip_right=True),
        dict(type="Replace", pattern=dict(Regex=" {2,}"), content="\\1▁")])),
    "bart": {},
}


def write(folder, spec):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def both(folder, spec):
    write(folder, spec)
    return load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path, t5_json, bart_json):
    base = t5_json if request.param.startswith("t5") else bart_json
    return both(tmp_path / "it", base | VARIANTS[request.param])


def assert_same(ours, lib, texts):
    wrong = [t for t, e in zip(texts, lib.encode_batch(texts)) if ours.encode(t) != e.ids]
    assert not wrong, (len(wrong), ascii(wrong[0]), ours.encode(wrong[0]), lib.encode(wrong[0]).ids)


def assert_normalized(ours, lib, texts):
    wrong = [t for t in texts if ours.normalize(t) != lib.normalizer.normalize_str(t)]
    assert not wrong, (len(wrong), ascii(wrong[0]))


# ------------------------------------------------------------------------------ against the library

def test_ids_equal_the_library_on_2500_texts(pair):
    ours, lib = pair
    assert_same(ours, lib, TEXTS)
    assert_same(ours, lib, TEXTS)                          # from the cache
    if lib.normalizer:
        assert_normalized(ours, lib, TEXTS)
    assert len(ours) == lib.get_vocab_size()
    with pytest.raises(UnicodeEncodeError):
        ours.encode("half an emoji \ud83d ?")
    assert [ours.pad_id, ours.eos_id, ours.unk_id] == list(
        map(lib.token_to_id, ("<pad>", "</s>", "<unk>")))


def test_decoding_equals_the_library(pair):
    ours, lib = pair
    rnd = random.Random(1)
    rows = [ours.encode(text) for text in TEXTS]
    rows += [[rnd.randrange(len(ours)) for _ in range(8)] for _ in range(2000)]
    for skip in (True, False):
        wrong = [row for row in rows if ours.decode(row, skip) != lib.decode(row, skip)]
        assert not wrong, wrong[0]
    assert ours.decode(torch.tensor(rows[20])) == lib.decode(rows[20])
    if ours.bos_id is not None:                            # BART gives every text back
        assert all(ours.decode(row) == text for text, row in zip(TEXTS, rows) if "<" not in text)


def test_truncation_equals_the_library(pair):
    ours, lib = pair
    texts = [t for t in TEXTS if len(t) > 20][:200]
    for max_length in (None, 3, 7, 1000):
        if max_length:
            lib.enable_truncation(max_length)
        rows = [ours.encode(text, max_length) for text in texts]
        assert rows == [e.ids for e in lib.encode_batch(texts)]
    assert ours.encode("a long text", 2)[-1] == ours.eos_id
    with pytest.raises(AssertionError, match="max_length = 0"):
        ours.encode("a", 0)


def test_every_character_is_split_as_the_library_splits(bart_json, tmp_path):
    ours, lib = both(tmp_path, bart_json)
    for start in range(0, 0x20000, 0x800):
        if 0x3800 <= start < 0xA000 or 0xB000 <= start < 0xD000:
            continue                                       # Han and Hangul: letters all alike
        text = "".join(f"a{c}1 {c}.{c} '{c}" for c in assigned(start, start + 0x800))
        words = ["".join(tokenizer.BYTES[b] for b in word.encode()) for word in ours.words(text)]
        assert words == [w for w, _ in lib.pre_tokenizer.pre_tokenize_str(text)], hex(start)


def test_every_cluster_is_replaced_as_the_library_replaces(t5_json, tmp_path):
    ours, lib = both(tmp_path, t5_json)
    rnd, pool = random.Random(2), assigned(1, 0x3400) + assigned(0xF900, 0x20000)
    assert_normalized(ours, lib, ["".join(rnd.choices(pool, k=5)) for _ in range(20_000)])
    for start, stop in ((1, 0x3400), (0xA000, 0xAC00), (0xF900, 0x20000), (0xE0000, 0xE0200)):
        for char in assigned(start, stop):
            assert_normalized(ours, lib, (char, f"ª{char}Q{char}x", f"{char}\u0301",
                                          f"\u0600{char}\u0301", f"{char}ª\u0301"))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_flags_of_added_tokens(kind, tmp_path, t5_json, bart_json):
    spec = copy.deepcopy(t5_json if kind == "t5" else bart_json)
    tokens = {"<l>": dict(lstrip=True), "<r>": dict(rstrip=True), "<l><r>": {},
              "<lr>": dict(lstrip=True, rstrip=True), "plain": dict(special=False),
              "ＮＯＲＭ": dict(normalized=True, special=False, lstrip=True),
              "<\u0301": dict(normalized=True), "<l>a": dict(normalized=True)}
    n = tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab_size()
    spec["added_tokens"] += [added(i, text, **tokens[text]) for i, text in enumerate(tokens, n)]
    ours, lib = both(tmp_path, spec)
    rnd = random.Random(3)
    parts = [*tokens, "NORM", "<mask>", "<s>", "a", "\u00e9"]
    gaps = ["", " ", "\n\u3000 ", "\x1c"]
    texts = ["".join(rnd.choice(parts) + rnd.choice(gaps) for _ in range(5)) for _ in range(2000)]
    assert_same(ours, lib, texts)
    for row in [ours.encode(text) for text in texts[:300]]:
        assert ours.decode(row) == lib.decode(row)


def test_files_of_every_form_give_the_same_ids(tmp_path, bart_json):
    """tokenizer.json with merges as text or as pairs, its model named or not, or vocab.json with
    merges.txt; with a byte order mark and Windows' line ends, as editors there save them."""
    ours, lib = both(tmp_path / "json", bart_json)
    wanted = [ours.encode(text) for text in TEXTS[:800]]
    old = tmp_path / "old"
    old.mkdir()
    lib.model.save(str(old))                               # vocab.json and merges.txt
    model = {key: value for key, value in bart_json["model"].items() if key != "type"}
    pairs = [tuple(line.split()) for line in (old / "merges.txt").read_text().split("\n")[1:-1]]
    text = bart_json | dict(model=model | dict(merges=[" ".join(pair) for pair in pairs]))
    both(tmp_path / "text", text)                          # the library reads a nameless model, too
    write(tmp_path / "pairs", bart_json | dict(model=model | dict(type="BPE", merges=pairs)))
    for folder in (old, tmp_path / "text", tmp_path / "pairs"):
        for front, line_end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
            for file in folder.iterdir():
                file.write_bytes(front + file.read_bytes().replace(b"\n", line_end))
            tok = load_tokenizer(folder)
            assert [tok.encode(text) for text in TEXTS[:800]] == wanted
            assert (tok.bos_id, tok.pad_id, tok.eos_id, tok.unk_id) == (0, 1, 2, 3)


def bpe_json(merges, first=SPECIAL["bart"]):
    vocab = {text: i for i, text in enumerate([*first, *tokenizer.BYTES])}
    for merge in merges:
        vocab.setdefault("".join(merge), len(vocab))
    return dict(version="1.0", added_tokens=[added(i, text) for i, text in enumerate(first)],
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
                model=dict(type="BPE", vocab=vocab, merges=[" ".join(merge) for merge in merges]))


@pytest.mark.parametrize("seed", range(6))
def test_random_merges_equal_the_library(seed, tmp_path):
    """Also where a line is repeated: its last rank counts."""
    rnd = random.Random(seed)
    tokens, merges = list("abc"), []
    for _ in range(40):
        pair = (rnd.choice(tokens), rnd.choice(tokens))
        if len("".join(pair)) < 12:
            merges.append(rnd.choice(merges) if merges and rnd.random() < 0.2 else pair)
            tokens.append("".join(merges[-1]))
    ours, lib = both(tmp_path, bpe_json(merges))
    assert len(set(merges)) < len(merges)
    for _ in range(300):
        text = "".join(rnd.choices("abc", k=rnd.randint(1, 60)))
        assert ours.encode(text) == [0, *lib.encode(text).ids, 2], text


def test_a_long_word_takes_no_longer_than_many_short_ones(tmp_path):
    """Chinese has no spaces: a message is one word. 20,000 letters, which took minutes once."""
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]
    for char in "中文字幕":
        first, second, third = (tokenizer.BYTES[byte] for byte in char.encode())
        merges += [(first, second), (first + second, third)]
    ours, lib = both(tmp_path, bpe_json(list(dict.fromkeys(merges))))
    for text in ("a" * 20_000, "中文字幕" * 5_000):
        start = time.process_time()
        ids = ours.encode(text)
        assert time.process_time() - start < 2
        assert ids[1:-1] == lib.encode(text).ids and ours.decode(ids) == text


# --------------------------------------------------------------------------------------- bert

@pytest.fixture(scope="session")
def bert_json():
    lib = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    lib.normalizer = normalizers.BertNormalizer()
    lib.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lib.decoder = decoders.WordPiece(cleanup=False)
    lib.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    lib.train_from_iterator(CORPUS + TEXTS[::3], trainers.WordPieceTrainer(
        vocab_size=3000, special_tokens=SPECIAL["bert"], show_progress=False))
    return json.loads(lib.to_str())


def write_lines(folder, tokens):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folder


def test_bert_equals_the_official_tokens(tmp_path):
    """Computed by CLIP-ViL's own code, "cat[SEP]cat" among them, padded to max_seq_length."""
    golden = json.loads((ROOT / "golden/clipvil_tokens.json").read_text(encoding="utf-8"))
    ours, length = load_tokenizer(write_lines(tmp_path, golden["vocab"])), golden["max_seq_length"]
    assert len(golden["cases"]) == 20
    for case in golden["cases"]:
        assert [ours.tokens[i] for i in ours.encode(case["text"])[1:-1]] == case["tokens"]
        ids = ours.encode(case["text"], length)
        assert ids + [ours.pad_id] * (length - len(ids)) == case["input_ids"]
    assert ours.decode(ours.encode("Cafés [SEP] tables!")) == "cafes tables !"


def test_bert_equals_its_own_code_and_the_library(bert_json, tmp_path):
    """The library's Unicode is old, and a last sigma is to it a sigma: such texts are left out."""
    ours, lib = both(tmp_path / "json", bert_json)
    rows = [ours.encode(text) for text in TEXTS]
    lines = load_tokenizer(write_lines(tmp_path / "lines", sorted(ours.ids, key=ours.ids.get)))
    assert rows == [lines.encode(text) for text in TEXTS] and lines.special == ours.special
    category = unicodedata.ucd_3_2_0.category
    known = [t for t in TEXTS if "Σ" not in t and "Cn" not in map(category, t)]
    assert len(known) > 1400
    assert_same(ours, lib, known)
    for skip in (True, False):
        assert [ours.decode(row, skip) for row in rows] == lib.decode_batch(rows, skip)
    assert ours.encode("a" * 1_000_000 + " 中" * 20_000)[:2] == [2, 1]       # takes no time

    official = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    words, pieces = official.BasicTokenizer(), official.WordpieceTokenizer(ours.ids, "[UNK]")
    for text, row in zip(TEXTS, rows):
        tokens = pieces.tokenize(" ".join(words.tokenize(text)))
        assert [ours.tokens[i] for i in row[1:-1]] == tokens, ascii(text)


@pytest.mark.parametrize("part, change, message", [
    ("normalizer", dict(lowercase=False), "'lowercase' should be one of True, not False"),
    ("normalizer", dict(strip_accents=False), "'strip_accents' should be"),
    ("pre_tokenizer", dict(type="Whitespace"), "'BertPreTokenizer', not 'Whitespace'"),
    ("model", dict(max_input_chars_per_word=50), "should be one of 100, not 50"),
])
def test_bert_settings_that_give_other_ids_are_refused(part, change, message, bert_json, tmp_path):
    refused(write(tmp_path, bert_json | {part: bert_json[part] | change}), message)
    refused(write_lines(tmp_path / "lines", SPECIAL["bert"][1:]), "'.PAD.' is missing", "vocab.txt")


# ------------------------------------------------------------------------------------ by hand

def unigram(vocab, **other):
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *vocab]
    return dict(model=dict(type="Unigram", unk_id=2, vocab=vocab), pre_tokenizer=METASPACE) | other


@pytest.mark.parametrize("text, vocab, pieces, split", [
    ("xab", [["ab", -1.0], ["b", -6.0], ["xa", -30.0]], ["▁", "xa", "b"], True),
    ("xab", [["ab", -1.0], ["b", -13.0], ["xa", -30.0]], ["▁", "<unk>", "ab"], True),
    ("abc", [["a", -3.0], ["ab", -2.0], ["bc", -3.0], ["c", -4.0]], ["▁", "a", "bc"], True),
    ("a b", [["a", -3.0], ["b", -3.0], ["a▁b", -1.0]], ["▁", "a", "▁", "b"], True),
    ("a b", [["a", -3.0], ["b", -3.0], ["a▁b", -1.0]], ["▁", "a▁b"], False),
], ids=["30 + 6 < 40 + 1", "30 + 13 > 40 + 1", "tie: the first", "split", "unsplit"])
def test_paths_by_hand_and_by_the_library(text, vocab, pieces, split, tmp_path):
    """An unknown character costs the worst piece's score and 10 more."""
    ours, lib = both(tmp_path, unigram([["▁", -1.0], *vocab], version="1.0", added_tokens=[],
                                       pre_tokenizer=METASPACE | dict(split=split)))
    wanted = [ours.ids[piece] for piece in pieces]
    assert ours.encode(text) == [*wanted, 1]
    assert lib.encode(text).ids == wanted


def test_bpe_by_hand(tmp_path):
    """Ranks decide: "bc" was learned first, so "abc" is a + bc, although "ab" is known too."""
    vocab = {t: i for i, t in enumerate([*SPECIAL["bart"], *tokenizer.BYTES, "bc", "ab", "Ġa"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\na b\nĠ a\n", encoding="utf-8")
    tok = load_tokenizer(tmp_path)
    assert tok.encode("abc ab") == [0, vocab["a"], vocab["bc"], vocab["Ġ"], vocab["ab"], 2]
    assert tok.encode("a <mask>") == [0, vocab["a"], 4, 2]
    assert [tokenizer.BYTES[b] for b in (32, 10, 65, 0xAD, 0xFF)] == ["Ġ", "Ċ", "A", "Ń", "ÿ"]
    assert tok.decode([vocab[tokenizer.BYTES[0xC3]], vocab["a"]]) == "\ufffda"


def test_a_word_is_cut_once_and_the_memory_is_bounded(tmp_path, bart_json, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE", 5)
    ours, lib = both(tmp_path, bart_json)
    assert_same(ours, lib, TEXTS[:300])
    assert ours.segment.cache_info().currsize == 5
    cut = ours.segment.cache_info().misses
    ours.encode("a a" + " a" * 50)
    assert ours.segment.cache_info().misses <= cut + 2


# -------------------------------------------------------------------------------------- errors

def refused(folder, message, file="tokenizer.json"):
    with pytest.raises(BadInput, match=rf"{file}.*: .*{message}"):
        load_tokenizer(folder)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in (b"{", b"[1]", b"{}", b"", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refused(tmp_path, "")


@pytest.mark.parametrize("change, message", [
    (dict(model=dict(type="WordLevel")), "'type' should be one of 'BPE', .*, not 'WordLevel'"),
    (dict(normalizer=dict(type="Nmt")), "'type' should be one of .*, not 'Nmt'"),
    (dict(normalizer=dict(type="Replace", pattern=dict(Regex="("), content="")), "'Regex' should"),
    (precompiled("AAAA"), "precompiled_charsmap is cut short"), (precompiled("?"), "base64"),
    (dict(pre_tokenizer=dict(type="Whitespace")), "'Metaspace', not 'Whitespace'"),
    (dict(pre_tokenizer=METASPACE | dict(prepend_scheme="first")), "'prepend_scheme' .* 'first'"),
    (dict(post_processor=dict(single=[{}])), ""), (dict(pre_tokenizer=None), "None"),
    (dict(decoder=dict(type="BPE")), "'type' should be one of 'Metaspace'"),
    (dict(post_processor=dict(type="RobertaProcessing", cls=["<s>", 0], sep=["</s>", 1])),
     r"\['<s>', 'A', '</s>'\] should be \['A', '</s>'\]"),
    (dict(added_tokens=[added(9, "x", single_word=True)]), "'single_word' .* not True"),
    (dict(added_tokens=[added("7", "x")]), "'id' should be a whole number, not '7'"),
    (dict(added_tokens=[added(-7, "xyz")]), "no whole number >= 0"),
    (dict(added_tokens=[added(9999, "x")]), "'x' has two ids"),
    (dict(model=dict(type="Unigram")), "'unk_id' is missing"), (unigram([["a"]]), "not enough"),
    (unigram([["a", "much"]]), r"vocab\[3\] = \['a', 'much'\] is not a piece"),
    (unigram([["a", float("nan")]]), r"vocab\[3\] = \['a', nan\] is not a piece"),
    (dict(added_tokens=[], model=dict(unk_id=0, vocab=[["<pad>", 0.0]])), "'<unk>' is missing"),
    (dict(model=dict(type="Unigram", unk_id=900, vocab=[["<pad>", 0.0]])), ""),
])
def test_unknown_settings_and_malformed_files_are_refused(change, message, tmp_path, t5_json):
    refused(write(tmp_path, t5_json | dict(normalizer=None) | change), message)


def test_malformed_bart_files_are_named(tmp_path):
    for lacks, merges, message in [
            ("", "a b\n", r"merge 0 \('a b'\) is not of two tokens"), ("", "a b c\n", "merge 0"),
            ("", " a\n", "merge 0"), ("Ġ", "", "the bytes Ġ have no"), ("<mask>", "", "<mask>")]:
        vocab = bpe_json([])["model"]["vocab"]
        vocab.pop(lacks, None)
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
        refused(tmp_path, message, "vocab.json")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<mask>": 4, "a": True}))
    refused(tmp_path, "no whole number >= 0", "vocab.json")
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    refused(tmp_path, "", "merges.txt")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        load_tokenizer(tmp_path)


def test_a_damaged_charsmap_is_refused_or_harmless(t5_json):
    """A flipped bit may give other text, but never an error while training."""
    whole = base64.b64decode(t5_json["normalizer"]["precompiled_charsmap"])
    rnd, read = random.Random(4), []
    for _ in range(40):
        blob = bytearray(whole)
        blob[rnd.randrange(len(blob))] ^= 1 << rnd.randrange(8)
        with suppress(*WRONG):
            read.append(Charsmap(bytes(blob)))
    assert 0 < len(read) < 40
    assert all(normalize(text) is not None for normalize in read for text in TEXTS[:200])
    # A value that leads nowhere is found at once, not when a text meets it.
    at = next(at for at in range(4, len(whole), 4) if whole[at + 3] & 0x80)
    with pytest.raises(AssertionError, match="damaged"):
        Charsmap(whole[:at] + b"\xf0\xff\xff\xff" + whole[at + 4:])
