"""What happens when something that is read from outside is wrong?

One gate for all of it: annotations, weights, pictures, run folders, the command line.

    with reading(path, record):            # whatever goes wrong in here becomes one BadInput:
        text = record["question"]          # "vqa.json, record 7: field 'question' is missing"

Inside the gate code reads plainly, as if every file were right; after it nothing is checked again.
`program` turns a BadInput or an OSError into one sentence and exit status 1. Every other exception
is a bug of ours and shows its traceback.

    python -m pytest tests/test_gate.py
"""
import json
import math
import os
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:
    fcntl = None                                       # Windows: one process at a time, please

# What damaged input makes of plain code, and what decoders call it.
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError,
         MemoryError, EOFError, SyntaxError, RuntimeError, OSError, struct.error, zlib.error,
         zipfile.BadZipFile, SafetensorError, Image.DecompressionBombError,
         tokenize.TokenError, SystemError)             # both of numpy, at headers of .npy files


class BadInput(ValueError):
    """What is wrong with a user's input, in one sentence that names the culprit and the remedy."""


@contextmanager
def reading(path: str | Path, record: int | str | None = None) -> Iterator[None]:
    """Turns what goes wrong inside into BadInput("path, record 7: ...")."""
    try:
        yield
    except WRONG as error:
        system = isinstance(error, OSError) and error.errno is not None
        if system or isinstance(error, BadInput):
            raise                                      # no such file, or an inner gate: it is said
        where = f"{path}" if record is None else f"{path}, record {record!r}"
        said = " ".join(str(error).split()) or f"it cannot be read ({type(error).__name__})"
        if isinstance(error, KeyError):
            said = f"field {said} is missing"
        # A damaged file can quote ten thousand letters of itself.
        raise BadInput(f"{where:.500}: {said:.1000}") from error


# ------------------------------------------------------------------------------------ the check

class Number(NamedTuple):
    """A finite number from `low` to `high`, both allowed; `whole`: an integer."""
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list",
         bool: "true or false"}


def check(record: dict, table: dict[str, object]) -> list:
    """The values of a record's fields, in the table's order; AssertionError names the field.

        text, label = check(record, {"sent|question": str, "label?": Number(0, 1)})

    "a|b": the first that is there. "a?": may be missing or null (None). Right is a value of a type,
    or of one of a tuple of types, in the range of a Number, or in a set; [str]: a list of these.
    """
    assert isinstance(record, dict), f"an object with fields should stand here, not {record!r:.60}"
    values = []
    for names, want in table.items():
        options, name = [names], names                 # most fields have one name, and are there
        if name not in record:
            options = names.rstrip("?").split("|")
            name = next((name for name in options if name in record), options[0])
        value = record.get(name)
        if value is not None or not names.endswith("?"):
            assert name in record, f"field {' or '.join(map(repr, options))} is missing"
            assert fits(value, want), f"{name!r} should be {told(want)}, not {value!r:.60}"
        values.append(value)
    return values


def fits(value: object, want: object) -> bool:
    if isinstance(value, str) and not value.isascii():
        value.encode()                                 # half an emoji (a lone surrogate) raises
    if isinstance(want, list):
        return isinstance(value, list) and all(fits(one, want[0]) for one in value)
    if isinstance(want, set):                          # True == 1 for Python, not for us
        return any(value == one and type(value) is type(one) for one in want)
    if isinstance(want, Number):
        number = type(value) is int or type(value) is float and not want.whole
        return number and math.isfinite(value) and want.low <= value <= want.high
    return type(value) is want or isinstance(want, tuple) and type(value) in want


def told(want: object) -> str:
    if isinstance(want, list):
        return f"a list, each {told(want[0])}"
    if isinstance(want, set):
        return "one of " + ", ".join(sorted(map(repr, want)))
    if isinstance(want, Number):
        bounds = f" from {want.low:g}" if want.low > -math.inf else ""
        if want.high < math.inf:
            bounds += f" to {want.high:g}"
        return NAMES[int if want.whole else float] + bounds
    return " or ".join(map(told, want)) if isinstance(want, tuple) else NAMES[want]


# ------------------------------------------------------------------------------------- files

def read_text(path: str | Path) -> str:
    """A whole text file; a byte order mark is passed over."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds."""
    with reading(path):
        content = json.loads(read_text(path))
        assert isinstance(content, dict), "it should hold an object"
        return content


read_only = False                                      # support/ranks.py sets it


def replace_file(path: str | Path, content: bytes | str) -> None:
    """Writes beside and moves over: the name never stands for half a file, whatever happens. Of
    several ranks (support/ranks.py) the first one writes."""
    if read_only:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(making, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())                    # on the disk before it gets its name
        os.replace(making, path)
    except OSError as error:
        error.filename = str(path)                     # a full disk does not say where it is full
        raise
    finally:
        making.unlink(missing_ok=True)


def lock(file: IO, wait: bool = False) -> bool:
    """Holds an open file until it is closed. If another process does: waits, or returns False."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --------------------------------------------------------------------------------- programs

def program(main: Callable) -> Callable:
    """Around the main() of a program: what its user did wrong is one sentence, exit status 1."""
    name = Path(main.__code__.co_filename).name

    def run(argv: list[str] | None = None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):         # what a terminal cannot show is \xe9
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except (BadInput, KeyboardInterrupt) as wrong:
            said = str(wrong) or "interrupted"
        except OSError as wrong:
            said = f"{wrong.filename or 'error'}: {wrong.strerror or wrong}"
        sys.exit(f"{name}: {said}")
    return run
