"""``Family``: one architecture as a closed TOML table, read strictly.

A table states the forward pass as data: which branches read the residual stream through which norm,
which linear layers read and write, on which axis, where biases can live, what a config key must be.
An unknown key, a missing key or a value of the wrong kind is an error: data that no code checks
would be folklore.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, structs

from bake.errors import FamilyError
from bake.families.runtime import DESCRIBED, RUNTIMES, Carriers, Runtime
from bake.families.section import (
    Allowed,
    Factors,
    Json,
    Modules,
    NumberOrKey,
    Size,
    Table,
    Texts,
    size_keys,
)
from bake.families.select import Only
from bake.section import Toml, nearest, parse_toml
from bake.sites import SiteKind

Flag = Annotated[bool, Meta(extra={"meant": "no boolean"})]


class LinearRow(Table, frozen=True, kw_only=True):
    """A linear layer of a block, as the table names it."""

    module: str
    """Name of the tensors without ``.weight``, below the block's path (``{expert}`` counts)."""
    sites: Annotated[tuple[SiteKind, ...], Meta(extra={"meant": "no list of texts"})] = ()
    """For a reader the site of each fused output, for a writer the one site of its input."""
    bias: str
    """``always``, ``never``, or the config flag that gives the layer its bias."""
    layout: Literal["linear", "conv1d", "either"] = "linear"
    """``linear`` stores [out, in], ``conv1d`` stores [in, out]; ``either`` of the two, where the
    class itself turns on load what has the other shape."""
    stacked: bool = False
    """Whether one tensor has the layers of all experts, [experts, …] in this layout."""
    parameter: bool = False
    """Whether the class holds it without a module: its tensors are NAME and NAME_bias then."""
    fuse: Literal["concat", "heads", "gated"] = "concat"
    """How several outputs share the rows: one after another, or interleaved head by head.
    ``gated``: behind every head of the one output there are as many rows of its gate."""
    live: str | None = None
    """Path of the module in a loaded transformers model where it differs; "" where none exists."""
    only: tuple[Only, ...] = ()
    """The blocks that have it; all of the branch's where nothing is said."""

    @classmethod
    def read(cls, values: Toml, where: str, **known: Any) -> "LinearRow":
        """Return the row of a file, whose sites are all sites."""
        kinds = values.get("sites") if isinstance(values, dict) else None
        for kind in kinds if isinstance(kinds, list) else ():
            if isinstance(kind, str) and kind not in tuple(SiteKind):
                raise FamilyError(
                    f"sites names {kind!r}, which is no site",
                    where=where,
                    fix=f"the sites are {', '.join(SiteKind)}",
                )
        return super().read(values, where, **known)


class BranchRow(Table, frozen=True, kw_only=True):
    """One branch of a block: from a stream site through readers and writers to a stream site."""

    name: Literal["attn", "mlp", "extra"]
    """``extra`` is what a block has beside the two."""
    source: Literal["resid_pre", "resid_mid"] = msgspec.field(name="from")
    target: Literal["resid_mid", "resid_post"] = msgspec.field(name="to")
    module: Modules
    """Path of the branch's module in a loaded model, below the block; or those of several whose
    outputs add up to the branch's, in the order in which they run."""
    norm_in: str | None = None
    norm_out: str | None = None
    reads: tuple[LinearRow, ...]
    writes: tuple[LinearRow, ...]
    gain: Factors = 1.0
    """A number, the config key that holds it, or keys whose product it is."""
    only: tuple[Only, ...] = ()
    """The blocks that have it; all where nothing is said."""
    dims: Mapping[str, Size] = {}
    """Sizes of its own sites that are not those of the table."""
    sums_to_one: bool = False
    """Whether the weights of a token's experts sum to 1: every expert's bias may take a constant.
    """


class Recast(Table, frozen=True, kw_only=True):
    """How to declare a model of this family as one of another, exactly."""

    named = "family"

    family: str
    when: Mapping[str, Allowed] = {}
    """Config keys and the values they must have."""
    set: Mapping[str, Json]
    drop: Texts = ()
    explicit: Texts = ()
    """Keys whose default of the source class is written out where config.json leaves it unsaid."""


class GatedExperts(Table, frozen=True, kw_only=True):
    """Experts whose weights for a token sum to 1: what all of them compute alike is added once."""

    gate: str
    """The module whose outputs pass the activation, with ``{expert}`` in it."""
    up: str
    """The module that they are multiplied with."""
    size: str
    """The config key of how many outputs either has."""
    sums: str = ""
    """The config key that is true where the weights sum to 1; empty where they always do."""


class Widen(Table, frozen=True, kw_only=True):
    """How a model of this family is declared wider than it is, with dimensions that are zero."""

    eps: str
    """The config key of the norms' epsilon."""
    same_eps: Annotated[tuple[SiteKind, ...], Meta(extra={"meant": "no list of texts"})] = ()
    """Readers' outputs that pass a norm of their own width with this epsilon."""
    gate: str = ""
    """The config key of the activation of gated layers, which can compute edits; else empty."""
    experts: GatedExperts | None = None
    """Gated layers that are experts."""
    heads: bool = False
    """Whether heads are added, since the class takes their size from the width of the stream."""
    run: Texts = ()
    """The runtimes that widened models have been run in, besides transformers."""
    refused: Mapping[str, str] = {}
    """Why other runtimes do not serve them as they are meant."""


class GgufNames(Table, frozen=True, kw_only=True):
    """How llama.cpp's converter names and lays out the tensors of this family."""

    arch: str
    """``general.architecture`` of the file."""
    source: str
    linears: Mapping[str, str]
    """Name below ``blk.{layer}`` of every linear layer, by module; experts share a stacked one."""
    norms: Mapping[str, str]
    """The same for the norms of a block."""
    embed: str = "token_embd"
    positions: Texts = ()
    """In the order of the family's own positions."""
    unembed: str = "output"
    final_norm: str = "output_norm"
    rows: Mapping[str, Literal["rotary", "parts"]] = {}
    """Linear layers whose outputs the converter orders anew, weight and bias alike: ``rotary``
    interleaves the halves of every head, ``parts`` lays fused outputs one after another."""
    untouched: Texts = ()
    """Further tensors of the file that no edit touches."""


class Dims(Table, frozen=True, kw_only=True):
    """The config key of each size, or the size itself; an empty text where there is none."""

    layers: Size
    hidden: str
    vocab: Size
    heads: Size = ""
    kv_heads: Size = ""
    head_dim: Size = ""
    inner: Size = ""
    experts: Size = ""

    @property
    def said_by(self) -> frozenset[str]:
        """Every key of config.json that may hold a size."""
        found = (key for size in structs.astuple(self) for key in size_keys(size))
        return frozenset(key.removeprefix("len:") for key in found if key)


class ConfigRow(Table, frozen=True, kw_only=True):
    """What else the table says of the keys of config.json."""

    harmless: Texts = ()
    """Keys of this class that change nothing of how the stream is read and written."""


class BlockRow(Table, frozen=True, kw_only=True):
    """Where the blocks are, and what of them is no linear layer and no norm."""

    path: str
    untouched: Texts = ()


class StreamRow(Table, frozen=True, kw_only=True):
    """What the sum that runs through the blocks is."""

    closed: str = ""
    """Why no edit of it is an edit of weights; edits of the parts of a block may be."""


class NormRow(Table, frozen=True, kw_only=True):
    """What kind every norm of the family is."""

    kind: Literal["rms", "layer"]
    gain: bool = True
    """Whether every norm has a gain."""
    gain_offset: int = 0
    bias: bool = False


class EmbedRow(Table, frozen=True, kw_only=True):
    """The embedding and the position tables."""

    module: str
    multiplier: NumberOrKey = 1.0
    multiplied_by: Literal["module", "model"] = "module"
    """Who multiplies: the embedding module itself (Gemma), or the model behind it (Granite)."""
    positions: Texts = ()
    zeroed: str = ""
    """A config key with the number of a row that the class sets to zero when it loads a file."""


class UnembedRow(Table, frozen=True, kw_only=True):
    """The output head and the norm before it."""

    module: str
    norm_in: str
    live: str = ""
    """Its path in a loaded model, where that is not ``module``."""
    bias: str = "never"
    tied_by: str = ""
    """A config key that the class reads before ``tie_word_embeddings``."""


class Wrapper(Table, frozen=True, kw_only=True):
    """A class that holds the family's model as its text model, beside towers for other inputs."""

    architectures: Texts
    model_types: Texts
    config: str
    """The key of config.json that holds the text model's configuration."""
    flat: bool = False
    """Whether older files have the text model's keys at the top level instead."""
    defaults: Mapping[str, Json] = {}
    """Defaults of the text model's class, for keys that its files leave unsaid."""
    tied: bool
    """Whether the class ties the head where config.json does not say."""
    tie_said: Literal["on top", "in either", "in text"] = "on top"
    """Where it has to say so: on top, in the text model's configuration, or in either of them."""
    text_types: Texts
    """The values of ``model_type`` in there that are this family; of a flat file those on top."""
    names: tuple[Mapping[str, str], ...]
    live: Mapping[str, str]
    """What the table's prefixes are in the loaded model."""
    untouched: Texts
    """The towers' tensors, as checkpoints name them."""
    harmless: Texts
    """Keys of the top level that change nothing of the text model."""


class Family(Table, frozen=True, kw_only=True):
    """One architecture; see ``docs/families.md`` for the meaning of every key."""

    name: str
    title: str
    source: str
    architectures: Texts
    model_types: Texts
    dims: Dims
    when: Mapping[str, Allowed] = {}
    """What tells tables of one class apart: keys, and the values that this table is meant for."""
    must: Mapping[str, Allowed] = {}
    """Keys that change the arithmetic, and the values that the table is written for."""
    flags: Mapping[str, Flag] = {}
    """Keys that give linear layers a bias, each with the class's default."""
    defaults: Mapping[str, Json] = {}
    """Defaults of the config class, for keys that config.json may leave unsaid."""
    config: ConfigRow = ConfigRow()
    block: BlockRow
    stream: StreamRow = StreamRow()
    norm: NormRow
    embed: EmbedRow
    unembed: UnembedRow
    names: tuple[Mapping[str, str], ...] = ()
    """What checkpoints write for the table's prefixes, where they write something else: of several
    ways the first in which the embedding is there."""
    wrappers: tuple[Wrapper, ...] = msgspec.field(name="wrapper", default=())
    within: Wrapper | None = None
    """The class that a model's is wrapped in; no key of the table."""
    untouched: Texts = ()
    """Tensors outside the blocks that travel as they are, with ``*`` and ``**``."""
    branches: tuple[BranchRow, ...] = msgspec.field(name="branch")
    runtimes: Mapping[str, Runtime] = msgspec.field(name="runtime", default_factory=dict)
    run: Mapping[str, Carriers] = {}
    """For every runtime, the carriers of this family that tests have run in it."""
    recasts: Mapping[str, Recast] = msgspec.field(name="recast", default_factory=dict)
    widen: Widen | None = None
    """None where nobody has said how."""
    gguf: GgufNames | None = None
    """None where llama.cpp has no such architecture, or nobody has written its names down."""

    @property
    def linears(self) -> tuple[LinearRow, ...]:
        """The linear layers of a block, in the order of the forward pass."""
        return tuple(row for branch in self.branches for row in (*branch.reads, *branch.writes))

    def wrapped(self, wrapper: Wrapper) -> "Family":
        """Return the table of a class that holds this one's model, which other programs run."""
        return structs.replace(
            self,
            architectures=wrapper.architectures,
            model_types=wrapper.model_types,
            when={},
            defaults={**self.defaults, **wrapper.defaults},
            names=wrapper.names,
            within=wrapper,
            wrappers=(),
            runtimes={},
            run={name: () for name in self.run} | {"transformers": ("checkpoint",)},
            recasts={},
            widen=None,
            gguf=None,
        )

    def section(self, config: Mapping[str, Json]) -> Mapping[str, Json]:
        """Return the part of config.json that is of this table: all of it, or the text model's.

        The head of a wrapped model is tied as the parts say that its class reads.
        """
        if self.within is None:
            return config
        said = [part[TIED] for part in self._tying(config) if TIED in part]
        # Of two parts the one that ties it is heard; what is no boolean is found out later.
        tied = next((value for value in said if value), said[0] if said else self.within.tied)
        return {**self.text(config), TIED: tied}

    def _tying(self, config: Mapping[str, Json]) -> tuple[Mapping[str, Json], ...]:
        """Return the parts of config.json in which a class looks for whether the head is tied."""
        if self.within is None:
            return (config,)
        parts = {"on top": (config,), "in text": (self.text(config),)}
        return parts.get(self.within.tie_said, (config, self.text(config)))

    def states_tie(self, config: Mapping[str, Json]) -> bool:
        """Return whether config.json itself says that the head is tied, or is not."""
        return any(key in part for part in self._tying(config) for key in self.tied_by)

    def text(self, config: Mapping[str, Json]) -> Mapping[str, Json]:
        """Return what a wrapper's config.json says of its text model."""
        within = self.within
        if within is None:
            return {}
        if within.flat and within.config not in config:
            return {key: value for key, value in config.items() if key not in within.harmless}
        found = config.get(within.config)
        return found if isinstance(found, dict) else {}

    @property
    def loader(self) -> str | None:
        """The class of transformers that loads a wrapped model, towers included; else None."""
        return None if self.within is None else self.within.architectures[0]

    @property
    def tied_by(self) -> tuple[str, ...]:
        """The config keys that say whether the head is tied, the one that is read first first."""
        own = self.unembed.tied_by
        return (own, TIED) if own else (TIED,)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the table is for, wrappers included."""
        return (*self.architectures, *(name for of in self.wrappers for name in of.architectures))

    @property
    def conditions(self) -> tuple[Only, ...]:
        """What says which blocks have which branches and linear layers."""
        branches = (one for branch in self.branches for one in branch.only)
        return (*branches, *(one for row in self.linears for one in row.only))

    @property
    def tier(self) -> Literal["core", "served"]:
        """``served`` where the table says what runtimes do with the family, else ``core``."""
        return "served" if self.runtimes or self.gguf is not None else "core"


TIED = "tie_word_embeddings"
SQRT_HIDDEN = "sqrt_hidden"  # for a multiplier: the root of the stream's width
PER_SQRT_LAYERS = "per_sqrt_layers"  # the same: one over the root of the number of blocks
MISSING = object()  # no value and no default: never equal to what a condition allows


def configured(family: Family, config: Mapping[str, Json], key: str) -> Json:
    """Return the value of a config key, its default when it is unsaid, or ``MISSING``."""
    return config.get(key, family.defaults.get(key, MISSING))


def parse_family(text: str, where: str) -> Family:
    """Return the family that a TOML text describes.

    Raises:
        FamilyError: the text is no TOML, lacks a key, or holds an unknown one.
    """
    values = parse_toml(text, "the family table", FamilyError, where)
    family = Family.read(values, where, within=None)
    _check_flags(family, where)
    _check_branches(family, where)
    _check_runtimes(family, where)
    _check_gguf(family, where)
    _check_widen(family, where)
    run = {name: family.run.get(name, ()) for name in RUNTIMES}
    return structs.replace(family, run=run)


def _check_flags(family: Family, where: str) -> None:
    for bias in {row.bias for row in family.linears} | {family.unembed.bias}:
        if bias not in ("always", "never", *family.flags):
            raise FamilyError(
                f"bias = {bias!r} is neither always, never nor a key of [flags]", where=where
            )


def _check_branches(family: Family, where: str) -> None:
    """Require conditions that say one thing each, and names of sizes that a branch's sites have."""
    for one in family.conditions:
        one.check(f"{where} [[branch]]")
    for branch in family.branches:
        if not branch.module:
            raise FamilyError("module names no module", where=f"{where} [[branch]] {branch.name}")
    for row in family.linears:
        if row.stacked and (row.sites or "{expert}" in row.module):
            what = "sites, which one layer has" if row.sites else "{expert} in its module"
            raise FamilyError(
                f"{row.module} is stacked, and has {what}",
                where=f"{where} [[branch]]",
                why="a stacked tensor has the layers of all experts",
            )
    own = ("heads", "kv_heads", "head_dim", "inner", "experts")
    for name in {name for branch in family.branches for name in branch.dims}.difference(own):
        raise FamilyError(f"unknown key {name!r}", where=f"{where} dims", fix=nearest(name, own))


def _check_runtimes(family: Family, where: str) -> None:
    """Require names of runtimes, and below them names of linear layers."""
    for name in family.run:
        if name not in RUNTIMES:
            fix = nearest(name, RUNTIMES)
            raise FamilyError(f"unknown key {name!r}", where=f"{where} [run]", fix=fix)
    modules = {family.unembed.module, *(row.module for row in family.linears)}
    for name, runtime in family.runtimes.items():
        place = f"{where} [runtime.{name}]"
        if name not in DESCRIBED:
            raise FamilyError(
                f"there is no runtime {name!r}", where=place, fix=nearest(name, DESCRIBED)
            )
        for key in ("biases", "misplaced"):
            for module in getattr(runtime, key):
                if module not in modules:
                    raise FamilyError(
                        f"{key} names {module!r}, which is no linear layer of the table",
                        where=place,
                    )


def _check_widen(family: Family, where: str) -> None:
    """Require a way for heads to keep their size in a wider model."""
    if family.widen is not None and not (family.widen.heads or family.dims.head_dim):
        raise FamilyError(
            "heads = true is missing, and [dims] names no head_dim",
            where=f"{where} [widen]",
            why="the class then takes the size of a head from the width of the stream",
        )


def _check_gguf(family: Family, where: str) -> None:
    """Require a GGUF name for everything that an edit may touch, and for nothing else."""
    names = family.gguf
    if names is None:
        return
    linears = {row.module for row in family.linears}
    norms = {
        name for branch in family.branches for name in (branch.norm_in, branch.norm_out) if name
    }
    for key, found, meant in (
        ("linears", set(names.linears), linears),
        ("norms", set(names.norms), norms),
        ("rows", set(names.rows), linears & set(names.rows)),
    ):
        for name in sorted(found ^ meant):
            what = "lacks" if name in meant else "names"
            raise FamilyError(
                f"{key} {what} {name!r}, and has to name exactly those of the table's branches",
                where=f"{where} [gguf]",
            )
    if len(names.positions) != len(family.embed.positions):
        raise FamilyError(
            f"positions names {len(names.positions)} tables, [embed] {len(family.embed.positions)}",
            where=f"{where} [gguf]",
        )
