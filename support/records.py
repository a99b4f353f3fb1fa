"""How is a JSON file of any size read?

Record by record: a file of a gigabyte never is in memory as a whole, a broken or odd one is named
with the record and the field that are wrong, and a large one shows how far it is.

    for where, name, record in records(path):                  # [record, ...] or {name: record}
    for where, name, record in records(path, "questions"):     # {"questions": [record, ...], ...}
    for where, name, record in records(path, lines=True):      # one record behind the other
        text = take(record, ("sent", "question"), str, where)

    python -m pytest tests/test_data.py
"""

import json
import re
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

from tqdm import tqdm

PIECE = 1 << 20  # characters read at a time
LONGEST = 1 << 26  # characters of one value: a broken file is not read on for ever
BIG = 20 << 20  # bytes of a file that gets a progress bar
SPACE = re.compile(r"\s*")
DECODE = json.JSONDecoder().raw_decode


def read_json(path: Path) -> list | dict:
    """The contents of a small JSON file; ValueError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch or write it again.") from None


class Stream:
    """An open JSON file, read value by value: no more is held than a piece and the value at hand.

    `text` is what was read, used up to `at`. A number at its end may go on: 12, or 12 before a
    point or an e, can be the beginning of 12.5e3. So a space is put behind the file.
    """

    def __init__(self, path: Path, file, bar: tqdm):
        self.path, self.file, self.bar = path, file, bar
        self.text, self.at, self.ended = "", 0, False

    def broken(self, why: str) -> ValueError:
        why += f": {self.text[self.at :][:40]!r}" if self.peek() else ": here it ends"
        return ValueError(f"{self.path} is not valid JSON ({why}): fetch or write it again.")

    def more(self) -> bool:
        """Reads on, at least as much again as is pending; False at the end."""
        if self.ended:
            return False
        try:
            piece = self.file.read(max(PIECE, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            why = f"{self.path} is not UTF-8 text ({error.reason}): save it as UTF-8."
            raise ValueError(why) from None
        self.text, self.at, self.ended = self.text[self.at :] + (piece or " "), 0, not piece
        self.bar.update(self.file.buffer.tell() - self.bar.n)
        return True

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def skip(self, char: str) -> None:
        if self.peek() != char:
            raise self.broken(f"{char!r} expected")
        self.at += 1

    def value(self):
        """The next value, whole."""
        self.peek()
        while True:
            try:
                (value, end), why = DECODE(self.text, self.at), "no whole value"
            except json.JSONDecodeError as error:
                end, why = len(self.text), error.msg
            except (ValueError, RecursionError) as error:        # endless numbers, endless brackets
                raise self.broken(str(error)) from None
            if end < len(self.text) and self.text[end] not in ".eE":
                self.at = end
                return value
            if len(self.text) - self.at > LONGEST or not self.more():
                raise self.broken(why)

    def members(self) -> Iterator[int | str]:
        """The numbers or names of a list's or object's members; the caller reads their values."""
        opening = self.peek()
        if opening not in ("[", "{"):
            raise self.broken("a list or object of records expected")
        self.at += 1
        closing = {"[": "]", "{": "}"}[opening]
        for name in count() if self.peek() != closing else ():
            if opening == "{":
                if self.peek() != '"':
                    raise self.broken("a name expected")
                name = self.value()
                self.skip(":")
            yield name
            if self.peek() == closing:
                break
            self.skip(",")
        self.skip(closing)

    def members_of(self, key: str) -> Iterator[int | str]:
        """The same of the list at `key` of an object; what stands before it is passed over."""
        for name in self.members():
            if name == key:
                yield from self.members()
                return
            for _ in self.members() if self.peek() in ("[", "{") else "1":
                self.value()
        raise ValueError(f"{self.path}: field {key!r} is missing.")

    def lines(self) -> Iterator[int]:
        """The numbers of values that stand one behind the other."""
        yield from takewhile(lambda _: self.peek(), count())


def records(path: Path, key: str | None = None, lines: bool = False) -> Iterator[tuple]:
    """(where, number or name, record) for each member of a file's list or object; of the list at
    `key` in its object; or, with `lines`, of records one behind the other."""
    size = path.stat().st_size
    with (
        open(path, encoding="utf-8-sig") as file,
        tqdm(total=size, desc=f"read {path.name}", unit="B", unit_scale=True, leave=False,
             disable=size < BIG) as bar,
    ):  # fmt: skip
        s = Stream(path, file, bar)
        lines = lines and s.peek() == "{"
        for name in s.lines() if lines else s.members_of(key) if key else s.members():
            yield f"{path}, record {name!r}", name, s.value()
        if not key and s.peek():
            raise s.broken("nothing more expected")


def take(record: dict, names: tuple[str, ...], kind: type | tuple[type, ...], where: str):
    """The first of these fields that the record has, checked to be of this kind."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} should be an object with fields, not {record!r:.60}.")
    for name in names:
        if name in record:
            if isinstance(record[name], kind) and not isinstance(record[name], bool):
                return record[name]
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: {name!r} should be {kinds}, not {record[name]!r:.60}.")
    raise ValueError(f"{where}: field {' or '.join(map(repr, names))} is missing.")
