"""How is a row of the table changed from the command line?

    python train.py --set r=48,encoder.gate=none
    python -m pytest tests/test_methods.py
"""
import inspect
from dataclasses import fields, replace
from typing import get_args

from adapters import SUBLAYERS, Add, Method, Prompt, methods, parts

# What a field needs of its module in order to mean anything: a change without effect is refused.
NEEDS = {
    "n": ("matrix=kronecker", lambda add: add.matrix == "kronecker"),
    "p": ("matrix=generated", lambda add: add.matrix == "generated"),
    "g": ("gate=large", lambda add: add.gate == "large"),
    "mean": ("gate=small", lambda add: add.gate == "small"),
    "reduction": ("r=0", lambda add: add.r == 0 and add.matrix != "none"),
    "r": ("a matrix", lambda add: add.matrix != "none"),
}
FIELDS = {f.name: (get_args(f.type) or (f.type,)) for kind in (Add, Prompt) for f in fields(kind)}


def row(name: str, t5: bool, changes: str = "") -> Method:
    """Row `name` with changes, made from left to right, a comma between them:

        r=48                          a field of Add or Prompt, wherever a module has it
        encoder.gate=none             the same, at the sites whose names begin so
        decoder.cross_attn.v=none     nothing at these sites ("decoder=none": in no decoder site)
        decoder.cross_attn.k=lora     one of the parts at a site
        open=norms+biases             what the row opens of the backbone (none: nothing)

    ValueError names what is unknown and what is allowed.
    """
    rows = methods(t5)
    if name not in rows:
        raise ValueError(f"there is no method {name!r}{' on T5' * t5}; there are {', '.join(rows)}")
    method = rows[name]
    for change in filter(None, changes.split(",")):
        key, _, value = (word.strip() for word in change.partition("="))
        if not (key and value):
            raise ValueError(f"{change!r} is no change of a row: write FIELD=VALUE or SITE=PART")
        method = changed(method, key, value, parts(t5))
    return method


def changed(method: Method, key: str, value: str, part: dict[str, Add | Prompt]) -> Method:
    """The method with one change of those that `row` lists."""
    if key == "open":
        return replace(method, open=() if value == "none" else tuple(value.split("+")))
    path, _, name = key.rpartition(".") if key.rpartition(".")[2] in FIELDS else (key, "", "")
    there = [site for site in method.at if not path or f"{site}.".startswith(f"{path}.")]
    there = [site for site in there if not name or hasattr(method.at[site], name)]
    if name in NEEDS and there:
        needed, means = NEEDS[name]
        if not any(means(method.at[site]) for site in there):
            raise ValueError(f"{key}={value} would change nothing: {name} needs {needed}")
    if name:
        new = {site: replace(method.at[site], **{name: parse(key, value)}) for site in there}
    elif value in part:
        there, new = [key], {key: part[value]}
    elif value == "none":
        new = {}
    else:
        raise ValueError(f"{key}={value}: {value!r} is no part for a site, {key!r} no field; parts "
                         f"are {', '.join(part)}; fields are {', '.join(FIELDS)}")
    if not there:
        raise ValueError(f"{key}={value}: {f'no module with a {name}' if name else 'nothing'} is "
                         f"there; the row's sites are {', '.join(method.at) or '-'}")
    kept = {site: add for site, add in method.at.items() if name or site not in there}
    return replace(method, at=kept | new)


def parse(key: str, value: str) -> object:
    """The text of a field's value: none, yes or no, a number, a word."""
    kind, *other = FIELDS[key.rpartition(".")[2]]                               # float | None
    try:
        if value == "none" and other:
            return None
        return {"yes": True, "no": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"{key} is {value!r}; it must be "
                         f"{'yes or no' if kind is bool else kind.__name__}") from None


def grammar() -> str:
    """For --help: what `row` takes, and the words it knows."""
    told = inspect.getdoc(row).rsplit("\n\n", 1)[0]
    return "\n".join([
        "--set: " + told, "", f"fields: {', '.join(FIELDS)}", f"parts: {', '.join(parts(False))}",
        f"sites: {', '.join(SUBLAYERS)}; behind an attention .q .k .v .o, behind a feed-forward "
        ".wi .wg .hidden .wo; encoder.prompt"])
