"""What storing an edit as codes costs, in a GGUF type by type: size and noise, before writing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.jobs.request import Request

if TYPE_CHECKING:
    from bake.outputs.coded import Cost
    from bake.outputs.gguf.choice import Choice


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The choices that there are, those of one type for all first, and the one that is taken."""

    file: str
    limit: float
    choices: tuple["Choice", ...]
    taken: "Choice"
    other_bytes: int
    """Of the file, without the edited tensors that are stored in blocks."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        rows = [
            {
                "types": dict(choice.types),
                "bytes": self.other_bytes + choice.nbytes,
                "noise": choice.noise,
                "lost": choice.lost,
                "taken": choice is self.taken,
            }
            for choice in self.choices
        ]
        return {"gguf": self.file, "limit": self.limit, "choices": rows}


def storage(request: Request, gguf: Path) -> Storage:
    """Return what the types come to for one file of the base. Some rows of it are read.

    Raises:
        BakeError: the file is no GGUF of the planned model, or cannot hold the plan.
    """
    from bake.checkpoints.gguf.storage import AUTO
    from bake.outputs.gguf.edit import storage_choices

    export = request.export(Path(), gguf=gguf)
    taken = storage_choices(export)[1]
    single, _, other = storage_choices(request.export(Path(), gguf=gguf, gguf_type=AUTO))
    choices = [taken if choice == taken else choice for choice in single]
    if taken not in choices:
        choices.append(taken)
    return Storage(gguf.name, export.most_kl, tuple(choices), taken, other)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to write the edited weights of a quantised base."""

    title: str
    nbytes: int
    """Of all weights of the checkpoint."""
    cost: "Cost | None"
    """None where it is not measured: the base's weights are not at hand."""
    taken: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        measured = {} if self.cost is None else {"noise": self.cost.noise, "lost": self.cost.lost}
        return {"as": self.title, "bytes": self.nbytes, "taken": self.taken, **measured}


@dataclass(frozen=True, slots=True)
class CodedStorage:
    """What writing back as codes comes to, and what dequantising does."""

    edited: int
    """Of the quantised weights."""
    coded: int
    ways: tuple[Way, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        ways = [way.to_json() for way in self.ways]
        return {"edited": self.edited, "weights": self.coded, "ways": ways}


def coded_storage(request: Request, *, dequantize: bool) -> CodedStorage | None:
    """Return what a checkpoint of a quantised base comes to, or None where the base is not.

    Some rows of a few edited weights are read, where they are at hand.

    Raises:
        UsageError: it is to be dequantised, and is not quantised.
    """
    from bake.artifact import KINDS
    from bake.outputs.checkpoint import coded_costs
    from bake.outputs.registry import refuse_plain

    taken = dequantize or request.recipe.export.dequantize
    export, base = request.export(Path(), dequantize=taken), request.model.checkpoint
    refuse_plain(export)
    if not (base.coded and any(KINDS[name].checkpoint for name in request.recipe.export.to)):
        return None
    edited = [u.name for u in request.plan.tensors if u.name in base.coded]
    measured = base.complete and edited and not request.plan.widened
    back, float_ = coded_costs(export) if measured else (None, None)
    sizes = [
        sum(info.nbytes for info in one.tensors.values()) + request.plan.created_bytes
        for one in (base.as_stored, base)
    ]
    formats = sorted({base.coded[name].format for name in edited or base.coded})
    types = sorted({base.coded[name].dtype for name in base.coded})
    ways = (
        Way(f"written back as {', '.join(formats)}", sizes[0], back, not taken),
        Way(f"--dequantize: all in {', '.join(types)}", sizes[1], float_, taken),
    )
    return CodedStorage(len(edited), len(base.coded), ways)
