"""How does text become ids?

Text is cut into words, a word into pieces, and the pieces are looked up in a vocabulary. A word
seen before costs one look-up: that is the speed. The ids are those of the `tokenizers` library;
only characters newer than this Python's Unicode tables can be split elsewhere.

    T5     unigram (Kudo 2018, arXiv 1804.10959): of all ways to cut a word, the likeliest. Text is
           normalised first (normalize.py), and a space is a visible "\u2581" of the word behind it
    BART   byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019): a word's
           bytes, merged in the order that was learned. No text is unknown
    BERT   WordPiece (Wu et al. 2016, arXiv 1609.08144), uncased: from the left the longest piece
           that fits; "##" begins a piece inside a word. The ids are BertTokenizer's

    tokenizer = load_tokenizer("weights/tiny-bart")
    tokenizer.decode(tokenizer.encode("How many cats?"))

    python -m pytest tests/test_tokenizer.py
"""
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path

from support.gate import Number, check, fits, read_json, read_text, reading
from support.normalize import WHITE, Shadow, cut, normalizer

SPACE = "\u2581"                     # how T5's pieces write a space
UNKNOWN_PENALTY = 10.0               # an unknown character scores this much below the worst piece
LONGEST = 100                        # characters of a word; to BERT a longer one is unknown
CACHE = 1 << 17                      # words whose ids are remembered


# -------------------------------------------------------------------------------- what all share

class Added:
    """Finds tokens that stand in the text as they are, like <mask>: the leftmost, the longest."""

    def __init__(self, tokens: dict[str, dict]):
        self.tokens = tokens
        # `re` takes the first alternative that fits, so the longest stands first.
        longest_first = sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first) or "(?!)")      # (?!) is found nowhere

    def split(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """(text in front of it, [its id]) for every token found, then (the rest, [])."""
        start = 0
        for found in self.pattern.finditer(text):
            token = self.tokens[found[0]]
            front = text[start:found.start()]
            if token.get("lstrip"):                    # swallows the white space in front of it
                front = front.rstrip(WHITE)
            yield front, [token["id"]]
            start = found.end()
            if token.get("rstrip"):                    # and behind it
                start = len(text) - len(text[start:].lstrip(WHITE))
        yield text[start:], []


class Tokenizer:
    """Added tokens, the tokens around a text, truncation, padding, the memory for words.

    A kind says how text is cut into `words`, a word into ids (`segment`), and how tokens become
    text again (`join`).
    """

    FRAME: list[str]                     # special tokens around a text, which is called A
    PAD, UNKNOWN = "<pad>", "<unk>"

    def __init__(self, spec: dict, vocab: dict[str, int]):
        self.normalize = normalizer(spec.get("normalizer"))
        self.ids = dict(vocab)                         # token -> id
        self.special = set()                           # left out when ids become text
        # Added tokens are found in the text as typed, or ("normalized") in the normalised text.
        typed, late = {}, {}
        for token in spec.get("added_tokens") or []:
            text, _, _ = check(token, {"content": str, "id": int, "single_word?": {False}})
            known = self.ids.setdefault(text, token["id"])
            assert known == token["id"], f"the token {text!r} has two ids"
            if token.get("special"):
                self.special.add(text)
            if token.get("normalized"):
                late[self.normalize(text)] = token
            else:
                typed[text] = token
        self.typed, self.late = Added(typed), Added(late)
        self.tokens = {i: text for text, i in self.ids.items()}       # id -> token
        self.tokens |= {token["id"]: text for text, token in late.items()}
        assert fits([*self.ids.values()], [Number(0, 2**24, whole=True)]), \
            "an id is no whole number >= 0"
        self.pad_id, self.unk_id = self.ids[self.PAD], self.ids[self.UNKNOWN]
        self.bos_id = None if self.FRAME[0] == "A" else self.ids[self.FRAME[0]]
        self.eos_id = self.ids[self.FRAME[-1]]
        self.segment = lru_cache(CACHE)(self.segment)

        # What the file says stands around a text must be what encode puts there.
        post = spec.get("post_processor") or {}
        frame = [list(item.values())[0]["id"] for item in post.get("single", ())]
        if "cls" in post:
            frame = [post["cls"][0], "A", post["sep"][0]]
        assert frame == self.FRAME or not post, f"post_processor: {frame} should be {self.FRAME}"

    def __len__(self) -> int:
        """Rows that an embedding needs: the highest id + 1."""
        return max(self.tokens) + 1

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of a text with its special tokens. max_length counts those and never cuts them."""
        text.encode()                                  # refuses half an emoji, as the library does
        ids: list[int] = []
        # Added tokens are cut out first, so that nothing normalises or splits them.
        for typed, typed_ids in self.typed.split(text):
            for part, late_ids in self.late.split(self.normalize(typed)):
                for word in self.words(part):
                    ids += self.segment(word)
                ids += late_ids
            ids += typed_ids
        if max_length is not None:
            room = max_length - (len(self.FRAME) - 1)
            assert room >= 0, f"max_length = {max_length} has no room for the special tokens"
            ids = ids[:room]
        front = [] if self.bos_id is None else [self.bos_id]
        return front + ids + [self.eos_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids (a list or a one-dimensional tensor)."""
        skipped = self.special if skip_special else ()
        tokens = [self.tokens[i] for i in map(int, ids)]
        return self.join([token for token in tokens if token not in skipped])


# --------------------------------------------------------------------------------- T5: unigram

NOT_WHITE = re.compile(f"[^{WHITE}]+")
SPACED = re.compile(f"{SPACE}[^{SPACE}]*")
WHOLE = re.compile(".+", re.DOTALL)


class Unigram(Tokenizer):
    """T5's: normalised text -> words that begin with a visible space -> their likeliest cut."""

    FRAME = ["A", "</s>"]

    def __init__(self, spec: dict):
        model = spec["model"]
        check(model, {"byte_fallback?": {False}, "unk_id": Number(0, whole=True)})
        self.scores: dict[str, float] = {}             # piece -> log-probability
        self.piece_ids: dict[str, int] = {}
        for i, (piece, score) in enumerate(model["vocab"]):
            assert fits(piece, str) and fits(score, Number()), \
                f"vocab[{i}] = {[piece, score]} is not a piece and its log-probability"
            self.scores[piece], self.piece_ids[piece] = score, i
        super().__init__(spec, self.piece_ids)
        self.unk_id = self.ids[model["vocab"][model["unk_id"]][0]]
        self.unknown = min(self.scores.values()) - UNKNOWN_PENALTY    # of a character unheard of
        self.longest = max(map(len, self.scores))      # Viterbi need not look further

        # The last step makes spaces visible; those before it end words at any white space.
        first = spec["pre_tokenizer"]
        *before, metaspace = first.get("pretokenizers", [first])
        for step in before:
            check(step, {"type": {"WhitespaceSplit"}})
        for record in (metaspace, spec.get("decoder") or metaspace):
            check(record, {"type": {"Metaspace"}, "replacement?": {SPACE},
                           "prepend_scheme?": {"always"}, "add_prefix_space?": {True}})
        self.chunk = NOT_WHITE if before else WHOLE
        self.word = SPACED if metaspace.get("split", True) else WHOLE   # or a piece holds spaces

    def words(self, text: str) -> list[str]:
        """"a big  cat" -> "_a", "_big", "_cat", with SPACE for "_"."""
        words: list[str] = []
        for chunk in self.chunk.findall(text):
            # A chunk begins with a space: one is put there unless it is there already.
            words += self.word.findall(SPACE + chunk.replace(" ", SPACE).removeprefix(SPACE))
        return words

    def segment(self, word: str) -> list[int]:
        """Viterbi: best[e] = max over s of best[s] + score(word[s:e]); the first of equals wins.

        best[e] belongs to the best cut of the first e characters; came_from[e] is where the last
        piece of that cut starts.
        """
        best = [0.0] + [-float("inf")] * len(word)
        came_from = [-1] * (len(word) + 1)
        for s in range(len(word)):                     # best[s] is final: pieces go forward only
            for e in range(s + 1, min(s + self.longest, len(word)) + 1):
                score = self.scores.get(word[s:e])
                if score is None and e == s + 1:
                    score = self.unknown               # a single character can always be read
                if score is not None and best[s] + score > best[e]:
                    best[e] = best[s] + score
                    came_from[e] = s
        # Back from the end of the word, along the pieces of the best cut.
        ids: list[int] = []
        e = len(word)
        while e > 0:
            piece = self.piece_ids.get(word[came_from[e]:e], self.unk_id)
            if piece != self.unk_id or ids[-1:] != [piece]:         # a run of unknowns is one
                ids.append(piece)
            e = came_from[e]
        return ids[::-1]

    def join(self, tokens: list[str]) -> str:
        """Visible spaces become spaces, those of the first token nothing."""
        text = "".join(tokens[1:]).replace(SPACE, " ")
        return "".join(tokens[:1]).replace(SPACE, "") + text


# ----------------------------------------------------------------------------------- BART: BPE

def byte_chars() -> list[str]:
    """GPT-2's visible characters for the 256 bytes: Latin-1's, or from U+0100 on if it has none."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


BYTES = byte_chars()
BYTE_OF = {char: byte for byte, char in enumerate(BYTES)}


def word_letter(char: str) -> str:
    """L: letter, N: number, tab: white space, .: other; space, ' and contractions' letters stay."""
    if char in "'strevmld ":
        return char
    if char in WHITE:
        return "\t"
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "."


# GPT-2's words, on the shadow: contractions | letters | numbers | other signs, each with the one
# space in front of it | white space, whose last one belongs to the word behind it.
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[Lstrevmld]+| ?N+| ?[.']+|\s+(?!\S)|\s+")
WORD_SHADOW = Shadow(word_letter)


class BPE(Tokenizer):
    """BART's: text -> words with the space in front of them -> bytes -> merged bytes."""

    FRAME = ["<s>", "A", "</s>"]

    def __init__(self, spec: dict):
        model = spec["model"]
        check(model, {"dropout?": Number(0, 0), "continuing_subword_prefix?": {""},
                      "end_of_word_suffix?": {""}, "byte_fallback?": {False},
                      "ignore_merges?": {False}, "vocab": dict})
        check(spec["pre_tokenizer"], {"type": {"ByteLevel"}, "use_regex?": {True},
                                      "add_prefix_space?": {False}})
        check(spec.get("decoder") or {}, {"type?": {"ByteLevel"}})
        self.vocab = model["vocab"]
        super().__init__(spec, self.vocab)
        missing = [char for char in BYTES if char not in self.vocab]
        assert not missing, f"the bytes {' '.join(missing[:8])} have no token (all 256 need one)"
        self.ranks: dict[tuple[str, str], int] = {}    # two neighbours -> when they were learned
        for rank, merge in enumerate(model["merges"]):
            pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
            assert len(pair) == 2 and all(pair) and {*pair, "".join(pair)} <= self.vocab.keys(), \
                f"merge {rank} ({merge!r}) is not of two tokens that give a third"
            self.ranks[pair] = rank                    # of a repeated line the last rank counts

    def words(self, text: str) -> list[str]:
        return cut(text, WORD_SHADOW, WORD)

    def segment(self, word: str) -> list[int]:
        """Merges the neighbours of lowest rank, the leftmost first, until no pair is known.

        The parts stand in a ring, so that a merge moves nothing, and the known pairs wait in a
        heap: n log n for n bytes. An empty part, which no pair holds, closes the ring.
        """
        parts = [BYTES[byte] for byte in word.encode()] + [""]
        count = len(parts)
        before = [(i - 1) % count for i in range(count)]      # places of the neighbours
        behind = [(i + 1) % count for i in range(count)]
        pairs = enumerate(zip(parts, parts[1:]))
        heap = [(self.ranks[pair], left) for left, pair in pairs if pair in self.ranks]
        heapify(heap)
        while heap:
            rank, left = heappop(heap)
            right = behind[left]
            if self.ranks.get((parts[left], parts[right])) != rank:
                continue                               # one of the two has been merged meanwhile
            parts[left] += parts[right]                # "l", "o" -> "lo"
            parts[right] = ""                          # leaves the ring
            behind[left] = behind[right]
            before[behind[left]] = left
            for new in (before[left], left):           # the pairs that the merged part is in
                rank = self.ranks.get((parts[new], parts[behind[new]]))
                if rank is not None:
                    heappush(heap, (rank, new))
        return [self.vocab[part] for part in parts if part]

    def join(self, tokens: list[str]) -> str:
        """A token with a character outside the table (an added one) is text, the others bytes."""
        content = b""
        for token in tokens:
            # Bytes first, text at the end: one letter's bytes may lie in two tokens.
            if BYTE_OF.keys() >= set(token):
                content += bytes(BYTE_OF[char] for char in token)
            else:
                content += token.encode()
        return content.decode("utf-8", "replace")


# ----------------------------------------------------------------------------- BERT: WordPiece

CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                     "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


def clean_char(char: str) -> str:
    """Control characters vanish, a Chinese character becomes a word."""
    if char == "\ufffd" or unicodedata.category(char)[0] == "C" and char not in "\t\n\r":
        return ""
    return f" {char} " if CHINESE.match(char) else char


def bare_char(char: str) -> str:
    """Accents vanish, a punctuation sign becomes a word."""
    category = unicodedata.category(char)
    if category == "Mn":
        return ""
    return f" {char} " if char in string.punctuation or category[0] == "P" else char


CLEAN, BARE = Shadow(clean_char), Shadow(bare_char)


class WordPiece(Tokenizer):
    """BERT's, uncased: text -> words in lower case, without accents -> their longest pieces."""

    FRAME = ["[CLS]", "A", "[SEP]"]
    PAD, UNKNOWN = "[PAD]", "[UNK]"

    def __init__(self, spec: dict):
        model = spec["model"]
        check(model, {"unk_token?": {"[UNK]"}, "continuing_subword_prefix?": {"##"},
                      "max_input_chars_per_word?": {LONGEST}, "vocab": dict})
        check(spec["normalizer"], {"type": {"BertNormalizer"}, "clean_text?": {True},
                                   "handle_chinese_chars?": {True}, "strip_accents?": {True},
                                   "lowercase": {True}})
        check(spec["pre_tokenizer"], {"type": {"BertPreTokenizer"}})
        check(spec.get("decoder") or {}, {"type?": {"WordPiece"}, "prefix?": {"##"}})
        for token in spec["added_tokens"]:
            check(token, {"special": {True}})
        super().__init__(spec | {"normalizer": None}, model["vocab"])
        self.typed = self.late = Added({})             # special tokens are found in `words`

    def words(self, text: str) -> list[str]:
        """"Don't [SEP]" -> "don", "'", "t", "[SEP]"."""
        words: list[str] = []
        for word in text.translate(CLEAN).split():
            # Trap: a special token counts as a word of its own only, not in "cat[SEP]".
            if word not in self.special:
                word = unicodedata.normalize("NFD", word.lower()).translate(BARE)
            words += word.split()
        return words

    def segment(self, word: str) -> list[int]:
        """The longest piece that the word begins with, and on from its end; or one unknown."""
        ids, start = [], 0
        while start < len(word) <= LONGEST:
            glue = "##" if start else ""
            end = len(word)
            while end > start and glue + word[start:end] not in self.ids:
                end -= 1
            if end == start:                           # no piece fits
                return [self.unk_id]
            ids.append(self.ids[glue + word[start:end]])
            start = end
        return ids or [self.unk_id]

    def join(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "")


# ------------------------------------------------------------------------------------- reading

def from_merges(vocab: dict[str, int], merges: str) -> dict:
    """What a tokenizer.json would say, from the two files that BART was first published as."""
    # merges.txt begins with "#version: 0.2"; line by line two tokens, the first learned first.
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    added = [dict(content=token, id=vocab[token], special=True, lstrip=token == "<mask>")
             for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    return dict(model=dict(type="BPE", vocab=vocab, merges=lines), added_tokens=added,
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False))


def from_lines(lines: str) -> dict:
    """The same from BERT's vocab.txt: a token a line, whose number is its id."""
    vocab = {token: i for i, token in enumerate(lines.removesuffix("\n").split("\n"))}
    added = [dict(content=token, id=vocab[token], special=True)
             for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    return dict(model=dict(type="WordPiece", vocab=vocab), added_tokens=added,
                normalizer=dict(type="BertNormalizer", lowercase=True),
                pre_tokenizer=dict(type="BertPreTokenizer"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokeniser of a folder: tokenizer.json, or else vocab.json with merges.txt (BART), or
    vocab.txt (taken as an uncased BERT's).

    BadInput says what in a file is wrong, or which setting would give other ids.
    """
    files = [Path(folder) / name for name in ("tokenizer.json", "vocab.json", "vocab.txt")]
    path = next(filter(Path.is_file, files), files[0])
    with reading(f"{path} is damaged or no tokeniser of T5, BART or uncased BERT"):
        if path.name == "vocab.txt":
            return WordPiece(from_lines(read_text(path)))
        spec = read_json(path)
        if path.name == "vocab.json":
            spec = from_merges(spec, read_text(path.with_name("merges.txt")))
        model = spec["model"]
        (kind,) = check(model, {"type?": {"Unigram", "BPE", "WordPiece"}})
        if kind == "BPE" or "merges" in model:         # old files do not name their kind
            return BPE(spec)
        if kind == "WordPiece" or "continuing_subword_prefix" in model:
            return WordPiece(spec)
        return Unigram(spec)
