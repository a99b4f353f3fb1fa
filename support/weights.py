"""How do tensors get from a safetensors file into a module, and back?

The only file that opens weights. A rename table says how published names become ours; nothing is
guessed. Every published tensor must be known to the table, every tensor of the module be filled,
every shape agree, all before the first number is written. Pickles are never opened: they can run
code.

    tensors = read("weights/tiny-t5")            # a folder as on the Hugging Face hub, or a file
    load(model, tensors, table, where="weights/tiny-t5")
    write("copy/model.safetensors", published(model, table))

    python -m pytest tests/test_weights.py

A row of a table is (published, ours) or (published, ours, "T"); the first that matches wins:

    ("layer.{i}.attn.q_proj", "blocks.{i}.q")         {i}, {j} are numbers; a row names a tensor or
                                                      a module, with all that lies below it
    ("layer.{i}.attn.qkv", ("blocks.{i}.q", ...))     stored as one, cut in equal parts along dim 0
    ("proj", "head.weight", "T")                      stored transposed
    ("text_model", None)                              known and ignored

Several published tensors may mean one of ours (tied copies) if they are bit-equal.
"""
import hashlib
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from shlex import quote

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from support.gate import read_json, reading, replace_file

Table = list[tuple[str, str | tuple[str, ...] | None] | tuple[str, str | tuple[str, ...], str]]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHOWN = 8                                        # names listed for each problem, then a count


# ------------------------------------------------------------------------------------------- files

class Tensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, each read when asked for."""

    def __init__(self, files: Mapping[str, "safe_open"], metadata: dict[str, str]):
        self.files = files                       # tensor name -> its open file
        self.metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())


def read(path: str | Path) -> Tensors:
    """A .safetensors file, or a folder with model.safetensors (or its index of shards).

    BadInput says what was looked for, what is damaged, or how to convert a pickle.
    """
    path = Path(path)
    files, metadata = {}, {}
    with reading(path):
        if path.is_dir():
            pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
            found = [file for file in (path / WHOLE, path / INDEX, *pickles) if file.is_file()]
            assert found, f"it holds neither {WHOLE} nor {INDEX}: give a downloaded model's folder"
            path = found[0]
        assert path.suffix not in PICKLES, \
            f"a pickle can run code when it is opened; convert it once: {conversion(path)}"
    with reading(path):
        # Large models come as several files; an index says which tensor lies in which.
        home = read_json(path)["weight_map"] if path.name == INDEX else {}
        shards = [path.parent / Path(name).name for name in sorted(set(home.values()))]
        for shard in shards or [path]:
            # Opening compares the header with the file's length; no number is read yet.
            with reading(f"{shard} is missing, cut short or no safetensors file; use a whole copy"):
                file = safe_open(shard, "pt")
            files |= dict.fromkeys(file.keys(), file)
            metadata |= file.metadata() or {}
    return Tensors(files, metadata)


def conversion(path: Path) -> str:
    """The command that turns a pickle into a safetensors file beside it."""
    call = "torch.load(argv[1], 'cpu', weights_only=True)"
    # Both kinds are zips, but only a TorchScript archive (OpenAI's CLIP) holds a program.
    if zipfile.is_zipfile(path) and "/constants.pkl" in " ".join(zipfile.ZipFile(path).namelist()):
        call = "torch.jit.load(argv[1], 'cpu').state_dict()"
    program = (f"from sys import argv; import torch, safetensors.torch as s; w = {call}; "
               "s.save_file({k: v.contiguous().clone() for k, v in w.items()}, argv[2])")
    # The one name that safetensors files have not kept: a folder's pytorch_model.bin.
    result = path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors")
    return f'python -c "{program}" {quote(str(path))} {quote(str(result))}'


def write(path: str | Path, tensors: Mapping[str, Tensor],
          metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file: the same bytes for the same tensors and metadata."""
    # Copies, because safetensors refuses two names for one memory (views, tied weights).
    content = save({name: tensor.detach().to("cpu", copy=True).contiguous()
                    for name, tensor in tensors.items()}, metadata)
    # A file is: 8 bytes with the header's length | the header, JSON | the numbers. safetensors
    # orders the metadata anew in every run: sorted, equal files are equal byte for byte.
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)                # the numbers start at a multiple of 8
    start = len(header).to_bytes(8, "little")
    replace_file(path, b"".join((start, header, memoryview(content)[size:])))


# ------------------------------------------------------------------------------------------- names

@lru_cache(maxsize=4096)
def pattern(row: str) -> re.Pattern:
    """"a.{i}.b" -> an expression for that tensor, or all tensors below that module."""
    numbers = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(row))
    return re.compile(numbers + r"(?P<below>(\..+)?)")


def rename(name: str, old: str, new: str) -> str | None:
    """The name under the row old -> new, or None where old does not match.

    rename("layer.3.attn.weight", "layer.{i}.attn", "blocks.{i}.q") == "blocks.3.q.weight"
    """
    match = pattern(old).fullmatch(name)               # numbers by name, and what lies below
    if match is None:
        return None
    return new.format(**match.groupdict()) + match["below"]


def parts(ours: str | tuple[str, ...] | None) -> list[str]:
    """The right side of a row as a list: several of ours stored as one, one alone, or none."""
    return [ours] if isinstance(ours, str) else list(ours or ())


def to_ours(name: str, table: Table | None) -> tuple[list[str], bool] | None:
    """A published name -> our names for its parts (none: ignored), transposed; None: unknown."""
    if table is None:
        return [name], False
    for published_row, ours, *how in table:            # the first row that matches wins
        if pattern(published_row).fullmatch(name):
            return [rename(name, published_row, part) for part in parts(ours)], how == ["T"]
    return None


def to_published(name: str, table: Table | None) -> tuple[str, int, bool] | None:
    """Our name -> published name, which part of it this is, transposed; None: not in the table."""
    if table is None:
        return name, 0, False
    for published_row, ours, *how in table:
        for part, our_row in enumerate(parts(ours)):
            full = rename(name, our_row, published_row)
            if full is not None:
                return full, part, how == ["T"]
    return None


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---------------------------------------------------------------------------------- file <-> module

@torch.no_grad()
def load(target: nn.Module | Mapping[str, Tensor], source: Mapping[str, Tensor],
         table: Table | None = None, where: str = "a set of tensors") -> None:
    """Fills every tensor of the target, or raises one BadInput that names `where`.

    target: a module (all its parameters and buffers), or our names -> tensors. source: published
    names -> tensors, cast to the target's dtypes. table: None if the names are ours.
    """
    state = target.state_dict() if isinstance(target, nn.Module) else target
    filled: dict[str, Tensor] = {}                     # our name -> what will be copied there
    unexpected, unfit = [], []
    with reading(where):
        # 1. Every published tensor: which of ours does it mean, and does it fit there?
        for full in source:
            row = to_ours(full, table)                 # full: the whole published name
            if row is None or not state.keys() >= set(row[0]):
                unexpected.append(full)
                continue
            names, transposed = row
            if not names:
                continue                               # known and ignored: not even read
            tensor = source[full].T if transposed else source[full]
            pieces = [tensor]
            if len(names) > 1:
                pieces = torch.atleast_1d(tensor).tensor_split(len(names))  # (3 d, ..) -> 3 (d, ..)
            for name, piece in zip(names, pieces):
                # A second tensor for one of ours is a tied copy, which must equal the first.
                problem = misfit(piece, state[name], filled.setdefault(name, piece))
                if problem:
                    unfit.append(f"{full} {problem}")
        # 2. Every one of ours: is it filled? Else it is missed, under its published name.
        missing = [to_published(name, table) or (name,) for name in state if name not in filled]
        missing = list(dict.fromkeys(full for full, *_ in missing))  # q, k, v in one: named once
        problems = {"missing": missing, "unexpected": unexpected, "not fitting": unfit}
        said = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        assert not said, (f"it cannot be loaded into this {type(target).__name__} ({said}): use "
                          "the complete weights of a model of this kind and size")
    # 3. Only now is anything changed.
    for name, tensor in filled.items():
        state[name].copy_(tensor)


def misfit(piece: Tensor, ours: Tensor, first: Tensor) -> str:
    """Why a piece cannot become ours; else "". first: the piece that came first for it."""
    if piece.shape != ours.shape:
        return f"{tuple(piece.shape)} for {tuple(ours.shape)}"
    if piece.is_floating_point() != ours.is_floating_point():
        return f"{piece.dtype} for {ours.dtype}"
    if not piece.isfinite().all():
        return "holds NaN or inf"
    if piece is not first and (piece.dtype != first.dtype or not torch.equal(piece, first)):
        return "differs from its copy"
    return ""


def published(module: nn.Module, table: Table | None) -> dict[str, Tensor]:
    """The module's tensors under published names, for saving: the inverse of load."""
    rows = defaultdict(dict)                           # (published, transposed) -> part -> tensor
    for name, tensor in module.state_dict().items():
        row = to_published(name, table)
        assert row is not None, f"no row of the table says what {name} is called when published"
        full, part, transposed = row
        rows[full, transposed][part] = tensor          # q, k and v meet under one name
    out = {}
    for (full, transposed), numbered in rows.items():
        pieces = [numbered[part] for part in sorted(numbered)]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        out[full] = whole.T if transposed else whole
    return out


def fingerprint(module: nn.Module) -> str:
    """16 hex digits that change with any weight or its name."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
