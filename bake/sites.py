"""Names of places in the forward pass: parse them, order them, expand selections of them.

The words are TransformerLens's. ``resid_pre.l``, ``resid_mid.l`` and ``resid_post.l`` are the
residual stream at the input of block l, between its two branches and at its output; ``attn_out``
and ``mlp_out`` are the outputs of the modules, before any post-norm; ``z`` is the input of the
attention's output projection and ``mlp_act`` the input of the MLP's; a norm's output is taken after
gain and bias. ``extra_out`` is the output of what a block has beside attention and MLP, between the
norms ``ln3_out`` and ``ln3_post_out``: a state-space mixer, experts, per-layer inputs. Layers count
blocks from 0.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from bake.errors import UsageError


class SiteKind(StrEnum):
    """A kind of place, in the order in which a forward pass reaches them within one block."""

    EMBED = "embed"
    RESID_PRE = "resid_pre"
    LN1_OUT = "ln1_out"
    Q = "q"
    K = "k"
    V = "v"
    Z = "z"
    ATTN_OUT = "attn_out"
    LN1_POST_OUT = "ln1_post_out"
    LN3_OUT = "ln3_out"
    EXTRA_OUT = "extra_out"
    LN3_POST_OUT = "ln3_post_out"
    RESID_MID = "resid_mid"
    LN2_OUT = "ln2_out"
    MLP_GATE = "mlp_gate"
    MLP_UP = "mlp_up"
    MLP_ACT = "mlp_act"
    MLP_OUT = "mlp_out"
    LN2_POST_OUT = "ln2_post_out"
    RESID_POST = "resid_post"
    LN_FINAL_OUT = "ln_final_out"


STREAM_KINDS = (SiteKind.RESID_PRE, SiteKind.RESID_MID, SiteKind.RESID_POST)
HEAD_KINDS = (SiteKind.Q, SiteKind.K, SiteKind.V, SiteKind.Z)
INNER_KINDS = (SiteKind.MLP_GATE, SiteKind.MLP_UP, SiteKind.MLP_ACT)
GLOBAL_KINDS = (SiteKind.EMBED, SiteKind.LN_FINAL_OUT)  # one in the model, so they take no layer

_ORDER = {kind: position for position, kind in enumerate(SiteKind)}
_SITE = re.compile(
    r"(?P<kind>[a-z0-9_]+)(?:\.(?P<layers>\*|[0-9]{1,9}(?:-[0-9]{1,9})?))?(?:\.h(?P<head>[0-9]{1,9}))?"
)
_HIDDEN_STATES = re.compile(r"hidden_states\[(-?[0-9]{1,9})\]")


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the forward pass, for example ``resid_post.12`` or ``z.3.h5``."""

    kind: SiteKind
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f".{self.layer}"
        head = "" if self.head is None else f".h{self.head}"
        return f"{self.kind}{layer}{head}"

    @property
    def order(self) -> tuple[float, int, int]:
        """A key that sorts sites in the order in which a forward pass reaches them."""
        layer = {SiteKind.EMBED: -1.0, SiteKind.LN_FINAL_OUT: float("inf")}.get(
            self.kind, self.layer
        )
        assert layer is not None
        return layer, _ORDER[self.kind], -1 if self.head is None else self.head


def parse_site(text: str) -> Site:
    """Return the one site that ``text`` names. It inverts ``str(site)``.

    Raises:
        UsageError: the text names no site, or a selection of several.
    """
    kind, layers, head = _split(text)
    if layers is not None and not layers.isdecimal():
        raise UsageError(f"{text!r} names several sites where one is meant", fix="name one layer")
    return Site(kind, None if layers is None else int(layers), head)


def expand(
    patterns: str | Sequence[str],
    *,
    layers: int,
    stream: Iterable[Site],
    having: Collection[Site] = (),
) -> tuple[Site, ...]:
    """Return the sites that patterns select, in the order given, without repeats.

    Args:
        patterns: ``"resid"`` (every stream site), ``"resid_post.14"``, ``"attn_out.*"``,
            ``"mlp_out.8-20"``, ``"z.3.h5"``, ``"hidden_states[13]"``, or a list of such.
        layers: number of blocks of the model.
        stream: the sites that ``"resid"`` stands for: ``resid_pre.0``, then one after every write.
        having: the sites of the model, where its blocks differ: a star is for those that have it.

    Raises:
        UsageError: an unknown site, a layer out of range, or an empty selection.
    """
    texts = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    found: dict[Site, None] = {}
    for text in texts:
        sites = tuple(stream) if text == "resid" else _expand_one(text, layers)
        if ".*" in text:
            # Of a site that no block has, all are named, for the model to say which it has.
            sites = tuple(s for s in sites if Site(s.kind, s.layer) in having) or sites
        found.update(dict.fromkeys(sites))
    if not found:
        raise UsageError(
            "the selection of sites is empty", fix='name a site, for example at = "resid"'
        )
    return tuple(found)


def summary(sites: Iterable[Site]) -> str:
    """Return sites in a few words: ``resid_post.0-31, z.3.h5``."""
    layers: dict[tuple[str, int | None], list[int]] = {}
    for site in sites:
        found = layers.setdefault((site.kind, site.head), [])
        if site.layer is not None:
            found.append(site.layer)
    return ", ".join(
        kind + (f".{span(found)}" if found else "") + ("" if head is None else f".h{head}")
        for (kind, head), found in layers.items()
    )


def patterns(sites: Iterable[Site]) -> list[str]:
    """Return patterns that select sites without heads: one for each run of layers of a kind."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        found = layers.setdefault(site.kind, [])
        if site.layer is not None:
            found.append(site.layer)
    return [
        f"{kind}.{run}" if run else kind
        for kind, found in layers.items()
        for run in span(found).split(",")
    ]


def span(numbers: Iterable[int]) -> str:
    """Return whole numbers in a few words: ``0,3-7``."""
    ordered = sorted(set(numbers))
    runs = []
    for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(runs)


def _expand_one(text: str, layers: int) -> tuple[Site, ...]:
    hidden = _HIDDEN_STATES.fullmatch(text)
    if hidden is not None:
        return (_hidden_state(text, int(hidden[1]), layers),)
    kind, selected, head = _split(text)
    if selected is None:
        return (Site(kind),)
    if selected == "*":
        first, last = 0, layers - 1
    else:
        start, _, end = selected.partition("-")
        first, last = int(start), int(end or start)
    if last < first:
        raise UsageError(
            f"{text!r} counts layers downwards",
            fix=f"write {text.replace(selected, f'{last}-{first}')}",
        )
    if last >= layers:
        raise UsageError(
            f"{text!r} names layer {last}, but the model has {layers} blocks",
            fix=f"blocks count from 0 to {layers - 1}",
        )
    return tuple(Site(kind, layer, head) for layer in range(first, last + 1))


def _hidden_state(text: str, index: int, layers: int) -> Site:
    """Map an index of transformers' ``output_hidden_states`` to the site it was read from."""
    index = index + layers + 1 if index < 0 else index  # there is one more of them than blocks
    if index == layers:
        raise UsageError(
            f"{text!r} is no residual-stream site",
            why="transformers takes the last hidden state after the final norm",
            fix=f"name resid_post.{layers - 1} (before the norm) or ln_final_out (after it)",
        )
    if not 0 <= index < layers:
        raise UsageError(
            f"{text!r} is out of range: the model has {layers} blocks",
            fix=f"hidden_states[0] to hidden_states[{layers - 1}], or [-{layers + 1}] to [-2] from "
            "the end, are residual-stream sites",
        )
    return Site(SiteKind.RESID_PRE, 0) if index == 0 else Site(SiteKind.RESID_POST, index - 1)


def _split(text: str) -> tuple[SiteKind, str | None, int | None]:
    match = _SITE.fullmatch(text)
    word = text.partition(".")[0] if match is None else match["kind"]
    if word not in tuple(SiteKind):
        near = difflib.get_close_matches(word, [*SiteKind, "resid"], n=1)
        raise UsageError(
            f"unknown site {text!r}",
            fix=f"did you mean {str(near[0])!r}?"
            if near
            else f"the sites are resid, {', '.join(SiteKind)}",
        )
    kind = SiteKind(word)
    if match is None:
        raise UsageError(f"cannot read the site {text!r}", fix=_usage(kind))
    if (kind in GLOBAL_KINDS) != (match["layers"] is None):
        what = "names no layer"
        if kind in GLOBAL_KINDS:
            what = f"names a layer, but the model has one {kind}"
        raise UsageError(f"{text!r} {what}", fix=_usage(kind))
    if match["head"] is not None and kind not in HEAD_KINDS:
        raise UsageError(
            f"{text!r} names a head, but {kind} has none",
            fix=f"heads go with {', '.join(HEAD_KINDS)}",
        )
    return kind, match["layers"], None if match["head"] is None else int(match["head"])


def _usage(kind: SiteKind) -> str:
    if kind in GLOBAL_KINDS:
        return f"write {kind}"
    head = f", and {kind}.3.h5 for one head" * (kind in HEAD_KINDS)
    return f"write {kind}.14, {kind}.* or {kind}.8-20{head}"
