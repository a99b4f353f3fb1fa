"""Which module stands where? The table of methods, and how a row is changed.

Adding a method is adding a row here (and a module, where it needs one that adapters.py does not
have: any nn.Module made of (add, site) with forward(h, x, ctx)).

    python -m tools.count                                       # every row and what it trains
    python train.py --method lora --set r=16,alpha=16,open=none
    python -m pytest tests/test_methods.py
"""
import inspect
from contextlib import suppress
from dataclasses import replace
from itertools import product

from adapters import GATES, Add, DoRA, Method, Prompt
from support.gate import Number, check, reading

SUBLAYERS = ("encoder.self_attn", "encoder.ffn",
             "decoder.self_attn", "decoder.cross_attn", "decoder.ffn")
ATTENTION = tuple(site for site in SUBLAYERS if "attn" in site)


# --------------------------------------------------------------------------------- the table

def parts(is_t5: bool) -> dict[str, Add | Prompt]:
    """What rows are made of, by name, with the papers' settings.

    Deliberate: on T5 the papers' adapters reduce by 4, and VL-PET's start at zero and scale the
    sub-layer's output by 0.3.
    """
    add, tokens, reduction, s, r = Add(), 0.02, 8, 1.0, 128
    if is_t5:
        add, tokens, reduction, s, r = Add(std=None), 1.0, 4, 0.3, 150
    light = replace(add, reads="x", zero=is_t5)
    gated = replace(add, s=s, zero=is_t5)
    lora = Add(reads="x", linear=True, r=r, alpha=32, dropout=0.1, std=None, zero=True)
    found = {
        "adapter": replace(add, reduction=reduction),
        "adapter-light": light,
        "compacter": replace(add, matrix="kronecker"),
        "compacter-light": replace(light, matrix="kronecker"),
        "compacter-original": replace(add, matrix="kronecker", n=4, rank=1, shared_R=True),
        "hyperformer": Add(matrix="generated", std=0.01 if is_t5 else 0.02, std_tokens=tokens),
        "lora": lora,
        "dora": replace(lora, module=DoRA),
        "ia3": Add(matrix="none", gate="middleY", zero=True),
        "prompt": Prompt(std=add.std, std_tokens=tokens),
    }
    for gate in GATES:
        found[f"adapter+{gate}"] = replace(gated, gate=gate, reduction=reduction)
        found[f"compacter+{gate}"] = replace(gated, gate=gate, matrix="kronecker")
    return found


def methods(is_t5: bool) -> dict[str, Method]:
    """Every row by name.

    Deliberate: on T5 the papers open no norms, but for VL-PET's rows (the encoder's); and T5 has
    no biases, so that there is no row bitfit.
    """
    part = parts(is_t5)
    norms, biases = (), ()
    if not is_t5:
        norms, biases = ("norms",), ("biases",)
    narrow = replace(part["adapter"], reduction=8)         # per-task rows: by 8 on T5, too

    def attentions(linears: str, add: Add) -> dict[str, Add]:
        """The part behind these Linears of every attention."""
        return {f"{site}.{linear}": add for site, linear in product(ATTENTION, linears)}

    def everywhere(add: Add, formula: str) -> Method:
        return Method(dict.fromkeys(SUBLAYERS, add), norms, formula)

    def one_a_task(method: Method) -> Method:
        at = {site: replace(add, per_task="all") for site, add in method.at.items()}
        return replace(method, at=at, formula=f"{method.formula}; one a task")

    hidden = dict.fromkeys(("encoder.ffn.hidden", "decoder.ffn.hidden"), part["ia3"])
    adapter, light = "h + U gelu(D h + b_D) + b_U", "decoder h + U gelu(D x + b_D) + b_U"
    rows = {
        "frozen": Method(),
        "norms": Method(open=("norms",)),
        "full": Method(open=("all",)),
        "bitfit": Method(open=("biases",)),
        "adapter": everywhere(part["adapter"], adapter),
        "adapter-multiple": one_a_task(everywhere(narrow, adapter)),
        "adapter-half-shared": everywhere(replace(narrow, per_task="down"),
                                          f"{adapter}; D, b_D for each task"),
        "compacter": everywhere(part["compacter"], f"{adapter}; D, U = sum_i kron(R_i, W_i)"),
        "compacter-original": everywhere(part["compacter-original"],
                                         f"{adapter}; D, U = sum_i kron(R_i, L_i U_i), one R"),
        "hyperformer": everywhere(part["hyperformer"], f"{adapter}; generated for (task, layer)"),
        "lora": Method(attentions("qv", part["lora"]), biases,
                       "h + (alpha / r) B A dropout(x) at q and v"),
        "dora": Method(attentions("qv", part["dora"]), biases,
                       "m (W + (alpha / r) B A) x / |W + (alpha / r) B A| + bias at q and v"),
        "ia3": Method(attentions("kv", part["ia3"]) | hidden, (),
                      "(1 + z) h at k, v and behind the feed-forward's activation"),
        "prompt": Method({"encoder.prompt": part["prompt"]}, (),
                         "40 tokens W_2 tanh(W_1 E + b_1) + b_2 before the encoder's text"),
    }
    if is_t5:
        del rows["bitfit"]
    for name in ("compacter", "lora", "prompt"):
        rows[f"{name}-multiple"] = one_a_task(rows[name])
    # VL-PET: G behind the encoder's modules, one light module for each decoder block.
    sizes = {"large": "one number a token and channel", "middleX": "one a token",
             "middleY": "one a channel", "small": "one an example"}
    for base, gate in product(("adapter", "compacter"), GATES):
        at = dict.fromkeys(SUBLAYERS[:2], part[f"{base}+{gate}"])
        at["decoder.cross_attn.v"] = part[f"{base}-light"]
        rows[f"{base}+{gate}"] = Method(at, ("encoder.norms",),
                                        f"s G (.) ({adapter}), G {sizes[gate]}; {light}")
    for gate in GATES:                       # VL-PET itself: its heads are one matrix (Bottleneck)
        rows[f"vlpet-{gate}"] = rows[f"adapter+{gate}"]
    return rows


# ------------------------------------------------------------------- a row with changes (--set)

# What a field may be; "?": also none.
FROM0, FROM1 = Number(0, whole=True), Number(1, whole=True)
FIELDS = {
    "reads": {"h", "x"}, "matrix": {"dense", "kronecker", "generated", "none"},
    "r": FROM0, "reduction": FROM1, "n": FROM1, "rank": FROM0, "shared_R": bool, "p": FROM1,
    "linear": bool, "dropout": Number(0, 0.999), "scale": Number(), "alpha?": Number(),
    "gate?": {*GATES}, "g": FROM0, "s": Number(), "mean": {"real", "all"}, "std?": Number(0),
    "std_tokens": Number(0), "zero": bool, "per_task?": {"all", "down", "up"},
    "length": FROM1, "mid": FROM1,                                             # a prompt's
}
WANTS = {name.rstrip("?"): want for name, want in FIELDS.items()}

# What a field needs beside it in order to mean anything: most changes without effect are refused.
NEEDS = {"p": ("matrix", {"generated"}), "g": ("gate", {"large"}), "mean": ("gate", {"small"}),
         "reduction": ("r", {0})}
NEEDS |= dict.fromkeys(("n", "rank", "shared_R"), ("matrix", {"kronecker"}))
NEEDS |= dict.fromkeys(("reads", "r", "linear", "scale", "alpha", "dropout"),
                       ("matrix", FIELDS["matrix"] - {"none"}))


def row(name: str, is_t5: bool, changes: str = "") -> Method:
    """Row `name` with changes, made from left to right, a comma between them:

        r=48                          a field of Add or Prompt, wherever a module has it
        encoder.gate=none             the same, at the sites whose names begin so
        decoder.cross_attn.v=none     nothing at these sites ("decoder=none": in no decoder site)
        decoder.cross_attn.k=lora     one of the parts at a site
        open=norms+biases             what the row opens of the backbone (none: nothing)
    """
    with reading("--method"):
        rows = methods(is_t5)
        assert name in rows, f"there is no method {name!r} here; there are {', '.join(rows)}"
    method = rows[name]
    for change in filter(str.strip, changes.split(",")):
        with reading(f"--set {change.strip()}"):
            method = changed(method, change, parts(is_t5))
    with reading(f"--set {changes}"):
        check_row(method)
    return method


def changed(method: Method, change: str, part: dict[str, Add | Prompt]) -> Method:
    """The method with one change of those that `row` lists."""
    key, _, value = (word.strip() for word in change.partition("="))
    assert key and value, f"{change!r} is no change of a row: write FIELD=VALUE or SITE=PART"
    if key == "open":
        return replace(method, open=() if value == "none" else tuple(value.split("+")))
    path, _, name = key.rpartition(".")
    if name in WANTS:
        there = [site for site in below(method, path) if hasattr(method.at[site], name)]
        assert there, f"no module with a {name} is there; the row's sites are {sites(method)}"
        if name in NEEDS:
            field, needed = NEEDS[name]
            told = " or ".join(sorted(map(str, needed)))
            assert any(getattr(method.at[site], field) in needed for site in there), \
                f"it would change nothing: {name} needs {field}={told}"
        new = {site: replace(method.at[site], **{name: parse(name, value)}) for site in there}
        return replace(method, at=method.at | new)
    if value in part:
        return replace(method, at=method.at | {key: part[value]})
    assert value == "none", (f"{value!r} is no part for a site, {key!r} no field; parts are "
                             f"{', '.join(part)}; fields are {', '.join(WANTS)}")
    gone = below(method, key)
    assert gone, f"nothing is there; the row's sites are {sites(method)}"
    return replace(method, at={site: method.at[site] for site in method.at if site not in gone})


def below(method: Method, path: str) -> list[str]:
    """The row's sites whose names begin with path."""
    return [site for site in method.at if not path or f"{site}.".startswith(f"{path}.")]


def sites(method: Method) -> str:
    return ", ".join(method.at) or "-"


def parse(name: str, text: str) -> object:
    """The text of a field's value: none, yes or no, a number, a word."""
    want = WANTS[name]
    if text == "none" and f"{name}?" in FIELDS:
        return None
    if want is bool:
        assert text in ("yes", "no"), f"{name} is {text!r}; it must be yes or no"
        return text == "yes"
    if isinstance(want, Number):
        with suppress(ValueError):                  # what is no number, check_row tells
            return int(text) if want.whole else float(text)
    return text


def check_row(method: Method) -> None:
    """Fields in range, and no combination that would mean nothing or look at tokens to come."""
    for site, add in method.at.items():
        kind = type(add).__name__
        assert (kind == "Prompt") == (site == "encoder.prompt"), \
            f"a {kind} cannot stand at {site}: a prompt, and nothing else, stands at encoder.prompt"
        check(vars(add), {name: FIELDS[name] for name in FIELDS if name.rstrip("?") in vars(add)})
        whole = add.per_task in (None, "all")
        if kind == "Prompt":
            assert whole, f"per_task of a prompt is {add.per_task!r}; it can be none or all"
            continue
        plain = add.gate is None and add.s == 1 and not add.shared_R
        plain = plain and add.matrix in ("dense", "kronecker")
        assert add.module is not DoRA or (plain and whole and add.linear and add.reads == "x"), \
            "dora is for LoRA's linear update of x: start from row dora"
        assert add.matrix != "generated" or not (add.per_task or add.linear or add.zero), \
            "a generated module is one a task already: leave per_task, linear and zero out"
        assert add.matrix != "none" or (add.gate and whole), \
            "matrix 'none' has no down or up: give it a gate, and per_task all or none"
        ahead = site.startswith("decoder") and not site.endswith(("cross_attn.k", "cross_attn.v"))
        assert add.gate != "small" or not ahead, \
            f"gate 'small' at {site} would average over the tokens to come: take another gate"


def grammar() -> str:
    """For --help: what `row` takes, and the words it knows."""
    places = f"{', '.join(SUBLAYERS)}; of an attention .q .k .v .o, of a feed-forward .wi .wg"
    return (f"--set: {inspect.getdoc(row)}\n\nfields: {', '.join(WANTS)}\n"
            f"parts: {', '.join(parts(False))}\nsites: {places} .hidden .wo; encoder.prompt")
