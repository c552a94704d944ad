"""What rounding left of an edit in a GGUF file, tensor by tensor, as its record has it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from bake.cli.render.pieces import section, size, table

if TYPE_CHECKING:
    from bake.artifact.schema import CodedTensor, StorageRecord
    from bake.jobs.storage import CodedStorage, Storage


def rounding(tensors: "Sequence[CodedTensor]", *, verbose: bool) -> list[RenderableType]:
    """Return the table of what rounding did; unless ``verbose`` tensors of one type share a row.

    Of several tensors the worst counts: the least of the edit, the largest leak and error.
    """
    if not tensors:
        return []
    title = "Rounding of the edited tensors" + ("" if verbose else " (of each type the worst)")
    rows = table(
        "tensor" if verbose else "tensors", "type", "rounding", "edit kept", "leak", "error",
        right=("edit kept", "leak", "error"),
    )  # fmt: skip
    for group in [[one] for one in tensors] if verbose else _grouped(tensors):
        leaks = [tensor.leak for tensor in group if tensor.leak is not None]
        kept = [tensor.change for tensor in group if tensor.change is not None]
        rows.add_row(
            group[0].name if verbose else str(len(group)),
            _type(group[0]),
            group[0].rounding,
            f"{max(kept, key=lambda change: abs(1 - change)):.1%}",
            f"{max(leaks):.1e}" if leaks else "",
            f"{max(tensor.error or 0.0 for tensor in group):.1e}",
        )
    return [section(title, rows)]


def storage(found: "Storage") -> RenderableType:
    """Return the table of what every type for the edited tensors comes to."""
    rows = table(
        "edited tensors", "file", "noise", "KL lost", "", right=("file", "noise", "KL lost")
    )
    for choice in found.choices:
        rows.add_row(
            types_shown(choice.types),
            size(found.other_bytes + choice.nbytes),
            f"{choice.noise:.1e}",
            f"{choice.lost:.1%}",
            "taken" if choice is found.taken else "",
        )
    return section(f"Storage in {found.file} (may lose {found.limit:.0%} of the KL)", rows)


def coded_storage(found: "CodedStorage") -> RenderableType:
    """Return the table of what writing back as codes comes to, and what dequantising does."""
    columns = ("checkpoint", "noise", "KL lost")
    rows = table("quantised weights", *columns, "", right=columns)
    for way in found.ways:
        cost = way.cost
        told = ("", "not measured") if cost is None else (f"{cost.noise:.1e}", f"{cost.lost:.1%}")
        rows.add_row(way.title, size(way.nbytes), *told, "taken" if way.taken else "")
    return section(
        f"The base is quantised: {found.edited} of {found.coded} such weights are edited", rows
    )


def storage_told(types: Mapping[str, str], why: "StorageRecord") -> str:
    """Return the types of the edited tensors, and why they are these."""
    lost = f"up to {why.lost:.2g} of the edit's KL is lost to rounding"
    if "auto" not in why.asked.values():
        return f"{types_shown(types)}, as asked: {lost}"
    if why.lost > why.limit:
        return f"{types_shown(types)}, the least noise there is: {lost}, above {why.limit:.2g}"
    return f"{types_shown(types)}, the smallest within {why.limit:.2g}: {lost}"


def types_shown(types: Mapping[str, str]) -> str:
    """Return types by the kind of tensor, as one word where they are the same."""
    if not types:
        return "as they are: none is in blocks"
    if len(set(types.values())) == 1:
        return next(iter(types.values()))
    return ", ".join(f"{part} {word}" for part, word in types.items())


def _type(tensor: "CodedTensor") -> str:
    base, kind = tensor.base_type, tensor.type
    return kind if base in (kind, None) else f"{base} → {kind}"


def _grouped(found: "Sequence[CodedTensor]") -> list["list[CodedTensor]"]:
    groups: dict[tuple[str, str], list[CodedTensor]] = {}
    for tensor in found:
        groups.setdefault((_type(tensor), tensor.rounding or ""), []).append(tensor)
    return list(groups.values())
