"""Widening: the same model with a wider stream, whose new dimensions are zero everywhere.

A model of width d with RMSNorms is one of width D: every reader gets zero columns, every writer and
the embedding zero outputs. The norms divide by the root of a mean over D values instead of d, so
that their gains are multiplied by √(d/D) and their epsilon by d/D. Heads keep their size. Where
norms inside the attention share the epsilon, what they divide is multiplied by √(d/D); where the
embedding is multiplied by √D, its rows are by √(d/D). Where a class takes the size of a head from
the width, heads are added that read nothing and write nothing.

A LayerNorm does not see the mean of the stream. So writers leave it out, which changes nothing, and
the mean of D values is that of d, zero; new dimensions are pairs (s, −s), which keep it so. Where
an edit does see the mean, one of them keeps it, β of its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap, chain, tolerance
from bake.edits import Edit, WeightUpdate
from bake.errors import FamilyError, UsageError
from bake.families import SQRT_HIDDEN, Family, Json, Layout, Linear, configured, size_keys
from bake.plan.emit import Assembly
from bake.plan.pieces import Gain
from bake.plan.types import BiasUpdate, ConfigChange, PartMap, TensorUpdate
from bake.plan.wide_layout import may_widen, norms, wide_layout
from bake.plan.writers import in_storage
from bake.sites import HEAD_KINDS, INNER_KINDS, SiteKind

STEPS = (64, 32, 16, 8)
"""What a width is a multiple of, besides the number of heads, which transformers wants it to be:
the first with which the model does not grow by more than a thirty-second, or by 64."""
MEAN = 2.0**-8
"""β, at which the mean of a stream is kept that LayerNorms do not see."""
_NORMED = {SiteKind.LN1_OUT, SiteKind.LN2_OUT, SiteKind.LN_FINAL_OUT}
"""Sites of the width of the stream that are not the stream."""


@dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """A model that is widened."""

    base: Layout
    layout: Layout
    """The same model at its new width."""
    eps: float
    """That of the base's norms."""
    size: float = 0.0
    """What the embedding sets one dimension to, for whose energy the epsilon makes room."""
    keeps_mean: bool = False
    """Whether an edit sees the mean of the stream that LayerNorms leave out."""

    @property
    def fresh(self) -> int:
        """How many dimensions are new, the last ones of the stream."""
        return self.layout.hidden - self.base.hidden

    @property
    def units(self) -> Float[Tensor, "m d"]:
        """Unit vectors along which the wide stream is zero."""
        return self._units[1:] if self.keeps_mean else self._units

    @property
    def _units(self) -> Float[Tensor, "m d"]:
        fresh = torch.eye(self.layout.hidden, dtype=torch.float64)[self.base.hidden :]
        if not self._centred:
            return fresh
        return (fresh[: len(fresh) // 2 * 2 : 2] - fresh[1::2]) / math.sqrt(2)

    @property
    def _centred(self) -> bool:
        return self.base.family.norm.kind == "layer"

    @property
    def _mean(self) -> Float[Tensor, " d"]:
        """The functional that is the mean of the base's dimensions."""
        mean = torch.zeros(self.layout.hidden, dtype=torch.float64)
        mean[: self.base.hidden] = 1 / self.base.hidden
        return mean

    @property
    def into(self) -> LowRankMap:
        """The map from a LayerNorm base's stream, with zeros behind it, to the centred wide one."""
        mean, zeros = self._mean, torch.zeros(self.layout.hidden, dtype=torch.float64)
        left = -self.base.hidden * mean
        if self.keeps_mean:
            left = left + MEAN * self._units[0]
        return LowRankMap(left.unsqueeze(1), mean.unsqueeze(0), zeros)

    @property
    def _new_eps(self) -> float:
        """The epsilon with which a mean over D values is d/D of that of the base."""
        return (self.base.hidden * self.eps - self.size**2) / self.layout.hidden

    @property
    def note(self) -> str:
        """What the plan says of it."""
        before, after = (sum(map(prod, x.shapes.values())) for x in (self.base, self.layout))
        more, keys = after / before - 1, self.base.family.dims
        sizes = {keys.hidden: "hidden"} | ({keys.inner: "inner"} if keys.inner else {})
        grown = [
            f"{key} {self.base.dims[dim]} becomes {self.layout.dims[dim]}"
            for key, dim in sizes.items()
            if self.base.dims[dim] != self.layout.dims[dim]
        ]
        experts = None if self.base.family.widen is None else self.base.family.widen.experts
        if len(grown) > 1 and experts is not None and experts.size not in sizes:
            wider = self.layout.dims["inner"] - self.base.dims["inner"]
            grown.append(f"{experts.size} becomes {wider} more")
        return (
            f"widened: {', '.join(grown)}, every tensor of the stream is written anew, and the "
            f"model has {100 * more:.2g} % more weights"
        )

    def edit(self, edit: Edit) -> Edit:
        """Return an edit as one of the wide model.

        Raises:
            UsageError: its sites are of different kinds, and there it would become different maps.
        """
        kinds = {site.kind for site in edit.sites}
        stream = not kinds & {*HEAD_KINDS, *INNER_KINDS}
        mixed = (kinds & _NORMED and kinds - _NORMED) if self._centred else False
        if mixed or not (stream or kinds <= {*HEAD_KINDS, *INNER_KINDS}):
            raise UsageError(
                f"the edit {edit.concept!r} names {', '.join(sorted(kinds))} together, which a "
                "widened model cannot tell one map for",
                fix="make of it an edit for the stream and one for each other kind of site",
            )
        size = (self.base if edit.sites[0].head is None else self.layout).width(edit.sites[0])
        wide = self.layout.width(edit.sites[0])
        if isinstance(edit.map, AffineMap):
            found = edit.map.scatter(torch.arange(size), wide)
            if self._centred and stream and not kinds & _NORMED:
                found = self._of_stream(found)
            return replace(edit, map=found)
        pad = torch.nn.functional.pad
        assert isinstance(edit.map, WeightUpdate), "conditional edits are refused before"
        left, right = edit.map.left, edit.map.right
        left = pad(left, (0, 0, 0, wide - size))
        inner = self.layout.dims["heads"] - self.base.dims["heads"]
        more = self.fresh
        if stream:  # at a branch's output
            more = self.layout.dims["inner"] - self.base.dims["inner"]
            more = inner * self.layout.dims["head_dim"] if SiteKind.ATTN_OUT in kinds else more
        return replace(edit, map=WeightUpdate(left, pad(right, (0, more))))

    def _of_stream(self, map_: AffineMap) -> AffineMap:
        """Return what a map of the base's stream, with zeros behind it, is on the wide one."""
        left, right = map_.delta_factors()
        mean = right @ self._mean * self.base.hidden  # the functionals of the all-ones vector
        own = right - mean.unsqueeze(1) * self._mean
        if self.keeps_mean:
            own = own + mean.unsqueeze(1) * self._units[0] / MEAN
        into = self.into
        return LowRankMap(into.linear(left.T).T, own, into.linear(map_.bias))

    def gain(self, read: Gain) -> Gain:
        """Return what reads the norms of the wide model."""
        share = math.sqrt(self.base.hidden / self.layout.hidden)
        offset = self.base.family.norm.gain_offset
        biases = {norm.bias for norm in norms(self.base)}

        def wider(name: str) -> Float[Tensor, " d"]:
            if name in biases:
                return torch.nn.functional.pad(read(name), (0, self.fresh))
            gain = share * (offset + read(name))
            return torch.cat([gain, gain.new_full((self.fresh,), share)]) - offset

        return wider

    def config(self, config: Mapping[str, Json]) -> tuple[ConfigChange, ...]:
        """Return what changes in config.json."""
        family, dims = self.base.family, self.layout.dims
        assert family.widen is not None
        new: dict[str, Json] = {
            family.dims.hidden: dims["hidden"],
            **dict.fromkeys(size_keys(family.dims.inner), dims["inner"]),
            family.widen.eps: self._new_eps,
        }
        if (experts := family.widen.experts) is not None:
            size = _number(family, config, experts.size)
            new[experts.size] = round(size) + dims["inner"] - self.base.dims["inner"]
        for own in ("heads", "kv_heads") if family.widen.heads else ("head_dim",):
            keys = filter(None, size_keys(getattr(family.dims, own)))  # of some there is none
            new |= dict.fromkeys(keys, dims[own])
        return tuple(ConfigChange(key, config.get(key), value) for key, value in new.items())

    def completed(self, made: Assembly, gain: Gain, edits: Sequence[int]) -> Assembly:
        """Return an assembly in which every tensor of the stream has its new shape.

        Args:
            made: what the edits change.
            gain: reads the norms of the wide model.
            edits: those that it is widened for.
        """
        layout, own, around = self.layout, tuple(edits), self._around()
        tensors = {update.name: update for update in made.tensors}
        biases = {update.name: update for update in made.biases}
        more = [
            TensorUpdate(name, name, layout.shapes[name], 1, is_table=True)
            for name in (layout.embed, *layout.positions)
        ]
        heads = [layout.unembed] if layout.head_is_stored else []
        for linear in (*heads, *layout.linears):
            name, axis = linear.weight, linear.output_axis
            more.append(TensorUpdate(name, name, linear.shape, axis))
            slot = linear.bias
            if slot.state == "present" and slot.name not in biases:
                if slot.size != self.base.shapes[slot.name][0] or name in around:
                    biases[slot.name] = BiasUpdate(slot.name, slot.size, create=False, edits=own)
        for norm in norms(layout):
            for own_name in (norm.weight, norm.bias):
                if own_name is not None:
                    new, shape = gain(own_name), (layout.hidden,)
                    more.append(TensorUpdate(own_name, own_name, shape, 0, replacement=new))
        for update in more:
            tensors.setdefault(update.name, replace(update, edits=own))
        for name, (bias, change) in around.items():
            tensors[name] = change.tensor(tensors[name])
            if bias in biases:
                biases[bias] = change.bias(biases[bias])
        untied = made.untied or (layout.tied and layout.embed in around)
        if untied and layout.unembed.weight not in tensors:
            head = layout.unembed
            tensors[head.weight] = TensorUpdate(head.weight, layout.embed, head.shape, 0, edits=own)
        return replace(
            made, tensors=tuple(tensors.values()), biases=tuple(biases.values()), untied=untied
        )

    def _around(self) -> dict[str, tuple[str, "_Around"]]:
        """Return what else becomes of weights, by name: of which bias too, and what.

        The embedding, which the model multiplies by a number of its width; what passes a norm with
        the stream's epsilon, which is smaller now; what writes to a stream without mean; and fused
        layers that have more heads.
        """
        base, layout, found = self.base, self.layout, dict[str, tuple[str, _Around]]()
        assert base.family.widen is not None
        if self._centred:
            tables = {name: "" for name in (layout.embed, *layout.positions)}
            writes = {w.weight: w.bias.name for b in layout.branches for w in b.writes}
            found |= {n: (bias, _Around(self.into)) for n, bias in (tables | writes).items()}
        if base.family.embed.multiplier == SQRT_HIDDEN:
            own, new = (in_storage(math.sqrt(x.hidden), x.dtype) for x in (base, layout))
            whole = PartMap(None, _times(own / new, layout.hidden))
            found[layout.embed] = "", _Around(behind=(whole,))
        share = math.sqrt(self._new_eps / self.eps) if self.eps else 1.0  # no norm sees a size
        for old, linear in zip(base.linears, layout.linears, strict=True):
            rows = [p.rows for p in linear.parts if p.site.kind in base.family.widen.same_eps]
            placed = _places(old, linear)
            if rows or placed is not None:
                behind = tuple(PartMap(r, _times(share, len(r))) for r in rows)
                found[linear.weight] = linear.bias.name, _Around(behind=behind, placed=placed)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Around:
    """What becomes of a weight besides what edits do to it."""

    first: LowRankMap | None = None
    """Acts on its outputs before any edit does."""
    behind: tuple[PartMap, ...] = ()
    """Act on them last."""
    placed: Sequence[int] | None = None

    def _outputs(self, outputs: tuple[PartMap, ...]) -> tuple[PartMap, ...]:
        if self.first is not None:
            assert all(part.rows is None for part in outputs)
            maps = [self.first, *(part.map for part in outputs)]
            outputs = (PartMap(None, chain(maps, self.first.width)),)
        return *outputs, *self.behind

    def tensor(self, update: TensorUpdate) -> TensorUpdate:
        return replace(update, outputs=self._outputs(update.outputs), placed=self.placed)

    def bias(self, update: BiasUpdate) -> BiasUpdate:
        return replace(update, outputs=self._outputs(update.outputs), placed=self.placed)


def _places(old: Linear, new: Linear) -> Sequence[int] | None:
    """Return where the outputs of a layer are that has more heads, where not all come first."""
    pairs = zip(old.parts, new.parts, strict=True)
    moved = {a: b for p, q in pairs for a, b in zip(p.rows, q.rows, strict=False)}
    places = [moved[row] for row in sorted(moved)]
    return None if places == list(range(len(places))) else places


def _times(factor: float, width: int) -> AffineMap:
    zeros = torch.zeros(width, dtype=torch.float64)
    return DiagonalMap(zeros + factor, zeros)


def sees_mean(edits: Sequence[Edit], layout: Layout) -> bool:
    """Whether an edit of the stream depends on its mean."""
    for edit in edits:
        kinds = {site.kind for site in edit.sites}
        if kinds & {*HEAD_KINDS, *INNER_KINDS, *_NORMED} or not isinstance(edit.map, AffineMap):
            continue
        right = edit.map.delta_factors()[1]
        if float(right.sum(1).abs().sum()) > tolerance(layout.hidden) * float(right.abs().sum()):
            return True
    return False


def widened(
    layout: Layout,
    config: Mapping[str, Json],
    fresh: int,
    asked: int | None = None,
    *,
    mean: bool = False,
    neurons: int = 0,
) -> Wide | None:
    """Return a wider model, or None where it cannot be widened.

    Args:
        layout: the model.
        config: the parsed config.json.
        fresh: how many dimensions are needed at least, besides that of the mean.
        asked: how many it is to get; None for as few as runtimes take.
        mean: whether edits see the mean of the stream.
        neurons: how many its gated layers need besides their own.

    Raises:
        FamilyError: the epsilon of the norms is missing or no number.
        UsageError: it cannot get as many as are asked for.
    """
    family = layout.family
    if not may_widen(layout):
        return None
    keeps = mean and family.norm.kind == "layer"
    more = 2 * (fresh + keeps) if family.norm.kind == "layer" else fresh
    inner = layout.dims["inner"]
    if neurons:
        step = _step(inner, (256, *STEPS))
        inner = math.ceil((inner + neurons) / step) * step
    wide = wide_layout(layout, _width(layout, more, asked), inner)
    return Wide(layout, wide, epsilon(layout, config), keeps_mean=keeps)


def epsilon(layout: Layout, config: Mapping[str, Json]) -> float:
    """Return the epsilon of a model's norms.

    Raises:
        FamilyError: it is missing or no number.
    """
    assert layout.family.widen is not None
    return _number(layout.family, config, layout.family.widen.eps)


def _number(family: Family, config: Mapping[str, Json], key: str) -> float:
    found = configured(family, config, key)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise FamilyError(f"the key {key!r} is missing or no number", where="config.json")
    return float(found)


def _step(size: int, steps: Sequence[int]) -> int:
    """Return the first step by which a size grows no more than by a thirty-second, or by 64."""
    return next((step for step in steps if step <= max(64, size // 32)), steps[-1])


def _width(layout: Layout, fresh: int, asked: int | None) -> int:
    """Return the width that is asked for, or the least that runtimes take."""
    widen, hidden = layout.family.widen, layout.hidden
    unit = heads = layout.dims["heads"]
    if widen is not None and widen.heads:  # that share a key are added together
        unit = layout.dims["head_dim"] * (heads // layout.dims["kv_heads"])
    if asked is not None:
        return _asked_width(hidden, fresh, asked, unit)
    step = _step(hidden, [math.lcm(unit, step) for step in STEPS])
    return (hidden + fresh + step - 1) // step * step


def _asked_width(hidden: int, fresh: int, asked: int, unit: int) -> int:
    least = math.lcm(unit, STEPS[-1])
    width = least * max(math.ceil((hidden + fresh) / least), round((hidden + asked) / least))
    if width != hidden + asked:
        raise UsageError(
            f"widen = {asked} makes a model of width {hidden + asked}",
            why=f"the edits need {fresh} more dimensions, and a widened model has a width that is "
            f"a multiple of {least}: of {unit}, for its heads, and of {STEPS[-1]}",
            fix=f"widen = {width - hidden}",
        )
    return width
