"""What a tensor does to the residual stream, according to the family's table.

A writer adds to the stream, so its output axis lies along it; a reader takes from it, so its input
axis does. A change that makes one direction disappear from what writers add is an ablation, and
shows as a subspace of the stream that many writers' changes share.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bake.families import Family, Layout, Linear, load_families

Side = Literal["written", "read"]
_PARTS = re.compile(r"(\D*)(\d*)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Role:
    """Where the stream lies in one tensor.

    Attributes:
        side: whether the tensor writes to the stream or reads from it.
        axis: the axis of a matrix that lies along the stream; 0 for a vector.
        table: whether its rows are looked up, one for a token or a position.
    """

    side: Side
    axis: int
    table: bool = False


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of a model's tensors.

    Attributes:
        family: the table that they come from, or None.
        reason: why there is no table.
        by_name: the role of every tensor that has one.
    """

    family: str | None
    reason: str | None
    by_name: Mapping[str, Role]

    def of(self, name: str, base_name: str) -> Role | None:
        """Return the role of a tensor, by its name or else by the one that it has in the base."""
        return self.by_name.get(name, self.by_name.get(base_name))


def kind_of(name: str) -> str:
    """Return a tensor's name with ``#`` for its numbers: what all layers have alike."""
    return _NUMBER.sub("#", name)


def layer_of(name: str) -> int | None:
    """Return the first number in a tensor's name, which is its layer."""
    found = _NUMBER.search(name)
    return None if found is None else int(found[0])


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """Return a key that sorts names with numbers by the numbers: layer 2 before layer 10."""
    return tuple((text, int(digits or 0)) for text, digits in _PARTS.findall(name))


def roles_of(layout: Layout) -> Roles:
    """Return the roles of a checkpoint's tensors.

    Args:
        layout: of the base. An output head that was untied is named as the table names it.
    """
    roles = {layout.embed: Role("written", 1, table=True)}
    roles |= {name: Role("written", 1, table=True) for name in layout.positions}
    for branch in layout.branches:
        for linear in branch.writes:
            roles[linear.weight] = Role("written", linear.output_axis)
            each = linear.bias.experts is not None  # a row for each expert, as a table has them
            roles[linear.bias.name] = Role("written", 1 if each else 0, table=each)
        for linear in branch.reads:
            roles[linear.weight] = _reader(linear)
    roles[layout.unembed.weight] = _reader(layout.unembed)
    return Roles(layout.family.name, None, roles)


def _reader(linear: Linear) -> Role:
    return Role("read", 1 - linear.output_axis)


def gguf_roles(arch: str, names: Mapping[str, object]) -> Roles:
    """Return the roles of the tensors of a GGUF file, whose linear layers are all [out, in].

    Several tables may belong to one architecture of llama.cpp; they agree on what its names mean,
    or the name gets no role.

    Args:
        arch: ``general.architecture``.
        names: the tensors of the file.
    """
    families = [f for f in load_families() if f.gguf is not None and f.gguf.arch == arch]
    if not families:
        return Roles(None, f"no family table names the GGUF architecture {arch!r}", {})
    tables = [_gguf_kinds(family) for family in families]
    kinds = {
        kind: role
        for kind, role in tables[0].items()
        if all(table.get(kind, role) == role for table in tables)
    }
    found = {name: kinds[kind_of(name)] for name in names if kind_of(name) in kinds}
    return Roles("/".join(family.name for family in families), None, found)


def _gguf_kinds(family: Family) -> dict[str, Role]:
    names = family.gguf
    assert names is not None  # only such families are asked
    kinds = {
        f"{names.embed}.weight": Role("written", 1, table=True),
        f"{names.unembed}.weight": Role("read", 1),
    }
    kinds |= {f"{name}.weight": Role("written", 1, table=True) for name in names.positions}
    for branch in family.branches:
        for row in branch.writes:
            kinds[f"blk.#.{names.linears[row.module]}.weight"] = Role("written", 0)
            kinds[f"blk.#.{names.linears[row.module]}.bias"] = Role("written", 0)
        for row in branch.reads:
            kinds[f"blk.#.{names.linears[row.module]}.weight"] = Role("read", 1)
    return kinds
