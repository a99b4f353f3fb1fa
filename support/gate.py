"""What happens when something that is read from outside is wrong?

One gate for all of it: annotations, weights, pictures, run folders, the command line.

    with reading(path, record):            # whatever goes wrong in here becomes one BadInput:
        text = record["question"]          # "vqa.json, record 7: field 'question' is missing"

Inside the gate code reads plainly, as if every file were right; behind it nothing is checked again.
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
from functools import wraps
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:
    fcntl = None

# What damaged input makes of plain code, and what decoders call it.
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError,
         RecursionError, MemoryError, EOFError, SyntaxError, RuntimeError, struct.error, zlib.error,
         zipfile.BadZipFile, SafetensorError, Image.DecompressionBombError,
         tokenize.TokenError, SystemError)             # both of numpy, at headers of .npy files


class BadInput(ValueError):
    """What is wrong with a user's input, in one sentence that names the culprit and the remedy."""


@contextmanager
def reading(path: str | Path, record: int | str | None = None) -> Iterator[None]:
    """Turns what goes wrong inside into BadInput("path, record 7: ...").

    An OSError of the system (no such file, no permission) names its path itself and passes.
    """
    try:
        yield
    except BadInput:
        raise                                          # an inner gate has said it already
    except (*WRONG, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = str(path) if record is None else f"{path}, record {record!r}"
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):
            said = f"field {said} is missing"
        elif isinstance(error, (RecursionError, MemoryError)) or not said:
            said = f"it cannot be read ({type(error).__name__})"
        raise BadInput(f"{where}: {said}") from error


# ------------------------------------------------------------------------------------ the check

class Number(NamedTuple):
    """A finite number from `low` to `high`, both allowed; `whole`: an integer."""
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        said = "a whole number" if self.whole else "a number"
        if self.low > -math.inf:
            said += f" from {self.low:g}"
        if self.high < math.inf:
            said += f" to {self.high:g}"
        return said


def check(record: dict, table: dict[str, object]) -> list:
    """The values of a record's fields, in the table's order; ValueError names the field.

    A name may offer others ("sent|question": the first that is there) and end in "?" (may be
    missing or null: None). What a value should be is a type or a tuple of types, a Number, a set
    of allowed values, or a list with one of these in it: a list of such values.

        text, label = check(record, {"sent|question": str, "label": Number(0, 1)})
    """
    assert isinstance(record, dict), f"an object with fields should stand here, not {record!r:.60}"
    values = []
    for names, want in table.items():
        name = names if names in record else first_name(record, names)
        value = record.get(name)
        if value is None and names.endswith("?"):
            values.append(None)
            continue
        assert name in record, f"field {' or '.join(map(repr, names.split('|')))} is missing"
        assert fits(value, want), f"{name!r} should be {told(want)}, not {value!r:.60}"
        values.append(value)
    return values


def first_name(record: dict, names: str) -> str:
    """Of "a|b?" the first that the record has."""
    options = names.rstrip("?").split("|")
    return next((name for name in options if name in record), options[0])


def fits(value: object, want: object) -> bool:
    if isinstance(value, str) and not value.isascii():
        value.encode()                                 # half an emoji (a lone surrogate) raises
    if type(value) is want:
        return True
    if isinstance(want, list):
        return isinstance(value, list) and all(fits(one, want[0]) for one in value)
    if isinstance(want, (set, frozenset)):
        return any(value == one and type(value) is type(one) for one in want)
    if isinstance(want, Number):
        number = type(value) is int or type(value) is float and not want.whole
        return number and math.isfinite(value) and want.low <= value <= want.high
    if isinstance(value, bool):                        # True is an int for Python, not for us
        return False
    return isinstance(value, want)


def told(want: object) -> str:
    if isinstance(want, list):
        return f"a list, each {told(want[0])}"
    if isinstance(want, (set, frozenset)):
        return "one of " + ", ".join(map(repr, sorted(want, key=repr)))
    if isinstance(want, tuple) and not isinstance(want, Number):
        return " or ".join(map(told, want))
    names = {str: "text", int: "a whole number", float: "a number", dict: "an object",
             list: "a list", bool: "true or false"}
    return names[want] if isinstance(want, type) else str(want)


# ------------------------------------------------------------------------------------- files

def read_text(path: str | Path) -> str:
    """A whole text file; a byte order mark is passed over."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, kind: type = dict):
    """The contents of a JSON file, an object unless another kind is named."""
    with reading(path):
        content = json.loads(read_text(path))
        assert isinstance(content, kind), f"it should hold {told(kind)}"
        return content


def replace_file(path: str | Path, content: bytes | str) -> None:
    """Writes beside and moves over: the name never stands for half a file, whatever happens."""
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
    """Holds an open file for this process alone, until it is closed or the process dies.

    False if another process holds it; with `wait`, this one waits for its turn.
    """
    if fcntl is None:
        return True                                    # Windows: one process at a time, please
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --------------------------------------------------------------------------------- programs

def program(main: Callable) -> Callable:
    """Around the main() of a program: what its user did wrong is one sentence, exit status 1."""
    name = Path(main.__code__.co_filename).name

    @wraps(main)
    def run(argv: list[str] | None = None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):         # what a terminal cannot show is \xe9
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except BadInput as wrong:
            sys.exit(f"{name}: {wrong}")
        except OSError as wrong:
            where = f"{wrong.filename}: " if wrong.filename else ""
            sys.exit(f"{name}: {where}{wrong.strerror or wrong}")
        except KeyboardInterrupt:
            sys.exit(f"{name}: interrupted")
    return run
