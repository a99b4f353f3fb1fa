"""How is text normalised before T5 cuts it into pieces?

T5 reads text through SentencePiece's table nmt_nfkc: full-width letters become plain ones, a
ligature its letters, odd spaces a space, control characters nothing. BART normalises nothing.
A tokenizer.json names the steps; `normalizer` makes a function of them that gives the text of the
`tokenizers` library, character for character.

The table is asked for each *grapheme cluster*, what a reader sees as one character.

    python -m pytest tests/test_tokenizer.py
"""
import base64
import re
import struct
import unicodedata
from collections.abc import Callable
from functools import reduce

from support.gate import check

# Unicode's White_Space. Python's str.isspace and \s also take the separators U+001C to U+001F.
WHITE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
         "\u200a\u2028\u2029\u202f\u205f\u3000")


# ------------------------------------------------------------- cutting by Unicode's properties

class Shadow(dict):
    """A table for str.translate that is worked out character by character, as they are met.

    Python's `re` cannot name Unicode's properties. So a text's shadow, in which every letter is an
    L, say, is cut with a plain expression, and the text is cut at the same places.
    """

    def __init__(self, letter: Callable[[str], str]):
        self.letter = letter

    def __missing__(self, code: int) -> str:
        self[code] = self.letter(chr(code))
        return self[code]


def cut(text: str, shadow: Shadow, pattern: re.Pattern) -> list[str]:
    """The parts of the text under which the pattern matches the shadow."""
    found = pattern.finditer(text.translate(shadow))
    return [text[match.start():match.end()] for match in found]


# Grapheme clusters (Unicode annex 29), as far as they can be shorter than six bytes: Hangul
# syllables, flags, emoji joined by ZWJ and Indic conjuncts are longer, so need no rule here.
JOINS = re.compile("[\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"             # skin tones, flags' tags:
                   "\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
STANDS = re.compile("[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f"
                    "\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d\U00011720\U00011721]")
LEADS = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd"
                   "\U000111c2\U000111c3\U000113d1\U0001193f\U00011941"
                   "\U00011a84-\U00011a89\U00011d46\U00011f02]")


def cluster_letter(char: str) -> str:
    """Line ends stay; m joins what stands before it; p joins what comes behind it; c controls."""
    category = unicodedata.category(char)
    if char in "\r\n":
        return char
    # Category M: a mark, such as an accent.
    if JOINS.match(char) or category[0] == "M" and not STANDS.match(char):
        return "m"
    if LEADS.match(char):
        return "p"
    return "c" if category in ("Cc", "Cf", "Cs", "Zl", "Zp") else "o"


CLUSTER = re.compile("\r\n|p*om*|p+m*|m+|.", re.DOTALL)
CLUSTER_SHADOW = Shadow(cluster_letter)


# --------------------------------------------------------------------------------- the steps

class Charsmap:
    """SentencePiece's compiled replacement table (T5's is called nmt_nfkc).

    blob: u32 size of the trie in bytes | the trie, u32 a unit | replacements, each ended by 0.
    The trie is a double array: from a unit, byte c leads to unit `position ^ c`, if that one's
    label is c. The bits of a unit: 0-7 label, 8 has a value, 9 wide offset, 10-30 offset; a
    value's unit has bit 31 set and in the other bits the place of the replacement.
    """

    def __init__(self, blob: bytes):
        size = int.from_bytes(blob[:4], "little")
        assert 0 < size < len(blob) - 4 and size % 4 == 0, "precompiled_charsmap is cut short"
        self.units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.replacements, start = {}, 0                    # place among the bytes -> text
        for text in blob[4 + size:].decode().split("\0"):
            self.replacements[start] = text
            start += len(text.encode()) + 1
        # Every value leads to a replacement, so that look_up never fails on a damaged table.
        for at, unit in enumerate(self.units):
            if unit & 0x80000100 == 0x100:
                value = self.units[at ^ self.offset(unit)]
                assert value & 0x7FFFFFFF in self.replacements, "precompiled_charsmap is damaged"
        self.characters = Shadow(lambda char: self.look_up(char, char))

    def look_up(self, text: str, unknown: str | None = None) -> str | None:
        """The replacement of the *shortest* beginning of text that is in the trie, or `unknown`."""
        at = self.offset(self.units[0])
        for byte in text.encode():
            at ^= byte
            # 0x800000FF: the label, and the bit that would make it a value's unit.
            if byte == 0 or at >= len(self.units) or self.units[at] & 0x800000FF != byte:
                return unknown
            has_value = self.units[at] & 0x100
            at ^= self.offset(self.units[at])
            if has_value:
                return self.replacements[self.units[at] & 0x7FFFFFFF]
        return unknown

    @staticmethod
    def offset(unit: int) -> int:
        return unit >> 10 << ((unit & 0x200) >> 6)          # wide: 8 bits more

    def __call__(self, text: str) -> str:
        if text.isascii() and "\r" not in text:             # every cluster is one character
            return text.translate(self.characters)
        out = []
        for cluster in cut(text, CLUSTER_SHADOW, CLUSTER):
            new = cluster.translate(self.characters)
            # Short clusters are looked up whole. Trap: the shortest beginning wins, so a mark
            # behind a replaced character is lost. The `tokenizers` library does so: it stays.
            out.append(self.look_up(cluster, new) if len(cluster.encode()) < 6 else new)
        return "".join(out)


def normalizer(spec: dict | None) -> Callable[[str], str]:
    """The function that a `normalizer` record of a tokenizer.json describes."""
    if spec is None:
        return str                                          # text as it is
    (kind,) = check(spec, {"type": {"Precompiled", "Sequence", "Replace", "Strip"}})
    if kind == "Precompiled":
        blob = base64.b64decode(spec["precompiled_charsmap"] or "", validate=True)
        return Charsmap(blob) if blob else str
    if kind == "Strip":
        left, right = (WHITE if spec[side] else "" for side in ("strip_left", "strip_right"))
        return lambda text: text.lstrip(left).rstrip(right)
    if kind == "Replace":
        # The library's expressions are not quite Python's: only the one that T5 uses is known.
        check(spec["pattern"], {"Regex": {" {2,}"}})
        (content,) = check(spec, {"content": str})
        return lambda text: re.sub(" {2,}", lambda _: content, text)
    steps = [normalizer(step) for step in spec["normalizers"]]
    return lambda text: reduce(lambda done, step: step(done), steps, text)
