"""What rounding left of an edit in a GGUF file, tensor by tensor, as its record has it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from bake.cli.render.pieces import section, table

if TYPE_CHECKING:
    from bake.artifact.schema import GgufTensor


def rounding(tensors: "Sequence[GgufTensor]", *, verbose: bool) -> list[RenderableType]:
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


def _type(tensor: "GgufTensor") -> str:
    base, kind = tensor.base_type, tensor.type
    return kind if base in (kind, None) else f"{base} → {kind}"


def _grouped(found: "Sequence[GgufTensor]") -> list["list[GgufTensor]"]:
    groups: dict[tuple[str, str], list[GgufTensor]] = {}
    for tensor in found:
        groups.setdefault((_type(tensor), tensor.rounding or ""), []).append(tensor)
    return list(groups.values())
