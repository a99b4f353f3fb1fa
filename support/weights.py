"""How do tensors get from a safetensors file into a module, and back?

The only file that opens weights. A rename table, a readable list, says how published names become
ours; nothing is guessed. Loading is strict: every published tensor must be known to the table,
every tensor of the module must be filled, every shape must agree. All is checked before the first
number is written, so a failed load leaves the module as it was. Pickles (.bin, .pt) are never
opened: they can run code.

    tensors = read("weights/tiny-t5")            # a folder as on the Hugging Face hub, or a file
    load(model, tensors, table, where="weights/tiny-t5")
    write("copy/model.safetensors", published(model, table))

    python -m pytest tests/test_weights.py

A row of a table is (published, ours) or (published, ours, "T"):

    ("layer.{i}.attn.q_proj", "blocks.{i}.q")         {i}, {j} are numbers; a row names a tensor or
                                                      a module, with all that lies below it
    ("layer.{i}.attn.qkv", ("blocks.{i}.q", ...))     stored as one, cut in equal parts along dim 0
    ("proj", "head.weight", "T")                      stored transposed
    ("text_model", None)                              known and ignored

The first row that matches wins, in both directions. Several published tensors may mean one of
ours (tied copies) if they are bit-equal; the first of these rows is the name it is saved under.
"""
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

Table = list[tuple[str, str | tuple[str, ...] | None] | tuple[str, str | tuple[str, ...], str]]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = ("python -c \"import torch, safetensors.torch as s; w = torch.load('{0}', 'cpu', "
           "weights_only=True); s.save_file({{k: v.clone() for k, v in w.items()}}, '{1}')\"")
SHOWN = 8                                        # names listed for each problem, then a count


# ------------------------------------------------------------------------------------------- files

class Tensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, each read when asked for."""

    def __init__(self, files: Mapping[str, "safe_open"], metadata: dict[str, str]):
        self.files, self.metadata = files, metadata                   # tensor name -> its open file

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

    Raises FileNotFoundError with what was looked for, ValueError for a pickle or a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if not whole.exists() and index.exists():
            return read_shards(index)
        if not whole.exists():
            pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
            if pickles:
                refuse_pickle(pickles[0])
            raise FileNotFoundError(f"{path} holds neither {whole.name} nor {index.name}: give the "
                                    "folder of a downloaded model, or a .safetensors file.")
        path = whole
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .safetensors file or a folder that "
                                "holds model.safetensors.")
    if path.suffix in PICKLES:
        refuse_pickle(path)
    file = open_file(path)
    return Tensors(dict.fromkeys(file.keys(), file), file.metadata() or {})


def read_shards(index: Path) -> Tensors:
    """All shards that model.safetensors.index.json names."""
    try:
        home = json.loads(index.read_text(encoding="utf-8"))["weight_map"]       # tensor -> file
        shards = {name: index.parent / name for name in sorted(set(home.values()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no readable weight_map: download it again.") from None
    if missing := [name for name, path in shards.items() if not path.exists()]:
        raise FileNotFoundError(f"{index} names files that are not there: {listed(missing)}. "
                                "Download them into the same folder.")
    files = {name: open_file(path) for name, path in shards.items()}
    inside = {name: set(file.keys()) for name, file in files.items()}
    if lost := [tensor for tensor, name in home.items() if tensor not in inside[name]]:
        raise ValueError(f"{index} places tensors in files that lack them: {listed(lost)}. "
                         "Download index and files from the same model.")
    metadata = {k: v for file in files.values() for k, v in (file.metadata() or {}).items()}
    return Tensors({tensor: files[name] for tensor, name in home.items()}, metadata)


def open_file(path: Path) -> "safe_open":
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): "
                         "download it again.") from None


def refuse_pickle(path: Path) -> None:
    raise ValueError(f"{path} is a pickle, which can run code when opened, and is not read here; "
                     f"convert it once: {CONVERT.format(path, path.parent / 'model.safetensors')} "
                     "(OpenAI's own CLIP files: w = torch.jit.load(...).state_dict())")


def write(path: str | Path, tensors: Mapping[str, Tensor],
          metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; the name appears only once the file is complete."""
    path, memory, out = Path(path), set(), {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        # safetensors refuses two names for one memory (views, tied weights): give each its own.
        out[name] = t.clone() if t.untyped_storage().data_ptr() in memory else t
        memory.add(t.untyped_storage().data_ptr())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(save(out, metadata))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- names

@lru_cache(maxsize=4096)
def pattern(row: str) -> re.Pattern:
    """"a.{i}.b" -> an expression for that tensor, or all tensors below that module."""
    numbers = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(row))
    return re.compile(numbers + r"(?P<below>(\..+)?)")


def rename(name: str, old: str, new: str) -> str | None:
    """The name under the row old -> new, or None where old does not match."""
    match = pattern(old).fullmatch(name)
    return match and new.format(**match.groupdict()) + match["below"]


def parts(ours: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if ours is None else (ours,) if isinstance(ours, str) else ours


def to_ours(name: str, table: Table | None) -> tuple[list[str], bool] | None:
    """A published name -> our names for its parts (none: ignored), transposed; None: unknown."""
    if table is None:
        return [name], False
    for published_row, ours, *how in table:
        if pattern(published_row).fullmatch(name):
            return [rename(name, published_row, part) for part in parts(ours)], how == ["T"]
    return None


def to_published(name: str, table: Table | None) -> tuple[str, int, bool] | None:
    """Our name -> published name, which part of it this is, transposed; None: not in the table."""
    if table is None:
        return name, 0, False
    for published_row, ours, *how in table:
        for k, part in enumerate(parts(ours)):
            if found := rename(name, part, published_row):
                return found, k, how == ["T"]
    return None


def listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------- file <-> module

@torch.no_grad()
def load(target: nn.Module | Mapping[str, Tensor], source: Mapping[str, Tensor],
         table: Table | None = None, where: str = "") -> None:
    """Fills every tensor of the target, or raises one ValueError and changes nothing.

    target: a module (all its parameters and buffers), or our names -> tensors. source: published
    names -> tensors, cast to the target's dtypes. table: None if the names are ours. where: the
    file, for the message.
    """
    state = target.state_dict() if isinstance(target, nn.Module) else target
    filled, origin = {}, {}
    unexpected, unfit = [], []
    for full in source:
        found = to_ours(full, table)
        if found is None or any(name not in state for name in found[0]):
            unexpected.append(full)
        elif found[0]:
            names, t = found[0], source[full].T if found[1] else source[full]
            pieces = torch.atleast_1d(t).tensor_split(len(names)) if len(names) > 1 else [t]
            for name, piece in zip(names, pieces):
                if name in filled and not same(piece, filled[name]):
                    unfit.append(f"{full} differs from its copy {origin[name]}")
                elif problem := misfit(piece, state[name]):
                    unfit.append(f"{full} {problem}")
                filled.setdefault(name, piece)
                origin.setdefault(name, full)
    missing = [(to_published(n, table) or (n,))[0] for n in state if n not in filled]
    problems = [f"{what}: {listed(list(dict.fromkeys(names)))}" for what, names in (
        ("missing", missing), ("unexpected", unexpected), ("not fitting", unfit)) if names]
    if problems:
        raise ValueError(
            f"{where or 'a set of tensors'} cannot be loaded into this {type(target).__name__} "
            f"({'; '.join(problems)}): use the complete weights of a model of this kind and size.")
    for name, t in filled.items():
        state[name].copy_(t)


def misfit(theirs: Tensor, ours: Tensor) -> str:
    """Why a tensor (or its part, where several are stored as one) cannot become ours; else ""."""
    if theirs.shape != ours.shape:
        return f"{tuple(theirs.shape)} for {tuple(ours.shape)}"
    if theirs.is_floating_point() != ours.is_floating_point():
        return f"{theirs.dtype} for {ours.dtype}"
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def published(module: nn.Module, table: Table | None) -> dict[str, Tensor]:
    """The module's tensors under published names, for saving: the inverse of load."""
    pieces, turned = defaultdict(dict), {}
    for name, t in module.state_dict().items():
        found = to_published(name, table)
        if found is None:
            raise ValueError(f"no row of the table says what {name} is called in a published file.")
        full, part, turned[full] = found
        pieces[full][part] = t
    whole = {full: torch.cat([p[k] for k in sorted(p)]) if len(p) > 1 else p[0]
             for full, p in pieces.items()}
    return {full: t.T if turned[full] else t for full, t in whole.items()}


def fingerprint(module: nn.Module) -> str:
    """16 hex digits that change with any weight or its name."""
    digest = hashlib.sha256()
    for name, t in module.state_dict().items():
        digest.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
