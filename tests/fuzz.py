"""Damages everything that is read from outside: a sentence, or the right result, and nothing else.

    PYTHONPATH=. python tests/fuzz.py --inputs 5000 --seed 0      # the table, and every failure

An input is a copy of a good folder with one thing broken: bytes flipped, cut, put in or taken out,
or one value made another (of JSON, a safetensors header, a zip). It is read by what a user's
command calls. Right is a BadInput or an OSError in one line, or a result that equals what other
readers find in the same bytes. Wrong is any other exception, more than five seconds or 300 MB, and
a file that is read or written elsewhere. What is read: the table in tests/fuzz_kinds.py.
"""
import argparse
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import torch
from fuzz_kinds import ELSEWHERE, Kind, sources

from support.gate import BadInput

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = (-1, 0, 10 ** 6, 10 ** 30, 1e300, float("nan"))
ODD = (None, True, "", "x", "\ud83d", "a" * 9999, f"{ELSEWHERE}/model.safetensors", [], {}, [[]])
NAMES = ("x", "images/", "/images/x", "images/../../x", f"{ELSEWHERE}/images/x", "a" * 9999)


# ------------------------------------------------------------------------------------ the damage

def damage(content: bytes, name: str, rng: Random) -> bytes:
    """The bytes of a file with one thing broken."""
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.6:
        return damage_json(content, name, rng)
    if name.endswith(".safetensors") and rng.random() < 0.4:       # 8 bytes, header, numbers
        size = 8 + int.from_bytes(content[:8], "little")
        header = damage_json(content[8:size], name, rng)
        return len(header).to_bytes(8, "little") + header + content[size:]
    if name.endswith((".npz", ".zip")) and rng.random() < 0.7:
        return damage_zip(content, rng)
    where, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 100))
    if rng.random() < 0.5:
        where = rng.randrange(min(200, len(content) + 1))          # headers are at the beginning
    kind = rng.choice(("flip", "cut", "insert", "drop"))
    if kind == "cut":
        return content[:where]
    if kind == "insert":
        return content[:where] + rng.randbytes(length) + content[where:]
    if kind == "drop":
        return content[:where] + content[where + length:]
    return content[:where] + rng.randbytes(1) + content[where + 1:]


def damage_json(content: bytes, name: str, rng: Random) -> bytes:
    """One value, somewhere, is gone or an odd one."""
    lines = name.endswith(".jsonl")
    whole = list(map(json.loads, content.splitlines())) if lines else json.loads(content)
    at = whole
    while at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        number = isinstance(at[key], (int, float)) and rng.random() < 0.5
        at[key] = rng.choice(NUMBERS if number else ODD)
        if rng.random() < 0.2:
            del at[key]
        break
    if lines:
        return "".join(json.dumps(line) + "\n" for line in whole).encode()
    return json.dumps(whole).encode()


def damage_zip(content: bytes, rng: Random) -> bytes:
    """One member is damaged or called otherwise, and all sums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        broken, rename = rng.choice(old.namelist()), rng.random() < 0.4
        for name in old.namelist():
            member = old.read(name)
            if name == broken and rename:
                name = rng.choice(NAMES)
            elif name == broken:
                member = damage(member, "", rng)
            new.writestr(name, member)
    return made.getvalue()


# ---------------------------------------------------------------------------------- the campaign

class Watch:
    """What is opened, made, moved or started, as Python itself tells, while `on`."""
    EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
              "os.truncate", "os.chmod", "os.exec", "os.fork", "os.posix_spawn", "os.system",
              "subprocess.Popen", "socket.connect"}

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.note)                   # for good: there is no way to take one out

    def note(self, event: str, given: tuple) -> None:
        if self.on and event in self.EVENTS:
            self.seen.append((event, given))

    def elsewhere(self, *mine: Path) -> list[tuple]:
        """What happened outside of these folders. The repository and Python's own may be read."""
        found, readable = [], (ROOT, sys.prefix, sys.base_prefix)
        for event, given in self.seen:
            name = str(given[0])
            writes = event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            place = os.path.abspath(name)
            fine = place.startswith(tuple(map(str, mine if writes else (*mine, *readable))))
            # A name alone lies in a folder that is held open (shutil.rmtree). Settings may name
            # what is nowhere. Python writes what it has compiled.
            fine |= "/" not in name or "__pycache__" in name or not writes and not Path(
                place).exists()
            if not fine:
                found.append((event, *given))
        return found


class Hang(BaseException):
    """Raised in whatever does not end."""


def hang(number: int, frame: object) -> None:
    raise Hang("a minute has passed")


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(kind: Kind, folder: Path, out: Path, watch: Watch) -> str:
    """refused or read; raises what is wrong."""
    home, said, found = folder.parent.parent, "", None
    before, memory, start = sorted(home.iterdir()), megabytes(), time.process_time()
    watch.seen, watch.on = [], True
    try:
        with redirect_stdout(io.StringIO()):
            found = kind.read(folder, out)
    except BadInput as told:
        said = str(told)
    except OSError as told:
        said = told.strerror or str(told)             # what gate.program prints behind the name
    finally:
        watch.on = False
    took, grown = time.process_time() - start, megabytes() - memory
    assert took < 5 and grown < 300, f"{took:.1f} s, {grown:.0f} MB"
    elsewhere = watch.elsewhere(folder, out)
    assert not elsewhere and before == sorted(home.iterdir()), f"elsewhere: {elsewhere}"
    assert "\n" not in said and len(said) < 3000, said
    if found is None:
        return "refused"
    kind.peer(folder, found)
    return "read"


def campaign(inputs: int, seed: int) -> tuple[Counter, list[str]]:
    """(kind, verdict) -> how many; what failed, in words."""
    rng, found, failures, watch = Random(seed), Counter(), [], Watch()
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        kinds, out = sources(home), home / "out"
        for name, kind in kinds.items():
            shutil.copytree(kind.good, home / "damaged" / name)
        for number in range(inputs):
            name = rng.choice(list(kinds))
            kind, folder = kinds[name], home / "damaged" / name
            file = rng.choice(kind.files)
            content = (kind.good / file).read_bytes()
            (folder / file).write_bytes(damage(content, file, rng))
            out.mkdir()
            signal.alarm(60)
            try:
                verdict = attempt(kind, folder, out, watch)
            except (Exception, Hang) as bug:  # noqa: BLE001 (that is what is looked for)
                verdict = "FAILED"
                failures.append(f"{number} {name} {file}: {type(bug).__name__}: {bug}"[:400])
            signal.alarm(0)
            found[name, verdict] += 1
            (folder / file).write_bytes(content)
            shutil.rmtree(out)
    return found, failures


def main() -> None:
    parser = argparse.ArgumentParser(description="Damages what is read from outside.")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, failures = campaign(args.inputs, args.seed)
    for kind in dict.fromkeys(kind for kind, _ in found):
        print(f"{kind:14} refused {found[kind, 'refused']:5}  read {found[kind, 'read']:5}  "
              f"failed {found[kind, 'FAILED']:3}")
    print(*failures, sep="\n")


if __name__ == "__main__":
    main()
