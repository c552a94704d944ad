"""``Family``: one architecture as a closed TOML table, read strictly.

A table states the forward pass as data: which branches read the residual stream through which norm,
which linear layers read and write, on which axis, where biases can live, what a config key must be.
An unknown key, a missing key or a value of the wrong kind is an error: data that no code checks
would be folklore.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from bake.errors import FamilyError
from bake.sites import SiteKind

T = TypeVar("T")
Json = Any  # a value of config.json: the one place where the type is the file's, not ours


@dataclass(frozen=True, slots=True)
class LinearRow:
    """A linear layer of a block, as the table names it."""

    module: str
    """Name of the tensors without ``.weight``, below the block's path (``{expert}`` counts)."""
    sites: tuple[SiteKind, ...]
    """For a reader the site of each fused output, for a writer the one site of its input."""
    bias: str
    """``always``, ``never``, or the config flag that gives the layer its bias."""
    layout: Literal["linear", "conv1d"]
    """``linear`` stores [out, in], ``conv1d`` stores [in, out]."""
    fuse: Literal["concat", "heads"]
    """How several outputs share the rows: one after another, or interleaved head by head."""
    live: str | None
    """Path of the module in a loaded transformers model where it differs; "" where none exists."""


@dataclass(frozen=True, slots=True)
class BranchRow:
    """One branch of a block: from a stream site through readers and writers to a stream site."""

    name: Literal["attn", "mlp"]
    source: SiteKind
    target: SiteKind
    module: str
    """Path of the branch's module in a loaded model, below the block."""
    norm_in: str | None
    norm_out: str | None
    gain: float | str
    """A number, or the config key that holds it."""
    reads: tuple[LinearRow, ...]
    writes: tuple[LinearRow, ...]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What one runtime does with checkpoints of this family."""

    biases: tuple[str, ...]
    """The linear layers whose bias it applies; every other bias it drops or refuses."""
    extra_bias: Literal["dropped", "refused"]
    """What it does with a bias tensor that it has no slot for."""
    untied_head: bool
    """Whether it loads an output head that differs from the embedding."""
    source: str
    lora: tuple[str, ...] | None
    """What an adapter may change there: some of ``ADAPTABLE``; None where nothing is known."""
    control_vector: bool | None
    """Whether it adds control vectors behind the blocks; None where nothing is known."""


ADAPTABLE = ("linear", "expert", "embed", "positions", "head")
"""What a low-rank adapter can be for: a linear layer of a block, an expert's, a table, the head."""


@dataclass(frozen=True, slots=True)
class Recast:
    """How to declare a model of this family as one of another, exactly."""

    family: str
    when: Mapping[str, tuple[Json, ...]]
    """Config keys and the values they must have."""
    set: Mapping[str, Json]
    drop: tuple[str, ...]
    explicit: tuple[str, ...]
    """Keys whose default of the source class is written out where config.json leaves it unsaid."""


@dataclass(frozen=True, slots=True)
class GgufNames:
    """How llama.cpp's converter names and lays out the tensors of this family."""

    arch: str
    """``general.architecture`` of the file."""
    source: str
    embed: str
    positions: tuple[str, ...]
    """In the order of the family's own positions."""
    unembed: str
    final_norm: str
    linears: Mapping[str, str]
    """Name below ``blk.{layer}`` of every linear layer, by module; experts share a stacked one."""
    norms: Mapping[str, str]
    """The same for the norms of a block."""
    rows: Mapping[str, Literal["rotary", "parts"]]
    """Linear layers whose outputs the converter orders anew, weight and bias alike: ``rotary``
    interleaves the halves of every head, ``parts`` lays fused outputs one after another."""
    untouched: tuple[str, ...]
    """Further tensors of the file that no edit touches."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture; see ``docs/families.md`` for the meaning of every key."""

    name: str
    title: str
    source: str
    architectures: tuple[str, ...]
    when: Mapping[str, tuple[Json, ...]]
    must: Mapping[str, tuple[Json, ...]]
    flags: Mapping[str, bool]
    """Config keys that give linear layers a bias, each with the class's default."""
    defaults: Mapping[str, Json]
    """Defaults of the config class, for keys that config.json may leave unsaid."""
    dims: Mapping[str, str]
    block_path: str
    optional_prefix: str
    untouched: tuple[str, ...]
    norm_kind: Literal["rms", "layer"]
    norm_gain_offset: float
    norm_bias: bool
    embed: str
    embed_multiplier: float | str
    embed_multiplied_by: Literal["module", "model"]
    """Who multiplies: the embedding module itself (Gemma), or the model behind it (Granite)."""
    positions: tuple[str, ...]
    unembed: str
    unembed_live: str
    unembed_bias: str
    final_norm: str
    branches: tuple[BranchRow, ...]
    runtimes: Mapping[str, Runtime]
    recasts: tuple[Recast, ...]
    gguf: GgufNames | None
    """None where llama.cpp has no such architecture, or nobody has written its names down."""


MISSING = object()  # no value and no default: never equal to what a condition allows


def configured(family: Family, config: Mapping[str, Json], key: str) -> Json:
    """Return the value of a config key, its default when it is unsaid, or ``MISSING``."""
    return config.get(key, family.defaults.get(key, MISSING))


DIMENSIONS = ("layers", "hidden", "vocab", "heads", "kv_heads", "head_dim", "inner", "experts")
OPTIONAL = dict.fromkeys(("kv_heads", "head_dim", "inner", "experts"), "")  # no key of the config


class Section:
    """A TOML table that must be emptied: every key is taken once, with its type."""

    def __init__(self, values: Mapping[str, Json], where: str) -> None:
        if not isinstance(values, Mapping):
            raise FamilyError(f"a table is meant, not {values!r}", where=where)
        self._values = dict(values)
        self._known: list[str] = []
        self.where = where

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of ``key``; raise when it is missing or of another type."""
        self._known.append(key)
        if key not in self._values:
            if default is None:
                raise FamilyError(f"the key {key!r} is missing", where=self.where)
            return default
        value = self._values.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise FamilyError(f"{key} = {value!r} is no {kind.__name__}", where=self.where)
        return value

    def take_optional(self, key: str) -> Json:
        """Return the value of ``key`` whatever its type, or None."""
        self._known.append(key)
        return self._values.pop(key, None)

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self.take(key, list, None if default is None else list(default))
        if not all(isinstance(value, str) for value in values):
            raise FamilyError(f"{key} = {values!r} is no list of strings", where=self.where)
        return tuple(values)

    def close(self) -> None:
        """Raise when a key is left over, naming the nearest known one."""
        for key in self._values:
            near = difflib.get_close_matches(key, self._known, n=1)
            raise FamilyError(
                f"unknown key {key!r}",
                where=self.where,
                fix=f"did you mean {near[0]!r}?"
                if near
                else f"known keys: {', '.join(self._known)}",
            )


def parse_family(text: str, where: str) -> Family:
    """Return the family that a TOML text describes.

    Raises:
        FamilyError: the text is no TOML, lacks a key, or holds an unknown one.
    """
    try:
        root = Section(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise FamilyError(f"not valid TOML: {error}", where=where) from error
    block = Section(root.take("block", dict), f"{where} [block]")
    norm = Section(root.take("norm", dict), f"{where} [norm]")
    embed = Section(root.take("embed", dict), f"{where} [embed]")
    unembed = Section(root.take("unembed", dict), f"{where} [unembed]")
    dims = Section(root.take("dims", dict), f"{where} [dims]")
    unembed_module = unembed.take("module", str)
    family = Family(
        name=root.take("name", str),
        title=root.take("title", str),
        source=root.take("source", str),
        architectures=root.strings("architectures"),
        when=_conditions(root.take("when", dict, {}), f"{where} [when]"),
        must=_conditions(root.take("must", dict, {}), f"{where} [must]"),
        flags=_flags(root.take("flags", dict, {}), f"{where} [flags]"),
        defaults=root.take("defaults", dict, {}),
        dims={key: dims.take(key, str, OPTIONAL.get(key)) for key in DIMENSIONS},
        block_path=block.take("path", str),
        optional_prefix=block.take("optional_prefix", str, ""),
        untouched=block.strings("untouched", ()),
        norm_kind=_choice(norm, "kind", ("rms", "layer")),
        norm_gain_offset=float(norm.take("gain_offset", int, 0)),
        norm_bias=norm.take("bias", bool, False),
        embed=embed.take("module", str),
        embed_multiplier=_number_or_key(embed, "multiplier"),
        embed_multiplied_by=_choice(embed, "multiplied_by", ("module", "model"), "module"),
        positions=embed.strings("positions", ()),
        unembed=unembed_module,
        unembed_live=unembed.take("live", str, unembed_module),
        unembed_bias=unembed.take("bias", str, "never"),
        final_norm=unembed.take("norm_in", str),
        branches=tuple(_branch(row, where) for row in root.take("branch", list)),
        runtimes={
            name: _runtime(row, f"{where} [runtime.{name}]")
            for name, row in root.take("runtime", dict).items()
        },
        recasts=tuple(
            _recast(name, row, f"{where} [recast.{name}]")
            for name, row in root.take("recast", dict, {}).items()
        ),
        gguf=_gguf(root.take_optional("gguf"), f"{where} [gguf]"),
    )
    for section in (root, block, norm, embed, unembed, dims):
        section.close()
    _check_flags(family, where)
    _check_gguf(family, where)
    return family


def _branch(row: Mapping[str, Json], where: str) -> BranchRow:
    section = Section(row, f"{where} [[branch]]")
    section.where += f" {row.get('name')}"
    branch = BranchRow(
        name=_choice(section, "name", ("attn", "mlp")),
        source=SiteKind(_choice(section, "from", ("resid_pre", "resid_mid"))),
        target=SiteKind(_choice(section, "to", ("resid_mid", "resid_post"))),
        module=section.take("module", str),
        norm_in=section.take("norm_in", str, "") or None,
        norm_out=section.take("norm_out", str, "") or None,
        gain=_number_or_key(section, "gain"),
        reads=tuple(_linear(r, section.where) for r in section.take("reads", list)),
        writes=tuple(_linear(r, section.where) for r in section.take("writes", list)),
    )
    section.close()
    return branch


def _linear(row: Mapping[str, Json], where: str) -> LinearRow:
    section = Section(row, f"{where} {row.get('module') if isinstance(row, Mapping) else row!r}")
    linear = LinearRow(
        module=section.take("module", str),
        sites=tuple(_site_kind(section, kind) for kind in section.strings("sites", ())),
        bias=section.take("bias", str),
        layout=_choice(section, "layout", ("linear", "conv1d"), "linear"),
        fuse=_choice(section, "fuse", ("concat", "heads"), "concat"),
        live=_text_or_none(section, "live"),
    )
    section.close()
    return linear


def _runtime(row: Mapping[str, Json], where: str) -> Runtime:
    section = Section(row, where)
    runtime = Runtime(
        biases=section.strings("biases"),
        extra_bias=_choice(section, "extra_bias", ("dropped", "refused")),
        untied_head=section.take("untied_head", bool),
        source=section.take("source", str),
        lora=_adaptable(section),
        control_vector=_optional_boolean(section, "control_vector"),
    )
    section.close()
    return runtime


def _adaptable(section: Section) -> tuple[str, ...] | None:
    values = section.take_optional("lora")
    if values is None:
        return None
    if not isinstance(values, list) or not all(value in ADAPTABLE for value in values):
        raise FamilyError(
            f"lora = {values!r} is no list of {', '.join(ADAPTABLE)}", where=section.where
        )
    return tuple(values)


def _optional_boolean(section: Section, key: str) -> bool | None:
    value = section.take_optional(key)
    if value is not None and not isinstance(value, bool):
        raise FamilyError(f"{key} = {value!r} is no bool", where=section.where)
    return value


def _recast(name: str, row: Mapping[str, Json], where: str) -> Recast:
    section = Section(row, where)
    recast = Recast(
        family=name,
        when=_conditions(section.take("when", dict, {}), where),
        set=section.take("set", dict),
        drop=section.strings("drop", ()),
        explicit=section.strings("explicit", ()),
    )
    section.close()
    return recast


def _gguf(row: Mapping[str, Json] | None, where: str) -> GgufNames | None:
    if row is None:
        return None
    section = Section(row, where)
    rows = Section(section.take("rows", dict, {}), f"{where} rows")
    names = GgufNames(
        arch=section.take("arch", str),
        source=section.take("source", str),
        embed=section.take("embed", str, "token_embd"),
        positions=section.strings("positions", ()),
        unembed=section.take("unembed", str, "output"),
        final_norm=section.take("final_norm", str, "output_norm"),
        linears=_strings_by_key(section.take("linears", dict), f"{where} linears"),
        norms=_strings_by_key(section.take("norms", dict), f"{where} norms"),
        rows={key: _choice(rows, key, ("rotary", "parts")) for key in row.get("rows", {})},
        untouched=section.strings("untouched", ()),
    )
    section.close()
    return names


def _strings_by_key(values: Mapping[str, Json], where: str) -> Mapping[str, str]:
    section = Section(values, where)
    return {key: section.take(key, str) for key in values}


def _conditions(values: Mapping[str, Json], where: str) -> Mapping[str, tuple[Json, ...]]:
    for key, allowed in values.items():
        if not isinstance(allowed, list):
            raise FamilyError(f"{key} = {allowed!r} is no list of allowed values", where=where)
    # TOML has no null: the table writes "null" for it.
    return {
        key: tuple(None if value == "null" else value for value in allowed)
        for key, allowed in values.items()
    }


def _flags(values: Mapping[str, Json], where: str) -> Mapping[str, bool]:
    for key, default in values.items():
        if not isinstance(default, bool):
            raise FamilyError(f"{key} = {default!r} is no boolean", where=where)
    return dict(values)


def _choice(
    section: Section, key: str, allowed: tuple[str, ...], default: str | None = None
) -> Any:
    value = section.take(key, str, default)
    if value not in allowed:
        raise FamilyError(
            f"{key} = {value!r} is not one of {', '.join(allowed)}", where=section.where
        )
    return value


def _site_kind(section: Section, kind: str) -> SiteKind:
    if kind not in tuple(SiteKind):
        raise FamilyError(
            f"sites names {kind!r}, which is no site",
            where=section.where,
            fix=f"the sites are {', '.join(SiteKind)}",
        )
    return SiteKind(kind)


def _text_or_none(section: Section, key: str) -> str | None:
    value = section.take_optional(key)
    if value is not None and not isinstance(value, str):
        raise FamilyError(f"{key} = {value!r} is no str", where=section.where)
    return value


def _number_or_key(section: Section, key: str) -> float | str:
    value = section.take_optional(key)
    if value is None:
        return 1.0
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise FamilyError(
        f"{key} = {value!r} is neither a number nor a config key", where=section.where
    )


def _check_flags(family: Family, where: str) -> None:
    rows = [row for branch in family.branches for row in (*branch.reads, *branch.writes)]
    for bias in {row.bias for row in rows} | {family.unembed_bias}:
        if bias not in ("always", "never", *family.flags):
            raise FamilyError(
                f"bias = {bias!r} is neither always, never nor a key of [flags]", where=where
            )
    modules = {row.module for row in rows} | {family.unembed}
    for name, runtime in family.runtimes.items():
        for module in runtime.biases:
            if module not in modules:
                raise FamilyError(
                    f"biases names {module!r}, which is no linear layer of the table",
                    where=f"{where} [runtime.{name}]",
                )


def _check_gguf(family: Family, where: str) -> None:
    """Require a GGUF name for everything that an edit may touch, and for nothing else."""
    names, branches = family.gguf, family.branches
    if names is None:
        return
    linears = {row.module for branch in branches for row in (*branch.reads, *branch.writes)}
    norms = {name for branch in branches for name in (branch.norm_in, branch.norm_out) if name}
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
    if len(names.positions) != len(family.positions):
        raise FamilyError(
            f"positions names {len(names.positions)} tables, [embed] {len(family.positions)}",
            where=f"{where} [gguf]",
        )
