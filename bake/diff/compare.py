"""``diff``: what differs between two models, from their bytes."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from bake.artifact.record import RECORD
from bake.checkpoints.adapter import FoundAdapter
from bake.diff.adapter import adapted, base_of_adapter
from bake.diff.change import Change, measure, same_bytes
from bake.diff.files import KeyChange, config_changes, file_changes, metadata_changes
from bake.diff.record import Claims, edit_directions, read_claims
from bake.diff.report import Diff, Reshaped
from bake.diff.roles import Roles, gguf_roles, natural, roles_of
from bake.diff.sources import Model, base_of, open_model, open_out
from bake.diff.subspace import Subspace, given_cosines, leaks_of, subspaces
from bake.diff.verdict import violations
from bake.diff.weights import Weights
from bake.edits import Edit
from bake.errors import CheckpointError, FamilyError, UsageError
from bake.families import Family, Layout, find_family, resolve
from bake.progress import Progress, Tally


@dataclass(slots=True)
class _Walk:
    """What the walk over the tensors has found so far."""

    by_hash: list[str] = field(default_factory=list)
    by_bytes: list[str] = field(default_factory=list)
    changes: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    retyped: list[str] = field(default_factory=list)
    reshaped: list[Reshaped] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


def diff(
    out: str,
    base: str | None = None,
    *,
    family: Family | None = None,
    most_rank: int = 16,
    ranks: bool = True,
    given: Mapping[str, Float[Tensor, "n d"]] | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Return what differs between a model and its base.

    Every byte of both is read once, but for shards that the Hub states to be equal; changed tensors
    are read several times, from the disk. Memory stays at some tiles and at m + n numbers for every
    direction of a changed matrix.

    Args:
        out: a folder, a Hub id (``owner/name``, ``owner/name@revision``, also after ``hf://``) or
            a GGUF file; of an adapter also ``owner/name/folder``.
        base: the same, and no adapter; the base that ``out`` names in its record when None.
        family: the family's table; the one that fits the base when None.
        most_rank: the largest rank of a change to tell from a larger one.
        ranks: whether to measure ranks and subspaces at all.
        given: directions, as rows by label, to compare what was found with.
        progress: called with the bytes of ``out`` that are done and their total.

    Raises:
        CheckpointError: one of the two is malformed, hostile or no model.
        UsageError: they cannot be compared, or a given direction has no fitting width.
        InputError: the record of ``out`` is malformed.
        HubError: the Hub refuses or cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="bake-diff-") as folder:
        scratch = Path(folder)
        after = open_out(out, scratch)
        if isinstance(after, FoundAdapter):
            before = open_model(base_of_adapter(after) if base is None else base, scratch)
            return _diff_adapter(after, before, family, most_rank if ranks else None, given or {})
        if base is None:
            base = base_of(out, after.small_file(RECORD), after.folder)
        before = open_model(base, scratch)
        if (before.gguf is None) != (after.gguf is None):
            raise UsageError(
                "a checkpoint and a GGUF file cannot be compared byte by byte",
                fix="convert one of them with llama.cpp's convert_hf_to_gguf.py, then name two "
                "GGUF files",
            )
        claims, reason = read_claims(after)
        roles, layout = _roles(before, family)
        origins = _origins(before, claims, layout)
        found = _walk(before, after, origins, most_rank if ranks else None, progress)
        made = _assemble(before, after, claims, reason, roles, found)
        edits = () if claims is None else claims.edits
        spaces = _spaces(made, before.weights, after.weights, roles, edits, given or {}, most_rank)
        return replace(made, subspaces=spaces)


def _diff_adapter(
    adapter: FoundAdapter,
    base: Model,
    family: Family | None,
    most: int | None,
    given: Mapping[str, Float[Tensor, "n d"]],
) -> Diff:
    """Return what an adapter adds to its base: nothing is stored, so nothing is compared."""
    roles, _ = _roles(base, family)
    weights = adapted(adapter, base)
    found = _Walk()
    for name, source in weights.sources.items():
        weights.keep(name)
        # Of the sum nothing is rounded but in float64, and its storage type is nobody's.
        found.changes[name] = tuple(
            replace(change, dtypes=(change.dtypes[0], change.dtypes[0]))
            for change in measure(base.weights, weights, source, name, most=most)
        )
    made = replace(_assemble(base, base, None, None, roles, found), out=str(adapter), adapter=True)
    spaces = _spaces(made, base.weights, weights, roles, (), given, most or 1)
    return replace(made, subspaces=spaces, read={"base": base.bytes_read, "out": 0})


def _roles(base: Model, family: Family | None) -> tuple[Roles, Layout | None]:
    if base.gguf is not None:
        return gguf_roles(base.gguf.arch, base.weights.tensors), None
    assert base.checkpoint is not None  # one of the two is there
    shapes = {name: stored.shape for name, stored in base.weights.tensors.items()}
    dtypes = {name: stored.dtype for name, stored in base.weights.tensors.items()}
    config = base.checkpoint.config
    try:
        layout = resolve(family or find_family(config), config, shapes, dtypes)
    except (FamilyError, CheckpointError) as error:
        if family is not None:
            raise
        # An audit needs no table: without one, the axes are compared and not named.
        return Roles(None, str(error).partition("\n")[0], {}), None
    return roles_of(layout), layout


def _origins(base: Model, claims: Claims | None, layout: Layout | None) -> Mapping[str, str]:
    """Return the base's tensor that one of another name stands for, or was made from.

    A head that was tied is made from the embedding. Whoever saves a model anew with transformers
    puts a prefix before every name where the original had none.
    """
    found = {}
    ways = () if layout is None else layout.family.names
    for own, written in (pair for way in ways for pair in way.items()):
        for name in base.weights.tensors:
            old, new = (own, written) if name.startswith(own) else (written, own)
            if name.startswith(old):
                found[new + name[len(old) :]] = name
    if layout is not None and layout.tied:
        found[layout.unembed.weight] = layout.embed
    if claims is not None:
        found |= {c.name: c.source for c in claims.tensors.values() if c.source is not None}
    return found


def _walk(
    base: Model,
    out: Model,
    origins: Mapping[str, str],
    most: int | None,
    progress: Progress | None,
) -> _Walk:
    found = _Walk()
    digest = cache(Model.digest)  # of a shard, which many tensors lie in
    tally = Tally(sum(stored.nbytes for stored in out.weights.tensors.values()), progress)
    for name, new in out.weights.tensors.items():
        source = name if name in base.weights.tensors else origins.get(name)
        if source not in base.weights.tensors:
            source = None
        if source is None:
            found.created.append(name)
        elif _same_place(base, out, source, name, digest):
            found.by_hash.append(name)
        else:
            _pair(base, out, source, name, most, found)
        if source is not None and source != name:
            if source in out.weights.tensors:
                found.created.append(name)
            else:
                found.renamed[name] = source
        tally.advance(new.nbytes)
    return found


def _pair(base: Model, out: Model, source: str, name: str, most: int | None, found: _Walk) -> None:
    old, new = base.weights.tensors[source], out.weights.tensors[name]
    if old.shape != new.shape or (old.dtype != new.dtype and not (old.numeric and new.numeric)):
        forms = ((old.dtype, old.shape), (new.dtype, new.shape))
        found.reshaped.append(Reshaped(name, source, *forms))
        return
    base.weights.keep(source)
    out.weights.keep(name)
    if old.dtype == new.dtype and same_bytes(base.weights, out.weights, source, name):
        base.weights.drop(source)
        out.weights.drop(name)
        found.by_bytes.append(name)
        return
    if old.dtype != new.dtype:
        found.retyped.append(name)
    # What is kept stays until the end: what the writers still write is read from it again.
    found.changes[name] = measure(base.weights, out.weights, source, name, most=most)


def _same_place(
    base: Model, out: Model, source: str, name: str, digest: Callable[[Model, str], str]
) -> bool:
    """Tell whether two tensors are the same stretch of two files of the same hash.

    Only where it saves a download: of what is on this machine the bytes are compared.
    """
    if base.checkpoint is None or out.checkpoint is None or not (base.remote or out.remote):
        return False
    old, new = base.checkpoint.tensors[source], out.checkpoint.tensors[name]
    if (old.start, old.dtype, old.shape) != (new.start, new.dtype, new.shape):
        return False
    if base.checkpoint.shard_sizes[old.shard] != out.checkpoint.shard_sizes[new.shard]:
        return False
    return digest(base, old.shard) == digest(out, new.shard)


def _assemble(
    base: Model,
    out: Model,
    claims: Claims | None,
    reason: str | None,
    roles: Roles,
    found: _Walk,
) -> Diff:
    config, metadata = _keys(base, out)
    files = () if out is base else file_changes(base, out)
    made = [change for name in sorted(found.changes, key=natural) for change in found.changes[name]]
    touched = {found.renamed.get(change.tensor, change.tensor) for change in made}
    writers = _writers(base, roles)
    broken = None
    if claims is not None:
        broken = violations(claims, base, out, found.changes, files, metadata)
    return Diff(
        base=base.label,
        out=out.label,
        family=roles.family,
        no_family=roles.reason,
        tensors=len(out.weights.tensors),
        nbytes=sum(stored.nbytes for stored in out.weights.tensors.values()),
        by_hash=tuple(found.by_hash),
        by_bytes=tuple(found.by_bytes),
        changes=tuple(made),
        sides={
            change.tensor: role.side
            for change in made
            if (role := roles.of(change.tensor, change.base_name)) is not None
        },
        retyped=tuple(found.retyped),
        reshaped=tuple(found.reshaped),
        created=tuple(found.created),
        renamed=dict(found.renamed),
        missing=tuple(
            name
            for name in base.weights.tensors
            if name not in out.weights.tensors and name not in found.renamed.values()
        ),
        untouched_writers=tuple(name for name in writers if name not in touched),
        writers=len(writers),
        config=config,
        metadata=metadata,
        files=files,
        read={"base": base.bytes_read, "out": out.bytes_read},
        fetched=sum(model.bytes_read for model in (base, out) if model.remote),
        plan=None if claims is None else claims.record.plan.digest,
        no_plan=reason,
        violations=broken,
        other_base=claims is not None and _is_other(base, claims),
    )


def _is_other(base: Model, claims: Claims) -> bool:
    """Tell whether a record was written of another base, by its config and its headers."""
    recorded = claims.record.base.digest
    if recorded is None or base.checkpoint is None:
        return False
    return base.checkpoint.digest() != recorded


def _keys(base: Model, out: Model) -> tuple[tuple[KeyChange, ...], tuple[KeyChange, ...]]:
    """Return what differs in config.json, and in the metadata of GGUF files."""
    if base.gguf is not None and out.gguf is not None:
        return (), metadata_changes(base.gguf, out.gguf)
    assert base.checkpoint is not None  # models of one kind, as diff has seen to
    assert out.checkpoint is not None
    return config_changes(base.checkpoint.config, out.checkpoint.config), ()


def _writers(base: Model, roles: Roles) -> tuple[str, ...]:
    """Return the weights that write to the residual stream."""
    tensors = base.weights.tensors
    return tuple(
        name
        for name, role in roles.by_name.items()
        if role.side == "written" and name in tensors and len(tensors[name].shape) > 1
    )


def _spaces(
    made: Diff,
    base: Weights,
    out: Weights,
    roles: Roles,
    edits: Sequence[Edit],
    given: Mapping[str, Float[Tensor, "n d"]],
    most: int,
) -> tuple[Subspace, ...]:
    spaces = []
    for found in subspaces(made.changes, roles, most):
        cosines = given_cosines(found, {**given, **edit_directions(edits, found.side)})
        leaks = leaks_of(found, made.changes, roles, base, out)
        spaces.append(replace(found, cosines=cosines, leaks=leaks))
    widths = sorted({space.width for space in spaces})
    for label, rows in given.items():
        if widths and rows.shape[1] not in widths:
            raise UsageError(
                f"{label} has the width {rows.shape[1]}, and the changes have {widths}",
                fix="give a direction that was fitted on this model",
            )
    return tuple(spaces)
