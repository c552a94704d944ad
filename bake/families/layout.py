"""``Layout``: a family resolved against one model, with every tensor claimed exactly once.

The layout is what ``plan`` and ``steer`` both read: the plan its tensor names and slots, the
reference the paths of live modules. It is made from config.json and tensor headers alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bake.errors import CheckpointError, FamilyError, UsageError
from bake.families.runtime import Runtime
from bake.families.section import Json
from bake.families.table import MISSING, BranchRow, Family, LinearRow, configured
from bake.sites import HEAD_KINDS, STREAM_KINDS, Site, SiteKind

Shape = tuple[int, ...]
DTYPES = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class BiasSlot:
    """Where the bias of a linear layer lives, or would live."""

    name: str
    size: int
    state: Literal["present", "closed", "never"]
    """``present`` in the checkpoint, ``closed`` behind a config flag, or ``never`` possible."""
    flag: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a linear layer's output that one site stands for."""

    site: Site
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of the model."""

    module: str
    """The table's name for it, the key of ``Runtime.biases``."""
    weight: str
    shape: Shape
    output_axis: int
    """The axis of the weight that its output is on: 0 for [out, in], 1 for Conv1D's [in, out]."""
    bias: BiasSlot
    parts: tuple[Part, ...]
    """Outputs at sites, for a reader; empty for a writer, a router or an expert."""
    input_site: Site | None
    live: str | None
    """Path of the module in a loaded model; None where it is no module of its own."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation layer; its gain is ``gain_offset`` + the tensor ``weight``."""

    weight: str
    bias: str | None
    kind: Literal["rms", "layer"]
    gain_offset: float
    live: str
    site: Site | None


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of one block, between two points of the residual stream."""

    name: Literal["attn", "mlp"]
    layer: int
    source: int
    """Index of the stream point that it reads."""
    target: int
    """Index of the stream point that it writes to."""
    live: str
    norm_in: Norm | None
    norm_out: Norm | None
    gain: float
    reads: tuple[Linear, ...]
    writes: tuple[Linear, ...]
    output_site: Site


@dataclass(frozen=True, slots=True)
class Layout:
    """A family resolved against one model."""

    family: Family
    dims: Mapping[str, int]
    flags: Mapping[str, bool]
    dtype: str
    points: tuple[tuple[Site, ...], ...]
    """The stream points in forward order, each with every site that names it."""
    embed: str
    embed_multiplier: float
    positions: tuple[str, ...]
    branches: tuple[Branch, ...]
    final_norm: Norm
    unembed: Linear
    tied: bool
    block_live: str
    embed_live: str
    untouched: tuple[str, ...]
    shapes: Mapping[str, Shape]
    sites: tuple[Site, ...]
    """Every site of the model (heads left out), in forward order."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.dims["layers"]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.dims["hidden"]

    @property
    def stream(self) -> tuple[Site, ...]:
        """The sites that ``at = "resid"`` stands for: ``resid_pre.0``, then after every write."""
        return tuple(point[0] for point in self.points)

    def width(self, site: Site) -> int:
        """Return the width of the activations at a site.

        Raises:
            UsageError: the model has no such site.
        """
        if Site(site.kind, site.layer) not in self.sites:
            kinds = sorted({s.kind for s in self.sites}, key=list(SiteKind).index)
            raise UsageError(
                f"{self.family.name} has no site {site}",
                why=f"its {self.layers} blocks have {', '.join(kinds)}",
                fix="name one of these, or run `bake families MODEL`",
            )
        if site.kind in HEAD_KINDS:
            heads = self.dims["kv_heads" if site.kind in (SiteKind.K, SiteKind.V) else "heads"]
            if site.head is None:
                return heads * self.dims["head_dim"]
            if site.head >= heads:
                raise UsageError(f"{site} names head {site.head}, but there are {heads}")
            return self.dims["head_dim"]
        inner = (SiteKind.MLP_GATE, SiteKind.MLP_UP, SiteKind.MLP_ACT)
        return self.dims["inner"] if site.kind in inner else self.hidden


def resolve(
    family: Family,
    config: Mapping[str, Json],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
) -> Layout:
    """Return the layout of one model.

    Args:
        family: its table.
        config: the parsed config.json.
        shapes: the shape of every tensor of the checkpoint, by name.
        dtypes: the storage dtype of every tensor, as safetensors names it.

    Raises:
        FamilyError: the config contradicts the table, or a tensor is claimed by nothing.
        CheckpointError: a tensor that the table names is missing or has another shape.
    """
    return _Resolver(family, config, shapes, dtypes).layout()


class _Resolver:
    """Walks a table once, claiming tensors by name."""

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Json],
        shapes: Mapping[str, Shape],
        dtypes: Mapping[str, str],
    ) -> None:
        self.family, self.config, self.shapes, self.dtypes = family, config, shapes, dtypes
        self.claimed: set[str] = set()
        self.norms: dict[str, Norm] = {}
        self._check_config()
        self.dims = self._dims()
        self.flags = {flag: self._flag(flag, default) for flag, default in family.flags.items()}
        prefix = family.optional_prefix
        stripped = prefix and f"{family.embed}.weight" not in shapes
        self.prefix = prefix if stripped else ""

    def _check_config(self) -> None:
        if self.config.get("quantization_config") is not None:
            raise FamilyError(
                "the checkpoint is quantised",
                where="config.json quantization_config",
                why="an edit must be folded into weights, and these are codes",
                fix="use the unquantised checkpoint, or dequantise this one first",
            )
        for key, allowed in self.family.must.items():
            value = configured(self.family, self.config, key)
            if value is not MISSING and value not in allowed:
                raise FamilyError(
                    f"{key} = {value!r}, but the table {self.family.name!r} is written for "
                    + " or ".join(repr(value) for value in allowed),
                    where="config.json",
                    why="the key changes the arithmetic of the forward pass",
                    fix="bring a table for this variant with --family FILE",
                )

    def _flag(self, key: str, default: Json) -> bool:
        value = self.config.get(key, default)
        if value is MISSING:
            raise FamilyError(f"the key {key!r} is missing", where="config.json")
        if not isinstance(value, bool):
            raise FamilyError(f"{key} = {value!r} is no boolean", where="config.json")
        return value

    def _dims(self) -> dict[str, int]:
        def value(name: str) -> int | None:
            key = self.family.dims[name]
            found = configured(self.family, self.config, key) if key else None
            found = None if found is MISSING else found
            size = isinstance(found, int) and not isinstance(found, bool) and found > 0
            if found is not None and not size:
                raise FamilyError(f"{key} = {found!r} is no positive integer", where="config.json")
            return found

        dims = {}
        for name in ("layers", "hidden", "vocab", "heads"):
            size = value(name)
            if size is None:
                raise FamilyError(
                    f"the key {self.family.dims[name]!r} is missing", where="config.json"
                )
            dims[name] = size
        dims["kv_heads"] = value("kv_heads") or dims["heads"]
        dims["head_dim"] = value("head_dim") or dims["hidden"] // dims["heads"]
        # GPT-2 leaves n_inner unsaid when it is 4 × n_embd (configuration_gpt2.py).
        dims["inner"] = value("inner") or 4 * dims["hidden"]
        dims["experts"] = value("experts") or 0
        return dims

    def layout(self) -> Layout:
        family, hidden, vocab = self.family, self.dims["hidden"], self.dims["vocab"]
        embed = self._claim(f"{family.embed}.weight", (vocab, hidden), "the embedding")
        positions = tuple(
            self._claim(f"{name}.weight", (None, hidden), "the positions")
            for name in family.positions
        )
        points = self._points()
        index = {site: i for i, point in enumerate(points) for site in point}
        branches = tuple(
            self._branch(row, layer, index)
            for layer in range(self.dims["layers"])
            for row in family.branches
        )
        final_norm = self._norm(family.final_norm, Site(SiteKind.LN_FINAL_OUT))
        tied = self._tied()
        unembed = self._unembed(tied, embed)
        self._close()
        return Layout(
            family=family,
            dims=self.dims,
            flags=self.flags,
            dtype=self.dtypes[embed],
            points=points,
            embed=embed,
            embed_multiplier=self._number(family.embed_multiplier),
            positions=positions,
            branches=branches,
            final_norm=final_norm,
            unembed=unembed,
            tied=tied,
            block_live=family.block_path,
            embed_live=family.embed,
            untouched=tuple(sorted(set(self.shapes) - self.claimed)),
            shapes=self.shapes,
            sites=_sites(points, branches),
        )

    def _points(self) -> tuple[tuple[Site, ...], ...]:
        kinds = list(dict.fromkeys(row.target for row in self.family.branches))
        points: list[tuple[Site, ...]] = [(Site(SiteKind.RESID_PRE, 0),)]
        for layer in range(self.dims["layers"]):
            points += [(Site(kind, layer),) for kind in sorted(kinds, key=STREAM_KINDS.index)]
            if layer + 1 < self.dims["layers"]:
                points[-1] += (Site(SiteKind.RESID_PRE, layer + 1),)
        return tuple(points)

    def _branch(self, row: BranchRow, layer: int, index: Mapping[Site, int]) -> Branch:
        first = row.name == "attn"
        sites = (
            (SiteKind.LN1_OUT, SiteKind.LN1_POST_OUT, SiteKind.ATTN_OUT)
            if first
            else (SiteKind.LN2_OUT, SiteKind.LN2_POST_OUT, SiteKind.MLP_OUT)
        )
        norms = [
            None if name is None else self._norm(name, Site(kind, layer), layer)
            for name, kind in zip((row.norm_in, row.norm_out), sites, strict=False)
        ]
        return Branch(
            name=row.name,
            layer=layer,
            source=index[Site(row.source, layer)],
            target=index[Site(row.target, layer)],
            live=f"{self._block(layer)}.{row.module}",
            norm_in=norms[0],
            norm_out=norms[1],
            gain=self._number(row.gain),
            reads=tuple(x for r in row.reads for x in self._linears(r, layer, reads=True)),
            writes=tuple(x for r in row.writes for x in self._linears(r, layer, reads=False)),
            output_site=Site(sites[2], layer),
        )

    def _linears(self, row: LinearRow, layer: int, *, reads: bool) -> list[Linear]:
        if "{expert}" not in row.module:
            return [self._linear(row, layer, row.module, reads=reads)]
        if not self.dims["experts"]:
            raise FamilyError(
                f"the key {self.family.dims['experts']!r} is missing", where="config.json"
            )
        return [
            self._linear(row, layer, row.module.replace("{expert}", str(e)), reads=reads)
            for e in range(self.dims["experts"])
        ]

    def _linear(self, row: LinearRow, layer: int, module: str, *, reads: bool) -> Linear:
        block = self._block(layer)
        sites = tuple(Site(kind, layer) for kind in row.sites)
        widths = [self._width(site.kind) for site in sites]
        output_axis = 0 if row.layout == "linear" else 1
        outer = (sum(widths) or None) if reads else self.dims["hidden"]
        inner = self.dims["hidden"] if reads else (sum(widths) or None)
        expected = (outer, inner) if output_axis == 0 else (inner, outer)
        weight = self._claim(f"{block}.{module}.weight", expected, f"the {row.layout} layer")
        shape = self.shapes[weight]
        live = {None: f"{block}.{module}", "": None}.get(row.live, f"{block}.{row.live}")
        return Linear(
            module=row.module,
            weight=weight,
            shape=shape,
            output_axis=output_axis,
            bias=self._bias(f"{block}.{module}.bias", row.bias, shape[output_axis]),
            parts=self._parts(row, sites, widths) if reads else (),
            input_site=sites[0] if sites and not reads else None,
            live=live,
        )

    def _parts(
        self, row: LinearRow, sites: tuple[Site, ...], widths: list[int]
    ) -> tuple[Part, ...]:
        if row.fuse == "concat":
            starts = [sum(widths[:i]) for i in range(len(widths))]
            return tuple(
                Part(site, range(start, start + width))
                for site, start, width in zip(sites, starts, widths, strict=True)
            )
        # Head by head: rows [head, site, head_dim], as GPT-NeoX views its fused projection.
        size, count = self.dims["head_dim"], len(sites)
        return tuple(
            Part(
                site,
                tuple(
                    (head * count + i) * size + j
                    for head in range(self.dims["heads"])
                    for j in range(size)
                ),
            )
            for i, site in enumerate(sites)
        )

    def _bias(self, name: str, rule: str, size: int) -> BiasSlot:
        disk = self._disk(name)
        if rule == "never":
            return BiasSlot(disk, size, "never", None)
        if rule == "always" or self.flags[rule]:
            self._claim(name, (size,), "the bias")
            return BiasSlot(disk, size, "present", None if rule == "always" else rule)
        return BiasSlot(disk, size, "closed", rule)

    def _norm(self, name: str, site: Site, layer: int | None = None) -> Norm:
        path = name if layer is None else f"{self._block(layer)}.{name}"
        if path in self.norms:  # parallel branches may read one norm together
            return self.norms[path]
        hidden = self.dims["hidden"]
        weight = self._claim(f"{path}.weight", (hidden,), "the norm")
        bias = None
        if self.family.norm_bias:
            bias = self._claim(f"{path}.bias", (hidden,), "the norm")
        family = self.family
        offset = family.norm_gain_offset
        self.norms[path] = Norm(weight, bias, family.norm_kind, offset, path, site)
        return self.norms[path]

    def _tied(self) -> bool:
        key = "tie_word_embeddings"
        return self._flag(key, self.family.defaults.get(key, MISSING))

    def _unembed(self, tied: bool, embed: str) -> Linear:
        family = self.family
        name = self._disk(f"{family.unembed}.weight")
        if tied and name in self.shapes:
            # Some checkpoints store the tied head twice; transformers ties it all the same.
            raise FamilyError(
                f"tie_word_embeddings is true, but the checkpoint stores {name} as well",
                why="runtimes disagree on which of the two they load",
                fix="set tie_word_embeddings to false in config.json, or remove the tensor",
            )
        if not tied:
            size = (self.dims["vocab"], self.dims["hidden"])
            self._claim(f"{family.unembed}.weight", size, "the output head")
        shape = self.shapes[embed if tied else name]
        bias = self._bias(f"{family.unembed}.bias", family.unembed_bias, shape[0])
        live = family.unembed_live
        return Linear(family.unembed, name, shape, 0, bias, (), None, live)

    def _claim(self, name: str, expected: tuple[int | None, ...], what: str) -> str:
        """Claim a tensor by its table name; None in the expected shape leaves that axis free."""
        disk = self._disk(name)
        if disk not in self.shapes:
            raise CheckpointError(
                f"{what} {disk} is missing from the checkpoint",
                why=f"the table {self.family.name!r} expects it",
                fix="fetch the checkpoint again, or bring a table that fits with --family FILE",
            )
        shape = self.shapes[disk]
        if len(shape) != len(expected) or any(
            want is not None and want != have for want, have in zip(expected, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise CheckpointError(
                f"{what} {disk} has the shape {list(shape)} where [{wanted}] is meant",
                why="config.json and the tensors disagree",
            )
        if self.dtypes[disk] not in DTYPES:
            raise FamilyError(
                f"the checkpoint stores {what} {disk} as {self.dtypes[disk]}",
                why="an edit must be folded into weights, and these are codes",
                fix=f"use a checkpoint in one of {', '.join(DTYPES)}",
            )
        if disk in self.claimed:
            raise FamilyError(f"the tensor {disk} is claimed twice", where=self.family.name)
        self.claimed.add(disk)
        return disk

    def _close(self) -> None:
        blocks = re.escape(self.family.block_path).replace(r"\{layer\}", r"\d+")
        allowed = [re.compile(f"{blocks}\\.{re.escape(name)}") for name in self.family.untouched]
        for name in self.shapes:
            if name in self.claimed:
                continue
            full = f"{self.prefix}{name}"
            if not any(pattern.fullmatch(full) for pattern in allowed):
                raise FamilyError(
                    f"the checkpoint's tensor {name} is not in the table {self.family.name!r}",
                    why="a tensor that bake does not know could read or write the residual stream",
                    fix="bring a table that names it with --family FILE",
                )

    def _disk(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _block(self, layer: int) -> str:
        return self.family.block_path.replace("{layer}", str(layer))

    def _width(self, kind: SiteKind) -> int:
        if kind in (SiteKind.Q, SiteKind.Z):
            return self.dims["heads"] * self.dims["head_dim"]
        if kind in (SiteKind.K, SiteKind.V):
            return self.dims["kv_heads"] * self.dims["head_dim"]
        return self.dims["inner"]

    def _number(self, value: float | str) -> float:
        if isinstance(value, float):
            return value
        if value == "sqrt_hidden":
            return math.sqrt(self.dims["hidden"])
        number = configured(self.family, self.config, value)
        real = isinstance(number, int | float) and not isinstance(number, bool)
        if not real or not math.isfinite(number):
            raise FamilyError(f"the key {value!r} is missing or no number", where="config.json")
        return float(number)


def _sites(points: tuple[tuple[Site, ...], ...], branches: tuple[Branch, ...]) -> tuple[Site, ...]:
    found = {Site(SiteKind.EMBED), *(site for point in points for site in point)}
    for branch in branches:
        norms = (branch.norm_in, branch.norm_out)
        found |= {norm.site for norm in norms if norm is not None and norm.site is not None}
        found |= {part.site for linear in branch.reads for part in linear.parts}
        found |= {w.input_site for w in branch.writes if w.input_site is not None}
        found.add(branch.output_site)
    found.add(Site(SiteKind.LN_FINAL_OUT))
    return tuple(sorted(found, key=lambda site: site.order))


def runtime_of(layout: Layout, name: str) -> Runtime | None:
    """Return what the table says of a runtime, or None where it says nothing."""
    return layout.family.runtimes.get(name)
