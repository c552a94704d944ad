"""Whether an artifact differs from its base in what its record names, and in nothing else."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bake.artifact.record import RECORD
from bake.checkpoints.quantised.view import KEYS
from bake.diff.change import Change
from bake.diff.files import ABSENT, FileChange, KeyChange, config_changes, plain
from bake.diff.record import Claim, Claims
from bake.diff.sources import Model
from bake.diff.tiles import Difference
from bake.errors import UsageError

# What may be added to a model without changing what it computes: texts about it and proofs of it.
_DOCUMENTS = ("readme.md", "license", "licence", "notice", "use_policy", "copying")
_PROOFS = (RECORD, "verify.json", "verify.md", "verify.html", "sha256sums", "model.sig")
_FOLDERS = ("bake/", "plots/", "verify/", "reproduce/")
_METADATA = ("bake.", "split.tensors.count")


def violations(
    claims: Claims,
    base: Model,
    out: Model,
    changes: Mapping[str, tuple[Change, ...]],
    files: tuple[FileChange, ...],
    metadata: tuple[KeyChange, ...],
) -> tuple[str, ...]:
    """Return what contradicts the record, one line each; none where the bytes bear it out.

    Args:
        claims: what the record says.
        base: the model before.
        out: the artifact.
        changes: by tensor of the artifact, how it differs; no entry where its bytes are the same.
        files: the files beside the weights that differ.
        metadata: of GGUF files, the keys that differ.

    Raises:
        UsageError: the base is quantised: several tensors hold one weight that the record names.
    """
    if base.checkpoint is not None and any(base.checkpoint.config.get(key) for key in KEYS):
        raise UsageError(
            "the record names weights, and this base stores codes and scales of them",
            where=base.checkpoint.source,
            fix="run `bake verify`, which decodes both and holds every value against the plan",
        )
    lines = [*_another_base(claims, base), *_presence(claims, base, out)]
    for name in out.weights.tensors:
        lines += _tensor(claims.tensors.get(name), name, base, out, changes)
    lines += _config(claims, base, out)
    lines += [
        f"metadata {key.key}: {key.old} became {key.new}, which the record does not name"
        for key in metadata
        if not key.key.startswith(_METADATA)
    ]
    lines += _files(claims, files)
    return tuple(lines)


def _another_base(claims: Claims, base: Model) -> Iterator[str]:
    """Yield one line where edited tensors were others in the base that the artifact was made of."""
    if base.checkpoint is None:
        return
    found = base.checkpoint
    others = [
        name
        for name, digest in claims.record.base_tensors.items()
        if name in found.tensors and f"sha256:{found.tensor_digest(name)}" != digest
    ]
    if others:
        more = f" and {len(others) - 1} more edited tensors are" if len(others) > 1 else " is"
        yield (
            f"this is not the base that the artifact was made of: {others[0]}{more} not what "
            f"{RECORD} says was edited"
        )


def _presence(claims: Claims, base: Model, out: Model) -> Iterator[str]:
    for name in base.weights.tensors:
        if name not in out.weights.tensors:
            yield f"{name} is missing: the base has it"
    for name, claim in claims.tensors.items():
        if name not in out.weights.tensors and name not in base.weights.tensors:
            verb = "creates" if claim.created else "edits"
            yield f"{name} is missing: the plan {verb} it"


def _tensor(
    claim: Claim | None,
    name: str,
    base: Model,
    out: Model,
    changes: Mapping[str, tuple[Change, ...]],
) -> Iterator[str]:
    old, new = base.weights.tensors.get(name), out.weights.tensors[name]
    if claim is None:
        if old is None:
            yield f"{name} is new, and the plan does not create it"
        elif (old.dtype, old.shape) != (new.dtype, new.shape):
            yield f"{name} is {_form(new)} and was {_form(old)}, and the plan does not edit it"
        elif name in changes:
            yield f"{name} differs{_amount(changes[name])}, and the plan does not edit it"
        return
    if claim.created == (old is not None):
        yield f"{name}: the plan {'creates' if claim.created else 'edits'} it, and the base " + (
            "has it already" if claim.created else "has no such tensor"
        )
        return
    if claim.shape is not None and claim.shape != new.shape:
        yield f"{name} is {_form(new)}, and the plan has {list(claim.shape)}"
        return
    if claim.zero:
        if not _is_zero(out, name):
            yield f"{name} should hold zeros, and does not"
        return
    source = claim.source and base.weights.tensors.get(claim.source)
    if source:
        expected, shape = claim.dtype or source.dtype, claim.shape or source.shape
        if (expected, shape) != (new.dtype, new.shape):
            wanted = f"{expected} {list(shape)}"
            yield f"{name} is {_form(new)}; from {claim.source} it should be {wanted}"
        elif shape != source.shape:
            return  # a widened tensor, whose values `bake verify` holds to the plan
        elif claim.same and name in changes:
            yield f"{name} should be a copy of {claim.source}, and differs from it"
        elif not claim.same and name not in changes and not _is_zero(base, claim.source or name):
            yield (
                f"{name} is as it was, and the plan edits it: "
                "the edit was left out, or lost in rounding"
            )
    yield from _ranks(claim, changes.get(name, ()))


def _ranks(claim: Claim, changes: tuple[Change, ...]) -> Iterator[str]:
    for change in changes:
        spectrum = change.spectrum
        if claim.rank is None or spectrum is None or spectrum.threshold is None:
            continue
        if spectrum.rank is None and spectrum.most < claim.rank:
            continue
        if spectrum.rank is None or spectrum.rank > claim.rank:
            found = f"more than {spectrum.most}" if spectrum.rank is None else spectrum.rank
            yield f"{change.name} changes by rank {found}; the edits allow {claim.rank}"


def _form(stored: Any) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _amount(changes: tuple[Change, ...]) -> str:
    count = sum(change.elements for change in changes)
    return f" in {count:,} value{'s' * (count != 1)}" if count else ""


def _is_zero(model: Model, name: str) -> bool:
    weights = model.weights
    stacked = range(weights.tensors[name].matrices)
    parts = (Difference(weights, weights, name, name, index).tiles() for index in stacked)
    return not any(bool(tile.before.any()) for tiles in parts for tile in tiles)


def _config(claims: Claims, base: Model, out: Model) -> Iterator[str]:
    """Yield where config.json is not the base's with the plan's changes."""
    if base.checkpoint is None or out.checkpoint is None:
        return
    expected = dict(base.checkpoint.config)
    for planned in claims.record.plan.config:
        if planned.new is None:
            expected.pop(planned.key, None)
        else:
            expected[planned.key] = planned.new
    keys = {planned.key for planned in claims.record.plan.config}
    for change in config_changes(expected, out.checkpoint.config):
        name = change.key.partition(".")[0]
        if change.key in keys or name in keys:
            yield f"config.json {change.key} is {change.new}; the plan sets it to {change.old}"
        else:
            old = "was absent" if change.old == ABSENT else f"was {change.old}"
            yield f"config.json {change.key} is {change.new} and {old}; the plan leaves it alone"
    for planned in claims.record.plan.config:
        if base.checkpoint.config.get(planned.key) != planned.old:
            found = json.dumps(base.checkpoint.config.get(planned.key))
            made_for, key = json.dumps(planned.old), planned.key
            yield f"config.json {key} of this base is {found}; the plan was made for {made_for}"


def _files(claims: Claims, files: tuple[FileChange, ...]) -> Iterator[str]:
    for file in files:
        name = file.name.lower()
        about = name.startswith(_DOCUMENTS) or name in _PROOFS or name in _FOLDERS
        if about or (file.status == "added" and file.name in (claims.record.files or {})):
            continue
        if file.status == "added":
            yield f"the file {plain(file.name)} was added, and the record does not list it"
        elif file.role == "side":
            verb = "is missing" if file.status == "missing" else "differs"
            yield f"the file {plain(file.name)} {verb}, and the plan leaves it alone"
