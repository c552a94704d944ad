"""A model that is to be edited: what a plan needs of it, and how its weights are had at last."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.errors import UsageError

if TYPE_CHECKING:
    from bake.affine import AffineMap
    from bake.checkpoints import Checkpoint
    from bake.edits import Edit, EditKind, WeightUpdate
    from bake.families import Layout
    from bake.plan import Plan
    from bake.recipe import ExportTable


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Model:
    """A base that is to be edited: its checkpoint, and where the sites are in it."""

    checkpoint: "Checkpoint"
    layout: "Layout"
    """Of the base: a recast changes the plan's."""
    family: Path | None = None
    """The user's own table, which the record then carries."""

    def __repr__(self) -> str:
        at = self.layout
        return f"Model({self.checkpoint.source}: {at.family.name}, {at.layers} × {at.hidden})"

    def edit(
        self,
        kind: "EditKind | str",
        concept: str,
        edit_map: "AffineMap | WeightUpdate",
        at: Sequence[str] = ("resid",),
    ) -> "Edit":
        """Return one edit of this model.

        Args:
            kind: what the edit is, such as ``ablate``.
            concept: what it is about, in a word.
            edit_map: what one of the constructors of ``bake.edits`` returns for fitted vectors.
            at: patterns of sites, as a recipe spells them; the whole residual stream by itself.

        Raises:
            UsageError: an unknown kind or site, or a layer out of range.
        """
        from bake.edits import Edit, EditKind
        from bake.section import nearest
        from bake.sites import expand

        if kind not in tuple(EditKind):
            raise UsageError(f"there is no kind of edit {kind!r}", fix=nearest(kind, EditKind))
        sites = expand(
            at, layers=self.layout.layers, stream=self.layout.stream, having=self.layout.sites
        )
        return Edit(EditKind(kind), concept, sites, edit_map)

    def plan(self, edits: "Sequence[Edit]", export: "ExportTable") -> "Plan":
        """Return the plan of some edits. Of the weights only norms are read.

        Raises:
            BakeError: an edit does not fit the model.
        """
        import torch

        from bake.plan.compile import compile_plan

        return compile_plan(
            edits,
            self.layout,
            gain=lambda name: self.checkpoint.read(name).to(torch.float64),
            config=self.checkpoint.config,
            allow=export.allow,
            targets=export.target,
            widen=export.widen,
        )

    def complete(self) -> "Checkpoint":
        """Return the base with its weights at hand, which are fetched where a plan needed none."""
        from bake.checkpoints import open_checkpoint
        from bake.checkpoints.quantised.view import decoded

        found = self.checkpoint
        if found.complete:
            return found
        repo = found.source.partition("@")[0]
        whole = decoded(open_checkpoint(repo, revision=found.revision, complete=True))
        return replace(whole, harmless=found.harmless)


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    family: Path | None = None,
    assume_harmless: Sequence[str] = (),
) -> Model:
    """Open a base: a folder or a Hub id. Only headers and the config are read.

    Args:
        source: the folder or the id.
        revision: branch, tag or commit on the Hub.
        family: the user's own table.
        assume_harmless: keys of its config that no table knows and the user takes to change
            nothing.

    Raises:
        BakeError: there is no such model, or no table fits it.
    """
    from bake.checkpoints import open_checkpoint
    from bake.checkpoints.quantised.view import decoded
    from bake.families.fit import layout_of

    checkpoint = decoded(open_checkpoint(source, revision=revision))
    checkpoint = replace(checkpoint, harmless=tuple(assume_harmless))
    return Model(checkpoint, layout_of(checkpoint, family), family)
