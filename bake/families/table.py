"""``Family``: one architecture as a closed TOML table, read strictly.

A table states the forward pass as data: which branches read the residual stream through which norm,
which linear layers read and write, on which axis, where biases can live, what a config key must be.
An unknown key, a missing key or a value of the wrong kind is an error: data that no code checks
would be folklore.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bake.errors import FamilyError
from bake.families.runtime import Runtime, read_run, read_runtimes
from bake.families.section import KEY, Json, Section
from bake.sites import SiteKind


@dataclass(frozen=True, slots=True)
class LinearRow:
    """A linear layer of a block, as the table names it."""

    module: str
    """Name of the tensors without ``.weight``, below the block's path (``{expert}`` counts)."""
    sites: tuple[SiteKind, ...]
    """For a reader the site of each fused output, for a writer the one site of its input."""
    bias: str
    """``always``, ``never``, or the config flag that gives the layer its bias."""
    layout: Literal["linear", "conv1d"] = "linear"
    """``linear`` stores [out, in], ``conv1d`` stores [in, out]."""
    fuse: Literal["concat", "heads"] = "concat"
    """How several outputs share the rows: one after another, or interleaved head by head."""
    live: str | None = None
    """Path of the module in a loaded transformers model where it differs; "" where none exists."""


@dataclass(frozen=True, slots=True)
class BranchRow:
    """One branch of a block: from a stream site through readers and writers to a stream site."""

    name: Literal["attn", "mlp"]
    source: Literal["resid_pre", "resid_mid"] = field(metadata={KEY: "from"})
    target: Literal["resid_mid", "resid_post"] = field(metadata={KEY: "to"})
    module: str
    """Path of the branch's module in a loaded model, below the block."""
    norm_in: str | None
    norm_out: str | None
    reads: tuple[LinearRow, ...]
    writes: tuple[LinearRow, ...]
    gain: float | str = 1.0
    """A number, or the config key that holds it."""


@dataclass(frozen=True, slots=True)
class Recast:
    """How to declare a model of this family as one of another, exactly."""

    family: str
    when: Mapping[str, tuple[Json, ...]]
    """Config keys and the values they must have."""
    set: Mapping[str, Json]
    drop: tuple[str, ...] = ()
    explicit: tuple[str, ...] = ()
    """Keys whose default of the source class is written out where config.json leaves it unsaid."""


@dataclass(frozen=True, slots=True)
class GgufNames:
    """How llama.cpp's converter names and lays out the tensors of this family."""

    arch: str
    """``general.architecture`` of the file."""
    source: str
    linears: Mapping[str, str]
    """Name below ``blk.{layer}`` of every linear layer, by module; experts share a stacked one."""
    norms: Mapping[str, str]
    """The same for the norms of a block."""
    embed: str = "token_embd"
    positions: tuple[str, ...] = ()
    """In the order of the family's own positions."""
    unembed: str = "output"
    final_norm: str = "output_norm"
    rows: Mapping[str, Literal["rotary", "parts"]] = field(default_factory=dict)
    """Linear layers whose outputs the converter orders anew, weight and bias alike: ``rotary``
    interleaves the halves of every head, ``parts`` lays fused outputs one after another."""
    untouched: tuple[str, ...] = ()
    """Further tensors of the file that no edit touches."""


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """What the table says of the keys of config.json."""

    when: Mapping[str, tuple[Json, ...]]
    """What tells tables of one class apart: keys, and the values that this table is meant for."""
    must: Mapping[str, tuple[Json, ...]]
    """Keys that change the arithmetic, and the values that the table is written for."""
    flags: Mapping[str, bool]
    """Keys that give linear layers a bias, each with the class's default."""
    defaults: Mapping[str, Json]
    """Defaults of the config class, for keys that config.json may leave unsaid."""
    dims: Mapping[str, str]
    """The key of each size of ``DIMENSIONS``; an empty text where there is none."""
    harmless: tuple[str, ...]
    """Keys of this class that change nothing of how the stream is read and written."""


@dataclass(frozen=True, slots=True)
class BlockRow:
    """Where the blocks are, and what of them is no linear layer and no norm."""

    path: str
    optional_prefix: str = ""
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NormRow:
    """What kind every norm of the family is."""

    kind: Literal["rms", "layer"]
    gain_offset: int = 0
    bias: bool = False


@dataclass(frozen=True, slots=True)
class EmbedRow:
    """The embedding and the position tables."""

    module: str
    multiplier: float | str = 1.0
    multiplied_by: Literal["module", "model"] = "module"
    """Who multiplies: the embedding module itself (Gemma), or the model behind it (Granite)."""
    positions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnembedRow:
    """The output head and the norm before it."""

    module: str
    norm_in: str
    live: str = ""
    """Its path in a loaded model, where that is not ``module``."""
    bias: str = "never"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture; see ``docs/families.md`` for the meaning of every key."""

    name: str
    title: str
    source: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config: ConfigKeys
    block: BlockRow
    norm: NormRow
    embed: EmbedRow
    unembed: UnembedRow
    branches: tuple[BranchRow, ...]
    runtimes: Mapping[str, Runtime]
    run: Mapping[str, tuple[str, ...]]
    """For every runtime, the carriers of this family that tests have run in it."""
    recasts: tuple[Recast, ...]
    gguf: GgufNames | None
    """None where llama.cpp has no such architecture, or nobody has written its names down."""

    @property
    def linears(self) -> tuple[LinearRow, ...]:
        """The linear layers of a block, in the order of the forward pass."""
        return tuple(row for branch in self.branches for row in (*branch.reads, *branch.writes))

    @property
    def tier(self) -> Literal["core", "served"]:
        """``served`` where the table says what runtimes do with the family, else ``core``."""
        return "served" if self.runtimes or self.gguf is not None else "core"


MISSING = object()  # no value and no default: never equal to what a condition allows


def configured(family: Family, config: Mapping[str, Json], key: str) -> Json:
    """Return the value of a config key, its default when it is unsaid, or ``MISSING``."""
    return config.get(key, family.config.defaults.get(key, MISSING))


DIMENSIONS = ("layers", "hidden", "vocab", "heads", "kv_heads", "head_dim", "inner", "experts")
OPTIONAL = dict.fromkeys(("kv_heads", "head_dim", "inner", "experts"), "")  # no key of the config


def parse_family(text: str, where: str) -> Family:
    """Return the family that a TOML text describes.

    Raises:
        FamilyError: the text is no TOML, lacks a key, or holds an unknown one.
    """
    root = Section.parse(text, "the family table", where)
    branches = tuple(_branch(row, where) for row in root.take("branch", list))
    unembed = root.table("unembed").read(UnembedRow)
    modules = {row.module for branch in branches for row in (*branch.reads, *branch.writes)}
    names = root.optional("gguf", dict)
    family = root.read(
        Family,
        config=_config(root),
        block=root.table("block").read(BlockRow),
        norm=root.table("norm").read(NormRow),
        embed=root.table("embed").read(EmbedRow),
        unembed=unembed,
        branches=branches,
        runtimes=read_runtimes(root.take("runtime", dict, {}), modules | {unembed.module}, where),
        run=read_run(root.table("run", optional=True)),
        recasts=tuple(
            _recast(name, row, f"{where} [recast.{name}]")
            for name, row in root.take("recast", dict, {}).items()
        ),
        gguf=None if names is None else Section(names, f"{where} [gguf]").read(GgufNames),
    )
    _check_flags(family, where)
    _check_gguf(family, where)
    return family


def _config(root: Section) -> ConfigKeys:
    config, dims = root.table("config", optional=True), root.table("dims")
    keys = ConfigKeys(
        when=root.conditions("when"),
        must=root.conditions("must"),
        flags=root.take("flags", dict, {}),
        defaults=root.take("defaults", dict, {}),
        dims={key: dims.take(key, str, OPTIONAL.get(key)) for key in DIMENSIONS},
        harmless=config.value("harmless", tuple[str, ...], ()),
    )
    config.close()
    dims.close()
    return keys


def _branch(row: Mapping[str, Json], where: str) -> BranchRow:
    section = Section(row, f"{where} [[branch]]")
    section.where += f" {row.get('name')}"
    return section.read(
        BranchRow,
        norm_in=section.value("norm_in", str) or None,
        norm_out=section.value("norm_out", str) or None,
        reads=tuple(_linear(r, section.where) for r in section.take("reads", list)),
        writes=tuple(_linear(r, section.where) for r in section.take("writes", list)),
    )


def _linear(row: Mapping[str, Json], where: str) -> LinearRow:
    section = Section(row, f"{where} {row.get('module') if isinstance(row, Mapping) else row!r}")
    kinds = section.value("sites", tuple[str, ...], ())
    return section.read(LinearRow, sites=tuple(_site_kind(kind, section.where) for kind in kinds))


def _recast(name: str, row: Mapping[str, Json], where: str) -> Recast:
    section = Section(row, where)
    return section.read(Recast, family=name, when=section.conditions("when"))


def _site_kind(kind: str, where: str) -> SiteKind:
    if kind not in tuple(SiteKind):
        raise FamilyError(
            f"sites names {kind!r}, which is no site",
            where=where,
            fix=f"the sites are {', '.join(SiteKind)}",
        )
    return SiteKind(kind)


def _check_flags(family: Family, where: str) -> None:
    for key, default in family.config.flags.items():
        if not isinstance(default, bool):
            raise FamilyError(f"{key} = {default!r} is no boolean", where=f"{where} [flags]")
    for bias in {row.bias for row in family.linears} | {family.unembed.bias}:
        if bias not in ("always", "never", *family.config.flags):
            raise FamilyError(
                f"bias = {bias!r} is neither always, never nor a key of [flags]", where=where
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
