"""``resolve``: a table, a config and the headers of the tensors → ``Layout``, step by step."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bake.errors import FamilyError
from bake.families.claims import Claims
from bake.families.layout import BiasSlot, Branch, Layout, Linear, Norm, Part, Shape
from bake.families.section import Json
from bake.families.select import Only
from bake.families.settings import Settings, inner_width, missing, read_settings
from bake.families.table import BranchRow, Family, LinearRow
from bake.sites import STREAM_KINDS, Site, SiteKind

# The norm before the readers, the norm behind the writers, and the output of a branch.
BRANCH_SITES = {
    "attn": (SiteKind.LN1_OUT, SiteKind.LN1_POST_OUT, SiteKind.ATTN_OUT),
    "mlp": (SiteKind.LN2_OUT, SiteKind.LN2_POST_OUT, SiteKind.MLP_OUT),
    "extra": (SiteKind.LN3_OUT, SiteKind.LN3_POST_OUT, SiteKind.EXTRA_OUT),
}


def resolve(
    family: Family,
    config: Mapping[str, Json],
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
    assumed: Collection[str] = (),
) -> Layout:
    """Return the layout of one model.

    Args:
        family: its table.
        config: the parsed config.json.
        shapes: the shape of every tensor of the checkpoint, by name.
        dtypes: the storage dtype of every tensor, as safetensors names it.
        assumed: keys of the config that the table does not know and the user takes to change
            nothing.

    Raises:
        FamilyError: the config contradicts the table, or a tensor is claimed by nothing.
        CheckpointError: a tensor that the table names is missing or has another shape.
    """
    settings = read_settings(family, config, assumed)
    claims, hidden = Claims(family, shapes, dtypes), settings.dims["hidden"]
    table = (settings.dims["vocab"], hidden)
    embed = claims.claim(f"{family.embed.module}.weight", table, "the embedding")
    positions = tuple(
        claims.claim(f"{name}.weight", (None, hidden), "the positions")
        for name in family.embed.positions
    )
    rows = tuple(_rows(settings, claims, layer) for layer in range(settings.dims["layers"]))
    points = _points(rows)
    index = {site: i for i, point in enumerate(points) for site in point}
    branches = tuple(
        branch
        for layer, own in enumerate(rows)
        for branch in _Block(settings, claims, layer, own).branches(index)
    )
    final_norm = _norm(claims, hidden, family.unembed.norm_in, Site(SiteKind.LN_FINAL_OUT))
    unembed = _unembed(settings, claims, embed)
    return Layout(
        family=family,
        dims=settings.dims,
        flags=settings.flags,
        dtype=dtypes[embed],
        points=points,
        embed=embed,
        embed_multiplier=settings.number(family.embed.multiplier),
        positions=positions,
        branches=branches,
        final_norm=final_norm,
        unembed=unembed,
        tied=settings.tied,
        block_live=claims.live(family.block.path),
        embed_live=claims.live(family.embed.module),
        untouched=claims.close(settings.dims["layers"]),
        shapes=shapes,
        sites=_sites(points, branches),
        assumed=settings.assumed,
    )


def _rows(settings: Settings, claims: Claims, layer: int) -> tuple[BranchRow, ...]:
    """Return the branches of one block, of which there is at most one of a name.

    Raises:
        FamilyError: the conditions of the table give the block none, two of one name, or one that
            reads a point which nothing in the block writes.
    """
    has = _Block(settings, claims, layer, ()).has
    rows = tuple(row for row in settings.family.branches if has(row.only))
    names, reached = [row.name for row in rows], {"resid_pre", *(row.target for row in rows)}
    unread = any(row.source not in reached for row in rows)
    if unread or not names or len(names) != len(set(names)):
        found = f"the branches {', '.join(names)}" if names else "no branch"
        raise FamilyError(
            f"the table {settings.family.name!r} gives block {layer} {found}",
            where="config.json",
            why="each condition `only` has to choose the blocks of one kind",
            fix="bring a table for this variant with --family FILE",
        )
    return rows


def _points(rows: tuple[tuple[BranchRow, ...], ...]) -> tuple[tuple[Site, ...], ...]:
    """Return the points of the stream: before the blocks, and behind every sum."""
    points: list[tuple[Site, ...]] = [(Site(SiteKind.RESID_PRE, 0),)]
    for layer, own in enumerate(rows):
        kinds = sorted({SiteKind(row.target) for row in own}, key=STREAM_KINDS.index)
        points += [(Site(kind, layer),) for kind in kinds]
        if layer + 1 < len(rows):
            points[-1] += (Site(SiteKind.RESID_PRE, layer + 1),)
    return tuple(points)


@dataclass(frozen=True)
class _Block:
    """One block of the model, whose tensors are claimed as its branches are made."""

    settings: Settings
    claims: Claims
    layer: int
    rows: tuple[BranchRow, ...]

    @property
    def path(self) -> str:
        return self.settings.family.block.path.replace("{layer}", str(self.layer))

    def has(self, only: tuple[Only, ...]) -> bool:
        """Return whether conditions of the table hold for the block."""
        return self.settings.has(only, self.layer, self._stores)

    def _stores(self, name: str) -> bool:
        return self.claims.on_disk(f"{self.path}.{name}") in self.claims.shapes

    def _rows(self, name: str) -> int | None:
        shape = self.claims.shapes.get(self.claims.on_disk(f"{self.path}.{name}"), ())
        return shape[0] if shape else None

    def branches(self, index: Mapping[Site, int]) -> Iterator[Branch]:
        for row in self.rows:
            *beside, last = (self.claims.live(f"{self.path}.{name}") for name in row.module)
            output, dims = BRANCH_SITES[row.name][2], self.settings.sizes(row, self._rows)
            yield Branch(
                name=row.name,
                layer=self.layer,
                source=index[Site(SiteKind(row.source), self.layer)],
                target=index[Site(SiteKind(row.target), self.layer)],
                live=last,
                beside=tuple(beside),
                norm_in=self.norms[row.norm_in] if row.norm_in else None,
                norm_out=self.norms[row.norm_out] if row.norm_out else None,
                gain=self.settings.number(row.gain),
                reads=tuple(x for r in row.reads for x in self.linears(r, dims, reads=True)),
                writes=tuple(x for r in row.writes for x in self.linears(r, dims, reads=False)),
                output_site=Site(output, self.layer),
                dims=dims,
                sums_to_one=row.sums_to_one,
            )

    @cached_property
    def norms(self) -> Mapping[str, Norm]:
        """The norms of the block, by the table's name; parallel branches may read one together."""
        hidden, found = self.settings.dims["hidden"], dict[str, Norm]()
        for row in self.rows:
            for name, kind in zip(
                (row.norm_in, row.norm_out), BRANCH_SITES[row.name], strict=False
            ):
                if name and name not in found:
                    site = Site(kind, self.layer)
                    found[name] = _norm(self.claims, hidden, f"{self.path}.{name}", site)
        return found

    def linears(self, row: LinearRow, dims: Mapping[str, int], *, reads: bool) -> Iterator[Linear]:
        """Yield the layer of a row, or those of all experts; none where this block has none."""
        if not self.has(row.only):
            return
        if "{expert}" not in row.module:
            yield self.linear(row, row.module, dims, reads=reads)
            return
        for expert in range(self.stack(dims)):
            module = row.module.replace("{expert}", str(expert))
            yield self.linear(row, module, dims, reads=reads)

    def linear(
        self, row: LinearRow, module: str, dims: Mapping[str, int], *, reads: bool
    ) -> Linear:
        sites = tuple(Site(kind, self.layer) for kind in row.sites)
        hidden = dims["hidden"]
        # What is not the stream has the width of the sites there, or any where there are none.
        width = sum(inner_width(dims, kind) for kind in row.sites) or None
        width = 2 * width if width is not None and row.fuse == "gated" else width
        outer, inner = (width, hidden) if reads else (hidden, width)
        name, what = f"{self.path}.{module}", f"the {row.layout} layer"
        weight, bias = (
            (name, f"{name}_bias") if row.parameter else (f"{name}.weight", f"{name}.bias")
        )
        output_axis = self.output_axis(row, weight, 0 if reads else 1)
        expected = (outer, inner) if output_axis == 0 else (inner, outer)
        stack = (self.stack(dims),) if row.stacked else ()
        weight = self.claims.claim(weight, (*stack, *expected), what)
        shape = self.claims.shapes[weight]
        outputs = (*stack, shape[-2:][output_axis])
        return Linear(
            module=row.module,
            weight=weight,
            shape=shape,
            output_axis=output_axis,
            bias=_bias(self.settings, self.claims, bias, row.bias, outputs),
            parts=parts_of(dims, row, sites) if reads else (),
            input_site=sites[0] if sites and not reads else None,
            live=self.live(row, name),
        )

    def stack(self, dims: Mapping[str, int]) -> int:
        """Return how many experts one tensor has.

        Raises:
            FamilyError: config.json does not say.
        """
        if not dims["experts"]:
            raise missing(self.settings.family.dims.experts)
        return dims["experts"]

    def output_axis(self, row: LinearRow, name: str, inner: int) -> int:
        """Return the axis of a weight that its output is on, of the last two.

        Args:
            row: the layer in the table.
            name: the weight, as the table names it.
            inner: the axis that the stream is not on where the layer is stored as [out, in].

        Raises:
            FamilyError: the class takes the axis from the shape, and the shape has both alike.
        """
        if row.layout != "either":
            return 0 if row.layout == "linear" else 1
        disk, hidden = self.claims.on_disk(name), self.settings.dims["hidden"]
        axes = [size == hidden for size in self.claims.shapes.get(disk, ())[-2:]]
        if axes == [True, True]:
            raise FamilyError(
                f"{disk} is square, and may be stored as [out, in] or as [in, out]",
                where="config.json",
                why="the class tells the two apart by the shape, and so would have to guess here",
                fix="state the layout in a table of your own, with --family FILE",
            )
        return 0 if axes[1 - inner : 2 - inner] == [True] else 1

    def live(self, row: LinearRow, name: str) -> str | None:
        """Return where a layer is in a loaded model, if it is a module of its own there."""
        if row.live == "":
            return None
        return self.claims.live(name if row.live is None else f"{self.path}.{row.live}")


def parts_of(dims: Mapping[str, int], row: LinearRow, sites: tuple[Site, ...]) -> tuple[Part, ...]:
    """Return which rows of a fused layer each site has."""
    widths = [inner_width(dims, site.kind) for site in sites]
    if row.fuse == "concat":
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return tuple(
            Part(site, range(start, start + width))
            for site, start, width in zip(sites, starts, widths, strict=True)
        )
    # Head by head: rows [head, site, head_dim], as GPT-NeoX views its fused projection, and
    # Qwen3-Next its queries with their gate.
    size, count = dims["head_dim"], 2 if row.fuse == "gated" else len(sites)
    return tuple(
        Part(
            site,
            tuple(
                (head * count + i) * size + j for head in range(dims["heads"]) for j in range(size)
            ),
        )
        for i, site in enumerate(sites)
    )


def _bias(settings: Settings, claims: Claims, name: str, rule: str, shape: Shape) -> BiasSlot:
    disk, (*stack, size) = claims.on_disk(name), shape
    slot = BiasSlot(disk, size, "never", None, *stack)
    if rule == "never":
        return slot
    if rule == "always" or settings.flags[rule]:
        claims.claim(name, shape, "the bias")
        return replace(slot, state="present", flag=None if rule == "always" else rule)
    return replace(slot, state="closed", flag=rule)


def _norm(claims: Claims, hidden: int, path: str, site: Site) -> Norm:
    rule = claims.family.norm
    weight = claims.claim(f"{path}.weight", (hidden,), "the norm") if rule.gain else None
    bias = claims.claim(f"{path}.bias", (hidden,), "the norm") if rule.bias else None
    return Norm(weight, bias, rule.kind, float(rule.gain_offset), claims.live(path), site)


def _unembed(settings: Settings, claims: Claims, embed: str) -> Linear:
    row = settings.family.unembed
    name = claims.on_disk(f"{row.module}.weight")
    # Some checkpoints store a tied head as well: ``layout_of`` compares it with the embedding.
    if not settings.tied or name in claims.shapes:
        size = (settings.dims["vocab"], settings.dims["hidden"])
        claims.claim(f"{row.module}.weight", size, "the output head")
    shape = claims.shapes[embed if settings.tied else name]
    bias = _bias(settings, claims, f"{row.module}.bias", row.bias, shape[:1])
    live = claims.live(row.live or row.module)
    return Linear(row.module, name, shape, 0, bias, (), None, live)


def _sites(points: tuple[tuple[Site, ...], ...], branches: tuple[Branch, ...]) -> tuple[Site, ...]:
    found = {Site(SiteKind.EMBED), *(site for point in points for site in point)}
    for branch in branches:
        found |= {norm.site for norm in branch.norms}
        found |= {part.site for linear in branch.reads for part in linear.parts}
        found |= {w.input_site for w in branch.writes if w.input_site is not None}
        found.add(branch.output_site)
    found.add(Site(SiteKind.LN_FINAL_OUT))
    return tuple(sorted(found, key=lambda site: site.order))
