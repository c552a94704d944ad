"""``Diff``: everything that a comparison found, and the same as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bake.diff.change import Change
from bake.diff.files import FileChange, KeyChange
from bake.diff.subspace import Subspace
from bake.errors import VerificationFailed


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A tensor whose shape differs, or whose type does and one of the two holds codes."""

    name: str
    source: str
    old: tuple[str, tuple[int, ...]]
    new: tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Diff:
    """What differs between a model and its base.

    Attributes:
        base: the base, with the commit of a repository.
        out: the model.
        family: the family's table, or None.
        no_family: why there is none.
        tensors: how many tensors ``out`` has.
        nbytes: their bytes.
        by_hash: tensors in a shard that is, by the Hub's sha256, equal to one of the base.
        by_bytes: tensors whose every byte was compared and is the same; a head that was untied and
            equals the base's embedding is among them, and in ``created``.
        changes: the others, sorted by names and numbers, one for every matrix that a tensor stacks.
        sides: ``written`` or ``read`` by changed tensor, by the family's table.
        retyped: tensors of another storage type, whose values are compared.
        reshaped: tensors that cannot be compared.
        created: tensors that the base has not.
        renamed: tensors that stand under another name in the base, with that name.
        missing: tensors that only the base has.
        untouched_writers: weights that write to the residual stream and are as they were.
        writers: how many weights write to it.
        config: the keys of config.json that differ.
        metadata: of GGUF files, the keys that differ.
        files: the files beside the weights that differ.
        read: bytes of weights that were read, of ``base`` and of ``out``; 0 for GGUF files.
        fetched: how many of them came over the network.
        plan: the digest of the plan in the record of ``out``, or None.
        no_plan: why its record was not used, where it has one.
        violations: what contradicts the record; None without one.
        subspaces: what the changes have in common.
        adapter: whether ``out`` is an adapter: what it adds was measured, and nothing compared.
    """

    base: str
    out: str
    family: str | None
    no_family: str | None
    tensors: int
    nbytes: int
    by_hash: tuple[str, ...]
    by_bytes: tuple[str, ...]
    changes: tuple[Change, ...]
    sides: Mapping[str, str]
    retyped: tuple[str, ...]
    reshaped: tuple[Reshaped, ...]
    created: tuple[str, ...]
    renamed: Mapping[str, str]
    missing: tuple[str, ...]
    untouched_writers: tuple[str, ...]
    writers: int
    config: tuple[KeyChange, ...]
    metadata: tuple[KeyChange, ...]
    files: tuple[FileChange, ...]
    read: Mapping[str, int]
    fetched: int
    plan: str | None
    no_plan: str | None
    violations: tuple[str, ...] | None
    subspaces: tuple[Subspace, ...] = ()
    adapter: bool = False
    other_base: bool = False
    """Whether the record was written of another base than the one that was compared."""

    @property
    def identical(self) -> bool:
        """Whether every tensor, and the config, is the same."""
        return not (
            self.changes
            or self.retyped
            or self.reshaped
            or self.created
            or self.renamed
            or self.missing
            or self.config
            or self.metadata
        )

    @property
    def drawable(self) -> bool:
        """Whether anything has changed whose size can be told."""
        return any(change.relative for change in self.changes)

    def failure(self) -> VerificationFailed | None:
        """Return what contradicts the record as an error, or None where nothing does."""
        if not self.violations:
            return None
        if self.other_base:
            return VerificationFailed(
                f"{self.base} is not the base that {self.out} was made from",
                why="its config or its tensors are others than the record's",
                fix=f"bake diff {self.out} finds the base that the record names",
            )
        count = len(self.violations)
        return VerificationFailed(
            f"{self.out} differs from its base in what its record does not name",
            why="\n".join(self.violations),
            fix=f"{count} finding{'s' * (count != 1)}: export it again, or trust it no further "
            "than this report",
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; the basis of every subspace included."""
        return {
            "base": self.base,
            "out": self.out,
            "family": self.family,
            "no_family": self.no_family,
            "adapter": self.adapter,
            "identical": self.identical,
            "tensors": {
                "total": self.tensors,
                "bytes": self.nbytes,
                "same_by_hash": list(self.by_hash),
                "same_by_bytes": list(self.by_bytes),
                "changed": [self._change(change) for change in self.changes],
                "retyped": list(self.retyped),
                "not_comparable": [_reshaped(row) for row in self.reshaped],
                "created": list(self.created),
                "renamed": dict(self.renamed),
                "missing": list(self.missing),
            },
            "writers": {"total": self.writers, "untouched": list(self.untouched_writers)},
            "subspaces": [_subspace(found) for found in self.subspaces],
            "config": [asdict(change) for change in self.config],
            "metadata": [asdict(change) for change in self.metadata],
            "files": [asdict(file) for file in self.files],
            "bytes_read": dict(self.read),
            "bytes_fetched": self.fetched,
            "plan": self.plan,
            "no_plan": self.no_plan,
            "as_recorded": None if self.violations is None else not self.violations,
            "violations": None if self.violations is None else list(self.violations),
        }

    def _change(self, change: Change) -> dict[str, Any]:
        found = change.spectrum
        return {
            "name": change.name,
            "from": change.base_name,
            "side": self.sides.get(change.tensor),
            "dtype": list(change.dtypes),
            "shape": list(change.shape),
            "elements": change.elements,
            "rows": change.rows,
            "columns": change.columns,
            "norm": change.norm,
            "relative": change.relative,
            "largest": change.largest,
            "rank": None if found is None else found.rank,
            "rank_above": found.most if found and found.rank is None and found.threshold else None,
            "threshold": None if found is None else found.threshold,
            "singular_values": None if found is None else found.values.tolist(),
            "explained": change.explained,
            "rounding": change.rounding,
            "note": change.note,
        }


def _reshaped(row: Reshaped) -> dict[str, Any]:
    return {
        "name": row.name,
        "from": row.source,
        "old": {"dtype": row.old[0], "shape": list(row.old[1])},
        "new": {"dtype": row.new[0], "shape": list(row.new[1])},
    }


def _subspace(found: Subspace) -> dict[str, Any]:
    return {
        "side": found.side,
        "width": found.width,
        "shared": found.shared,
        "dimension": found.dimension,
        "share": found.share,
        "lowest": {"name": found.lowest[0], "share": found.lowest[1]},
        "angle": found.angle,
        "tensors": dict(zip(found.tensors, found.shares, strict=True)),
        "cosines": dict(found.cosines),
        "leaks": [{**asdict(leak), "ratio": leak.ratio} for leak in found.leaks],
        "directions": found.directions.tolist() if found.shared else None,
    }
