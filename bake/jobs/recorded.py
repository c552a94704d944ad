"""From an artifact, here or on the Hub, back to its plan: what the commands on artifacts share.

The edits are in the artifact, and the record says what the plan was allowed to do, so that the
plan can be made again from the base alone. Its digest has to be the recorded one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoints.hub_names import HUB_PREFIX, parse_hub_id, split_hub_id
from bake.errors import BakeError, InputError, VerificationFailed
from bake.jobs.model import Model
from bake.jobs.request import Request

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.plan import Plan
    from bake.recipe import Recipe
    from bake.verify.artifact import Baked


@dataclass(frozen=True, slots=True)
class Source:
    """An artifact that a command names.

    Attributes:
        folder: where its files are; for one on the Hub in the cache, which is never written to.
        name: the folder, or ``owner/name@commit``.
        published: whether it is on the Hub. Then its record is a stranger's, and paths in it mean
            nothing here.
        notes: what is worth knowing of how it arrived.
    """

    folder: Path
    name: str
    published: bool
    notes: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The last part of the name, without the commit."""
        return self.name.partition("@")[0].rpartition("/")[2] if self.published else self.name

    def without_base(self, model: str) -> InputError:
        """Return what it means that a published record names a folder as the base."""
        return InputError(
            f"the base {model} is a folder of the machine that the model was made on",
            where=self.name,
            fix="name it with --base MODEL, if you have it",
        )


def is_artifact(text: str) -> bool:
    """Tell whether an argument names an artifact rather than a recipe."""
    if text.startswith(HUB_PREFIX) or Path(text).is_dir():
        return True
    return not Path(text).exists() and _is_address(text)


def _is_address(text: str) -> bool:
    return not text.endswith(".toml") and split_hub_id(text) is not None


def find(text: str, *, weights: bool) -> Source:
    """Return an artifact: a folder, ``hf://owner/name[@revision]``, or the same without ``hf://``.

    A folder that exists wins over a Hub id of the same spelling.

    Args:
        text: what the user names.
        weights: whether the artifact's weights are needed, or its record and its edits alone.

    Raises:
        InputError: there is no such artifact.
        HubError: the Hub refuses or cannot be reached.
        VerificationFailed: a file on the Hub is not the one that was exported.
    """
    named = text.startswith(HUB_PREFIX)
    if not named and (Path(text).exists() or not _is_address(text)):
        return Source(_with_record(Path(text)), text, published=False)
    from bake.publish.fetch import fetch

    repo, revision = parse_hub_id(text.removeprefix(HUB_PREFIX), None)
    folder, notes = fetch(repo, revision, weights=weights)
    return Source(folder, f"{repo}@{folder.name}", published=True, notes=notes)


def _with_record(folder: Path) -> Path:
    from bake.artifact.record import RECORD

    if (folder / RECORD).is_file() or not folder.is_dir():
        return folder  # whoever opens it says what is wrong
    from bake.publish.fetch import what_it_is

    names = [path.relative_to(folder).as_posix() for path in folder.iterdir()]
    raise InputError(
        f"this is no artifact of bake: it is {what_it_is(names)}, and there is no {RECORD} in it",
        where=str(folder),
        fix="name what `bake export` wrote; a recipe for a model is written by `bake init`",
    )


def base_of(source: Source, artifact: "Baked", given: str | None) -> str:
    """Return where the base of an artifact is: what the user says, or what the record does.

    Raises:
        InputError: the record names a folder of the machine that it was written on.
    """
    if given is not None:
        return given
    from bake.verify.inputs import place_of_base

    base = artifact.record.base
    if not source.published:
        return place_of_base(artifact)
    if base.path is not None or not _is_address(base.model):
        raise source.without_base(base.model)
    if not base.pinned:
        raise InputError(
            f"the record names no commit of the base {base.model}",
            where=source.name,
            fix="name the base with its commit, as --base owner/name@commit",
        )
    return f"{base.repo}@{base.revision}"


@dataclass(frozen=True, slots=True, eq=False)
class Replanned:
    """The plan of an artifact, made again from its base, its edits and its record.

    Attributes:
        source: the artifact.
        artifact: its record and edits.
        request: with the new plan; its recipe is what the record keeps of it.
        differences: why the new plan is not the recorded one; none where it is.
        notes: what else is worth knowing.
    """

    source: Source
    artifact: "Baked"
    request: Request
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the plan is the recorded one, bit by bit or within rounding."""
        return not self.differences

    @property
    def summary(self) -> str:
        """How the plan compares with the recorded one, in a few words."""
        if not self.same:
            return f"NOT the plan of the record, {self.artifact.plan_digest}"
        exactly = self.request.plan.digest == self.artifact.plan_digest
        return "the plan of the record" + ("" if exactly else ", within rounding")

    def failure(self) -> VerificationFailed | None:
        """Return what it means that the plan is another one, or None when it is not."""
        if self.same:
            return None
        return VerificationFailed(
            f"the plan of {self.source.name} is not the recorded one",
            why="\n".join(self.differences),
            fix="compare with the version of bake that made it, "
            f"{self.artifact.record.bake or 'which it does not name'}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "artifact": self.source.name,
            "kind": self.artifact.kind,
            "recorded": self.artifact.plan_digest,
            "digest": self.request.plan.digest,
            "same": self.same,
            "differences": list(self.differences),
            "notes": list(self.notes),
        }


def replan(
    source: Source,
    *,
    base: str | None,
    family: Path | None,
    assume_harmless: Sequence[str] = (),
) -> Replanned:
    """Make the plan of an artifact again. Of the base only headers, config and norms are read.

    Args:
        source: the artifact.
        base: where its base is; as recorded when None.
        family: the user's own table; that of the record when None.
        assume_harmless: keys of the base's config that no table knows and the user takes to change
            nothing, beside those that the record names.

    Raises:
        BakeError: whatever is wrong with the artifact, its base or their fit.
    """
    from bake.checkpoints import open_checkpoint
    from bake.checkpoints.quantised.view import decoded
    from bake.families.fit import layout_of
    from bake.verify.artifact import open_baked
    from bake.verify.inputs import check_base

    artifact = open_baked(source.folder)
    if not artifact.edits:
        raise InputError(
            f"{source.name} is a {artifact.kind} and holds no edits, so it has no plan",
            fix="a plan is made of what `bake export` wrote",
        )
    place = base_of(source, artifact, base)
    checkpoint = check_base(artifact, decoded(open_checkpoint(place)))
    checkpoint = replace(checkpoint, harmless=(*checkpoint.harmless, *assume_harmless))
    if checkpoint.revision is not None:  # which the name need not say again
        checkpoint = replace(checkpoint, source=checkpoint.repo)
    layout = layout_of(checkpoint, artifact.family() if family is None else family)
    model = Model(checkpoint, layout, family)
    recipe = _recipe(source, artifact, place, checkpoint)
    plan = model.plan(artifact.edits if artifact.fitted is None else artifact.fitted, recipe.export)
    record = artifact.record
    if artifact.fitted is not None and record.calibration is not None:
        from bake.approximate import labelled

        plan = labelled(plan, artifact.edits, record.calibration)
    request = Request(
        recipe, model, plan, calibration=record.calibration, recorded=record.provenance
    )
    text_differs, notes = _against_recipe(artifact, request)
    plan_differs, more = _against_plan(artifact, plan)
    differences = tuple(map(_shown, (*_against_files(artifact), *text_differs, *plan_differs)))
    return Replanned(source, artifact, request, differences, (*source.notes, *notes, *more))


def _shown(text: str) -> str:
    """Return a text with words of a stranger's in it as a terminal may show it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _recipe(source: Source, artifact: "Baked", place: str, checkpoint: "Checkpoint") -> "Recipe":
    """Return the recipe as the record keeps it: what the plan depends on, and its title.

    Raises:
        InputError: the record allows or targets what bake does not know.
    """
    from bake.artifact.record import RECORD
    from bake.families import RUNTIMES
    from bake.recipe import ALLOWANCES, Base, ExportTable, Recipe

    record = artifact.record
    for key, words, known in (
        ("allow", record.allow, ALLOWANCES),
        ("target", record.target, RUNTIMES),
    ):
        for word in words:
            if word not in known:
                raise InputError(
                    f"{key} holds {word!r}, which this bake does not know",
                    where=f"{source.name}: {RECORD}",
                    fix=f"use the bake that made it, {record.bake or 'of another version'}",
                )
    stated = record.recipe
    # A folder has no revision; a Hub id is spelled with its own.
    local = None if checkpoint.revision is not None else checkpoint.path
    return Recipe(
        title=source.short if stated is None else stated.title or source.short,
        text="" if stated is None else stated.text,
        digest="" if stated is None else stated.digest,
        settings=() if stated is None else stated.settings,
        path=Path(source.name) / RECORD,
        base=Base(place, None, local),
        export=ExportTable(
            to=(artifact.kind,),
            allow=record.allow,
            target=record.target or ("transformers",),
            widen=record.widen,
        ),
    )


def _against_recipe(artifact: "Baked", request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return how the edits differ from the text of the recipe beside them, and notes."""
    from bake.artifact.record import RECORD
    from bake.recipe import disagreement, limits_differ, parse_recipe

    recipe = request.recipe
    if not recipe.text:
        return (), ("the record has no text of a recipe: the plan is that of the edits alone",)
    data = recipe.text.encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    if digest != recipe.digest:
        return (f"the recipe's digest is {digest}, recorded is {recipe.digest}",), ()
    try:
        parsed = parse_recipe(data, Path(RECORD), recipe.settings)
        found = disagreement(parsed, artifact.edits, request.model.layout)
    except BakeError as error:
        return (f"the recipe is not one that this bake reads: {error.what}",), ()
    if found is None:
        found = limits_differ(parsed.verify, artifact.record.verify)
    return (() if found is None else (f"the edits are not those of the recipe: {found}",)), ()


def _against_files(artifact: "Baked") -> tuple[str, ...]:
    """Return whether the edits are those that were exported."""
    from bake.artifact.record import RECORD
    from bake.edit_store import EDITS, FITTED
    from bake.verify.artifact import changed_files

    changed = changed_files(artifact, only=(EDITS, FITTED)) or ()
    return tuple(f"{name} is not the file that {RECORD} lists" for name in changed)


def _against_plan(artifact: "Baked", plan: "Plan") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return how the plan differs from the recorded one, and notes.

    The digest is over every bit. Where it is another one, the plan still is the recorded one if it
    changes the same tensors in the same way and has the same values within rounding.
    """
    if plan.digest == artifact.plan_digest:
        return (), ()
    from bake.plan.record import other_parts
    from bake.plan.sketch import differing

    digests = f"its digest is {plan.digest}, recorded is {artifact.plan_digest}"
    if parts := other_parts(artifact.record.plan, plan):
        return (f"{digests}: other {' and '.join(parts)}",), ()
    values = artifact.record.sketch
    if values is None:
        why = "from other edits or by the rounding of another processor or torch; the record does "
        return (f"{digests}: the same tensors with other values, {why}not say which",), ()
    if names := differing(values, plan):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (f"{digests}: {names[0]}{more} would get other values",), ()
    note = "the plan is the recorded one within the rounding of this processor and torch: "
    return (), (f"{note}{digests}",)
