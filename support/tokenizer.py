"""How does text become ids?

Both tokenisers cut text into words, words into pieces, and look the pieces up in a vocabulary.

    T5     unigram (Kudo 2018, arXiv 1804.10959): every piece has a log-probability, and a word is
           cut into the pieces whose sum is highest (Viterbi). Text is normalised first (NFKC and
           more), a space becomes a visible "\u2581" at the start of its word: pieces, </s>
    BART   byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019): a word
           starts as its UTF-8 bytes, and the best ranked neighbours are merged until no known
           pair is left. Nothing is normalised and nothing is ever unknown: <s>, pieces, </s>

Both cut every word on its own, so a word seen before costs one look-up: that is the speed. The
ids are those of the `tokenizers` library; only characters newer than this Python's Unicode tables
can be split elsewhere.

    tok = tokenizer.load("weights/tiny-bart")
    tok.encode("How many cats?"), tok.decode(ids), tok.batch(["one text", "another"])

    python -m pytest tests/test_tokenizer.py
"""
import base64
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

# B texts, L ids of the longest.

# Unicode's White_Space. Python's str.isspace and \s also take the separators U+001C to U+001F.
WHITE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
         "\u200a\u2028\u2029\u202f\u205f\u3000")
SPACE = "\u2581"                     # how T5's pieces write a space
UNKNOWN_PENALTY = 10.0               # an unknown character scores this much below the worst piece
CACHE = 1 << 17                      # words remembered before the memory is emptied
REMEDY = "use the files of a published T5 or BART, or export the folder again"


def only(record: dict, allowed: dict) -> None:
    """Refuses settings that would change the ids in a way that this file does not know."""
    for name, values in allowed.items():
        if record.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {record[name]!r} is not supported, only "
                             + " or ".join(map(repr, values)))


class Shadow(dict):
    """A table for str.translate that puts a class letter in the place of every character.

    A plain regular expression over the shadow of a text then cuts by Unicode properties, which
    Python's `re` cannot name. The letter of a character is worked out when it is first met."""

    def __init__(self, letter: Callable[[str], str]):
        self.letter = letter

    def __missing__(self, code: int) -> str:
        self[code] = self.letter(chr(code))
        return self[code]


def cut(text: str, shadow: Shadow, pattern: re.Pattern) -> list[str]:
    return [text[m.start():m.end()] for m in pattern.finditer(text.translate(shadow))]


# ------------------------------------------------------------------------ T5: normalisation

# Grapheme clusters (Unicode annex 29), as far as they can be shorter than six bytes: Hangul
# syllables, flags, emoji joined by ZWJ and Indic conjuncts are longer, so need no rule here.
JOINS = "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
STANDS = re.compile("[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f"
                    "\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d\U00011720\U00011721]")
LEADS = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd"
                   "\U000111c2\U000111c3\U000113d1\U0001193f\U00011941"
                   "\U00011a84-\U00011a89\U00011d46\U00011f02]")


def cluster_letter(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\r\n":
        return "r" if char == "\r" else "n"
    if char in JOINS or 0xE0020 <= ord(char) <= 0xE007F:
        return "m"                                          # joins what stands before it
    if category[0] == "M":
        return "o" if STANDS.match(char) else "m"
    if LEADS.match(char):
        return "p"                                          # joins what comes behind it
    return "c" if category in ("Cc", "Cf", "Cs", "Zl", "Zp") else "o"


CLUSTER = re.compile("rn|p*om*|p+m*|m+|.")
CLUSTER_SHADOW = Shadow(cluster_letter)


class Charsmap:
    """SentencePiece's compiled replacement table (T5's is called nmt_nfkc).

    blob: u32 size of the trie in bytes | the trie, u32 a unit | replacements, each ended by 0.
    The trie is a double array: from a unit, byte c leads to unit `position ^ c`, if that one's
    label is c. The bits of a unit: 0-7 label, 8 has a value, 9 wide offset, 10-30 offset; a
    value's unit has bit 31 set and in the other bits the place of the replacement."""

    def __init__(self, blob: bytes):
        size = int.from_bytes(blob[:4], "little")
        if size == 0 or size % 4 or 4 + size >= len(blob):
            raise ValueError("precompiled_charsmap is cut short")
        self.units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.replacements = blob[4 + size:]
        self.ascii = {code: new for code in range(128)
                      if (new := self.look_up(chr(code))) is not None}

    def look_up(self, text: str) -> str | None:
        """The replacement of the *shortest* beginning of text in the trie. None: there is none."""
        at = self.offset(self.units[0])
        for byte in text.encode():
            at ^= byte
            if byte == 0 or at >= len(self.units) or self.units[at] & 0x800000FF != byte:
                return None
            has_value = self.units[at] & 0x100
            at ^= self.offset(self.units[at])
            if has_value:
                start = self.units[at] & 0x7FFFFFFF
                return self.replacements[start:self.replacements.index(0, start)].decode()
        return None

    @staticmethod
    def offset(unit: int) -> int:
        return unit >> 10 << ((unit & 0x200) >> 6)          # wide: 8 bits more

    def __call__(self, text: str) -> str:
        if text.isascii() and "\r" not in text:             # every cluster is one character
            return text.translate(self.ascii)
        out = []
        for cluster in cut(text, CLUSTER_SHADOW, CLUSTER):
            # Short clusters are looked up whole. Trap: the shortest beginning wins, so a mark
            # behind a replaced character is lost. The `tokenizers` library does so: it stays.
            if len(cluster.encode()) < 6 and (new := self.look_up(cluster)) is not None:
                out.append(new)
            else:
                out += [c if (new := self.look_up(c)) is None else new for c in cluster]
        return "".join(out)


def normalizer(spec: dict | None) -> Callable[[str], str]:
    """The function that a `normalizer` record of a tokenizer.json describes."""
    kind = spec and spec["type"]
    if kind is None or kind == "Precompiled" and not spec["precompiled_charsmap"]:
        return str                                          # text as it is
    if kind == "Precompiled":
        return Charsmap(base64.b64decode(spec["precompiled_charsmap"], validate=True))
    if kind == "Sequence":
        steps = [normalizer(step) for step in spec["normalizers"]]
        return lambda text: reduce(lambda text, step: step(text), steps, text)
    if kind == "Replace":
        (how, pattern), content = *spec["pattern"].items(), spec["content"]
        find = re.compile(pattern if how == "Regex" else re.escape(pattern))
        return lambda text: find.sub(lambda _: content, text)
    if kind == "Strip":
        left, right = (WHITE if spec[side] else "" for side in ("strip_left", "strip_right"))
        return lambda text: text.lstrip(left).rstrip(right)
    if kind == "Lowercase":
        return lambda text: "".join(map(str.lower, text))   # one by one: no final sigma
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: unicodedata.normalize(kind, text)
    raise ValueError(f"normalizer {kind!r} is not supported")


# -------------------------------------------------------------------------------- tokenisers

class Added:
    """Finds tokens that stand in the text as they are, like <mask>: the leftmost, the longest."""

    def __init__(self, tokens: dict[str, dict]):
        self.tokens = tokens
        longest_first = sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first) or "(?!)")      # (?!) is found nowhere

    def split(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """(text in front of it, [its id]) for every token found, then (the rest, [])."""
        start = 0
        for found in self.pattern.finditer(text):
            token = self.tokens[found[0]]
            front = text[start:found.start()]
            yield front.rstrip(WHITE) if token.get("lstrip") else front, [token["id"]]
            start = found.end()
            while token.get("rstrip") and text[start:start + 1] in set(WHITE):
                start += 1
        yield text[start:], []


class Tokenizer:
    """What both share: added tokens, the tokens around a text, truncation, padding, the cache."""

    FRAME: list[str]                     # special tokens around a text, which is called A

    def __init__(self, spec: dict, vocab: dict[str, int]):
        self.normalize = normalizer(spec.get("normalizer"))
        added = {token["content"]: token for token in spec.get("added_tokens") or []}
        for token in added.values():
            only(token, {"single_word": (False,)})
        self.ids = vocab | {text: token["id"] for text, token in added.items()}
        self.special = {text for text, token in added.items() if token.get("special")}
        # Added tokens are found in the text as typed, or ("normalized") in the normalised text.
        self.typed = Added({text: t for text, t in added.items() if not t.get("normalized")})
        self.late = Added({self.normalize(text): t for text, t in added.items()
                           if t.get("normalized")})
        self.tokens = {i: text for text, i in self.ids.items()}
        self.tokens |= {t["id"]: text for text, t in self.late.tokens.items()}
        self.cache: dict[str, list[int]] = {}               # word -> ids
        missing = {*self.FRAME, "<pad>", "<unk>"} - {"A"} - self.ids.keys()
        if missing:
            raise ValueError(f"the vocabulary lacks {' '.join(sorted(missing))}")
        if not all(isinstance(i, int) and i >= 0 for i in self.tokens):
            raise ValueError("an id of the vocabulary is not a whole number from 0 on")
        self.pad_id, self.eos_id, self.unk_id = (self.ids[t] for t in ("<pad>", "</s>", "<unk>"))
        self.bos_id = self.ids["<s>"] if "<s>" in self.FRAME else None

        post = spec.get("post_processor") or {}
        only(post, {"type": (None, "RobertaProcessing", "TemplateProcessing")})
        names = ([post["cls"][0], "A", post["sep"][0]] if "cls" in post else
                 [entry["id"] for item in post.get("single", ()) for entry in item.values()])
        if post and names != self.FRAME:
            raise ValueError(f"post_processor gives {names} instead of {self.FRAME}")

    def __len__(self) -> int:
        """Rows that an embedding needs: the highest id + 1."""
        return max(self.tokens) + 1

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of a text with its special tokens. max_length counts those and never cuts them."""
        ids: list[int] = []
        for typed, typed_ids in self.typed.split(text):
            for part, late_ids in self.late.split(self.normalize(typed)):
                for word in self.words(part):
                    if word not in self.cache:
                        if len(self.cache) >= CACHE:
                            self.cache.clear()
                        self.cache[word] = self.segment(word)
                    ids += self.cache[word]
                ids += late_ids
            ids += typed_ids
        if max_length is not None:
            if max_length < len(self.FRAME) - 1:
                raise ValueError(f"max_length = {max_length} has no room for the special tokens: "
                                 f"give at least {len(self.FRAME) - 1}")
            ids = ids[:max_length - len(self.FRAME) + 1]
        return ([] if self.bos_id is None else [self.bos_id]) + ids + [self.eos_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids (a list or a one-dimensional tensor). ValueError names an unknown id."""
        tokens = []
        for i in map(int, ids):
            if i not in self.tokens:
                raise ValueError(f"id {i} is not in the vocabulary of {len(self)} ids: decode only "
                                 "ids that this tokenizer made or a model of its size predicts")
            tokens.append(self.tokens[i])
        return self.join([t for t in tokens if not (skip_special and t in self.special)])

    def batch(self, texts: list[str], max_length: int | None = None) -> Tensor:
        """Ids of texts, padded on the right with pad_id: (B, L), int64."""
        rows = [self.encode(text, max_length) for text in texts]
        longest = max(map(len, rows), default=0)
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).view(len(rows), longest)    # B, L


NOT_WHITE = re.compile(f"[^{WHITE}]+")
SPACED = re.compile(f"{SPACE}[^{SPACE}]*")


class Unigram(Tokenizer):
    """T5's: normalised text -> words that begin with a visible space -> their likeliest cut."""

    FRAME = ["A", "</s>"]

    def __init__(self, spec: dict):
        model = spec["model"]
        only(model, {"byte_fallback": (False, None)})
        for i, entry in enumerate(model["vocab"]):
            if [type(x) for x in entry] not in ([str, float], [str, int]):
                raise ValueError(f"vocab[{i}] = {entry!r} is not a [piece, log-probability] pair")
        self.scores = dict(map(tuple, model["vocab"]))
        self.piece_ids = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
        super().__init__(spec, self.piece_ids)
        self.unk_id = self.ids[model["vocab"][model["unk_id"]][0]]
        self.unknown = min(self.scores.values()) - UNKNOWN_PENALTY
        self.longest = max(map(len, self.scores))

        first = spec["pre_tokenizer"]
        steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
        kinds = [step["type"] for step in steps]
        if kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
            raise ValueError(f"pre_tokenizer {' '.join(kinds)} is not supported, only Metaspace")
        for record in (steps[-1], spec.get("decoder") or {}):
            only(record, {"type": ("Metaspace",), "replacement": (SPACE,),
                          "prepend_scheme": ("always",), "add_prefix_space": (True,)})
        self.white_splits = len(kinds) == 2
        self.splits = steps[-1].get("split", True)

    def words(self, text: str) -> list[str]:
        chunks = NOT_WHITE.findall(text) if self.white_splits else [text] if text else []
        chunks = [chunk.replace(" ", SPACE) for chunk in chunks]
        chunks = [chunk if chunk[0] == SPACE else SPACE + chunk for chunk in chunks]
        return SPACED.findall("".join(chunks)) if self.splits else chunks

    def segment(self, word: str) -> list[int]:
        """Viterbi: best[e] = max over s of best[s] + score(word[s:e]); the first of equals wins."""
        best, came_from = [0.0] + [-float("inf")] * len(word), [-1] * (len(word) + 1)
        for s in range(len(word)):
            for e in range(s + 1, min(s + self.longest, len(word)) + 1):
                score = self.scores.get(word[s:e], self.unknown if e == s + 1 else None)
                if score is not None and best[s] + score > best[e]:
                    best[e], came_from[e] = best[s] + score, s
        ids, e = [], len(word)
        while e > 0:
            found = self.piece_ids.get(word[came_from[e]:e], self.unk_id)
            if found != self.unk_id or ids[-1:] != [found]:     # a run of unknowns is one
                ids.append(found)
            e = came_from[e]
        return ids[::-1]

    def join(self, tokens: list[str]) -> str:
        return "".join(t.replace(SPACE, " " if i else "") for i, t in enumerate(tokens))


def byte_chars() -> list[str]:
    """A visible character for each of the 256 bytes (GPT-2's table).

    Bytes that are printable in Latin-1 stay; the others get the characters from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def word_letter(char: str) -> str:
    """L letter, N number, white space; the letters of contractions and the apostrophe stay."""
    if char in "'strevmld ":
        return char
    category = unicodedata.category(char)[0]
    return "\t" if char in WHITE else category if category in "LN" else "."


BYTES = byte_chars()
BYTE_OF = {char: byte for byte, char in enumerate(BYTES)}
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[Lstrevmld]+| ?N+| ?[.']+|\s+(?!\S)|\s+")
WORD_SHADOW = Shadow(word_letter)


class BPE(Tokenizer):
    """BART's: text -> words with the space in front of them -> bytes -> merged bytes."""

    FRAME = ["<s>", "A", "</s>"]

    def __init__(self, spec: dict):
        model = spec["model"]
        only(model, {"dropout": (None, 0), "continuing_subword_prefix": ("", None),
                     "end_of_word_suffix": ("", None), "byte_fallback": (False, None),
                     "ignore_merges": (False, None)})
        only(spec["pre_tokenizer"], {"type": ("ByteLevel",), "use_regex": (True,),
                                     "add_prefix_space": (False,)})
        only(spec.get("decoder") or {}, {"type": ("ByteLevel",)})
        self.vocab = model["vocab"]
        super().__init__(spec, self.vocab)
        missing = [f"{byte:#04x}" for byte, char in enumerate(BYTES) if char not in self.vocab]
        if missing:
            raise ValueError(f"the bytes {' '.join(missing[:8])} have no token (all 256 need one)")
        self.ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(model["merges"]):
            pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
            if len(pair) != 2 or not {*pair, "".join(pair)} <= self.vocab.keys():
                raise ValueError(f"merge {rank} ({merge!r}) is not of two tokens that give a third")
            self.ranks[pair] = rank

    def words(self, text: str) -> list[str]:
        return cut(text, WORD_SHADOW, WORD)

    def segment(self, word: str) -> list[int]:
        """Merges the neighbours of lowest rank, the leftmost first, until no pair is known."""
        parts = [BYTES[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, len(self.ranks)), i)
                          for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == len(self.ranks):
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.vocab[part] for part in parts]

    def join(self, tokens: list[str]) -> str:
        """A token with a character outside the table (an added one) is text, the others bytes."""
        return b"".join(bytes(BYTE_OF[c] for c in t) if BYTE_OF.keys() >= set(t) else t.encode()
                        for t in tokens).decode("utf-8", "replace")


def from_merges(vocab: dict[str, int], merges: str) -> dict:
    """What a tokenizer.json would say, from the two files that BART was first published as."""
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    added = [dict(content=token, id=vocab[token], special=True, lstrip=token == "<mask>")
             for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    return dict(model=dict(type="BPE", vocab=vocab, merges=lines), added_tokens=added,
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False))


def load(folder: str | Path) -> Tokenizer:
    """The tokeniser of a folder: tokenizer.json, or else vocab.json with merges.txt (BART).

    FileNotFoundError if there are none; ValueError says what in a file is wrong or unknown."""
    folder = Path(folder)
    file, merges = folder / "tokenizer.json", folder / "merges.txt"
    if not file.is_file():
        file = folder / "vocab.json"
        if not (file.is_file() and merges.is_file()):
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json with "
                                    f"merges.txt: {REMEDY}")
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "vocab.json":
            spec = from_merges(spec, merges.read_text(encoding="utf-8"))
        only(spec["model"], {"type": ("Unigram", "BPE")})
        return (BPE if spec["model"]["type"] == "BPE" else Unigram)(spec)
    except (ValueError, LookupError, TypeError, AttributeError, re.error) as error:
        reason = error if type(error) is ValueError else f"malformed ({error!r})"
        raise ValueError(f"{file}: {reason}: {REMEDY}") from error
