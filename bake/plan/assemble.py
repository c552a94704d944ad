"""Assemble the updates of every tensor from the folded stream and the hooks of the modules."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap, chain, identity
from bake.edits import WeightUpdate
from bake.families import Branch, Layout, Linear, Norm
from bake.plan.hooks import Hooks
from bake.plan.stream import Failure, StreamFold, oblique, thin
from bake.plan.types import BiasUpdate, PartMap, TensorUpdate
from bake.sites import STREAM_KINDS, Site, SiteKind

Gain = Callable[[str], Float[Tensor, " d"]]
"""Reads a norm's tensor from the checkpoint, in float64: the only values that a plan looks at."""


@dataclass(slots=True)
class Assembly:
    """The updates found so far, and what stood in the way."""

    tensors: list[TensorUpdate] = field(default_factory=list)
    biases: dict[str, BiasUpdate] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    """Config flags that must be on for a created bias."""
    failures: list[Failure] = field(default_factory=list)
    slotless: set[int] = field(default_factory=set)
    """Edits that failed for want of a bias slot: a recast may help them."""
    how: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """For every edit, the places that it was folded into, in words."""
    untied: bool = False


def assemble(layout: Layout, hooks: Hooks, stream: StreamFold, gain: Gain) -> Assembly:
    """Return every tensor and bias update of the plan."""
    builder = _Builder(layout, hooks, stream, gain)
    builder.embeddings()
    for branch in layout.branches:
        builder.writers(branch)
    for point in range(1, len(layout.points)):
        builder.point_constant(point)
    builder.readers()
    builder.head()
    builder.emit()
    return builder.result


@dataclass(slots=True)
class _Pending:
    """What has been decided of one linear layer; ``edits`` answer for its constants."""

    linear: Linear
    input: AffineMap | None = None
    updates: tuple[WeightUpdate, ...] = ()
    outputs: tuple[PartMap, ...] = ()
    addend: Tensor | None = None
    edits: set[int] = field(default_factory=set)

    def needs_bias(self) -> bool:
        """Whether a constant leaves the layer that its bias has to carry."""
        return (
            (self.input is not None and not self.input.is_linear())
            or any(not part.map.is_linear() for part in self.outputs)
            or (self.addend is not None and bool(self.addend.any()))
        )

    def changes_weight(self) -> bool:
        """Whether the weight is another one."""
        maps = [part.map for part in self.outputs]
        if self.input is not None:
            maps.append(self.input)
        return bool(self.updates) or any(not map_.is_translation() for map_ in maps)


class _Builder:
    """Walks the layout once and fills an ``Assembly``."""

    def __init__(self, layout: Layout, hooks: Hooks, stream: StreamFold, gain: Gain) -> None:
        self.layout, self.hooks, self.stream, self.gain = layout, hooks, stream, gain
        self.result = Assembly()
        self.pending: dict[str, _Pending] = {}

    def _of(self, linear: Linear) -> _Pending:
        return self.pending.setdefault(linear.weight, _Pending(linear))

    # --- writers -------------------------------------------------------------------------------

    def embeddings(self) -> None:
        """Fold the maps of the embedding and of the first point into the rows of the tables."""
        fold, site = self.stream.folds[0], Site(SiteKind.EMBED)
        first = self.layout.points[0]
        outer = [fold.linear, fold.frame.transpose()]
        own = [self.hooks.map_at(site).without_bias(), *outer]
        constant = fold.frame.transpose().linear(fold.constant)
        tables = [(self.layout.embed, own, self._multiplier())]
        tables += [(name, outer, 1.0) for name in self.layout.positions]
        # The constant goes into one table only: positions, where there are any, are never tied.
        holder = tables[-1][0]
        for name, maps, multiplier in tables:
            map_ = thin(chain(maps, self.layout.hidden))
            if name == holder:
                map_ = map_.with_bias(constant / multiplier)
            if map_.is_identity():
                continue
            shape = self.layout.shapes[name]
            self.result.tensors.append(
                TensorUpdate(name, name, shape, 1, (PartMap(None, map_),), is_table=True)
            )
            if name == self.layout.embed and self.layout.tied:
                self.result.untied = True
            self._say(self.hooks.edits_at(site, *first), f"rows of {name}")

    def _multiplier(self) -> float:
        """Return the embedding's multiplier as the model applies it, in its own dtype.

        Mirrors transformers' ``GemmaTextScaledWordEmbedding``: the scale is cast to the dtype of
        the weight, which rounds √d in bfloat16 and float16.
        """
        dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        scale = torch.tensor(self.layout.embed_multiplier, dtype=torch.float64)
        return float(scale.to(dtypes.get(self.layout.dtype, torch.float64)))

    def writers(self, branch: Branch) -> None:
        """Fold the hooks at a branch's output, at its post-norm and at its writers' inputs."""
        fold = self.stream.folds[branch.target]
        output = self.hooks.map_at(branch.output_site)
        if branch.norm_out is None:
            outer = chain(
                [output.without_bias(), fold.linear, fold.frame.transpose()], self.layout.hidden
            )
            outer = thin(outer)
        else:
            outer = thin(self._behind_norm(branch, branch.norm_out, output))
        for linear in branch.writes:
            pending = self._of(linear)
            pending.outputs = (PartMap(None, outer),)
            pending.edits |= self.hooks.edits_at(branch.output_site)
            if linear.input_site is not None:
                pending.input = self.hooks.map_at(linear.input_site)
                pending.edits |= self.hooks.edits_at(linear.input_site)
            pending.updates = self.hooks.updates_at(branch.output_site)
        sites = [
            site for site in (branch.output_site, *(w.input_site for w in branch.writes)) if site
        ]
        self._say(self.hooks.edits_at(*sites), f"writers of {branch.live}")
        if not fold.linear.is_translation():
            stream = self.hooks.edits_at(*self.layout.points[branch.target])
            self._say(stream, "writers of the stream")

    def _behind_norm(self, branch: Branch, norm: Norm, output: AffineMap) -> AffineMap:
        """Return the map before a post-norm, and put diagonal maps behind it into its gain."""
        assert norm.site is not None
        behind = self.hooks.map_at(norm.site)
        edits = self.hooks.edits_at(norm.site)
        if isinstance(behind, DiagonalMap) and (behind.is_linear() or norm.bias is not None):
            self._norm(norm, behind.scale, behind.bias)
            self._say(edits, f"gain of {norm.live}")
        elif edits:
            what = "is not diagonal" if _as_diagonal(behind) is None else "adds a constant"
            self._fail(
                edits,
                norm.site,
                f"the map {what}, and behind {norm.live} there is only a gain",
                f"edit {branch.output_site}, before the norm, where any affine map is exact",
            )
        if branch.target in self.stream.nulling:
            gain = norm.gain_offset + self.gain(norm.weight)
            output = oblique(self.stream.nulling[branch.target], gain).after(output)
        return output

    def point_constant(self, point: int) -> None:
        """Put the constant of a stream point into the bias of a writer before it."""
        fold = self.stream.folds[point]
        constant = fold.frame.transpose().linear(fold.constant)
        if not bool(constant.any()):
            return
        sites = self.layout.points[point]
        writers = [branch for branch in self.layout.branches if branch.target == point]
        edits = self.hooks.edits_at(*sites)
        for branch in writers:
            edits |= self.hooks.edits_at(branch.output_site)
        # The last writer before the site comes first: an MLP's bias rather than an attention's.
        for branch in reversed(writers):
            usable = branch.norm_out is None and len(branch.writes) == 1
            if usable and branch.writes[0].bias.state != "never":
                pending = self._of(branch.writes[0])
                pending.addend = constant / branch.gain
                pending.edits |= edits
                self._say(edits, f"bias of {branch.writes[0].weight.removesuffix('.weight')}")
                return
        self.result.slotless |= edits
        names = " and ".join(f"{b.live} ({_why_no_slot(b)})" for b in writers)
        reason = f"{self.layout.family.architectures[0]} has no bias slot there: {names}"
        met = self.hooks.at(*sites, *(branch.output_site for branch in writers))
        # A linear hook is to blame only where it moves the constant of an earlier point.
        for hook in [hook for hook in met if not hook.map.is_linear()] or met:
            remedy = self._slot_remedy(hook.site)
            self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))

    # --- readers -------------------------------------------------------------------------------

    def readers(self) -> None:
        """Fold norm outputs, frames and the readers' own outputs."""
        by_norm: dict[tuple[int, str | None], list[Branch]] = defaultdict(list)
        for branch in self.layout.branches:
            name = None if branch.norm_in is None else branch.norm_in.weight
            by_norm[branch.source, name].append(branch)
            for linear in branch.reads:
                self._outputs(linear)
        for (source, _), branches in by_norm.items():
            linears = [linear for branch in branches for linear in branch.reads]
            frame = self.stream.folds[source].frame
            self._reading(branches[0].norm_in, frame, linears)

    def _outputs(self, linear: Linear) -> None:
        pending = self._of(linear)
        parts = []
        for part in linear.parts:
            map_ = self.hooks.map_at(part.site)
            if not map_.is_identity():
                rows = None if len(linear.parts) == 1 else part.rows
                parts.append(PartMap(rows, map_))
            for update in self.hooks.updates_at(part.site):
                left = update.left.new_zeros(linear.shape[linear.output_axis], update.left.shape[1])
                index = torch.tensor(part.rows)
                pending.updates += (
                    WeightUpdate(left.index_copy(0, index, update.left), update.right),
                )
            edits = self.hooks.edits_at(part.site)
            pending.edits |= edits
            self._say(edits, f"outputs of {linear.weight.removesuffix('.weight')}")
        pending.outputs = tuple(parts)

    def _reading(self, norm: Norm | None, frame: AffineMap, linears: Iterable[Linear]) -> None:
        """Fold what stands between the stream and its readers: turn, gain, bias, norm hook."""
        turned = not frame.is_translation()
        if norm is None:
            seen: AffineMap = frame
            edits: frozenset[int] = frozenset()
        else:
            assert norm.site is not None
            map_, edits = self.hooks.map_at(norm.site), self.hooks.edits_at(norm.site)
            diagonal = _as_diagonal(map_)
            if turned:
                gain, bias = self._values(norm)
                seen = chain([frame, DiagonalMap(gain, bias), map_], self.layout.hidden)
                self._norm(norm, torch.zeros_like(gain), torch.zeros_like(bias), unit=True)
            elif diagonal is not None and (map_.is_linear() or norm.bias is not None):
                if not map_.is_identity():
                    self._norm(norm, diagonal, map_.bias)
                    self._say(edits, f"gain and bias of {norm.live}")
                return
            else:
                seen = map_
                self._say(edits, f"readers of {norm.live}")
        if seen.is_identity():
            return
        for linear in linears:
            pending = self._of(linear)
            pending.input = thin(seen)
            pending.edits |= edits

    def _values(self, norm: Norm) -> tuple[Tensor, Tensor]:
        gain = norm.gain_offset + self.gain(norm.weight)
        bias = torch.zeros_like(gain) if norm.bias is None else self.gain(norm.bias)
        return gain, bias

    def _norm(self, norm: Norm, scale: Tensor, shift: Tensor, *, unit: bool = False) -> None:
        """Replace a norm's gain g by s ⊙ g and its bias β by s ⊙ β + t, or by one and zero."""
        gain, bias = self._values(norm)
        new = torch.ones_like(gain) if unit else scale * gain
        shape = tuple(gain.shape)
        update = TensorUpdate(
            norm.weight, norm.weight, shape, 0, replacement=new - norm.gain_offset
        )
        if not torch.equal(new, gain):
            self.result.tensors.append(update)
        moved = shift if unit else scale * bias + shift
        if norm.bias is not None and not torch.equal(moved, bias):
            update = TensorUpdate(norm.bias, norm.bias, shape, 0, replacement=moved)
            self.result.tensors.append(update)

    def head(self) -> None:
        """Fold the output of the final norm into its gain, or into the (untied) output head."""
        self._reading(self.layout.final_norm, identity(self.layout.hidden), [self.layout.unembed])

    # --- emission ------------------------------------------------------------------------------

    def emit(self) -> None:
        """Turn what was decided of every linear layer into updates."""
        for pending in self.pending.values():
            linear = pending.linear
            is_head = linear.weight == self.layout.unembed.weight
            if pending.changes_weight():
                source = self.layout.embed if is_head and self.layout.tied else linear.weight
                outputs = tuple(p for p in pending.outputs if not p.map.is_translation())
                moved = pending.input is not None and not pending.input.is_translation()
                self.result.tensors.append(
                    TensorUpdate(
                        linear.weight,
                        source,
                        linear.shape,
                        linear.output_axis,
                        outputs,
                        pending.updates,
                        pending.input.without_bias() if moved and pending.input else None,
                    )
                )
                self.result.untied |= is_head and self.layout.tied
            self._bias(pending)
        if self.result.untied and self.layout.unembed.weight not in {
            update.name for update in self.result.tensors
        }:
            head, embed = self.layout.unembed, self.layout.embed
            self.result.tensors.append(TensorUpdate(head.weight, embed, head.shape, 0))

    def _bias(self, pending: _Pending) -> None:
        slot = pending.linear.bias
        needed = pending.needs_bias()
        if slot.state == "present":
            if not needed and all(part.map.is_translation() for part in pending.outputs):
                return
        elif not needed:
            return
        if slot.state == "never":
            self.result.slotless |= pending.edits
            name = pending.linear.weight.removesuffix(".weight")
            reason = f"{self.layout.family.architectures[0]} builds {name} without a bias, and the "
            reason += "edit's constant needs one"
            if pending.edits:
                site = self._first_site(pending)
                self._fail(frozenset(pending.edits), site, reason, self._slot_remedy(site))
            else:
                # The constant is the norm's own bias, which a turned frame moves into its readers.
                for hook in self.hooks.everywhere():
                    if hook.map.is_orthogonal() and not hook.map.is_translation():
                        self._fail(frozenset([hook.edit]), hook.site, reason, "use no rotation")
            return
        if slot.state == "closed":
            assert slot.flag is not None
            self.result.flags.add(slot.flag)
        shift = None
        if pending.input is not None and not pending.input.is_linear():
            shift = pending.input.bias
        self.result.biases[slot.name] = BiasUpdate(
            name=slot.name,
            size=slot.size,
            create=slot.state == "closed",
            weight=None if shift is None else pending.linear.weight,
            output_axis=pending.linear.output_axis,
            shift=shift,
            updates=pending.updates if shift is not None else (),
            outputs=pending.outputs,
            addend=pending.addend,
        )

    def _first_site(self, pending: _Pending) -> Site:
        sites = {part.site for part in pending.linear.parts}
        for branch in self.layout.branches:
            if pending.linear in (*branch.reads, *branch.writes):
                sites |= {
                    branch.output_site,
                    *(w.input_site for w in branch.writes if w.input_site),
                }
                if branch.norm_in is not None and branch.norm_in.site is not None:
                    sites.add(branch.norm_in.site)
        sites.add(Site(SiteKind.LN_FINAL_OUT))
        ordered = sorted(sites, key=lambda site: site.order)
        return next(site for site in ordered if self.hooks.edits_at(site) & pending.edits)

    def _slot_remedy(self, site: Site) -> str:
        if self.layout.family.recasts and site.kind is not SiteKind.LN_FINAL_OUT:
            return (
                'add allow = ["recast"] to [export]: the model is then declared as '
                f"{self.layout.family.recasts[0].family}, which has bias slots; exact, but it "
                "rewrites config.json"
            )
        remedy = "use an edit without a constant"
        if site.kind in STREAM_KINDS:
            remedy += ", or serve the offset as a llama.cpp control vector"
        return remedy

    def _say(self, edits: frozenset[int], where: str) -> None:
        for edit in edits:
            self.result.how[edit].add(where)

    def _fail(self, edits: frozenset[int], site: Site, reason: str, remedy: str) -> None:
        for edit in sorted(edits):
            self.result.failures.append(Failure(edit, site, reason, remedy))


def _as_diagonal(map_: AffineMap) -> Float[Tensor, " d"] | None:
    """Return the diagonal of a map whose linear part is diagonal, else None."""
    if isinstance(map_, DiagonalMap):
        return map_.scale
    if isinstance(map_, LowRankMap) and map_.is_translation():
        return torch.ones_like(map_.bias)
    return None


def _why_no_slot(branch: Branch) -> str:
    if branch.norm_out is not None:
        return "a norm follows it"
    if len(branch.writes) > 1:
        return f"{len(branch.writes)} experts write together"
    return f"{branch.writes[0].weight.removesuffix('.weight')} is built without bias"
